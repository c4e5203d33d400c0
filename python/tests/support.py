"""Finds the package beside the tests, and plays the agent."""

import json
import logging
import mmap
import os
import queue
import socket
import struct
import sys
import tempfile
import threading
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))

try:
    import numpy
except ImportError:
    numpy = None
try:
    import torch
except ImportError:
    torch = None

# What the package logs is checked by its effects; a test run should be quiet.
logging.getLogger("aquifer").setLevel(logging.CRITICAL + 1)

#: Seconds; longer than any wait that succeeds, on any machine.
PATIENCE = 60.0


def release(seq):
    """A release whose manifest hash can be told from its number."""
    return {
        "channel": "demo/test",
        "seq": seq,
        "manifest": f"{seq:064x}",
        "rollback": False,
        "note": "",
        "created_unix_ms": 0,
        "publisher": "ab" * 32,
        "something_new": True,
    }


def manifest(seq):
    return release(seq)["manifest"]


class Region:
    def __init__(self, fd, length):
        self.map = mmap.mmap(fd, length)
        self.inode = os.fstat(fd).st_ino
        os.close(fd)


class Peer:
    """One engine's connection, as the agent sees it."""

    def __init__(self, agent, connection):
        self.agent = agent
        self.connection = connection
        self.requests = queue.Queue()
        self.regions = {}
        self.bindings = []
        self.rows = 0
        self._sending = threading.Lock()
        threading.Thread(target=self._read, daemon=True).start()

    def expect(self, op):
        """The next request but for `hello`, `region`, `bind`, `bind_row` and further pages; it must be `op`."""
        request = self.requests.get(timeout=PATIENCE)
        assert request["op"] == op, f"expected {op}, got {request}"
        return request

    def event(self, event, **fields):
        self.send({"event": event, **fields})

    def send(self, message):
        content = json.dumps(message).encode()
        with self._sending:
            self.connection.sendall(struct.pack("<I", len(content)) + content)

    def land(self, tensors):
        """Writes `tensors` (name -> bytes, of the whole tensor) as the bindings say."""
        for binding in self.bindings:
            whole = tensors[binding["tensor"]]
            memory = self.regions[binding["region"]].map
            for at, source in element_places(binding, len(whole)):
                memory[at : at + len(range(*source))] = whole[source[0] : source[1]]

    def close(self):
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.connection.close()

    def _read(self):
        try:
            while True:
                header, fds = self._receive(4)
                content, more = self._receive(struct.unpack("<I", header)[0])
                self._answer(json.loads(content), fds + more)
        except (EOFError, OSError):
            self.requests.put({"op": "closed"})

    def _receive(self, count):
        data, fds = b"", []
        while len(data) < count:
            part, got, _, _ = socket.recv_fds(self.connection, count - len(data), 4)
            if not part:
                raise EOFError
            data += part
            fds += got
        return data, fds

    def _answer(self, request, fds):
        op = request["op"]
        ok = {}
        refusal = self.agent.refuse.pop(op, None)
        if refusal:
            for fd in fds:
                os.close(fd)
            self.send({"re": request["id"], "error": {"code": "no", "message": refusal}})
            return
        if op in self.agent.unknown:
            self.send({"re": request["id"], "error": {"code": "unknown-op", "message": "unknown"}})
            return
        if op == "hello":
            ok = {"node": "00" * 32, "agent_name": "fake", "version": "0"}
            self.hello = request
        elif op == "manifest":
            ok = self.agent.manifest_reply(request.get("from"))
            if ok is None:
                self.requests.put(request)
                return  # Waits, as the real one does.
        elif op == "region":
            (fd,) = fds
            self.regions[request["region"]] = Region(fd, request["bytes"])
            self.regions[request["region"]].fresh = request["fresh"]
        elif op == "bind":
            self.bindings += request["bindings"]
        elif op == "bind_row":
            if request["manifest"] != manifest(self.agent.seq):
                self.send({"re": request["id"], "error": {"code": "unknown-manifest", "message": "not here"}})
                return
            self.rows += 1
            self.bindings += self.agent.row(request)
        elif op == "status":
            ok = {"node": "fake", "engines": 1}
        self.send({"re": request["id"], "ok": ok})
        if op == "hello":
            self.agent.peers.put(self)
        elif op not in ("region", "bind", "bind_row", "status") and not request.get("from"):
            self.requests.put(request)


