"""The TCP data plane beside what others move the same bytes with, over loopback, by turns.

    peers.py --program target/release/aquifer --dir DIR [--size 2147483648] [--runs 5] [--write FILE]

Mooncake's transfer engine and NIXL come as wheels into a virtual environment under --dir; iroh-blobs is built by cargo
from the crate beside this file, also under --dir; nginx, curl, b3sum and, for Mooncake, libibverbs.so.1 must be
installed (where it is elsewhere, --tune takes LD_LIBRARY_PATH). A peer that is not there is said to be missing.

In each round every peer is started, moves the bytes once to warm up and once to be measured, and is ended before the
next is started; `aquifer bench transfer --transport tcp` does the same by itself. So memory holds what one of them
needs: a source and a destination of --size, and for the bench, which measures plain TCP too, four times --size.
"""

import argparse
import base64
import datetime
import json
import os
import platform
import re
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import time

#: Mooncake's other wheel does not load where there is no CUDA driver.
WHEELS = {"mooncake": "mooncake-transfer-engine-non-cuda", "nixl": "nixl"}
#: The best of those tried; docs/measured/peers.md has what was tried.
TUNED = {
    "mooncake": {"op": "write", "segment": 4 << 20, "env": {}},
    "nixl": {"op": "write", "segment": 1 << 20, "env": {"UCX_TCP_TX_SEG_SIZE": "1m", "UCX_TCP_RX_SEG_SIZE": "1m"}},
    # Its segment is how much of the stream QUIC has under way: iroh's own default. With 4 MiB and more it fails by
    # "too many gaps in stream buffer" where datagrams are lost.
    "iroh": {"op": "read", "segment": 1250000, "env": {}},
}
#: Without the first, UCX would take shared memory between processes of one host.
ALWAYS = {"nixl": {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}, "mooncake": {"MC_FORCE_TCP": "1"}}
#: Connections; None are as many as an agent opens.
AQUIFERS = {"aquifer": 1, "aquifer-2": 2, "aquifer-agent": None}
#: The crate of iroh-blobs' ends.
IROH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "iroh-blobs")
#: Seconds.
POLL = 0.0002
END_WAIT = 30


# The workers: one process for each end, run by the virtual environment's Python.


class Mooncake:
    """An end of Mooncake's transfer engine."""

    def __init__(self, address, length, segment):
        from mooncake.engine import TransferEngine

        self.address, self.length, self.segment = address, length, segment
        self.engine = TransferEngine()
        if self.engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
            sys.exit("mooncake: the engine does not initialize")
        if self.engine.register_memory(address, length) != 0:
            sys.exit("mooncake: memory is not registered")

    def about(self):
        return {"address": self.address, "session": f"127.0.0.1:{self.engine.get_rpc_port()}"}

    def prepare(self, other, op):
        self.session = other["session"]
        offsets = range(0, self.length, self.segment)
        self.ours = [self.address + o for o in offsets]
        self.theirs = [other["address"] + o for o in offsets]
        self.lengths = [min(self.segment, self.length - o) for o in offsets]
        self.call = getattr(self.engine, f"batch_transfer_sync_{op}")

    def move(self):
        if self.call(self.session, self.ours, self.theirs, self.lengths) != 0:
            sys.exit("mooncake: the transfer failed")


