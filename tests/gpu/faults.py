"""What goes wrong between an agent, its engines and a GPU: each is told clearly, and mended without the other.

    AQUIFER_BIN=target/release/aquifer python3 tests/gpu/faults.py [--only a,b,c,d,e] [--json FILE] [--twin]

A publisher, a node that holds, and a node with two engines, whose tensors are compared with the release's after each
case. One line is printed for each case, and the exit code says whether all went well. Needs a GPU and PyTorch with
CUDA; with --twin only NumPy: then host memory is taken for a GPU's.
"""

import argparse
import hashlib
import json
import os
import random
import struct
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, os.pardir, "python"))

from mesh import CHANNEL, PATIENCE, Engine, Failure, Process, Site

ENGINE = os.path.join(HERE, "fault_engine.py")
TWIN = "GPU-7e57ed00-0000-4000-8000-000000000001"
NOBODYS = "GPU-7e57ed00-0000-4000-8000-00000000ffff"
MIB = 1 << 20
TENSORS = 32
#: What the engine leaves of GPU memory: room for a chunk, and not for a release.
LEFT_BYTES = 96 * MIB
FALLS_BACK = "are applied from host memory"


class GpuEngine(Engine):
    def __init__(self, site, agent, name):
        Process.__init__(self, site, name, [sys.executable, ENGINE], site.environment)
        self.tell("open", channel=CHANNEL, socket=agent.socket, name=name)


