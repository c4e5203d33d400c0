"""Engines of one node give each other what they have."""

import signal
import unittest

from fleet import CHANGED_BYTES, Fleet
from mesh import needs_program


@needs_program()
class TwoEngines(Fleet):
    def test_what_is_found_in_one_fills_another_that_waits_for_it(self):
        old, first = self.engine()
        # It must not be back before the other one waits.
        old.child.send_signal(signal.SIGSTOP)
        self.alone()
        self.node.kill()
        self.node.start()
        new = self.start_engine("new")
        new.tell("allocate")
        self.node.wait_engine("is being filled", "new", lambda e: e["phase"] == "hydrating")
        old.child.send_signal(signal.SIGCONT)
        self.node.wait_engine("is found again", "engine", lambda e: e["serving"] == first)
        # Small tensors lie in memory otherwise than they are sent: these have to come from somebody.
        self.site.publisher("again", self.site.path("release-1"), peers=[self.node.address])
        self.assertEqual(new.tell("wait"), first)
        self.assert_answers(new, first, 1)
        self.assertLess(self.node.bytes_in(), CHANGED_BYTES // 8)


if __name__ == "__main__":
    unittest.main()
