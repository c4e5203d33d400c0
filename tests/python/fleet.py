"""One node of real processes with engines of ``checking_engine.py``, and checkpoints that tests make themselves."""

import functools
import hashlib
import json
import os
import struct
import sys

from mesh import CHANNEL, ROOT, Engine, MeshTest

ENGINE = os.path.join(ROOT, "tests", "python", "checking_engine.py")
#: Bytes of the tensor that releases differ in: many chunks.
CHANGED_BYTES = 12 << 20


@functools.lru_cache(maxsize=None)
def tensors(number):
    """Of release ``number``. Some are in all of them, some small."""
    def noise(seed, count):
        return hashlib.shake_128(b"%d" % seed).digest(count)

    return {
        "changed": noise(number, CHANGED_BYTES),
        "same": noise(0, 4 << 20),
        "small": noise(number, 64),
        "tiny": b"\x01\x02",
    }


def sums(number):
    return {name: hashlib.sha256(data).hexdigest() for name, data in tensors(number).items()}


class Fleet(MeshTest):
    """A channel's releases by number, and a node that follows it."""

    def setUp(self):
        self.node = None
        self.publishers = []
        self.options = ()

    def checkpoint(self, number):
        directory = self.site.path(f"release-{number}")
        os.mkdir(directory)
        header, content = {}, b""
        for name, data in tensors(number).items():
            span = [len(content), len(content) + len(data)]
            header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": span}
            content += data
        text = json.dumps(header).encode()
        with open(os.path.join(directory, "model.safetensors"), "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text + content)
        return directory

    def publish(self, number):
        """Makes release ``number``; returns its manifest."""
        return self.publish_with(number).manifest

    def publish_with(self, number, *options):
        """The same; returns its publisher."""
        peers = [self.node.address] if self.node else []
        publisher = self.site.publisher(f"publisher-{number}", self.checkpoint(number), *options, peers=peers)
        self.publishers.append(publisher)
        if self.node is None:
            self.node = self.site.agent("node", *self.options, peers=[publisher.address])
        return publisher

    def engine(self, *checks, options=(), twin=None, **more):
        """One that serves release 1, and that release."""
        self.options = options
        first = self.publish(1)
        engine = self.start_engine(**more)
        for check in checks:
            engine.tell("check", **check)
        engine.tell("allocate", twin=twin)
        self.assertEqual(engine.tell("wait"), first)
        self.assert_answers(engine, first, 1)
        return engine, first

    def start_engine(self, name="engine", **more):
        return self.site.started(CheckingEngine(self.site, self.node, name, **more))

    def alone(self):
        """Nobody is left to fetch anything from."""
        for publisher in self.publishers:
            publisher.kill()
        self.publishers.clear()

    def assert_answers(self, engine, manifest, number):
        self.assertEqual(engine.tell("answer"), {"release": manifest, "sums": sums(number)})

    def assert_back(self, engine, first, reason):
        engine.expect(lambda e: e.get("event") == "resumed" and e["manifest"] == first, "that it goes back")
        seen = self.node.wait_engine("serves what it served", "engine", lambda e: e["serving"] == first)
        self.assert_answers(engine, first, 1)
        self.assertEqual(seen["reason"], reason)
        self.assertFalse(seen["ready"], "it is not where its channel is")

    def assert_takes(self, engine, number):
        manifest = self.publish(number)
        engine.expect(lambda e: e.get("event") == "resumed" and e["manifest"] == manifest, f"it serves {number}")
        self.node.wait_engine("is ready", "engine", lambda e: e["ready"] and e["reason"] is None)
        self.assert_answers(engine, manifest, number)
        return manifest


class CheckingEngine(Engine):
    def __init__(self, site, agent, name, **options):
        self.start(site, name, [sys.executable, ENGINE])
        self.tell("open", channel=CHANNEL, socket=agent.socket, name=name, **options)