class Fleet:
    def __init__(self, site, twin):
        self.site, self.twin = site, TWIN if twin else None
        self.rows, self.columns = 256, 4096 if twin else 131072  # 1 MiB or 32 MiB
        self.tensors = {f"tensor.{n:02}": [self.rows, self.columns] for n in range(TENSORS)}
        self.sums = {which: self.checkpoint(which) for which in ("first", "second")}
        self.publisher = self.site.publisher("publisher-0", self.site.path("first"))
        self.holder = site.agent("holder", "--hold", "all", "--memory-limit", "8GiB", peers=[self.publisher.address])
        # On a twin nothing can be eaten: it is small from the beginning.
        options = ("--twin-gpu", TWIN, "--twin-gpu-memory", "512KiB") if twin else ()
        peers = [self.publisher.address, self.holder.address]
        self.node = site.agent("node", "--memory-limit", "8GiB", *options, peers=peers)
        self.serves = "first"
        self.published = self.engines_made = 0
        self.engines = [self.engine(), self.engine()]
        self.check_all()

    def checkpoint(self, which):
        """Random bytes. Returns their sums by name."""
        header, sums, at = {}, {}, 0
        os.makedirs(self.site.path(which))
        for name in self.tensors:
            end = at + self.rows * self.columns
            header[name] = {"dtype": "U8", "shape": [self.rows, self.columns], "data_offsets": [at, end]}
            at = end
        text = json.dumps(header).encode()
        with open(self.site.path(which, "model.safetensors"), "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in self.tensors:
                content = random.Random(f"{which} {name}").randbytes(self.rows * self.columns)
                sums[name] = hashlib.sha256(content).hexdigest()
                file.write(content)
        return sums

    def new(self):
        """An engine that has registered nothing yet."""
        self.engines_made += 1
        return self.site.started(GpuEngine(self.site, self.node, f"engine-{self.engines_made}"))

    def fill(self, engine):
        engine.tell("fill", tensors=self.tensors, twin=self.twin)

    def engine(self):
        engine = self.new()
        self.fill(engine)
        engine.tell("wait")
        return engine

    def publish(self):
        """The other checkpoint; whoever published the one before leaves."""
        before = self.publisher
        self.published += 1
        self.serves = "second" if self.serves == "first" else "first"
        peers = [self.holder.address, self.node.address]
        self.publisher = self.site.publisher(f"publisher-{self.published}", self.site.path(self.serves), peers=peers)
        before.stop()

    def update(self):
        self.publish()
        self.wait_all()

    def wait_all(self):
        for engine in self.engines:
            serves = lambda e: e["serving"] == self.publisher.manifest and e["ready"]
            self.node.wait_engine(f"{engine.name} serves {self.serves}", engine.name, serves)
        self.check_all()

    def check(self, engine):
        found = engine.tell("sums")
        if found != {"release": self.publisher.manifest, "sums": self.sums[self.serves]}:
            wrong = [n for n, s in found["sums"].items() if s != self.sums[self.serves][n]]
            raise Failure(f"{engine.name} serves {found['release']}, with wrong bytes in {wrong}")

    def check_all(self):
        for engine in self.engines:
            engine.check_alive()
            self.check(engine)

    def log(self):
        with open(self.node.process.log, "rb") as file:
            return file.read().decode(errors="replace")

    def is_gone(self, engine):
        """Until the agent has noticed that the engine ended."""
        self.node.wait_until(f"{engine.name} is gone", lambda s: engine.name not in [e["name"] for e in s["engines"]])


def agent_killed(fleet):
    """a: the agent is killed while an update is applied"""
    fleet.publish()
    fleet.engines[0].event("pausing")
    fleet.node.kill()
    fleet.node.start()
    fleet.wait_all()
    return "the next agent finished it; neither engine was restarted"


def engine_killed(fleet):
    """b: an engine is killed while it is filled"""
    engine = fleet.new()
    engine.say({"do": "fill", "tensors": fleet.tensors, "twin": fleet.twin})
    phase = "hydrating"
    on_its_way = lambda e: e["phase"] == phase or e["ready"]
    seen = fleet.node.wait_engine("it is being filled", engine.name, on_its_way)
    engine.kill()
    fleet.is_gone(engine)
    fleet.check_all()
    another = fleet.engine()
    fleet.check(another)
    another.kill()
    fleet.update()
    return f"killed with {seen['chunks_done']} of {seen['chunks_total']} chunks there; the agent and the others went on"


def memory_short(fleet):
    """c: the GPU has no room for an update beside what it changes"""
    before = fleet.log().count(FALLS_BACK)
    left = None if fleet.twin else fleet.engines[0].tell("eat", leave=LEFT_BYTES)
    try:
        fleet.update()
    finally:
        if not fleet.twin:
            fleet.engines[0].tell("give_back")
    lines = [line for line in fleet.log().splitlines() if FALLS_BACK in line][before:]
    if not lines:
        raise Failure("the agent did not say that the update was applied from host memory")
    if not fleet.twin:
        fleet.update()
        if fleet.log().count(FALLS_BACK) > before + len(lines):
            raise Failure("with memory given back, updates are applied from host memory all the same")
    room = "a twin of 512 KiB" if fleet.twin else f"{left / MIB:.0f} MiB were free"
    return f"{room}; said {len(lines)} times: {lines[0].split(': ', 1)[-1].strip()[:200]}"


def memory_freed(fleet):
    """d: an engine frees memory that it has registered"""
    engine = fleet.engine()
    engine.tell("free")
    fleet.update()
    # It may go on, in memory that the agent's mapping keeps, or be told why not.
    phase = next(e for e in fleet.node.status()["engines"] if e["name"] == engine.name)
    engine.check_alive()
    engine.kill()
    fleet.is_gone(engine)
    fleet.check_all()
    another = fleet.engine()
    fleet.check(another)
    another.kill()
    return f"the agent went on; that engine was '{phase['phase']}'{', ' + phase['reason'] if phase['reason'] else ''}"


def wrong_device(fleet):
    """e: an engine names a GPU that is none"""
    engine = fleet.new()
    error = engine.refusal("fill", tensors=fleet.tensors, twin=fleet.twin, device=NOBODYS)
    if "no GPU " + NOBODYS not in error and "no NVIDIA driver is here" not in error:
        raise Failure(f"the error does not tell what is wrong: {error}")
    engine.kill()
    fleet.update()
    return f"refused: {error[:200]}"


CASES = {"a": agent_killed, "b": engine_killed, "c": memory_short, "d": memory_freed, "e": wrong_device}


def run(fleet, case):
    agent, engines = fleet.node.process.pid, [engine.pid for engine in fleet.engines]
    begun = time.monotonic()
    outcome = {"case": case.__doc__, "passed": False, "seconds": 0.0, "what": ""}
    try:
        outcome["what"] = case(fleet)
        fleet.node.process.check_alive()
        if [engine.pid for engine in fleet.engines] != engines:
            raise Failure("an engine was restarted")
        if case is not agent_killed and fleet.node.process.pid != agent:
            raise Failure("the agent was restarted")
        outcome["passed"] = True
    except (Failure, OSError) as failure:
        outcome["what"] = f"{type(failure).__name__}: {failure}"
    outcome["seconds"] = round(time.monotonic() - begun, 2)
    verdict = "ok" if outcome["passed"] else "FAILED"
    print(f"{outcome['case']}: {verdict} in {outcome['seconds']} s: {outcome['what']}", flush=True)
    return outcome


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="a,b,c,d,e", help="some of the cases")
    parser.add_argument("--json", help="a file for what came of each")
    parser.add_argument("--twin", action="store_true", help="on host memory in place of a GPU's")
    options = parser.parse_args()
    cases = [CASES[letter] for letter in options.only.split(",")]
    site = Site()
    outcomes = []
    try:
        fleet = Fleet(site, options.twin)
        for case in cases:
            outcomes.append(run(fleet, case))
            if not outcomes[-1]["passed"]:
                break  # What state that left everything in, nobody knows.
    except BaseException:
        print(site.logs(), file=sys.stderr)
        raise
    finally:
        if options.json:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump({"twin": options.twin, "cases": outcomes}, file, indent=1)
        if outcomes and not outcomes[-1]["passed"]:
            print(site.logs(), file=sys.stderr)
        site.close()
    passed = sum(outcome["passed"] for outcome in outcomes)
    print(f"{passed} of {len(cases)} cases passed")
    sys.exit(0 if passed == len(cases) else 1)


if __name__ == "__main__":
    main()
