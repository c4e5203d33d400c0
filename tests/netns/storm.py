"""How long new nodes take to be ready when many start at once and know nothing but a DNS name.

    storm.py --program target/release/aquifer [--ready 4] [--storm 12] [--mbit 200] [--mib 64] [--runs 3]

Makes a network (see ``network.py``) whose first node answers DNS, by a server of a few lines here, and runs
on each other node the real program: ``aquifer agent`` with an engine that registers memory for the whole
release (``aquifer demo-engine``), so that a node is ready when its engine serves. ``--ready`` nodes hold and serve the
release and nothing else happens; the publisher is gone. Then ``--storm`` nodes start at the same moment, each with a
clean state and ``--peer NAME:7401``, where NAME resolves to two of the first. The time of a node is

    from   just before its agent's process is started,
    to     ``GET /readyz`` of that agent answering 200,

by one clock, asked every 5 ms from within its namespace. It is compared with the least that F bytes to K newcomers take
over these links (Kumar and Ross, 2006):

    LB = max(F / newcomer's download, K F / sum of all uploads)

in rates that TCP carries in full segments; what a node took more is its overhead. The same node is asked before the
storm what it predicts (``/v1/autoscale?nodes=K``). Needs root, Linux, and Python's standard library. Ends with 1 if a
node does not become ready, or if ``--overhead-at-most`` is given and the median over all nodes and runs is more.
"""

import argparse
import http.client
import json
import os
import random
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)

from network import Network, end_with_parent, goodput  # noqa: E402
from program import make_keys  # noqa: E402
from swarm import make_checkpoint  # noqa: E402

CHANNEL, NAME = "netns/storm", "mesh.aquifer.test"
HTTP_PORT, MESH_PORT = 7404, 7401
PATIENCE_S = 120.0
POLL_S = 0.005


def serve_dns(address, addresses):
    """Answers every question for an address of ``NAME`` with all of ``addresses``, and all others with none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((address, 53))
        print("ready", flush=True)
        while True:
            question, asker = server.recvfrom(512)
            end, labels = 12, []
            while question[end]:
                labels.append(question[end + 1 : end + 1 + question[end]].decode())
                end += 1 + question[end]
            (kind,) = struct.unpack_from(">H", question, end + 1)
            found = addresses if ".".join(labels) == NAME and kind == 1 else []
            answer = question[:2] + struct.pack(">HHHHH", 0x8580, 1, len(found), 0, 0) + question[12 : end + 5]
            for one in found:
                answer += struct.pack(">HHHIH", 0xC00C, 1, 1, 5, 4) + socket.inet_aton(one)
            server.sendto(answer, asker)


def run_node(options):
    """In a node's namespace: starts agent and engine when told to, and says when the agent is ready."""
    agent, engine = json.loads(options.agent), json.loads(options.engine)
    print("waits", flush=True)
    sys.stdin.readline()
    with open(options.log, "ab") as log:
        started = time.monotonic()
        children = [subprocess.Popen(agent, stdin=subprocess.DEVNULL, stderr=log, preexec_fn=end_with_parent)]
        listening = ready = None
        while ready is None:
            if listening is None and os.path.exists(options.socket):
                listening = time.monotonic() - started
                held = subprocess.PIPE  # it ends when its input does
                children.append(subprocess.Popen(engine, stdin=held, stdout=log, stderr=log, preexec_fn=end_with_parent))
            if is_ready(options.address):
                ready = time.monotonic() - started
            elif any(child.poll() is not None for child in children) or time.monotonic() - started > PATIENCE_S:
                break
            else:
                time.sleep(POLL_S)
    print(json.dumps({"listening": listening, "ready": ready}), flush=True)
    sys.stdin.readline()


def is_ready(address):
    connection = http.client.HTTPConnection(address, HTTP_PORT, timeout=PATIENCE_S)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except ConnectionError:
        return False
    finally:
        connection.close()