class FakeAgent:
    """Speaks the protocol on a socket; tests say what it says when."""

    def __init__(self, tensors=None):
        self.directory = tempfile.TemporaryDirectory()
        self.path = os.path.join(self.directory.name, "agent.sock")
        #: Name -> (dtype, shape, bytes); None while there is no release.
        self.tensors = tensors
        #: Of the release. What a later one does to a row is only seen in what is refused.
        self.seq = 1
        #: Tensors in a page; None for an agent from before there were pages.
        self.page = 4
        #: Op -> message: refuses the next request of that kind.
        self.refuse = {}
        #: Ops that it is too old for.
        self.unknown = set()
        self.peers = queue.Queue()
        self._all = []
        self.listen()

    def listen(self):
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        if os.path.exists(self.path):
            os.unlink(self.path)
        self.listener.bind(self.path)
        self.listener.listen(8)
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def peer(self):
        """The next engine that has said hello."""
        return self.peers.get(timeout=PATIENCE)

    def crash(self):
        """Ends all connections; the socket's file stays, with nobody behind it."""
        try:
            self.listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.listener.close()
        for peer in self._all:
            peer.close()

    def stop(self):
        self.crash()
        self.directory.cleanup()

    def manifest_reply(self, begin):
        if self.tensors is None:
            return None
        if self.page is not None and begin is not None:
            return self._page(begin)
        rows = [
            {"name": name, "dtype": dtype, "shape": list(shape), "bytes": len(data)}
            for name, (dtype, shape, data) in sorted(self.tensors.items())
        ]
        return {"release": release(self.seq), "tensors": rows}

    def _page(self, begin):
        told = sorted(self.tensors.items())[begin : begin + self.page]
        kinds = [{"dtype": d, "shape": list(shape), "bytes": len(data)} for _, (d, shape, data) in told]
        return {
            "release": release(self.seq),
            "count": len(self.tensors),
            "from": begin,
            "names": [name for name, _ in told],
            "kind_of": list(range(len(told))),
            "kinds": kinds,
        }

    def row(self, request):
        """The bindings that a `bind_row` stands for: the definition."""
        tensors = sorted(self.tensors.items())
        end, bindings = request.get("offset", 0), []
        for begin, behind in request.get("tensors", [[0, len(tensors)]]):
            for name, (dtype, shape, data) in tensors[begin:behind]:
                offset = -(-end // request["align"]) * request["align"]
                end = offset + len(data)
                region = request["region"]
                bindings.append(
                    {"tensor": name, "dtype": dtype, "shape": list(shape), "region": region, "offset": offset}
                )
        return bindings

    def data(self):
        return {name: data for name, (_, _, data) in self.tensors.items()}

    def _accept(self, listener):
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            self._all.append(Peer(self, connection))


def element_places(binding, whole_bytes):
    """Where each element of a binding goes: its offset in the region, and its bytes in the tensor.

    The definition, one element at a time.
    """
    shape = binding["shape"]
    sizes = {"F32": 4, "BF16": 2, "U16": 2, "I64": 8, "U8": 1, "F8_E4M3": 1, "F16": 2, "BOOL": 1, "F64": 8}
    size = sizes.get(binding["dtype"])
    if size is None or not shape or (not binding.get("index") and not binding.get("strides")):
        yield binding["offset"], (0, whole_bytes)
        return
    index = binding.get("index") or [[0, n] for n in shape]
    counts = [end - start for start, end in index]
    strides = binding.get("strides") or packed(counts, size)
    whole = packed(shape, size)

    def walk(dimension, region, tensor):
        if dimension == len(shape):
            yield region, (tensor, tensor + size)
            return
        for i in range(counts[dimension]):
            yield from walk(
                dimension + 1,
                region + i * strides[dimension],
                tensor + (index[dimension][0] + i) * whole[dimension],
            )

    yield from walk(0, binding["offset"], 0)


def packed(shape, size):
    strides = []
    for n in reversed(shape):
        strides.insert(0, size)
        size *= n
    return strides


class AgentTest(unittest.TestCase):
    """A test with a fake agent, and engines that are closed after it."""

    tensors = {}

    def setUp(self):
        self.agent = FakeAgent(dict(self.tensors))
        self.addCleanup(self.agent.stop)

    def engine(self, **options):
        import aquifer

        engine = aquifer.Engine(channel="demo/test", socket=self.agent.path, name="engine", **options)
        self.addCleanup(engine.close)
        return engine, self.agent.peer()

    def hydrated(self, engine, peer, seq=1):
        """Lands the fake agent's tensors and says so."""
        peer.expect("hydrate")
        peer.land(self.agent.data())
        peer.event("hydrated", release=release(seq))
        engine.wait_hydrated(PATIENCE, progress=False)

    def update(self, peer, seq, tensors):
        """Applies a release the way an agent does; returns when the engine has resumed."""
        peer.event("pause", release=release(seq), bytes=1)
        self.assertEqual(peer.expect("paused")["manifest"], manifest(seq))
        peer.land(tensors)
        peer.event("applied", release=release(seq))
        self.assertEqual(peer.expect("resumed")["manifest"], manifest(seq))
