"""How long a release takes to reach every node of a swarm whose links are the bottleneck.

    swarm.py --program target/release/aquifer [--nodes 8] [--mbit 50] [--mib 64] [--runs 5] [--kill 0]

Makes a network of one seed and so many nodes in namespaces of their own (see ``network.py``), every link
shaped to the rate each way, and runs the real program in them: ``aquifer agent --hold all`` on every
node, and, once they all know each other, ``aquifer publish`` on the seed. The time of a run is

    from   the publisher's log line that the channel is at the release, which it writes as it announces it,
    to     the last node's log line that the manifest is whole, every chunk of it verified,

both by the machine's one clock, to the microsecond. It is compared with the least that any way of
distributing F bytes over these links could take:

    LB = max(F / seed's upload, F / slowest download, N F / sum of all uploads)

where rates are what TCP carries in full segments (1448 of 1514 bytes): a plain stream is measured first
and reported beside it. With ``--kill K``, K nodes are killed (SIGKILL) when the nodes have received
half of the release on average; they do not count, and what they were sent is the swarm's loss.

Afterwards every surviving agent is asked for its state: it must hold every chunk of the very manifest
that was published. Needs root (namespaces, tc), Linux, and Python's standard library. What it makes, it
removes; it ends only processes that it started. Ends with 1 if a run went wrong, or if ``--at-most`` is
given and the median run took more times LB.
"""

import argparse
import datetime
import json
import os
import platform
import random
import re
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path[:0] = [HERE, os.path.join(ROOT, "python")]

from aquifer.errors import AgentUnavailable  # noqa: E402
from aquifer.wire import request_status  # noqa: E402
from network import BURST, FRAME_BYTES, PAYLOAD_BYTES, QUEUE_MS, Network, end_with_parent, goodput, run  # noqa: E402
from program import make_keys  # noqa: E402

CHANNEL = "netns/swarm"
MESH_PORT, DATA_PORT, PROBE_PORT = 7401, 7402, 7500
#: All nodes are on one machine: they would share its memory, and nothing would be measured.
OVER_THE_NETWORK = ("--shm", "false")
#: Seconds within which nodes must find each other, and within how many lower bounds a run must end.
PATIENCE_S, PATIENCE_BOUNDS, PATIENCE_LEAST_S = 60.0, 20, 60.0
POLL_S = 0.02
#: How often links are looked at while a run lasts.
SAMPLE_S = 0.1
#: After everybody knows everybody: time for links and gossip meshes to settle.
SETTLE_S = 2.0
#: BF16 rows of 4 KiB, 2 MiB a tensor: chunks of any target end on rows.
TENSOR_SHAPE = (512, 2048)
TENSOR_BYTES = 2 * TENSOR_SHAPE[0] * TENSOR_SHAPE[1]
PLAIN_S = 4
WHEN = re.compile(r"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+)Z\s+(?:INFO|WARN|ERROR|DEBUG)\s+(.*)$")


class Child:
    """A process in a namespace. It ends with its handle, and should this program be killed, with that."""

    def __init__(self, command, log=None, environment=None, output=None):
        self.log = log
        errors = open(log, "ab") if log else None
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output or subprocess.DEVNULL, stderr=errors,
            env=environment, text=True, preexec_fn=end_with_parent,
        )
        if errors:
            errors.close()

    def line(self):
        text = self.process.stdout.readline()
        if not text:
            raise RuntimeError(f"{self.process.args} ended without a word: {self.process.wait()}")
        return text

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()

    def cpu_seconds(self):
        with open(f"/proc/{self.process.pid}/stat", encoding="ascii") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def logged(self, *texts):
        """When it first logged a line with all of ``texts``; ``None`` if it has not."""
        with open(self.log, encoding="utf-8", errors="replace") as file:
            for line in file:
                match = WHEN.match(line)
                if match and all(text in match[2] for text in texts):
                    moment = datetime.datetime.fromisoformat(match[1][:26])
                    return moment.replace(tzinfo=datetime.timezone.utc).timestamp()
        return None