class Storm:
    def __init__(self, options, work, network):
        self.options, self.work, self.network = options, work, network
        self.children = []
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("AQUIFER_")}
        self.environment.update(HOME=work, XDG_CONFIG_HOME=work, XDG_RUNTIME_DIR=work)
        self.checkpoint = os.path.join(work, "checkpoint")
        self.bytes = make_checkpoint(self.checkpoint, options.mib << 20, options.seed)
        keys = make_keys(options.program, self.environment, work)
        self.mesh_key, self.publisher_key, self.public_key = keys
        self.resolver = os.path.join(work, "resolv.conf")
        with open(self.resolver, "w", encoding="ascii") as file:
            file.write(f"nameserver {network.address(0)}\n")

    def child(self, node, command, log="/dev/null"):
        # A mount namespace of its own, as `ip netns exec` makes it: nobody else's resolver changes.
        bound = ["sh", "-c", 'mount --bind "$0" /etc/resolv.conf && exec "$@"', self.resolver, *map(str, command)]
        with open(log, "ab") as errors:
            child = subprocess.Popen(
                self.network.inside(node, bound), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                env=self.environment, text=True, preexec_fn=end_with_parent,
            )
        self.children.append(child)
        return child

    def end(self):
        while self.children:
            child = self.children.pop()
            child.kill()
            child.wait()
            child.stdin.close()
            child.stdout.close()

    def common(self, node):
        address = self.network.address(node)
        at = ["--listen", f"{address}:{MESH_PORT}", "--data-listen", f"{address}:7402", "--mesh-key", self.mesh_key]
        return [*at, "--shm", "false", "--channel", CHANNEL]

    def node(self, node, run, *options):
        """A node that waits to be started."""
        base = os.path.join(self.work, f"run-{run}", f"node-{node}")
        os.makedirs(base)
        place, address = os.path.join(base, "agent.sock"), self.network.address(node)
        agent = [
            self.options.program, "agent", *self.common(node), "--name", f"node-{node}", "--trust", self.public_key,
            "--state", os.path.join(base, "state"), "--socket", place, "--http", f"{address}:{HTTP_PORT}", *options,
        ]
        engine = [self.options.program, "demo-engine", "--socket", place, "--channel", CHANNEL, "--name", f"engine-{node}"]
        command = [
            sys.executable, __file__, "--role", "node", "--address", address, "--socket", place,
            "--agent", json.dumps(agent), "--engine", json.dumps(engine), "--log", os.path.join(base, "log"),
        ]
        child = self.child(node, command, os.path.join(base, "log"))
        child.stdout.readline()
        return child

    def start(self, nodes):
        for node in nodes:
            node.stdin.write("\n")
            node.stdin.flush()
        results = [json.loads(node.stdout.readline() or "{}") for node in nodes]
        if any(result.get("ready") is None for result in results):
            raise RuntimeError(f"a node did not become ready: {results}; see the logs with --keep")
        return results

    def measure(self, run):
        first = range(1, 1 + self.options.ready)
        dns = self.child(0, [sys.executable, __file__, "--role", "dns", "--address", self.network.address(0),
                             "--names", ",".join(self.network.address(n) for n in list(first)[:2])])
        dns.stdout.readline()
        publisher = self.child(1 + self.options.ready, [
            self.options.program, "publish", self.checkpoint, "--json", "--name", "publisher",
            "--publisher-key", self.publisher_key, *self.common(1 + self.options.ready),
        ])
        while json.loads(publisher.stdout.readline()).get("event") != "published":
            pass
        peer = f"{self.network.address(1 + self.options.ready)}:{MESH_PORT}"
        others = [a for n in first for a in ("--peer", f"{self.network.address(n)}:{MESH_PORT}")]
        self.start([self.node(n, run, "--peer", peer, *others) for n in first])
        publisher.terminate()
        publisher.wait()
        time.sleep(self.options.settle)
        newcomers = range(1 + self.options.ready, 1 + self.options.ready + self.options.storm)
        waiting = [self.node(n, run, "--peer", f"{NAME}:{MESH_PORT}") for n in newcomers]
        predicted = self.predicted()
        return self.start(waiting), predicted

    def predicted(self):
        ask = ("import http.client, sys; c = http.client.HTTPConnection(sys.argv[1], 7404); "
               "c.request('GET', '/v1/autoscale?nodes=' + sys.argv[2]); print(c.getresponse().read().decode())")
        child = self.child(1, [sys.executable, "-c", ask, self.network.address(1), self.options.storm])
        return json.loads(child.stdout.readline())["predicted_seconds"]

    def bound(self):
        rate, k = goodput(self.options.mbit), self.options.storm
        return max(self.bytes / rate, k * self.bytes / (rate * (k + self.options.ready)))


def spread(values):
    values = sorted(values)
    at = lambda share: values[min(len(values) - 1, int(share * len(values)))]  # noqa: E731
    return f"least {values[0]:.2f}, median {statistics.median(values):.2f}, 90 % {at(0.9):.2f}, most {values[-1]:.2f} s"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--role", choices=["dns", "node"], help=argparse.SUPPRESS)
    for hidden in ("--address", "--names", "--socket", "--agent", "--engine", "--log"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--program")
    parser.add_argument("--ready", type=int, default=4)
    parser.add_argument("--storm", type=int, default=12)
    parser.add_argument("--mbit", type=int, default=200)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--settle", type=float, default=3.0, help="seconds between the last ready and the storm")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--overhead-at-most", type=float)
    parser.add_argument("--keep", action="store_true", help="leave logs and state where they are")
    options = parser.parse_args()
    if options.role == "dns":
        return serve_dns(options.address, options.names.split(","))
    if options.role == "node":
        return run_node(options)
    options.program = os.path.abspath(options.program)
    work = tempfile.mkdtemp(prefix="aquifer-storm-")
    took, listened = [], []
    try:
        with Network(1 + options.ready + options.storm, options.mbit) as network:
            storm = Storm(options, work, network)
            bound = storm.bound()
            print(f"{options.ready} ready, {options.storm} start at once: {options.mib} MiB over {options.mbit} Mbit/s each way; "
                  f"least possible {bound:.2f} s; seed {options.seed}", flush=True)
            for run in range(options.runs):
                try:
                    results, predicted = storm.measure(run)
                finally:
                    storm.end()
                times = [result["ready"] for result in results]
                took += times
                listened += [result["listening"] for result in results]
                print(f"  run {run}: {spread(times)}; predicted {predicted} s", flush=True)
    finally:
        if options.keep:
            print(f"kept: {work}")
        else:
            shutil.rmtree(work, ignore_errors=True)
    overhead = [t - bound for t in took]
    print(f"process start to ready: {spread(took)}")
    print(f"of that until the agent's socket is there: {spread(listened)}")
    print(f"beyond the least possible: {spread(overhead)}")
    print(json.dumps({"ready_s": took, "overhead_s": overhead, "bound_s": bound, "options": {
        k: getattr(options, k) for k in ("ready", "storm", "mbit", "mib", "runs", "seed")}}))
    if options.overhead_at_most is not None and statistics.median(overhead) > options.overhead_at_most:
        print(f"the median overhead is more than {options.overhead_at_most} s")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