class Nixl:
    """An end of NIXL, by its UCX plug-in."""

    def __init__(self, address, length, segment):
        from nixl._api import nixl_agent, nixl_agent_config

        self.address, self.length, self.segment = address, length, segment
        self.agent = nixl_agent(f"peer-{os.getpid()}", nixl_agent_config(backends=["UCX"]))
        self.agent.register_memory([(address, length, 0, "")], "DRAM")

    def about(self):
        return {"address": self.address, "meta": base64.b64encode(self.agent.get_agent_metadata()).decode()}

    def prepare(self, other, op):
        name = self.agent.add_remote_agent(base64.b64decode(other["meta"]))
        name = name.decode() if isinstance(name, bytes) else name
        ends = [
            self.agent.get_xfer_descs(
                [(a + o, min(self.segment, self.length - o), 0) for o in range(0, self.length, self.segment)], "DRAM"
            )
            for a in (self.address, other["address"])
        ]
        self.handle = self.agent.initialize_xfer(op.upper(), ends[0], ends[1], name)

    def move(self):
        state = self.agent.transfer(self.handle)
        while state != "DONE":
            if state == "ERR":
                sys.exit("nixl: the transfer failed")
            time.sleep(POLL)
            state = self.agent.check_xfer_state(self.handle)


def worker(peer, length, segment, fill):
    """Obeys JSON lines. Its answers go to what was its standard output: the peers' own lines must not mix in."""
    import blake3
    import numpy

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**what):
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    memory = numpy.empty(length, dtype=numpy.uint8)
    memory[:] = 0
    if fill:
        tile = numpy.frombuffer(os.urandom(4 << 20), dtype=numpy.uint8)
        for n, at in enumerate(range(0, length, len(tile))):
            part = memory[at : at + len(tile)]
            part[:] = tile[: len(part)]
            part[:8] = numpy.frombuffer(n.to_bytes(8, "little"), dtype=numpy.uint8)
    end = {"mooncake": Mooncake, "nixl": Nixl}[peer](memory.ctypes.data, length, segment)
    answer(**end.about())
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "prepare":
            end.prepare(order["other"], order["op"])
            answer()
        elif order["do"] == "move":
            begun = time.monotonic()
            end.move()
            answer(seconds=time.monotonic() - begun)
        elif order["do"] == "spoil":
            memory[::4096] ^= 0xFF
            answer()
        elif order["do"] == "hash":
            begun, cpu = time.monotonic(), time.thread_time()
            digest = blake3.blake3(memory, max_threads=1).hexdigest()
            answer(digest=digest, seconds=time.monotonic() - begun, cpu_s=time.thread_time() - cpu)
        elif order["do"] == "usage":
            usage = resource.getrusage(resource.RUSAGE_SELF)
            answer(cpu_s=usage.ru_utime + usage.ru_stime)
    os._exit(0)


# The driver.


class End:
    """A worker, seen from the driver."""

    def __init__(self, command, env, log):
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, **env}
        )

    def read(self):
        line = self.child.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.child.args} ended; its log says why")
        return json.loads(line)

    def ask(self, do, **more):
        self.child.stdin.write(json.dumps({"do": do, **more}) + "\n")
        self.child.stdin.flush()
        return self.read()

    def stop(self):
        try:
            self.child.stdin.close()
            self.child.wait(END_WAIT)
        except (OSError, subprocess.TimeoutExpired):
            self.child.kill()
            self.child.wait()


class Pair:
    """Two workers of a peer; the holder pushes where writing is what the peer does best."""

    warms_up = False

    def __init__(self, commands, env, tuned, log):
        self.holder, self.puller = self.ends = [End(c, {**env, **tuned["env"]}, log) for c in commands]
        try:
            about = [end.read() for end in self.ends]
            self.active, passive = (self.holder, about[1]) if tuned["op"] == "write" else (self.puller, about[0])
            self.active.ask("prepare", other=passive, op=tuned["op"])
        except (RuntimeError, OSError):
            self.stop()
            raise

    def move(self):
        """Seconds, and the CPU seconds of the holder and of the puller."""
        self.puller.ask("spoil")
        before = [e.ask("usage")["cpu_s"] for e in self.ends]
        seconds = self.active.ask("move")["seconds"]
        return seconds, [e.ask("usage")["cpu_s"] - b for e, b in zip(self.ends, before)]

    def stop(self):
        for end in self.ends:
            end.stop()


