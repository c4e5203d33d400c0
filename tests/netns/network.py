"""Shaped networks in namespaces of their own: nodes on one bridge, each at a given rate each way.

Every interface this makes lives in a namespace it made: the bridge has one, every node has one, and a
veth pair is created with an end in each. Nothing is added to, or changed in, the network of the machine.
"""

import ctypes
import os
import re
import signal
import subprocess

#: Bytes of a full frame as ``tbf`` counts it (with the Ethernet header, without preamble and checksum),
#: and what TCP carries in it with time stamps: 1500 - 20 (IPv4) - 20 (TCP) - 12 (options).
FRAME_BYTES = 1514
PAYLOAD_BYTES = 1448

#: What a node may send at once after it was idle: ten full frames. Less, and the timer's grain costs rate;
#: more, and a burst is a head start (at 25 Mbit/s this one is 5 ms).
BURST = "16kb"
#: The longest queue at either end of a link, as time. A frame that would wait longer is dropped, as a
#: switch with shallow buffers would do: at 50 Mbit/s this is 250 KB.
QUEUE_MS = 40

PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None, use_errno=True)


class Network:
    """``count`` nodes, numbered from 0, at ``mbit`` Mbit/s each way. Use it in a ``with``."""

    def __init__(self, count, mbit, queue_ms=QUEUE_MS, congestion=None):
        self.prefix = f"aqf{os.getpid()}"
        self.hub = f"{self.prefix}-hub"
        self.count, self.mbit, self.queue_ms, self.congestion = count, mbit, queue_ms, congestion
        self.made = []
        self.resident = None

    def __enter__(self):
        try:
            self._make()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *_):
        self.remove()

    def namespace(self, node):
        return f"{self.prefix}-{node}"

    @staticmethod
    def address(node):
        return f"10.77.{node // 200}.{node % 200 + 1}"

    def inside(self, node, command):
        """``command``, to be run as that node. It becomes the process; nothing stays in between."""
        return ["ip", "netns", "exec", self.namespace(node), *map(str, command)]

    def counters(self):
        """Bytes that each node received and sent since its interface was made."""
        with open(f"/proc/{self.resident.pid}/net/dev", encoding="ascii") as file:
            fields = (re.match(r"\s*p(\d+):\s*(.*)", line) for line in file)
            rows = {int(m[1]): m[2].split() for m in fields if m}
        # What the bridge's end sent, the node received.
        return [(int(rows[n][8]), int(rows[n][0])) for n in range(self.count)]

    def remove(self):
        if self.resident:
            self.resident.kill()
            self.resident.wait()
            self.resident = None
        while self.made:
            subprocess.run(["ip", "netns", "del", self.made.pop()], check=False)

    def _make(self):
        self._namespace(self.hub)
        # Through it /proc shows the bridge's counters, without a process for each look.
        self.resident = subprocess.Popen(
            ["ip", "netns", "exec", self.hub, "sleep", "infinity"], stdin=subprocess.DEVNULL, preexec_fn=end_with_parent
        )
        self._ip("-n", self.hub, "link", "add", "br0", "type", "bridge")
        self._ip("-n", self.hub, "link", "set", "br0", "up")
        for node in range(self.count):
            name, port = self.namespace(node), f"p{node}"
            self._namespace(name)
            self._ip("-n", self.hub, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            self._ip("-n", self.hub, "link", "set", port, "master", "br0", "up")
            self._ip("-n", name, "addr", "add", f"{self.address(node)}/16", "dev", "eth0")
            self._ip("-n", name, "link", "set", "lo", "up")
            self._ip("-n", name, "link", "set", "eth0", "up")
            self._shape(name, "eth0")
            self._shape(self.hub, port)
            if self.congestion:
                self._set(name, "net/ipv4/tcp_congestion_control", self.congestion)

    def _namespace(self, name):
        self._ip("netns", "add", name)
        self.made.append(name)

    def _shape(self, namespace, device):
        tbf = ["tbf", "rate", f"{self.mbit}mbit", "burst", BURST, "latency", f"{self.queue_ms}ms"]
        run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", *tbf)

    def _set(self, namespace, key, value):
        run("ip", "netns", "exec", namespace, "sh", "-c", f"echo {value} > /proc/sys/{key}")

    def _ip(self, *arguments):
        run("ip", *arguments)


def goodput(mbit):
    """Bytes a second that TCP carries over a link of ``mbit`` Mbit/s full of long segments."""
    return mbit * 1e6 / 8 * PAYLOAD_BYTES / FRAME_BYTES


def end_with_parent():
    """To be called in a child before it becomes another program: the kernel then ends it with its parent."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run(*command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout
