"""What a checkpoint of very many short tensors costs beside one of the same bytes in long tensors.

    packs.py --program target/release/aquifer [--tensors 200000] [--runs 5] [--work DIR] [--write FILE]

Makes the two checkpoints of random bytes and, by turns, publishes each, pulls it to a directory and compares every
byte, hydrates an engine of the program and one of the Python package from it, and compares its manifest with itself.
Needs Linux and the standard library; what it makes, it removes. Everything runs on this machine.
"""

import argparse
import datetime
import json
import mmap
import os
import platform
import queue
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, os.pardir)
CHANNEL = "measure/packs"
LONG_BYTES = 4 << 20
SHARDS = 4
#: Seconds.
PATIENCE = 900.0
PIECE_BYTES = 8 << 20
#: Memory that is used and freed just before each thing that is timed, three times what it takes: a virtual machine
#: may hand free memory back to its host, and getting it back takes seconds that are nobody's here.
WARM_BYTES = 3 << 30
#: Linux: fault all of it in.
MADV_POPULATE_WRITE = 23

#: Allocates with the Python package, and says when it has and when the weights are there.
ENGINE = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import aquifer
begun = time.monotonic()
engine = aquifer.Engine(channel=sys.argv[2], socket=sys.argv[3], connect_timeout=60)
weights = engine.allocate(framework="memoryview")
print(json.dumps({"event": "allocated", "seconds": time.monotonic() - begun}), flush=True)
engine.wait_hydrated(600, progress=False)
print(json.dumps({"event": "hydrated", "seconds": time.monotonic() - begun}), flush=True)
"""


class Child:
    """A process that says JSON lines."""

    running = []

    def __init__(self, command, log):
        self.log = log
        self.started = time.monotonic()
        with open(log, "wb") as errors:
            self.child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.running.append(self.child)
        self._lines = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def event(self, name):
        """Waits for that line; returns it, and the seconds since the start."""
        deadline = time.monotonic() + PATIENCE
        while True:
            line = self._lines.get(timeout=max(0, deadline - time.monotonic()))
            if line is None:
                with open(self.log, encoding="utf-8") as file:
                    sys.exit(f"{self.child.args} ended before '{name}': {file.read()}")
            if line.get("event") == name:
                return line, time.monotonic() - self.started

    def cpu_s(self):
        """User and system time so far."""
        with open(f"/proc/{self.child.pid}/stat", encoding="ascii") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self):
        """Ends it. Returns the processor time it took."""
        self.child.terminate()
        return self.ended()

    def ended(self):
        """Waits for its end. Returns the processor time it took."""
        _, status, usage = os.wait4(self.child.pid, 0)
        self.child.returncode = os.waitstatus_to_exitcode(status)
        return usage.ru_utime + usage.ru_stime

    def _read(self):
        for line in self.child.stdout:
            try:
                self._lines.put(json.loads(line))
            except ValueError:
                pass  # For people.
        self._lines.put(None)


def make_checkpoint(directory, tensors, bytes_each):
    """Shards of F32 tensors, named like the scales of experts, sorted by name as files are."""
    os.mkdir(directory)
    kinds = ("gate_proj", "up_proj", "down_proj")
    names = sorted(
        f"model.layers.{i // 1152}.mlp.experts.{i % 1152 // 3}.{kinds[i % 3]}.weight_scale_inv" for i in range(tensors)
    )
    rows = bytes_each // 128
    weight_map = {}
    for shard in range(SHARDS):
        own = names[len(names) * shard // SHARDS : len(names) * (shard + 1) // SHARDS]
        name = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        weight_map.update(dict.fromkeys(own, name))
        header = {
            tensor: {"dtype": "F32", "shape": [rows, 32], "data_offsets": [i * bytes_each, (i + 1) * bytes_each]}
            for i, tensor in enumerate(own)
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(os.path.join(directory, name), "wb", buffering=0) as file:
            file.write(struct.pack("<Q", len(text)) + text)
            left = len(own) * bytes_each
            while left:
                left -= file.write(os.urandom(min(left, PIECE_BYTES)))
    with open(os.path.join(directory, "model.safetensors.index.json"), "w", encoding="utf-8") as file:
        json.dump({"weight_map": weight_map}, file)


def warm():
    with mmap.mmap(-1, WARM_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(MADV_POPULATE_WRITE)


def same(one, other):
    """Whether two files are equal, byte for byte."""
    with open(one, "rb") as first, open(other, "rb") as second:
        while True:
            a, b = first.read(PIECE_BYTES), second.read(PIECE_BYTES)
            if a != b:
                return False
            if not a:
                return True


def measure(program, work, checkpoint):
    """Figures by name: counts, and seconds."""
    base = [program, "--config", os.devnull]
    quiet = {"stdout": subprocess.PIPE, "check": True}
    keys = [os.path.join(work, name) for name in ("mesh.key", "publisher.key")]
    subprocess.run([*base, "keygen", "mesh", "--out", keys[0]], **quiet)
    made = subprocess.run([*base, "keygen", "publisher", "--out", keys[1], "--json"], **quiet)
    trust = json.loads(made.stdout)["public"]
    loopback = ["--listen", "127.0.0.1:0", "--data-listen", "127.0.0.1:0", "--mesh-key", keys[0]]

    def log(name):
        return os.path.join(work, f"{name}.log")

    publish = [*base, "publish", checkpoint, "--channel", CHANNEL, "--publisher-key", keys[1], "--json", *loopback]
    Child(publish, log("warm")).event("published")  # Files are in the page cache then.
    Child.running.pop().kill()
    warm()
    publisher = Child(publish, log("publish"))
    hashed, hashed_s = publisher.event("hashed")
    published, published_s = publisher.event("published")
    peer = ["--trust", trust, "--peer", published["addresses"][0]]
    target = os.path.join(work, "pulled")
    cpu_s = publisher.cpu_s()
    warm()
    puller = Child([*base, "pull", CHANNEL, "--to", target, "--json", *peer, *loopback], log("pull"))
    pulled, pull_s = puller.event("pulled")
    pull_cpu_s = puller.ended() + publisher.cpu_s() - cpu_s
    for name in os.listdir(checkpoint):
        if not same(os.path.join(checkpoint, name), os.path.join(target, name)):
            sys.exit(f"{name} is not what was published")
    shutil.rmtree(target)
    figures = {
        "tensors": hashed["tensors"],
        "chunks": pulled["chunks_fetched"],
        "publish, until it is hashed": hashed_s,
        "publish, until it can be pulled": published_s,
        "publish, processor": cpu_s,
        "pull as files": pull_s,
        "pull as files, processor of both": pull_cpu_s,
        "publish, plan and pull as files": published_s + pull_s,
    }
    for kind in ("the program's engine", "Python's engine"):
        warm()
        cpu_s = publisher.cpu_s()
        agent_socket = os.path.join(work, "agent.sock")
        agent = [*base, "agent", "--channel", CHANNEL, "--socket", agent_socket, "--state", os.path.join(work, "state")]
        agent = Child([*agent, *peer, *loopback], log("agent"))
        while not os.path.exists(agent_socket):
            time.sleep(0.01)
        if kind == "Python's engine":
            engine = Child([sys.executable, "-c", ENGINE, os.path.join(ROOT, "python"), CHANNEL, agent_socket], log(kind))
            figures[f"{kind}, has allocated after"] = engine.event("allocated")[1]
        else:
            engine = Child(
                [*base, "demo-engine", "--socket", agent_socket, "--channel", CHANNEL, "--name", "e"], log(kind)
            )
        engine.event("hydrated")
        hydrated_s = time.monotonic() - agent.started
        figures[f"{kind}, hydrated after"] = hydrated_s
        figures[f"publish, plan and pull into {kind}"] = published_s + hydrated_s
        cpu_s = publisher.cpu_s() - cpu_s
        figures[f"{kind}, processor of all three"] = cpu_s + engine.stop() + agent.stop()
        shutil.rmtree(os.path.join(work, "state"), ignore_errors=True)
    publisher.stop()
    manifest = os.path.join(work, "manifest")
    subprocess.run([*base, "manifest", "show", checkpoint, "--out", manifest, "--json"], **quiet)
    figures["manifest, bytes"] = os.path.getsize(manifest)
    for name, operands in (("show", [manifest]), ("diff", [manifest, manifest]), ("verify", [manifest, checkpoint])):
        command = Child([*base, "manifest", name, *operands, "--json"], log(name))
        figures[f"manifest {name}, processor"] = command.ended()
    return figures


def report(turns, short_bytes, command, date, machine):
    """A page for docs/measured, of the figures of short and of long tensors, turn by turn."""

    def scatter(values, unit):
        middle, least, most = statistics.median(values), min(values), max(values)
        return f"{middle:.2f}{unit}" if len(values) == 1 else f"{middle:.2f}{unit} ({least:.2f} to {most:.2f})"

    def row(name):
        short, long = ([turn[at][name] for turn in turns] for at in (0, 1))
        if isinstance(short[0], int):
            return f"| {name} | {short[0]:,} | {long[0]:,} |  |"
        times = [a / max(b, 0.01) for a, b in zip(short, long)]
        return f"| {name} | {scatter(short, ' s')} | {scatter(long, ' s')} | {scatter(times, '')} |"

    rows = "\n".join(row(name) for name in turns[0][0])
    size = turns[0][0]["tensors"] * short_bytes
    return f"""# Many short tensors