class Bench:
    """Everything that runs of one configuration share."""

    def __init__(self, options, work, network):
        self.options, self.work, self.network = options, work, network
        self.children = []
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("AQUIFER_")}
        self.environment.update(HOME=work, XDG_CONFIG_HOME=work, XDG_RUNTIME_DIR=work)
        self.checkpoint = os.path.join(work, "checkpoint")
        self.bytes = make_checkpoint(self.checkpoint, options.mib << 20, options.seed)
        keys = make_keys(options.program, self.environment, work)
        self.mesh_key, self.publisher_key, self.public_key = keys
        self.random = random.Random(options.seed)

    def lower_bound(self):
        rate = goodput(self.options.mbit)
        nodes = self.options.nodes
        wanted = (nodes - self.options.kill) * self.bytes
        return max(self.bytes / rate, wanted / (rate * (nodes + 1)))

    def child(self, node, command, **more):
        child = Child(self.network.inside(node, command), environment=self.environment, **more)
        self.children.append(child)
        return child

    def end(self):
        while self.children:
            self.children.pop().kill()

    def plain_stream(self):
        """Bytes a second that one TCP stream gets from the seed to the first node."""
        probe = [sys.executable, os.path.join(HERE, "probe.py")]
        sink = self.child(1, [*probe, "sink", PROBE_PORT], output=subprocess.PIPE)
        sink.line()
        total = int(goodput(self.options.mbit) * PLAIN_S)
        self.child(0, [*probe, "source", self.network.address(1), PROBE_PORT, total])
        rate = float(sink.line())
        self.end()
        return rate

    def run(self, number):
        work = os.path.join(self.work, f"run-{number}")
        os.mkdir(work)
        try:
            return Run(self, work).measure()
        finally:
            self.end()
            if not self.options.keep:
                shutil.rmtree(work, ignore_errors=True)


class Run:
    def __init__(self, bench, work):
        self.bench, self.options, self.network, self.work = bench, bench.options, bench.network, work
        self.nodes = {}
        self.killed = []
        #: Moments, and every node's bytes received and sent by then.
        self.samples = []

    def measure(self):
        for node in range(1, self.options.nodes + 1):
            self.nodes[node] = self._agent(node)
        self._until_all_know_all()
        time.sleep(SETTLE_S)
        probes = self._probes() if self.options.rtt else {}
        cpu = {n: c.cpu_seconds() for n, c in self.nodes.items()}
        before, idle = self.network.counters(), idle_seconds()
        seed = self._publish()
        hashed = self._event(seed, "hashed")
        released = self._until_logged(seed, "is at release")
        joined = [self._joined(seed, n) for n in self.nodes]
        half = self._until_whole(hashed["manifest"], before, released)
        after, idle_after = self.network.counters(), idle_seconds()
        whole = {n: self._whole_at(n, hashed["manifest"]) - released for n in self.nodes}
        sockets = self._sockets()
        spent = sum(c.cpu_seconds() - cpu[n] for n, c in self.nodes.items()) + seed.cpu_seconds()
        self._check(hashed)
        last = max(whole.values())
        bound = self.bench.lower_bound()
        sent = [(a[1] - b[1]) / self.bench.bytes for a, b in zip(after, before)]
        received = [(a[0] - b[0]) / self.bench.bytes for a, b in zip(after, before)]
        print(
            f"  last {last:.2f} s, first {min(whole.values()):.2f} s, {last / bound:.3f} x LB; "
            f"seed sent {sent[0]:.2f} F, nodes received {statistics.mean(received[n] for n in self.nodes):.3f} F each",
            flush=True,
        )
        control, data = sockets["control"], sockets["data"]
        print(
            f"  control: {control['connections']} connections, {control['bytes'] / 1e6:.1f} MB in {control['segments']} segments; "
            f"chunks: {data['connections']} connections, {data['bytes'] / 1e6:.0f} MB in {data['segments']} segments, "
            f"{data['retransmitted_bytes'] / 1e6:.1f} MB again; CPU {spent:.1f} s, "
            f"machine idle {(idle_after[0] - idle[0]) / (idle_after[1] - idle[1]):.0%}",
            flush=True,
        )
        result = {
            "seconds": last, "ratio": last / bound, "first_seconds": min(whole.values()),
            "node_seconds": whole, "manifest": hashed["manifest"], "chunks": hashed["chunks"],
            "sent_of_release": sent, "received_of_release": received,
            "known_to_the_seed_before": sum(j is not None and j <= released for j in joined),
            "sockets": sockets, "timeline": self._timeline(released), "killed": self.killed, "killed_at_seconds": half,
            "agents_cpu_seconds": spent, "machine_idle_share": (idle_after[0] - idle[0]) / (idle_after[1] - idle[1]),
        }
        if probes:
            result["rtt_ms"] = self._round_trips(probes, released, last)
            print(f"  round trips while it ran, ms: {json.dumps(result['rtt_ms'])}", flush=True)
        return result

    def _agent(self, node):
        address = self.network.address(node)
        # Through the two before it: a chain, which gossip then closes.
        peers = [a for n in range(max(1, node - 2), node) for a in ("--peer", f"{self.network.address(n)}:{MESH_PORT}")]
        command = [
            self.options.program, "agent", "--hold", "all", "--name", f"node-{node}", "--channel", CHANNEL,
            "--trust", self.bench.public_key, "--mesh-key", self.bench.mesh_key,
            "--listen", f"{address}:{MESH_PORT}", "--data-listen", f"{address}:{DATA_PORT}", *OVER_THE_NETWORK,
            "--state", os.path.join(self.work, f"state-{node}"), "--socket", self._socket(node), *peers,
        ]
        return self.bench.child(node, self._logging(command), log=os.path.join(self.work, f"node-{node}.log"))

    def _publish(self):
        address = self.network.address(0)
        peers = [a for n in self.nodes for a in ("--peer", f"{self.network.address(n)}:{MESH_PORT}")]
        command = [
            self.options.program, "publish", self.bench.checkpoint, "--channel", CHANNEL, "--name", "seed", "--json",
            "--publisher-key", self.bench.publisher_key, "--mesh-key", self.bench.mesh_key,
            "--listen", f"{address}:{MESH_PORT}", "--data-listen", f"{address}:{DATA_PORT}",
            *OVER_THE_NETWORK, *peers,
        ]
        log = os.path.join(self.work, "seed.log")
        return self.bench.child(0, self._logging(command), log=log, output=subprocess.PIPE)

    def _logging(self, command):
        return [*command, "--log", self.options.log]

    def _socket(self, node):
        return os.path.join(self.work, f"{node}.sock")

    def _event(self, child, name):
        while True:
            event = json.loads(child.line())
            if event.get("event") == name:
                return event

    def _until(self, what, seconds, look):
        deadline = time.monotonic() + seconds
        while True:
            found = look()
            if found:
                return found
            self._sample()
            for node, child in self.nodes.items():
                if child.process.poll() is not None:
                    raise RuntimeError(f"node {node} ended with {child.process.returncode}; see its log with --keep")
            if time.monotonic() > deadline:
                raise RuntimeError(f"not within {seconds:.0f} s: {what}")
            time.sleep(POLL_S)

    def _sample(self):
        now = time.time()
        if not self.samples or now - self.samples[-1][0] >= SAMPLE_S:
            self.samples.append((now, self.network.counters()))

    def _timeline(self, released):
        """How full links were: end of each interval in seconds, share of the seed's upload, of a node's
        upload, of a node's download, the last two on average over surviving nodes."""
        rows, full = [], self.options.mbit * 1e6 / 8
        for (begin, before), (end, after) in zip(self.samples, self.samples[1:]):
            if end < released:
                continue
            used = [[(a - b) / (full * (end - begin)) for a, b in zip(x, y)] for x, y in zip(after, before)]
            down, up = (statistics.mean(used[n][way] for n in self.nodes) for way in (0, 1))
            rows.append([round(v, 3) for v in (end - released, used[0][1], up, down)])
        return rows

    def _sockets(self):
        """What the agents' TCP connections have sent, control and chunks apart, and how long a round trip
        took on them at the end."""
        kinds = {"control": [], "data": []}
        for node in [0, *self.nodes]:
            lines = run(*self.network.inside(node, ["ss", "-tinH"])).splitlines()
            for addresses, figures in zip(lines[::2], lines[1::2]):
                ports = {word.rpartition(":")[2] for word in addresses.split()[3:5]}
                values = dict(word.split(":", 1) for word in figures.split() if ":" in word)
                kinds["data" if str(DATA_PORT) in ports else "control"].append(values)
        total = lambda rows, key: sum(int(r.get(key, 0)) for r in rows)  # noqa: E731
        return {
            kind: {
                "connections": len(rows) // 2, "bytes": total(rows, "bytes_sent"), "segments": total(rows, "segs_out"),
                "retransmitted_bytes": total(rows, "bytes_retrans"),
                "rtt_ms": statistics.median(float(r["rtt"].split("/")[0]) for r in rows) if rows else None,
            }
            for kind, rows in kinds.items()
        }

    def _until_all_know_all(self):
        def knows_all(node):
            try:
                peers = request_status(self._socket(node))["peers"]
            except AgentUnavailable:  # it is starting
                return False
            return len(peers) == len(self.nodes) - 1

        for node in self.nodes:
            self._until(f"node {node} knows all", PATIENCE_S, lambda node=node: knows_all(node))

    def _until_logged(self, child, *texts):
        return self._until(f"a log line with {texts}", PATIENCE_S, lambda: child.logged(*texts))

    def _joined(self, seed, node):
        return seed.logged(f"node-{node} (", "is in the mesh")

    def _whole_at(self, node, manifest):
        return self.nodes[node].logged(f"manifest {manifest[:8]}", "is whole on this node")

    def _until_whole(self, manifest, before, released):
        """Waits for the end, and kills whom it must on the way. When that was, in seconds."""
        patience = max(PATIENCE_LEAST_S, PATIENCE_BOUNDS * self.bench.lower_bound())
        half = None
        if self.options.kill:
            wanted = self.bench.bytes / 2 * FRAME_BYTES / PAYLOAD_BYTES

            def is_half():
                now = self.network.counters()
                return sum(now[n][0] - before[n][0] for n in self.nodes) >= wanted * len(self.nodes)

            self._until("half of it is there", patience, is_half)
            half = time.time() - released
            for node in self.bench.random.sample(sorted(self.nodes), self.options.kill):
                self.nodes.pop(node).kill()
                self.killed.append(node)
        waiting = set(self.nodes)

        def all_whole():
            waiting.difference_update([n for n in waiting if self._whole_at(n, manifest) is not None])
            return not waiting

        self._until(f"whole on nodes {waiting}", patience, all_whole)
        return half

    def _check(self, hashed):
        """Every node holds every chunk of what was published, and says so itself."""
        for node in self.nodes:
            channel = request_status(self._socket(node))["channels"][0]
            right = (
                channel["manifest"] == hashed["manifest"] and channel["state"] == "hydrated"
                and channel["chunks_have"] == channel["chunks"] == hashed["chunks"]
                and channel["bytes_have"] == channel["bytes_wanted"] and channel["problem"] is None
            )
            if not right:
                raise RuntimeError(f"node {node} is not where it should be: {channel}")

    def _probes(self):
        """Round trips between a pair of nodes and from the first to the seed, beside the swarm's traffic."""
        probe = [sys.executable, os.path.join(HERE, "probe.py")]
        for node in (0, 2):
            self.bench.child(node, [*probe, "echo", PROBE_PORT], output=subprocess.PIPE).line()
        return {
            f"1-{node}": self._probe([*probe, "rtt", self.network.address(node), PROBE_PORT], node) for node in (0, 2)
        }

    def _probe(self, command, node):
        path = os.path.join(self.work, f"rtt-{node}")
        with open(path, "wb") as file:
            self.bench.child(1, command, output=file)
        return path

    def _round_trips(self, probes, released, last):
        result = {}
        for name, path in probes.items():
            with open(path, encoding="ascii") as file:
                rows = [line.split() for line in file]
            rows = [r[1] for r in rows if len(r) == 2 and released <= float(r[0]) <= released + last]
            times = sorted(float(r) * 1e3 for r in rows if r != "lost")
            if times:
                at = lambda part: round(times[min(len(times) - 1, int(part * len(times)))], 1)  # noqa: E731
                result[name] = {"median": at(0.5), "p90": at(0.9), "max": at(1), "lost": rows.count("lost")}
        return result


def make_checkpoint(directory, total, seed):
    """Random BF16 tensors in one safetensors file. Its length."""
    os.mkdir(directory)
    source, header, at = random.Random(seed), {}, 0
    while at < total:
        length = min(TENSOR_BYTES, total - at)
        header[f"layers.{at // TENSOR_BYTES}.weight"] = {
            "dtype": "BF16", "shape": [length // (2 * TENSOR_SHAPE[1]), TENSOR_SHAPE[1]],
            "data_offsets": [at, at + length],
        }
        at += length
    text = json.dumps(header).encode()
    path = os.path.join(directory, "model.safetensors")
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(0, total, TENSOR_BYTES):
            file.write(source.randbytes(TENSOR_BYTES))
        file.truncate(8 + len(text) + total)
    return os.path.getsize(path)


def idle_seconds():
    """What all cores idled so far, and what they had, in ticks."""
    with open("/proc/stat", encoding="ascii") as file:
        fields = [int(f) for f in file.readline().split()[1:9]]
    return fields[3] + fields[4], sum(fields)


def machine():
    with open("/proc/sys/net/ipv4/tcp_congestion_control", encoding="ascii") as file:
        congestion = file.read().strip()
    return {"kernel": platform.release(), "cores": os.cpu_count(), "congestion_control": congestion}


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True, help="the aquifer to run, built for release")
    parser.add_argument("--nodes", type=int, default=8, help="nodes beside the seed")
    parser.add_argument("--mbit", type=float, default=50, help="each link's rate, each way, in Mbit/s")
    parser.add_argument("--mib", type=int, default=64, help="length of the release")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--kill", type=int, default=0, help="nodes to kill at half of the way")
    parser.add_argument("--congestion", help="TCP congestion control in the namespaces [default: the machine's]")
    parser.add_argument("--queue-ms", type=int, default=QUEUE_MS, help="longest queue at either end of a link")
    parser.add_argument("--rtt", action="store_true", help="measure round trips of datagrams beside the swarm")
    parser.add_argument("--at-most", type=float, help="fail if the median run takes more times LB")
    parser.add_argument("--seed", type=int, default=1, help="of the release's bytes and of whom to kill")
    parser.add_argument("--log", default="info", help="log filter of the agents")
    parser.add_argument("--keep", action="store_true", help="keep logs, and say where they are")
    parser.add_argument("--json", metavar="FILE", help="write all figures here")
    options = parser.parse_args()
    options.program = os.path.abspath(options.program)
    options.mbit = int(options.mbit) if options.mbit == int(options.mbit) else options.mbit
    if os.geteuid() != 0:
        parser.error("it needs root: it makes network namespaces")
    if not os.access(options.program, os.X_OK):
        parser.error(f"there is no program {options.program}: cargo build --release")
    if options.kill >= options.nodes or options.nodes < 2:
        parser.error("two nodes at least, and one must survive")
    return options


