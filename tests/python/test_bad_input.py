"""What engines in Python can get wrong, at a real agent: each is told plainly, and nothing is lost."""

import hashlib
import json
import os
import random
import shutil
import struct
import time
import unittest

from mesh import CHANNEL, MeshTest, Safetensors, model_directory, needs

WORDS = "embeddings.word_embeddings.weight"
INNER = "encoder.layer.0.intermediate.dense.weight"
NEXT = "encoder.layer.1.intermediate.dense.weight"
SEED = 11


def binding(name, shape, **more):
    return {"tensor": name, "dtype": "F32", "shape": shape, "region": 0, "offset": 0, **more}


@needs("torch", "numpy")
class BadInput(MeshTest):
    def setUp(self):
        self.file = Safetensors(f"{model_directory()}/model.safetensors")
        self.publisher = self.site.publisher("publisher", model_directory())
        self.node = self.site.agent("node", peers=[self.publisher.address])

    def engine(self, name="engine"):
        return self.site.engine(self.node, name)

    def expected(self, file, names):
        return {name: hashlib.sha256(file.tensor(name)).hexdigest() for name in names}

    def check_serves(self, name="after"):
        """The agent is none the worse: another engine gets all of it."""
        engine = self.engine(name)
        engine.tell("allocate")
        self.assertEqual(engine.tell("wait"), self.publisher.manifest)
        self.assertEqual(engine.tell("sums")["sums"], self.expected(self.file, self.file.entries))
        self.node.process.check_alive()

    def test_an_unknown_channel(self):
        engine = self.engine()
        said = engine.refusal("open", channel="test/unknown", socket=self.node.socket, name="astray")
        for word in ("test/unknown", CHANNEL, "--channel", "unknown-channel"):
            self.assertIn(word, said)
        self.assertTrue(said.startswith("RequestRefused"), said)

    def test_no_agent(self):
        engine = self.engine()
        nowhere = self.site.path("nowhere.sock")
        said = engine.refusal("open", channel=CHANNEL, socket=nowhere, name="astray", connect_timeout=0)
        self.assertTrue(said.startswith("AgentUnavailable"), said)
        self.assertIn(nowhere, said)
        self.assertIn("aquifer agent", said)

    def test_bindings_that_do_not_fit_the_release(self):
        rows, columns = self.file.shape(WORDS)
        cases = [
            ("shape", dict(name=WORDS, shape=[columns, rows], tensor_shape=[columns, rows]), [WORDS, str(rows)]),
            (
                "dtype",
                dict(name=WORDS, shape=[rows, columns], tensor_shape=[rows, columns], dtype="F16"),
                [WORDS, "F32"],
            ),
            ("tensor", dict(name="words", shape=[4, 4], tensor_shape=[4, 4]), ["words"]),
        ]
        for name, what, words in cases:
            # Said without asking for the release, so that it is the agent that finds out.
            engine = self.engine(name)
            engine.tell("bind", **what)
            said = engine.refusal("hydrate")
            self.assertTrue(said.startswith("RequestRefused"), said)
            for word in words:
                self.assertIn(word, said)
            # And with the release at hand, it is the package, at the line that is wrong.
            engine = self.engine(f"{name}-2")
            engine.tell("tensors")
            said = engine.refusal("bind", **what)
            self.assertTrue(said.startswith("ArrayError"), said)
            for word in words:
                self.assertIn(word, said)
        self.check_serves()

    def test_regions_that_are_too_small(self):
        shape = self.file.shape(INNER)
        length = len(self.file.tensor(INNER))
        engine = self.engine()
        cases = [
            ("one byte short", length - 1, [binding(INNER, shape)], {}),
            ("behind the end", length, [binding(INNER, shape, offset=1)], {}),
            ("far behind", length, [binding(INNER, shape, offset=2**63)], {}),
            ("beyond all numbers", length, [binding(INNER, shape, offset=2**64 - 4)], {}),
            ("strides out of it", length, [binding(INNER, shape, strides=[2**40, 4])], {}),
            ("strides that wrap", length, [binding(INNER, shape, strides=[2**63, 2**63])], {}),
            ("another region", length, [binding(INNER, shape, region=7)], {}),
            ("more than there is", length, [binding(INNER, shape)], {"said_bytes": 2 * length}),
            ("index beyond", length, [binding(INNER, shape, index=[[0, shape[0] + 1], [0, shape[1]]])], {}),
            ("index backwards", length, [binding(INNER, shape, index=[[5, 4], [0, shape[1]]])], {}),
            ("a tensor that is not there", length, [binding("words", [4])], {}),
            ("two in one place", length + 4, [binding(INNER, shape), binding(NEXT, shape, offset=4)], {}),
        ]
        for what, region_bytes, bindings, more in cases:
            with self.subTest(what):
                said = engine.refusal("raw", region_bytes=region_bytes, bindings=bindings, **more)
                self.assertTrue(said.startswith("RequestRefused"), said)
                self.assertGreater(len(said), 40, "a reason, not a code")
        self.check_serves()

    def test_an_engine_is_killed_while_it_is_filled(self):
        instants = random.Random(SEED)
        for turn in range(6):
            engine = self.engine(f"killed-{turn}")
            engine.tell("allocate", hydrate=False)
            engine.tell("hydrate")
            # Not to wait for something: anywhere in the filling.
            time.sleep(instants.uniform(0, 0.08))
            engine.kill()
        self.check_serves()
        status = self.node.wait_until("has noticed", lambda status: len(status["engines"]) == 1)
        self.assertEqual(status["engines"][0]["name"], "after")
        self.assertTrue(status["engines"][0]["ready"])

    def test_one_of_two_engines_is_killed_while_both_are_filled(self):
        instants = random.Random(SEED)
        survivors = []
        for turn in range(3):
            engines = [self.engine(f"{name}-{turn}") for name in ("killed", "kept")]
            for engine in engines:
                engine.tell("allocate", hydrate=False)
            for engine in engines:
                engine.tell("hydrate")
            time.sleep(instants.uniform(0, 0.08))
            engines[0].kill()
            survivors.append(engines[1])
            self.assertEqual(engines[1].tell("wait"), self.publisher.manifest)
        for engine in survivors:
            self.assertEqual(engine.tell("sums")["sums"], self.expected(self.file, self.file.entries))

    def test_a_release_that_the_engine_cannot_take(self):
        engine = self.engine()
        engine.tell("allocate")
        engine.tell("wait")
        old = self.expected(self.file, self.file.entries)
        turned = self.with_header("turned", lambda header: header[INNER]["shape"].reverse())
        shrunk = self.with_header("lost", lambda header: header.update({"renamed.weight": header.pop(INNER)}))
        for number, (place, words) in enumerate([(turned, [INNER, "384", "1536"]), (shrunk, [INNER])]):
            publisher = self.site.publisher(f"publisher-{number + 2}", place, peers=[self.node.address])
            reason = engine.event("failed")["reason"]
            seen = self.node.wait_engine("is not ready", "engine", lambda e: not e["ready"] and e["reason"])
            for word in words:
                self.assertIn(word, reason)
                self.assertIn(word, seen["reason"])
            self.assertIn("incompatible", reason)
            self.assertEqual(seen["serving"], self.publisher.manifest)
            state = {"release": self.publisher.manifest, "wanted": publisher.manifest, "ready": True}
            self.assertEqual(engine.tell("state"), state)
            self.assertEqual(engine.tell("sums"), {"release": self.publisher.manifest, "sums": old})

        # Not even a new agent, which refuses the registration, gets it to let go of what it serves.
        self.node.kill()
        self.node.start()
        self.assertEqual(engine.tell("sums"), {"release": self.publisher.manifest, "sums": old})

        second, _ = self.site.variant("second")
        publisher = self.site.publisher("publisher-9", second, peers=[self.node.address])
        engine.expect(lambda e: e.get("event") == "resumed" and e["manifest"] == publisher.manifest, "that it resumed")
        file = Safetensors(f"{second}/model.safetensors")
        self.assertEqual(engine.tell("sums")["sums"], self.expected(file, self.file.entries))
        self.node.wait_engine("is ready", "engine", lambda e: e["ready"] and e["reason"] is None)

    def test_a_release_that_never_fitted(self):
        turned = self.with_header("turned", lambda header: header[INNER]["shape"].reverse())
        engine = self.engine()
        shape = self.file.shape(INNER)
        node = self.site.agent("empty", peers=[self.publisher.address])
        self.site.publisher("publisher-2", turned, peers=[node.address])
        engine.tell("bind", name=INNER, shape=shape, tensor_shape=shape)
        self.node.wait_until("has heard", lambda status: status["channels"][0]["seq"] == 2)
        said = engine.refusal("wait", timeout=60)
        self.assertIn(INNER, said)

    def with_header(self, name, change):
        """The model directory with a changed header of its weights, of the same length."""
        target = self.site.path(name)
        shutil.copytree(model_directory(), target)
        path = os.path.join(target, "model.safetensors")
        with open(path, "r+b") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
            change(header)
            text = json.dumps(header, separators=(",", ":")).encode()
            self.assertLessEqual(len(text), length)
            file.seek(8)
            file.write(text.ljust(length))
        return target


if __name__ == "__main__":
    unittest.main()