class Hashed(Pair):
    """A peer that does not verify: the puller hashes what arrived."""

    def __init__(self, python, peer, size, tuned, log):
        worker = [python, os.path.abspath(__file__), "--worker", peer, str(size), str(tuned["segment"])]
        super().__init__([[*worker, "1"], [*worker, "0"]], ALWAYS[peer], tuned, log)
        self.digest = None

    def round(self):
        if self.digest is None:
            self.digest = self.holder.ask("hash")["digest"]
        seconds, cpu = self.move()
        hashed = self.puller.ask("hash")
        if hashed["digest"] != self.digest:
            raise RuntimeError("the bytes that arrived are not those that were sent")
        return {
            "seconds": seconds,
            "cpu": cpu,
            "verified_seconds": seconds + hashed["seconds"],
            "verified_cpu": sum(cpu) + hashed["cpu_s"],
        }


class Iroh(Pair):
    """iroh-blobs, which verifies as it goes. Its store's memory is allocated during the transfer."""

    def __init__(self, program, size, tuned, log):
        worker = [program, str(size), str(tuned["segment"])]
        super().__init__([[*worker, "hold"], [*worker, "pull"]], {}, tuned, log)

    def round(self):
        seconds, cpu = self.move()
        return {"seconds": seconds, "cpu": cpu, "verified_seconds": seconds, "verified_cpu": sum(cpu)}


class Nginx:
    """nginx with sendfile from /dev/shm, to curl. curl throws away what it gets, or pipes it into b3sum."""

    warms_up = False

    def __init__(self, work, size):
        self.file = f"/dev/shm/aquifer-peers-{os.getpid()}"
        tile = os.urandom(4 << 20)
        with open(self.file, "wb") as file:
            for at in range(0, size, len(tile)):
                file.write(tile[: min(len(tile), size - at)])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        conf = os.path.join(work, "nginx.conf")
        with open(conf, "w", encoding="utf-8") as file:
            file.write(
                f"user root; daemon off; master_process off; pid {work}/nginx.pid; error_log {work}/nginx.log;\n"
                "events {}\nhttp { access_log off; sendfile on; sendfile_max_chunk 4m; tcp_nopush on;\n"
                f"server {{ listen 127.0.0.1:{self.port}; location / {{ root /dev/shm; }} }} }}\n"
            )
        self.child = subprocess.Popen(["nginx", "-c", conf])
        self.url = f"http://127.0.0.1:{self.port}/{os.path.basename(self.file)}"
        self.digest = self._b3sum(["b3sum", "--num-threads", "1", self.file])
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    break
            time.sleep(0.1)

    @staticmethod
    def _b3sum(command, **more):
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **more).stdout.split()[0]

    def _server_cpu(self):
        with open(f"/proc/{self.child.pid}/stat", encoding="ascii") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _timed(self, act):
        server, ours = self._server_cpu(), resource.getrusage(resource.RUSAGE_CHILDREN)
        begun = time.monotonic()
        act()
        seconds = time.monotonic() - begun
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        clients = after.ru_utime + after.ru_stime - ours.ru_utime - ours.ru_stime
        return seconds, [self._server_cpu() - server, clients]

    def _piped(self):
        curl = subprocess.Popen(["curl", "-sf", self.url], stdout=subprocess.PIPE)
        digest = self._b3sum(["b3sum", "--num-threads", "1"], stdin=curl.stdout)
        curl.stdout.close()
        if curl.wait() != 0 or digest != self.digest:
            raise RuntimeError("curl or its bytes failed")

    def round(self):
        seconds, cpu = self._timed(lambda: subprocess.run(["curl", "-sf", "-o", "/dev/null", self.url], check=True))
        verified, verified_cpu = self._timed(self._piped)
        return {"seconds": seconds, "cpu": cpu, "verified_seconds": verified, "verified_cpu": sum(verified_cpu)}

    def stop(self):
        self.child.terminate()
        self.child.wait(30)
        os.unlink(self.file)


