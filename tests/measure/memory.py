"""How much memory `aquifer publish` and `aquifer pull` take for a checkpoint larger than they may hold.

    memory.py --program target/release/aquifer [--gib 8] [--work DIR] [--write docs/measured/memory.md]

Makes a checkpoint of random bytes, publishes it, pulls it to a directory on the same machine, compares
every byte, and samples /proc/PID/status of both processes meanwhile. Needs Linux, the standard library,
and room on the disk for the checkpoint twice; what it makes, it removes. Ends with 1 if a process
held more than the bound. Where the `blake3` module is installed, it shows what hashing alone can do.
"""

import argparse
import datetime
import json
import os
import platform
import queue
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time

CHANNEL = "measure/memory"
#: Resident and not page cache: issue 2's bound for either process.
RESIDENT_BYTES_MAX = 512 << 20
SAMPLE_S = 0.05
#: BF16, as wide as a large model's.
TENSOR_SHAPE = (8192, 8192)
TENSOR_BYTES = 2 * 8192 * 8192
#: Seconds; a slow disk has time.
PATIENCE = 600.0
PIECE_BYTES = 8 << 20
#: The fastest counts: a machine that is shared can only be slower than it is.
HASHING_RUNS = 3
FIELDS = ("RssAnon", "RssShmem", "RssFile", "VmHWM")


class Peaks:
    """The largest of each field since :meth:`turn`, under the name of a phase."""

    def __init__(self, phase):
        self.by_phase = {}
        self.turn(phase)

    def turn(self, phase):
        self.now = self.by_phase.setdefault(phase, dict.fromkeys(("resident", "samples", *FIELDS), 0))

    def take(self, status):
        now = self.now
        now["samples"] += 1
        for field in FIELDS:
            now[field] = max(now[field], status[field])
        # Of one instant: the sum of two maxima would be too much.
        now["resident"] = max(now["resident"], status["RssAnon"] + status["RssShmem"])


class Sampled:
    """A child whose memory is looked at every 50 ms."""

    running = []

    def __init__(self, command, log, phase):
        self.log = log
        self.peaks = Peaks(phase)
        self.started = time.monotonic()
        with open(log, "wb") as errors:
            self.child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        self.running.append(self.child)
        self._lines = queue.Queue()
        self._over = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def event(self, name):
        """Waits for that JSON line; returns it, and the seconds since the start."""
        deadline = time.monotonic() + PATIENCE
        while True:
            line = self._lines.get(timeout=max(0, deadline - time.monotonic()))
            if line is None:
                with open(self.log, encoding="utf-8") as file:
                    sys.exit(f"{self.child.args[0]} ended before '{name}': {file.read()}")
            if line.get("event") == name:
                return line, time.monotonic() - self.started

    def stop(self):
        self._over.set()
        self._sampler.join()
        self.child.terminate()
        self.child.wait(PATIENCE)

    def _read(self):
        for line in self.child.stdout:
            try:
                self._lines.put(json.loads(line))
            except ValueError:
                pass  # For people.
        self._lines.put(None)

    def _sample(self):
        while not self._over.is_set():
            status = read_status(self.child.pid)
            if status is None:
                return
            self.peaks.take(status)
            self._over.wait(SAMPLE_S)


def read_status(pid):
    """The fields in bytes; ``None`` once the process has no memory any more."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii") as file:
            entries = dict(line.split(":", 1) for line in file)
        return {field: int(entries[field].split()[0]) << 10 for field in FIELDS}
    except (OSError, KeyError):
        return None


def make_checkpoint(directory, gib):
    """One safetensors file of random bytes."""
    os.mkdir(directory)
    count = max(1, (gib << 30) // TENSOR_BYTES)
    header = {
        f"layers.{i}.weight": {
            "dtype": "BF16",
            "shape": TENSOR_SHAPE,
            "data_offsets": [i * TENSOR_BYTES, (i + 1) * TENSOR_BYTES],
        }
        for i in range(count)
    }
    text = json.dumps(header).encode()
    path = os.path.join(directory, "model.safetensors")
    with open(path, "wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(count * TENSOR_BYTES // PIECE_BYTES):
            file.write(os.urandom(PIECE_BYTES))
        os.fsync(file.fileno())
    return path


def forget(path):
    """Takes a file out of the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def same(one, other):
    """Whether two files are equal, byte for byte."""
    a, b = bytearray(PIECE_BYTES), bytearray(PIECE_BYTES)
    with open(one, "rb", buffering=0) as first, open(other, "rb", buffering=0) as second:
        while True:
            n, m = first.readinto(a), second.readinto(b)
            if n != m or memoryview(a)[:n] != memoryview(b)[:m]:
                return False
            if n == 0:
                return True