def measure(options, work):
    with Network(options.nodes + 1, options.mbit, options.queue_ms, options.congestion) as network:
        bench = Bench(options, work, network)
        try:
            return measure_runs(options, bench)
        finally:
            bench.end()


def measure_runs(options, bench):
    bound, rate = bench.lower_bound(), goodput(options.mbit)
    plain = bench.plain_stream()
    print(
        f"{options.nodes} nodes and a seed, {options.mbit} Mbit/s each way (tbf, burst {BURST}, queue {options.queue_ms} ms), "
        f"{bench.bytes} bytes; LB {bound:.3f} s; a plain stream gets {plain / rate:.4f} of the rate in LB",
        flush=True,
    )
    runs = [bench.run(number) for number in range(options.runs)]
    median = statistics.median(r["ratio"] for r in runs)
    print(f"median of {len(runs)}: {statistics.median(r['seconds'] for r in runs):.2f} s, {median:.3f} x LB", flush=True)
    return {
        "nodes": options.nodes, "mbit": options.mbit, "queue_ms": options.queue_ms, "bytes": bench.bytes, "kill": options.kill,
        "lower_bound_seconds": bound, "plain_stream_of_rate": plain / rate, "median_ratio": median,
        "machine": machine() | ({"congestion_control": options.congestion} if options.congestion else {}),
        "runs": runs,
    }


def main():
    options = parse()

    def stop(number, _frame):
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, stop)
    work = tempfile.mkdtemp(prefix="aquifer-netns-")
    try:
        result = measure(options, work)
    finally:
        if options.keep:
            print(f"logs are in {work}", file=sys.stderr)
        else:
            shutil.rmtree(work, ignore_errors=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
    return int(options.at_most is not None and result["median_ratio"] > options.at_most)


if __name__ == "__main__":
    sys.exit(main())