class Aquifer:
    """One measured run of the program's own bench, which warms up by itself and verifies."""

    warms_up = True

    def __init__(self, program, size, conns):
        self.command = [program, "bench", "transfer", "--transport", "tcp", "--json", "--runs", "1"]
        self.command += ["--size", str(size), *(["--conns", str(conns)] if conns else [])]

    def round(self):
        said = subprocess.run(self.command, check=False, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if not said.stdout:
            raise RuntimeError(f"{self.command} failed: {said.stderr[-500:]}")
        series = {s["name"]: s for s in json.loads(said.stdout)["benches"][0]["series"]}
        ours = series["aquifer over TCP"]
        gb = ours["bytes"] / 1e9
        cpu = [p["cpu_s_per_gb"]["median"] * gb for p in ours["processes"]]
        seconds = ours["seconds"]["median"]
        return {"seconds": seconds, "cpu": cpu, "verified_seconds": seconds, "verified_cpu": sum(cpu)}

    def stop(self):
        pass


def environment(place):
    """Makes the virtual environment where it is not there; returns its Python and what could not be had."""
    venv = os.path.join(place, "venv")
    python = os.path.join(venv, "bin", "python")
    if not os.path.exists(python):
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    missing = {}
    for name in ["blake3", "numpy", *WHEELS.values()]:
        said = subprocess.run([python, "-m", "pip", "install", "-q", name], capture_output=True, text=True)
        if said.returncode != 0:
            missing[name] = said.stderr.strip().splitlines()[-1] if said.stderr.strip() else "pip failed"
    return python, missing


def built(place):
    """Builds iroh-blobs' program; returns where it is, and why not where it cannot be built."""
    target = os.path.join(os.path.abspath(place), "iroh-blobs")
    command = ["cargo", "build", "--release", "--locked", "--manifest-path", os.path.join(IROH, "Cargo.toml")]
    try:
        said = subprocess.run([*command, "--target-dir", target], capture_output=True, text=True)
    except OSError as error:
        return None, f"cargo does not run: {error}"
    if said.returncode != 0:
        return None, "cargo build failed: " + " ".join(said.stderr.split()[-40:])
    return os.path.join(target, "release", "iroh-blobs-peer"), None


def versions(python):
    listed = json.loads(subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True).stdout)
    found = [f"{p['name']} {p['version']}" for p in listed if p["name"].split("-")[0] in ("mooncake", "nixl", "blake3")]
    for command in (["nginx", "-v"], ["curl", "--version"], ["b3sum", "--version"]):
        if shutil.which(command[0]):
            said = subprocess.run(command, capture_output=True, text=True)
            line = (said.stdout or said.stderr).splitlines()[0]
            found.append(" ".join(line.replace("nginx version: ", "").split()[:2]))
    with open(os.path.join(IROH, "Cargo.lock"), encoding="utf-8") as file:
        locked = re.findall(r'name = "(iroh|iroh-blobs)"\nversion = "(.*)"', file.read())
    return found + [" ".join(package) for package in locked]


def turn(make):
    """Starts a peer, warms it up, measures it once and ends it."""
    peer = make()
    try:
        if not peer.warms_up:
            peer.round()
        return peer.round()
    finally:
        peer.stop()


def measure(makers, runs):
    rounds = {name: [] for name in makers}
    failed = {}
    for n in range(runs):
        for name, make in makers.items():
            if name in failed:
                continue
            try:
                result = turn(make)
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                failed[name] = str(error)
                continue
            print(n, name, json.dumps(result), file=sys.stderr, flush=True)
            rounds[name].append(result)
    return {n: r for n, r in rounds.items() if n not in failed}, failed