def timed(action):
    begun = time.monotonic()
    action()
    return time.monotonic() - begun


def read_all(path):
    buffer = bytearray(PIECE_BYTES)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def copy_all(path, target):
    """What a pull does at the least: read and write. It does not wait for the disk, and nor does this."""
    buffer = bytearray(PIECE_BYTES)
    with open(path, "rb", buffering=0) as source, open(target, "wb", buffering=0) as file:
        while count := source.readinto(buffer):
            file.write(memoryview(buffer)[:count])
    os.remove(target)


def blake3_all(path):
    import blake3

    blake3.blake3(max_threads=blake3.blake3.AUTO).update_mmap(path).digest()


def measure(program, work, gib):
    """All figures, as a dictionary."""
    path = make_checkpoint(os.path.join(work, "checkpoint"), gib)
    size = os.path.getsize(path)
    keys = [os.path.join(work, name) for name in ("mesh.key", "publisher.key")]
    base = [program, "--config", os.devnull]
    quiet = {"stdout": subprocess.PIPE, "check": True}
    subprocess.run([*base, "keygen", "mesh", "--out", keys[0]], **quiet)
    made = subprocess.run([*base, "keygen", "publisher", "--out", keys[1], "--json"], **quiet)
    trust = json.loads(made.stdout)["public"]
    loopback = ["--listen", "127.0.0.1:0", "--data-listen", "127.0.0.1:0", "--shm", "false", "--mesh-key", keys[0]]
    publish = [*base, "publish", path, "--channel", CHANNEL, "--publisher-key", keys[1], "--json", *loopback]

    forget(path)
    cold = Sampled(publish, os.path.join(work, "cold.log"), "publish, hashing")
    _, cold_s = cold.event("hashed")
    cold.stop()
    hashing = []
    for _ in range(HASHING_RUNS):
        publisher = Sampled(publish, os.path.join(work, "publish.log"), "publish, hashing")
        hashing.append(publisher.event("hashed")[1])
        published, _ = publisher.event("published")
        if len(hashing) < HASHING_RUNS:
            publisher.stop()
    publisher.peaks.turn("publish, serving")
    target = os.path.join(work, "pulled")
    os.sync()
    pull = [*base, "pull", CHANNEL, "--to", target, "--json", "--trust", trust, *loopback]
    puller = Sampled([*pull, "--peer", published["addresses"][0]], os.path.join(work, "pull.log"), "pull")
    pulled, pull_s = puller.event("pulled")
    puller.stop()
    publisher.stop()
    if not same(path, os.path.join(target, "model.safetensors")):
        sys.exit("what was pulled is not what was published")
    figures = {
        "bytes": size,
        "pulled": pulled,
        "cold_s": cold_s,
        "hashing_s": min(hashing),
        "pull_s": pull_s,
        "phases": {**publisher.peaks.by_phase, **puller.peaks.by_phase},
        "read_s": timed(lambda: read_all(path)),
    }
    shutil.rmtree(target)
    os.sync()
    figures["copy_s"] = timed(lambda: copy_all(path, os.path.join(work, "copy")))
    try:
        blake3_all(path)  # Its pages are mapped for the second time then.
        figures["blake3_s"] = timed(lambda: blake3_all(path))
    except ImportError:
        pass
    return figures


def rate(size, seconds):
    return f"{size / seconds / 1e9:.2f} GB/s"


