"""A release that an engine's own check finds no good is not served, and the one before is, without the network."""

import sys
import unittest

from fleet import CHANGED_BYTES, Fleet, sums
from mesh import needs_program


TWIN = "GPU-7e57ed00-0000-4000-8000-000000000001"


@needs_program()
class Checks(Fleet):
    def test_a_check_that_fails(self):
        self.fails("engines")

    def test_a_check_that_fails_where_everything_is_held(self):
        self.fails("all")

    def test_a_check_that_fails_on_a_gpu(self):
        self.fails("engines", ("--twin-gpu", TWIN), twin=TWIN)

    def test_a_check_that_fails_on_a_gpu_without_room_for_two(self):
        self.fails("engines", ("--twin-gpu", TWIN, "--landing", "host"), twin=TWIN)

    def fails(self, hold, options=(), **more):
        engine, first = self.engine({}, options=("--hold", hold, *options), while_paused="refuse", **more)
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

    def test_a_pause_that_hangs(self):
        engine, first = self.engine(pause_timeout=0.1)
        engine.tell("pause_slowly")
        second = self.publish(2)
        engine.event("pausing")
        seen = self.node.wait_engine("is given up", "engine", lambda e: e["reason"])
        self.assertEqual(seen["reason"], "the engine did not answer within 5 s that it paused")
        engine.tell("decide")
        engine.expect(lambda e: e.get("event") == "resumed" and e["manifest"] == first, "that it was called off")
        self.assert_answers(engine, first, 1)
        self.assertNotEqual(second, self.assert_takes(engine, 3))

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
        first = self.publish(1)
        engine = self.start_engine()
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


if __name__ == "__main__":
    unittest.main()
