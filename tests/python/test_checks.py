"""A release that an engine's own check finds no good is not served, and the one before is, without the network."""

import hashlib
import json
import os
import struct
import sys
import unittest

from mesh import CHANNEL, ROOT, Engine, MeshTest, needs_program

ENGINE = os.path.join(ROOT, "tests", "python", "checking_engine.py")
#: Bytes of the tensor that releases differ in: several chunks.
CHANGED_BYTES = 12 << 20


def tensors(number):
    """Of release ``number``. Some are in all of them, some small."""
    block = hashlib.sha512(b"%d" % number).digest()
    return {
        "changed": block * (CHANGED_BYTES // len(block)),
        "same": b"the same in all" * 300_000,
        "small": block,
        "tiny": b"\x01\x02",
    }


def sums(number):
    return {name: hashlib.sha256(data).hexdigest() for name, data in tensors(number).items()}


@needs_program()
class Checks(MeshTest):
    def setUp(self):
        self.node = None
        self.publishers = []

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
        peers = [self.node.address] if self.node else []
        publisher = self.site.publisher(f"publisher-{number}", self.checkpoint(number), peers=peers)
        self.publishers.append(publisher)
        if self.node is None:
            self.node = self.site.agent("node", *self.options, peers=[publisher.address])
        return publisher.manifest

    def engine(self, *checks, options=(), **more):
        """One that serves release 1, and that release."""
        self.options = options
        first = self.publish(1)
        engine = self.site.started(CheckingEngine(self.site, self.node, **more))
        for check in checks:
            engine.tell("check", **check)
        engine.tell("allocate")
        self.assertEqual(engine.tell("wait"), first)
        self.assert_answers(engine, first, 1)
        return engine, first

    def alone(self):
        """Nobody is left to fetch anything from."""
        for publisher in self.publishers:
            publisher.kill()
        self.publishers.clear()

    def assert_answers(self, engine, manifest, number):
        self.assertEqual(engine.tell("answer"), {"release": manifest, "sums": sums(number)})

    def assert_back(self, engine, first, reason):
        engine.expect(lambda e: e.get("event") == "resumed" and e["manifest"] == first, "that it goes back")
        self.assert_answers(engine, first, 1)
        seen = self.node.wait_engine("serves what it served", "engine", lambda e: e["serving"] == first)
        self.assertEqual(seen["reason"], reason)
        self.assertFalse(seen["ready"], "it is not where its channel is")

    def assert_takes(self, engine, number):
        manifest = self.publish(number)
        engine.expect(lambda e: e.get("event") == "resumed" and e["manifest"] == manifest, f"it serves {number}")
        self.assert_answers(engine, manifest, number)
        self.node.wait_engine("is ready", "engine", lambda e: e["ready"] and e["reason"] is None)
        return manifest

    def test_a_check_that_fails(self):
        for hold in ("engines", "all"):
            with self.subTest(hold):
                self.tearDownAll()
                engine, first = self.engine({}, options=("--hold", hold), while_paused="refuse")
                engine.tell("checks", mode="ask")
                second = self.publish(2)
                seen = engine.expect(
                    lambda e: e.get("event") == "checking" and e["manifest"] == second, "that it checks the second"
                )
                self.assertEqual((seen["served"], seen["sums"]), (second, sums(2)), "it is tried, whole")
                status = self.node.wait_engine("is checking", "engine", lambda e: e["phase"] == "checking")
                self.assertEqual((status["serving"], status["during_pause"]), ("", "refused"))
                self.assertIn("Paused", engine.refusal("answer"))
                self.alone()
                fetched = self.node.bytes_in()
                engine.tell("decide", outcome="12 instead of 42")
                self.assertEqual(engine.event("failed")["reason"], "ValueError: 12 instead of 42 (check)")
                self.assert_back(engine, first, "ValueError: 12 instead of 42")
                self.assertEqual(self.node.bytes_in(), fetched, "to go back takes no network")
                engine.tell("checks", mode="pass")
                self.assert_takes(engine, 3)

    def tearDownAll(self):
        """Between two fleets of one test."""
        if self.node is None:
            return
        self.alone()
        self.node.kill()
        self.node = None
        for name in os.listdir(self.site.directory):
            if name.startswith("release-"):
                os.rename(self.site.path(name), self.site.path(f"old-{name}"))

    def test_a_check_that_hangs(self):
        engine, first = self.engine({"timeout": 1})
        engine.tell("checks", mode="hang")
        second = self.publish(2)
        engine.expect(lambda e: e.get("event") == "checking" and e["manifest"] == second, "that it checks")
        self.alone()
        fetched = self.node.bytes_in()
        self.assert_back(engine, first, "the check did not end within 1 s")
        self.assertEqual(self.node.bytes_in(), fetched)
        engine.tell("checks", mode="pass")
        self.assert_takes(engine, 3)

    def test_a_check_that_is_a_command(self):
        code = "import os, sys; sys.exit('number 2 is no good' if os.environ['AQUIFER_SEQ'] == '2' else 0)"
        engine, first = self.engine({"command": [sys.executable, "-c", code]})
        self.publish(2)
        self.assert_back(engine, first, f"{sys.executable} ended with 1: number 2 is no good")
        self.assert_takes(engine, 3)

    def test_an_operator_goes_back_without_the_network(self):
        engine, first = self.engine()
        second = self.assert_takes(engine, 2)
        self.alone()
        fetched = self.node.bytes_in()
        # A publisher of the first release again, which nobody has to read from.
        again = self.site.publisher("again", self.site.path("release-1"), peers=[self.node.address])
        self.assertEqual(again.manifest, first)
        engine.expect(lambda e: e.get("event") == "resumed" and e["manifest"] == first, "that it goes back")
        self.assert_answers(engine, first, 1)
        self.assertNotEqual(first, second)
        self.assertEqual(self.node.bytes_in(), fetched)

    def test_there_is_no_room_to_keep_anything(self):
        # Room for what changes, and for little else.
        engine, first = self.engine({}, options=("--memory-limit", f"{CHANGED_BYTES * 5 // 4}"))
        engine.tell("checks", mode="ask")
        second = self.publish(2)
        engine.expect(lambda e: e.get("event") == "checking" and e["manifest"] == second, "that it checks")
        fetched = self.node.bytes_in()
        engine.tell("decide", outcome="no good")
        self.assert_back(engine, first, "ValueError: no good")
        self.assertGreater(self.node.bytes_in(), fetched, "what was not kept came from the publisher")
        with open(self.node.process.log, encoding="utf-8") as log:
            self.assertIn("cannot be kept here", log.read())

    def test_the_first_release_fails(self):
        self.options = ()
        first = self.publish(1)
        engine = self.site.started(CheckingEngine(self.site, self.node))
        engine.tell("check")
        engine.tell("checks", mode="ask")
        engine.tell("allocate")
        engine.event("checking")
        engine.tell("decide", outcome="no good")
        self.assertIn("failed its check: ValueError: no good", engine.refusal("wait"))
        seen = self.node.wait_engine("has failed", "engine", lambda e: e["reason"])
        self.assertEqual((seen["phase"], seen["serving"], seen["reason"]), ("failed", "", "ValueError: no good"))
        engine.tell("checks", mode="pass")
        second = self.publish(2)
        self.assertNotEqual(first, second)
        self.node.wait_engine("serves the second", "engine", lambda e: e["serving"] == second and e["ready"])
        self.assertEqual(engine.tell("wait"), second)
        self.assert_answers(engine, second, 2)

    def test_an_agent_dies_while_the_check_runs(self):
        engine, _ = self.engine({})
        engine.tell("checks", mode="ask")
        second = self.publish(2)
        engine.expect(lambda e: e.get("event") == "checking" and e["manifest"] == second, "that it checks")
        self.node.kill()
        self.node.start()
        engine.tell("decide")
        # Nobody heard of that: it is looked at, and checked, again.
        engine.expect(lambda e: e.get("event") == "checking" and e["manifest"] == second, "that it checks again")
        engine.tell("decide")
        engine.expect(lambda e: e.get("event") == "resumed" and e["manifest"] == second, "that it serves it")
        self.assert_answers(engine, second, 2)


class CheckingEngine(Engine):
    def __init__(self, site, agent, **options):
        self.start(site, "engine", [sys.executable, ENGINE])
        self.tell("open", channel=CHANNEL, socket=agent.socket, name="engine", **options)


if __name__ == "__main__":
    unittest.main()
