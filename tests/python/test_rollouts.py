"""Releases rolled out over a fleet whose engines are asked all the time."""

import statistics
import time
import unittest

from fleet import Fleet, check_no_mixture, check_values, checkpoint, longest_wait, report
from mesh import MeshTest, needs

NODES = 8
UPDATES = 10


@needs("numpy")
class Rollouts(MeshTest):
    def fleet(self, labels=None, engine_options=lambda i: ()):
        """A mesh whose engines all serve the first release."""
        value = checkpoint(self.site.path("release-0"), 0)
        self.publisher = self.site.publisher("publisher-0", self.site.path("release-0"))
        fleet = Fleet(self.site, NODES, labels, peers=[self.publisher.address])
        self.assertEqual(set(fleet.start_engines(engine_options)), {self.publisher.manifest})
        self.values = {self.publisher.manifest: value}
        self.order = [self.publisher.manifest]
        fleet.wait_ready(self.publisher.manifest)
        return fleet

    def publish(self, fleet, n, *options, changed=(1, 3)):
        """Release ``n``, of which some tensors are not what they were; whoever published before leaves."""
        directory = self.site.path(f"release-{n}")
        value = checkpoint(directory, n, changed)
        before = self.publisher
        peers = fleet.addresses(3)
        self.publisher = self.site.publisher(f"publisher-{n}", directory, *options, peers=peers)
        before.stop()
        self.values[self.publisher.manifest] = value
        self.order.append(self.publisher.manifest)
        return self.publisher.manifest

    def test_ten_synchronous_updates(self):
        fleet = self.fleet()
        fleet.ask_all_the_time()
        for n in range(1, UPDATES + 1):
            manifest = self.publish(fleet, n, "--policy", "synchronous")
            fleet.wait_ready(manifest)
            fleet.wait_answers(manifest)
        answers = fleet.stop_asking()
        check_values(answers, self.values)
        check_no_mixture(answers, self.order)
        report(answers=len(answers), longest_wait=f"{1e3 * longest_wait(answers):.0f} ms")


if __name__ == "__main__":
    unittest.main()
