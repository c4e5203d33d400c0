"""A mesh that is never left alone: does anything grow?

    soak.py --program target/release/aquifer [--agents 24] [--minutes 30] [--mib 16] [--seed N]

Runs so many agents on this machine, half of them with an engine (``aquifer demo-engine``), and all the while, at random
and by a seed: makes releases that share most chunks with the one before, drains agents and starts them anew, kills
agents and starts them anew, kills engines, and lets short-lived nodes (``aquifer pull``) come and go. Every ten seconds
it notes resident memory, threads and open files of every agent. At the end a line is fitted, for each agent that lives long
enough, through what it used since it was ``--warm-up`` minutes old: until then caches and the allocator's own arenas fill,
and the last events and leases are remembered up to their bounds.

A node's memory holds a release's chunks, and while it turns to the next also those of that one: what is asked is
whether that stays, not that it is little. Ends with 1 if any log has a line at ERROR, if an agent ended that was
not made to, if a mesh left alone at the end does not come to serve the last release, or if the median agent grows by more
than ``--growth-at-most`` of its resident memory in an hour, or by any thread or file in the median.
"""

import argparse
import http.client
import json
import os
import random
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "netns"))

from program import make_keys  # noqa: E402

CHANNEL = "soak/model"
PATIENCE_S = 180.0
LOOK_S, SAMPLE_S = 0.5, 10.0
TENSORS = 16


