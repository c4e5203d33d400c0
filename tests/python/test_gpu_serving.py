"""Nodes that serve chunks which lie in GPU memory alone, on twins: host memory that the agent treats as a device's.

The checkpoints are made here, so that this needs NumPy and the program alone.
"""

import hashlib
import json
import os
import random
import struct
import time
import unittest

from mesh import PATIENCE, MeshTest, program, python_with

TWINS = ["GPU-7e57ed00-0000-4000-8000-%012x" % n for n in (1, 2)]
MIB = 1 << 20
#: Less than a release, so that chunks that came are dropped from host memory; a slab of the store.
SMALL = ("--memory-limit", "64MiB")
TENSORS = 40
ROWS, COLUMNS = 1024, 1024  # of four bytes each


def checkpoint(directory, seed, changed=()):
    """Tensors of random bytes; those in ``changed`` are of another seed. Returns the sums of all."""
    os.makedirs(directory)
    sums, blobs, header, at = {}, [], {}, 0
    for n in range(TENSORS):
        blob = random.Random(f"{n} {seed if n not in changed else seed + 1}").randbytes(4 * ROWS * COLUMNS)
        header[name(n)] = {"dtype": "F32", "shape": [ROWS, COLUMNS], "data_offsets": [at, at + len(blob)]}
        sums[name(n)] = hashlib.sha256(blob).hexdigest()
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header).encode()
    with open(os.path.join(directory, "model.safetensors"), "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(blobs)
    return sums


def name(n):
    return f"layer.{n:02}.weight"


def needs(case):
    if not program():
        return unittest.skip("AQUIFER_BIN does not name the program")(case)
    if python_with("numpy") is None:
        return unittest.skip("no Python here has numpy")(case)
    return case


@needs
class GpuServing(MeshTest):
    def node(self, called, *options, peers):
        return self.site.agent(called, "--twin-gpu", ",".join(TWINS), *SMALL, *options, peers=peers)

    def engine(self, node, called, twin=TWINS[0]):
        engine = self.site.engine(node, called)
        engine.tell("allocate", hydrate=False)
        engine.tell("on_twin", device=twin)
        engine.tell("hydrate")
        return engine

    def first(self, *options):
        """A publisher that is gone again, and a node whose engine has what it published."""
        self.sums = checkpoint(self.site.path("first"), 1)
        publisher = self.site.publisher("publisher", self.site.path("first"))
        node = self.node("first-node", *options, peers=[publisher.address])
        engine = self.engine(node, "first-engine")
        self.assertEqual(engine.tell("wait"), publisher.manifest)
        # All of it is here, and most in the engine's memory alone.
        node.wait_holds(publisher.manifest)
        publisher.stop()
        return publisher.manifest, node, engine

    def check(self, engine, manifest, sums):
        self.assertEqual(engine.tell("sums"), {"release": manifest, "sums": sums})

    def brought_out(self, node):
        return node.status()["traffic"]["bytes_out_of_gpus"]

    def test_a_newcomer_has_what_lies_on_a_gpu_alone(self):
        manifest, node, engine = self.first()
        newcomer = self.node("second-node", peers=[node.address])
        second = self.engine(newcomer, "second-engine")
        answers = 0
        second.say({"do": "wait"})
        # The engine answers all the while.
        deadline = time.monotonic() + PATIENCE
        while newcomer.status()["engines"][0]["phase"] != "serving":
            self.check(engine, manifest, self.sums)
            answers += 1
            self.assertLess(time.monotonic(), deadline)
        self.assertEqual(self.hydrated(second), manifest)
        self.check(second, manifest, self.sums)
        self.check(engine, manifest, self.sums)
        self.assertGreater(answers, 0)
        status = newcomer.status()
        self.assertEqual(status["traffic"]["chunks_corrupt"], 0)
        self.assertEqual(status["traffic"]["bytes_in"], TENSORS * 4 * MIB)
        self.assertGreaterEqual(self.brought_out(node), (TENSORS - 16) * 4 * MIB, "what the store has no room for")
        # And the newcomer serves the next one.
        node.stop()
        third = self.node("third-node", peers=[newcomer.address])
        last = self.engine(third, "third-engine")
        self.assertEqual(last.tell("wait"), manifest)
        self.check(last, manifest, self.sums)

    def test_what_comes_faster_than_a_gpu_takes_it_waits(self):
        """The store is full most of the time; what it holds goes to the GPU, and nobody need do anything."""
        manifest, node, engine = self.first("--twin-gpu-rate", "80MiB")
        self.check(engine, manifest, self.sums)
        self.assertNotIn("the store is full", self.site.logs())

    def test_an_engine_that_writes_into_its_memory_is_found_out(self):
        manifest, node, engine = self.first()
        engine.tell("scribble")
        newcomer = self.node("second-node", peers=[node.address])
        second = self.engine(newcomer, "second-engine")
        second.say({"do": "wait"})
        # What is left is what the first node's store had room for.
        node.wait_until("it has looked at all", lambda status: status["channels"][0]["bytes_have"] <= 64 * MIB)
        self.assertEqual(self.brought_out(node), 0)
        self.assertEqual(newcomer.status()["traffic"]["chunks_corrupt"], 0, "no wrong byte was sent")
        # Whoever has it mends it.
        again = self.site.publisher("again", self.site.path("first"), peers=[node.address, newcomer.address])
        self.assertEqual(again.manifest, manifest)
        self.assertEqual(self.hydrated(second), manifest)
        self.check(second, manifest, self.sums)
        self.assertEqual(newcomer.status()["traffic"]["chunks_corrupt"], 0)

    def hydrated(self, engine):
        """What came of a ``wait``."""
        return engine.expect(lambda line: line.get("of") == "wait", "that it is hydrated")["done"]

    def test_another_engine_of_the_node_has_it_from_the_first_ones_gpu(self):
        manifest, node, engine = self.first()
        before = node.bytes_in()
        for called, twin in (("other", TWINS[1]), ("same", TWINS[0])):
            second = self.engine(node, called, twin)
            self.assertEqual(second.tell("wait"), manifest)
            self.check(second, manifest, self.sums)
        self.assertEqual(node.bytes_in(), before, "nothing is fetched twice")

    def test_gpus_are_served_from_no_faster_than_allowed(self):
        manifest, node, engine = self.first("--gpu-upload-limit", "40MiB")
        newcomer = self.node("second-node", peers=[node.address])
        second = self.engine(newcomer, "second-engine")
        begun = time.monotonic()
        self.assertEqual(second.tell("wait"), manifest)
        took = time.monotonic() - begun
        out = self.brought_out(node)
        self.assertLessEqual(out, 40 * MIB * took + 4 * 4 * MIB, f"in {took} s")
        self.assertEqual(newcomer.status()["traffic"]["reads_failed"], 0)
        self.check(second, manifest, self.sums)

    def test_at_zero_nothing_is_served_from_gpus(self):
        manifest, node, engine = self.first("--gpu-upload-limit", "0")
        newcomer = self.node("second-node", peers=[node.address])
        second = self.engine(newcomer, "second-engine")
        second.say({"do": "wait"})
        again = self.site.publisher("again", self.site.path("first"), peers=[node.address])
        self.assertEqual(self.hydrated(second), manifest)
        self.check(second, manifest, self.sums)
        self.assertEqual(self.brought_out(node), 0)

    def test_updates_go_on_while_a_newcomer_reads(self):
        manifest, node, engine = self.first()
        newcomer = self.node("second-node", peers=[node.address])
        second = self.engine(newcomer, "second-engine")
        # Some of it changes while the rest is read.
        sums = checkpoint(self.site.path("second"), 1, changed=range(0, TENSORS, 4))
        later = self.site.publisher("later", self.site.path("second"), peers=[node.address, newcomer.address])
        for of, where in ((engine, node), (second, newcomer)):
            where.wait_engine("it serves the second", of.name, lambda e: e["serving"] == later.manifest and e["ready"])
            self.check(of, later.manifest, sums)
        self.assertEqual(newcomer.status()["traffic"]["chunks_corrupt"], 0)

    def test_what_moves_in_an_engines_own_memory_is_brought_home_first(self):
        manifest, node, engine = self.first()
        # The first ten have each other's bytes.
        turned_name = lambda n: name(9 - n if n < 10 else n)
        turned = self.site.path("turned")
        os.makedirs(turned)
        with open(self.site.path("first", "model.safetensors"), "rb") as file:
            content = file.read()
        (length,) = struct.unpack_from("<Q", content)
        header = json.loads(content[8 : 8 + length])
        header = {name(n): header[turned_name(n)] for n in range(TENSORS)}
        text = json.dumps(header).encode()
        with open(os.path.join(turned, "model.safetensors"), "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text + content[8 + length :])
        before = node.bytes_in()
        later = self.site.publisher("later", turned, peers=[node.address])
        node.wait_engine("it serves them turned", "first-engine", lambda e: e["serving"] == later.manifest and e["ready"])
        self.check(engine, later.manifest, {name(n): self.sums[turned_name(n)] for n in range(TENSORS)})
        self.assertEqual(node.bytes_in(), before, "nothing of that is new to this node")


if __name__ == "__main__":
    unittest.main()