def table(rounds, gb):
    def spread(values, form):
        low, middle, high = min(values), statistics.median(values), max(values)
        return f"{middle:{form}} ({low:{form}} to {high:{form}})"

    lines = [
        "| | GB/s | CPU s per GB: holder, puller | verified GB/s | verified CPU s per GB | verified time, times Aquifer's |"
        " verified CPU, times Aquifer's | unverified time, times Aquifer's verified |",
        "|---|---|---|---|---|---|---|---|",
    ]
    base = rounds.get("aquifer")
    for name, all_rounds in rounds.items():
        cells = [
            spread([gb / r["seconds"] for r in all_rounds], ".2f"),
            ", ".join(f"{statistics.median(r['cpu'][end] for r in all_rounds) / gb:.2f}" for end in (0, 1)),
            spread([gb / r["verified_seconds"] for r in all_rounds], ".2f"),
            spread([r["verified_cpu"] / gb for r in all_rounds], ".2f"),
        ]
        if base:
            pairs = list(zip(all_rounds, base))
            cells.append(spread([r["verified_seconds"] / b["verified_seconds"] for r, b in pairs], ".2f"))
            cells.append(spread([r["verified_cpu"] / b["verified_cpu"] for r, b in pairs], ".2f"))
            cells.append(spread([r["seconds"] / b["verified_seconds"] for r, b in pairs], ".2f"))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def prepared(options, log):
    """What starts each peer that can be had, the environment's Python, and why each other peer is missing."""
    wanted = options.peers.split(",")
    python, failed = environment(options.dir)
    makers, missing = {}, {}
    for name in wanted:
        if name in WHEELS:
            lacks = [f"{wheel}: {failed[wheel]}" for wheel in ("blake3", "numpy", WHEELS[name]) if wheel in failed]
            missing[name] = "; ".join(lacks)
            makers[name] = lambda name=name: Hashed(python, name, options.size, TUNED[name], log)
        elif name == "nginx":
            absent = [command for command in ("nginx", "curl", "b3sum") if not shutil.which(command)]
            missing[name] = f"not installed: {', '.join(absent)}" if absent else None
            makers[name] = lambda: Nginx(os.path.abspath(options.dir), options.size)
        elif name == "iroh":
            program, missing[name] = built(options.dir)
            makers[name] = lambda: Iroh(program, options.size, TUNED["iroh"], log)
        elif name in AQUIFERS:
            makers[name] = lambda name=name: Aquifer(options.program, options.size, AQUIFERS[name])
        else:
            missing[name] = "no such peer"
    missing = {name: why for name, why in missing.items() if why}
    return {name: make for name, make in makers.items() if name not in missing}, python, missing


def main():
    if len(sys.argv) > 1 and sys.argv[1] == "--worker":
        worker(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "1")
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--program", required=True)
    options.add_argument("--dir", required=True, help="where the environment, iroh-blobs' build and the logs are")
    options.add_argument("--size", type=int, default=2 << 30)
    options.add_argument("--runs", type=int, default=5)
    options.add_argument("--peers", default="mooncake,nixl,nginx,iroh,aquifer,aquifer-2")
    options.add_argument("--tune", action="append", default=[], help="PEER:OP:SEGMENT[:NAME=VALUE...]")
    options.add_argument("--write", help="a file for the table")
    options = options.parse_args()
    for tune in options.tune:
        peer, op, segment, *env = tune.split(":")
        TUNED[peer] = {"op": op, "segment": int(segment), "env": dict(e.split("=", 1) for e in env)}
    os.makedirs(options.dir, exist_ok=True)
    with open(os.path.join(options.dir, "peers.log"), "wb") as log:
        makers, python, missing = prepared(options, log)
        rounds, failed = measure(makers, options.runs)
    missing.update(failed)
    text = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC, {os.cpu_count()} cores, "
    text += f"{platform.release()}, {options.size} bytes, {options.runs} rounds\n\n"
    text += ", ".join(versions(python)) + "\n\n" + table(rounds, options.size / 1e9) + "\n\n"
    text += "".join(f"Missing: {name}: {why}\n" for name, why in missing.items())
    print(text)
    if options.write:
        with open(options.write, "w", encoding="utf-8") as file:
            file.write(text)


if __name__ == "__main__":
    main()