class Node:
    def __init__(self, soak, number):
        self.soak, self.number = soak, number
        self.base = os.path.join(soak.work, f"node-{number}")
        os.mkdir(self.base)
        self.socket = os.path.join(self.base, "agent.sock")
        self.log = os.path.join(self.base, "log")
        self.has_engine = number % 2 == 0
        self.agent = self.engine = None
        self.starts = 0

    def start(self):
        options = ["--http", f"127.0.0.1:{self.port()}", "--name", f"node-{self.number}", "--socket", self.socket]
        options += ["--state", os.path.join(self.base, "state"), "--trust", self.soak.public_key]
        if not self.has_engine:
            options += ["--hold", "all"]
        self.agent = self.soak.spawn(self.log, "agent", *options, *self.soak.common(20_000 + self.number), *self.peers())
        self.born = time.monotonic()
        self.starts += 1
        if self.has_engine:
            self.start_engine()

    def start_engine(self):
        # An agent that was killed left its socket's file behind: somebody must answer there.
        end = time.monotonic() + PATIENCE_S
        while not self.listens() and time.monotonic() < end:
            time.sleep(0.01)
        self.engine = self.soak.spawn(
            self.log, "demo-engine", "--socket", self.socket, "--channel", CHANNEL, "--name", f"engine-{self.number}"
        )

    def listens(self):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
            return caller.connect_ex(self.socket) == 0

    def port(self):
        return 21_000 + self.number

    def peers(self):
        others = [n for n in range(self.soak.options.agents) if n != self.number]
        return [a for n in self.soak.random.sample(others, 3) for a in ("--peer", f"127.0.0.1:{20_000 + n}")]

    def end_engine(self):
        if self.engine:
            self.engine.kill()
            self.engine.wait()
            self.engine.stdin.close()
            self.engine = None

    def drain(self):
        self.agent.send_signal(signal.SIGTERM)
        code = self.agent.wait(PATIENCE_S)
        self.end_engine()
        if code != 0:
            self.soak.wrong.append(f"node-{self.number} was drained and ended with {code}")

    def kill(self):
        self.agent.kill()
        self.agent.wait()
        self.end_engine()

    def usage(self):
        """Resident KiB, threads, open files."""
        with open(f"/proc/{self.agent.pid}/status", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        rss = sum(int(fields[key].split()[0]) for key in ("RssAnon", "RssFile", "RssShmem"))
        return rss, int(fields["Threads"]), len(os.listdir(f"/proc/{self.agent.pid}/fd")), int(fields["RssAnon"].split()[0])

    def get(self, path):
        connection = http.client.HTTPConnection("127.0.0.1", self.port(), timeout=30)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()


class Soak:
    def __init__(self, options, work):
        self.options, self.work = options, work
        self.random = random.Random(options.seed)
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("AQUIFER_")}
        self.environment.update(HOME=work, XDG_RUNTIME_DIR=work)
        self.mesh_key, self.publisher_key, self.public_key = make_keys(options.program, self.environment, work)
        self.tensors = [self.random.randbytes((options.mib << 20) // TENSORS) for _ in range(TENSORS)]
        self.releases = 0
        self.manifest = self.publisher = None
        self.pulls, self.wrong, self.samples, self.counts = [], [], [], {}
        self.nodes = [Node(self, n) for n in range(options.agents)]

    def spawn(self, log, *arguments, output=subprocess.DEVNULL):
        with open(log, "ab") as file:
            return subprocess.Popen(
                [self.options.program, *map(str, arguments)], stdin=subprocess.PIPE, stdout=output or file, stderr=file,
                env=self.environment, text=True,
            )

    def common(self, port):
        at = ["--listen", f"127.0.0.1:{port}", "--data-listen", f"127.0.0.1:{port + 5000 if port else 0}"]
        return ["--mesh-key", self.mesh_key, "--channel", CHANNEL, *at, "--shm-dir", os.path.join(self.work, "shm")]

    def checkpoint(self):
        """The release before, with a tensor or two changed."""
        for i in self.random.sample(range(TENSORS), 2):
            self.tensors[i] = self.random.randbytes(len(self.tensors[i]))
        place = os.path.join(self.work, f"release-{self.releases}")
        os.mkdir(place)
        header, at = {}, 0
        for i, data in enumerate(self.tensors):
            header[f"t{i}"] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
            at += len(data)
        text = json.dumps(header).encode()
        with open(os.path.join(place, "model.safetensors"), "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.writelines(self.tensors)
        return place

    def release(self):
        self.releases += 1
        place = self.checkpoint()
        before, log = self.publisher, os.path.join(self.work, "publisher.log")
        # The policy's turn: what synchronous and rolling do to each other is part of it.
        policy = self.random.choice([(), ("--policy", "rolling", "--max-unavailable", "50%"), ()])
        self.publisher = self.spawn(
            log, "publish", place, "--json", "--publisher-key", self.publisher_key, "--name", f"publisher-{self.releases}",
            *policy, *self.common(0), *self.nodes[0].peers(), output=subprocess.PIPE,
        )
        while True:
            line = self.publisher.stdout.readline()
            if not line:
                raise RuntimeError(f"the publisher ended with {self.publisher.wait()}; see {log}")
            event = json.loads(line)
            if event.get("event") == "published":
                self.manifest = event["manifest"]
                break
        if before:
            before.terminate()
            before.wait(PATIENCE_S)
            before.stdout.close()
            before.stdin.close()
            shutil.rmtree(os.path.join(self.work, f"release-{self.releases - 1}"), ignore_errors=True)

    def pull(self):
        place = os.path.join(self.work, f"pull-{self.counts['pull']}")
        options = ["--to", place, "--timeout", "60", "--trust", self.public_key, "--name", "passing"]
        common = [word for word in self.common(0)]
        i = common.index("--channel")
        del common[i : i + 2]
        log = os.path.join(self.work, "pull.log")
        self.pulls.append((self.spawn(log, "pull", CHANNEL, *options, *common, *self.nodes[0].peers()), place))

    def reap(self):
        for child, place in list(self.pulls):
            if child.poll() is not None:
                self.pulls.remove((child, place))
                child.stdin.close()
                shutil.rmtree(place, ignore_errors=True)
                self.counts[f"pull ended with {child.returncode}"] = self.counts.get(f"pull ended with {child.returncode}", 0) + 1

    def step(self):
        what = self.random.choices(["release", "drain", "kill", "engine", "pull"], [4, 4, 3, 3, 2])[0]
        self.counts[what] = self.counts.get(what, 0) + 1
        # The first quarter is left alone, to be measured over the whole time.
        node = self.random.choice(self.nodes[self.options.agents // 4 :])
        if what == "release":
            self.release()
        elif what == "drain":
            node.drain()
            node.start()
        elif what == "kill":
            node.kill()
            node.start()
        elif what == "engine" and node.has_engine:
            node.end_engine()
            node.start_engine()
        elif what == "pull" and len(self.pulls) < 3:
            self.pull()
        self.reap()

    def sample(self, now):
        for node in self.nodes:
            if node.agent.poll() is not None:
                self.wrong.append(f"node-{node.number} ended by itself with {node.agent.returncode}; see {node.log}")
                node.start()
                continue
            self.samples.append((node.number, node.starts, now, now - node.born, *node.usage()))

    def until_quiet(self):
        """Everybody serves, or holds, the last release."""
        end = time.monotonic() + PATIENCE_S
        waiting = list(self.nodes)
        while waiting and time.monotonic() < end:
            for node in list(waiting):
                try:
                    status, body = node.get("/readyz")
                except OSError:
                    continue
                if status == 200 and body["channels"][0]["manifest"] == self.manifest:
                    waiting.remove(node)
            time.sleep(0.2)
        for node in waiting:
            self.wrong.append(f"node-{node.number} is not ready with the last release: {node.get('/readyz')[1]['reason']}")

    def soak(self):
        for node in self.nodes:
            node.start()
        self.release()
        self.until_quiet()
        begin = time.monotonic()
        end, next_step, next_sample = begin + 60 * self.options.minutes, begin, begin
        while (now := time.monotonic()) < end:
            if now >= next_sample:
                next_sample = now + SAMPLE_S
                self.sample(now)
            if now >= next_step:
                self.step()
                next_step = time.monotonic() + self.random.expovariate(1 / self.options.every)
            time.sleep(LOOK_S)
        self.until_quiet()
        self.sample(time.monotonic())

    def errors(self):
        found = []
        for place, _, names in os.walk(self.work):
            for name in names:
                if name == "log" or name.endswith(".log"):
                    with open(os.path.join(place, name), encoding="utf-8", errors="replace") as file:
                        found += [f"{os.path.join(place, name)}: {line.strip()}" for line in file
                                  if " ERROR " in line or "panicked" in line]
        return found

    def close(self):
        for child in [self.publisher, *(c for c, _ in self.pulls)]:
            if child and child.poll() is None:
                child.kill()
                child.wait()
        for node in self.nodes:
            if node.agent and node.agent.poll() is None:
                node.kill()


def slope(points):
    """Of the line nearest to points, per second; 0 for fewer than three."""
    if len(points) < 3:
        return 0.0
    mean_x, mean_y = (statistics.mean(p[i] for p in points) for i in (0, 1))
    over = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / over if over else 0.0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--program", required=True)
    parser.add_argument("--agents", type=int, default=24)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--mib", type=int, default=16, help="of a release")
    parser.add_argument("--every", type=float, default=4.0, help="seconds between two disturbances, on average")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--warm-up", type=float, default=8.0, help="minutes of an agent's life that are not looked at")
    parser.add_argument("--growth-at-most", type=float, default=0.10)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--samples", help="where to write every sample, as JSON")
    options = parser.parse_args()
    options.program = os.path.abspath(options.program)
    work = tempfile.mkdtemp(prefix="aquifer-soak-")
    print(f"seed {options.seed}; logs in {work}", flush=True)
    soak = Soak(options, work)
    try:
        soak.soak()
        wrong = soak.wrong + soak.errors()
    finally:
        soak.close()
    print(f"releases {soak.releases}, {', '.join(f'{k} {v}' for k, v in sorted(soak.counts.items()))}")
    if options.samples:
        with open(options.samples, "w", encoding="ascii") as file:
            json.dump(soak.samples, file)
    lasting = [n.number for n in soak.nodes if n.starts == 1]
    growth = {"resident": [], "anonymous": [], "threads": [], "files": []}
    for number in lasting:
        rows = [row for row in soak.samples if row[0] == number and row[3] > 60 * options.warm_up]
        if len(rows) < 3:
            continue
        for key, column in (("resident", 4), ("anonymous", 7), ("threads", 5), ("files", 6)):
            points = [(row[2], row[column]) for row in rows]
            level = statistics.mean(y for _, y in points)
            growth[key].append((level, 3600 * slope(points), min(y for _, y in points), max(y for _, y in points)))
    for key, rows in growth.items():
        if rows:
            level, hourly = (statistics.median(r[i] for r in rows) for i in (0, 1))
            unit = " KiB" if key in ("resident", "anonymous") else ""
            print(f"{key}: {len(rows)} agents that lived all the time; median {level:.0f}{unit}, "
                  f"from {min(r[2] for r in rows):.0f} to {max(r[3] for r in rows):.0f}; median growth {hourly:+.2f}{unit} in an hour, "
                  f"most {max(r[1] for r in rows):+.2f}")
            if key == "resident" and hourly > options.growth_at_most * level:
                wrong.append(f"resident memory grows by {hourly / level:.0%} of itself in an hour")
            if key in ("threads", "files") and hourly >= 2:
                wrong.append(f"{key} grow by {hourly:.1f} in an hour")
    for text in wrong[:20]:
        print(f"WRONG: {text}"[:400])
    print(f"{len(wrong)} things went wrong")
    if options.keep or wrong:
        print(f"kept: {work}")
    else:
        shutil.rmtree(work, ignore_errors=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