{date}, {machine}; {len(turns)} turns, medians with the least and the most, ratios of one turn.

{size:,} random bytes in four shards, once as tensors of {short_bytes:,} bytes and once as tensors of 4 MiB, each
published, pulled to files and into the memory of engines over loopback; all processes share the machine. The
files were compared with the original byte by byte. Processor is user and system time, which other work on the
machine changes less than it does the rest. Reproduce with

    {command}

| | short tensors | long ones | times |
|---|---|---|---|
{rows}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default=os.environ.get("AQUIFER_BIN", "target/release/aquifer"))
    parser.add_argument("--tensors", type=int, default=200_000, help="how many short tensors")
    parser.add_argument("--short-bytes", type=int, default=4096, help="bytes of each, a multiple of 128")
    parser.add_argument("--runs", type=int, default=5, help="turns")
    parser.add_argument("--work", default=None, help="where there is room [default: the directory for temporary files]")
    parser.add_argument("--write", default=None, metavar="FILE", help="write the page here")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--machine", default=f"{os.cpu_count()}-core {platform.machine()}")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # So that what follows is done.
    program = os.path.abspath(options.program)
    short, size = options.short_bytes, options.tensors * options.short_bytes
    turns = []
    home = tempfile.mkdtemp(prefix="aquifer-packs-", dir=options.work)
    try:
        checkpoints = [os.path.join(home, name) for name in ("short", "long")]
        make_checkpoint(checkpoints[0], options.tensors, short)
        make_checkpoint(checkpoints[1], size // LONG_BYTES, LONG_BYTES)
        for _ in range(options.runs):
            turns.append([])
            for checkpoint in checkpoints:
                with tempfile.TemporaryDirectory(dir=home) as work:
                    turns[-1].append(measure(program, work, checkpoint))
            print(json.dumps(turns[-1]), flush=True)
    finally:
        for child in Child.running:
            child.kill()
        shutil.rmtree(home, ignore_errors=True)
    command = f"python3 tests/measure/packs.py --program target/release/aquifer --tensors {options.tensors}"
    command += "" if short == 4096 else f" --short-bytes {short}"
    page = report(turns, short, command, options.date, options.machine)
    print(page)
    if options.write:
        with open(options.write, "w", encoding="utf-8") as file:
            file.write(page)


if __name__ == "__main__":
    main()