def mib(size):
    return f"{size / (1 << 20):,.0f} MiB"


def report(figures, command, date, machine):
    """A page for docs/measured."""
    size = figures["bytes"]
    seconds = {
        "publish, hashing": figures["hashing_s"],
        "publish, serving": figures["pull_s"],
        "pull": figures["pull_s"],
    }
    rows = []
    for phase, peaks in figures["phases"].items():
        took = seconds[phase]
        cells = [phase, mib(peaks["resident"]), mib(peaks["RssFile"]), mib(peaks["VmHWM"])]
        rows.append(" | ".join([*cells, f"{took:.1f}", rate(size, took), str(peaks["samples"])]))
    table = "\n".join(f"| {row} |" for row in rows)
    hashing = [
        ("`publish`, file in the page cache", figures["hashing_s"]),
        ("`publish`, file not in the page cache", figures["cold_s"]),
        ("reading the file from the page cache, one thread, no hashing", figures["read_s"]),
    ]
    if "blake3_s" in figures:
        hashing.append(("BLAKE3's own library over the mapped file, all cores", figures["blake3_s"]))
    rates = "\n".join(f"| {what} | {took:.1f} | {rate(size, took)} |" for what, took in hashing)
    pulled = figures["pulled"]
    return f"""# Memory of `publish` and `pull`

{date}, {machine}.

One safetensors file of {size:,} random bytes ({size / (1 << 30):.0f} GiB) is published and pulled to a directory
over loopback; publisher, puller and disk share the machine. Every byte that was pulled was compared with
the original. Reproduce with

    {command}

Resident is the largest RssAnon + RssShmem that /proc/PID/status showed in a sample every {SAMPLE_S * 1000:.0f} ms: memory
that is the process's own. RssFile is apart: pages of the checkpoint's files that are mapped, which are page
cache, and which the kernel takes back when it needs memory. VmHWM is the peak of all together. The bound is
{mib(RESIDENT_BYTES_MAX)} resident for each process.

| process | resident | RssFile | VmHWM | seconds | rate | samples |
|---|---|---|---|---|---|---|
{table}

The pull fetched {pulled["chunks_fetched"]:,} chunks, {pulled["bytes_in"]:,} bytes, and took {pulled["seconds"]:.1f} s
from start to exit, which includes writing, verifying, joining the mesh and leaving it. Copying the file with
read and write, and nothing else, takes {figures["copy_s"]:.1f} s ({rate(size, figures["copy_s"])}).

Hashing of the publisher, from its start to the manifest, the fastest of {HASHING_RUNS} runs:

| | seconds | rate |
|---|---|---|
{rates}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default=os.environ.get("AQUIFER_BIN", "target/release/aquifer"))
    parser.add_argument("--gib", type=int, default=8, help="length of the checkpoint")
    parser.add_argument("--work", default=None, help="where there is room [default: the directory for temporary files]")
    parser.add_argument("--write", default=None, metavar="FILE", help="write the page here")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--machine", default=f"{os.cpu_count()}-core {platform.machine()}")
    options = parser.parse_args()
    work = tempfile.mkdtemp(prefix="aquifer-memory-", dir=options.work)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # So that what follows is done.
    try:
        figures = measure(os.path.abspath(options.program), work, options.gib)
    finally:
        for child in Sampled.running:
            child.kill()
        shutil.rmtree(work, ignore_errors=True)
    command = f"python3 tests/measure/memory.py --program target/release/aquifer --gib {options.gib}"
    page = report(figures, command, options.date, options.machine)
    print(page)
    if options.write:
        os.makedirs(os.path.dirname(os.path.abspath(options.write)), exist_ok=True)
        with open(options.write, "w", encoding="utf-8") as file:
            file.write(page)
    over = [phase for phase, peaks in figures["phases"].items() if peaks["resident"] > RESIDENT_BYTES_MAX]
    if over:
        print(f"more than {mib(RESIDENT_BYTES_MAX)} resident: {', '.join(over)}", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
