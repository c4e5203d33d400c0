"""A real model on a real GPU, updated in place by a mesh of three while it answers.

    AQUIFER_BIN=target/release/aquifer python3 tests/gpu/serve.py [--updates 10] [--modes eager,graph,compile] [--json FILE]

A publisher, a node with an engine for each mode (by default two, of which one answers by a CUDA graph; `compile` by
what torch.compile made of the model), and a node that only holds. Every answer is compared with what its release's
checkpoint answers (see engine.py). Then the agent is killed while it applies an update, and an engine while it is
filled. Needs a GPU, PyTorch, transformers and safetensors, and 8 GB of disk; `compile` a C compiler.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, os.pardir, "python"))

from mesh import CHANNEL, Failure, Process, Site

ENGINE = os.path.join(HERE, "engine.py")


class Fleet:
    def __init__(self, site, landing):
        self.site = site
        self.checkpoints = [site.path(name) for name in ("a", "b", "c")]
        self.publisher = site.publisher("publisher-0", self.checkpoints[0])
        held = ("--memory-limit", "8GiB")
        self.other = site.agent("other", *held, "--hold", "all", peers=[self.publisher.address])
        self.node = site.agent("node", *held, "--landing", landing, peers=[self.publisher.address, self.other.address])
        self.published = 0

    def engine(self, name, mode):
        options = ["--socket", self.node.socket, "--channel", CHANNEL, "--name", name, "--mode", mode]
        command = [sys.executable, ENGINE, "serve", *options, *self.checkpoints]
        return self.site.started(Process(self.site, name, command, self.site.environment))

    def publish(self, which):
        """Another release; whoever published the one before leaves. Returns its manifest and when it was announced."""
        before = self.publisher
        self.published += 1
        peers = [self.other.address, self.node.address]
        self.publisher = self.site.publisher(f"publisher-{self.published}", self.checkpoints[which], peers=peers)
        at = time.monotonic()
        before.stop()
        return self.publisher.manifest, at


#: Seconds until an engine is hydrated: that takes two compilations before, at worst.
COMPILE_PATIENCE = 900.0


def hydrated(engine):
    """The manifest."""
    fits = lambda line: line.get("event") in ("hydrated", "fault")
    line = engine.expect(fits, "that it is hydrated", COMPILE_PATIENCE)
    if line["event"] == "fault":
        raise Failure(f"{engine.name}: {line['reason']}")
    return line["manifest"]


def serves(engine, manifest):
    return engine.expect(
        lambda line: line.get("event") == "fault" or (line.get("event") == "serves" and line["manifest"] == manifest),
        f"that it serves {manifest}",
    )


def wait(engine, manifest, which):
    line = serves(engine, manifest)
    if line["event"] == "fault" or line["checkpoint"] != which:
        raise Failure(f"{engine.name}: {line}")
    return line


def updates(fleet, engines, count):
    """Whole updates, and of one matrix. Pauses in seconds, and times from the announcement to the last answer."""
    taken = {"whole": [], "small": []}
    order = [("small", 2), ("whole", 1), ("whole", 0)] * count
    for kind, which in order[:count]:
        manifest, at = fleet.publish(which)
        lines = [wait(engine, manifest, which) for engine in engines]
        took = time.monotonic() - at
        taken[kind].append({"pauses": [line["pause"] for line in lines], "seconds": took})
        print(f"{kind}: paused {', '.join(f'{1e3 * p:.1f} ms' for p in taken[kind][-1]['pauses'])}; {took:.2f} s", flush=True)
    return taken


def kill_agent(fleet, engine):
    """While it applies an update. The next one finds out what is right and goes on."""
    before = fleet.node.bytes_in()
    manifest, _ = fleet.publish(1)
    engine.expect(lambda l: l.get("event") == "pausing" and l["manifest"] == manifest, "that it pauses")
    fleet.node.kill()
    at = time.monotonic()
    fleet.node.start()
    wait(engine, manifest, 1)
    print(f"agent killed while applying: right again after {time.monotonic() - at:.2f} s", flush=True)
    return {"seconds": time.monotonic() - at, "bytes_in_before": before, "bytes_in_after": fleet.node.bytes_in()}


def kill_engine(fleet):
    """While it is filled. The agent goes on, and so does the next engine."""
    engine = fleet.engine("short-lived", "graph")
    engine.event("bound")
    engine.kill()
    again = fleet.engine("again", "graph")
    wait(again, fleet.publisher.manifest, 1)
    again.child.stdin.close()
    again.event("ended")
    print("engine killed while it was filled: the agent goes on, and the next engine is right", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--landing", default="shadow")
    parser.add_argument("--modes", default="eager,graph", help="of an engine each: eager, graph, compile")
    parser.add_argument("--json")
    options = parser.parse_args()
    site = Site()
    try:
        for name, seed, like in (("a", 1, None), ("b", 2, None), ("c", 3, "a")):
            more = ["--like", site.path(like)] if like else []
            subprocess.run([sys.executable, ENGINE, "make", site.path(name), str(seed), *more], check=True)
        fleet = Fleet(site, options.landing)
        begun = time.monotonic()
        engines = [fleet.engine(mode, mode) for mode in options.modes.split(",")]
        manifests = [hydrated(engine) for engine in engines]
        if set(manifests) != {fleet.publisher.manifest}:
            raise Failure(f"hydrated with {manifests}")
        print(f"{len(engines)} engines hydrated {time.monotonic() - begun:.1f} s after they were started", flush=True)
        taken = updates(fleet, engines, options.updates)
        for kind, all_of_it in taken.items():
            pauses = [pause for update in all_of_it for pause in update["pauses"]]
            if pauses:
                print(f"{kind}: {len(all_of_it)} updates, median pause {1e3 * statistics.median(pauses):.1f} ms", flush=True)
        killed = kill_agent(fleet, engines[0])
        for engine in engines[1:]:
            wait(engine, fleet.publisher.manifest, 1)
        kill_engine(fleet)
        answers = 0
        for engine in engines:
            engine.child.stdin.close()
            ended = engine.expect(lambda l: l.get("event") in ("ended", "fault"), "that it ends")
            if ended["event"] == "fault":
                raise Failure(f"{engine.name}: {ended}")
            answers += ended["answers"]
        print(f"{answers} answers, all of one release each and right")
        if options.json:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump({"landing": options.landing, "modes": options.modes, "updates": taken, "killed": killed, "answers": answers}, file)
    except BaseException:
        print(site.logs(), file=sys.stderr)
        raise
    finally:
        site.close()


if __name__ == "__main__":
    main()
