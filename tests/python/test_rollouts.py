"""Releases rolled out over a fleet whose engines are asked all the time."""

import json
import os
import signal
import time
import unittest

from answering_fleet import Fleet, check_no_mixture, check_values, checkpoint, longest_wait, report
from mesh import CHANNEL, MeshTest, needs

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
            fleet.wait_answers(manifest, standing=[manifest, True])
        answers = fleet.stop_asking()
        check_values(answers, self.values)
        check_no_mixture(answers, self.order)
        report(answers=len(answers), longest_wait=f"{1e3 * longest_wait(answers):.0f} ms")

    def test_a_rolling_release_that_fails_on_the_third_node_is_taken_back(self):
        labels = [["role=canary"] if i == 0 else [] for i in range(NODES)]
        second = self.site.path("release-1")
        value = checkpoint(second, 1, (1, 3))
        bad = self.site.manifest(second)["manifest"]
        # While the third runs its check, the second answers.
        turns = ("--fail-at", "3", "--turns", self.site.path("turns"), "--check-seconds", "1")
        fleet = self.fleet(labels, lambda i: turns)
        good = self.order[0]
        fleet.ask_all_the_time()
        before = self.publisher
        rolling = ("--policy", "rolling", "--canary", "role=canary", "--max-unavailable", "1")
        self.publisher = self.site.publisher("publisher-1", second, *rolling, peers=fleet.addresses(3))
        before.stop()
        self.values[bad] = value
        self.assertEqual(self.publisher.manifest, bad)
        failed = [
            agent.wait_until("has given it up", lambda s: self.rollout(s)["step"] == "halted") for agent in fleet.agents
        ]
        fleet.wait_answers(good)
        answers = fleet.stop_asking()
        check_values(answers, self.values)
        for status in failed:
            self.assertEqual(status["engines"][0]["serving"], good)
            self.assertIn("check", self.rollout(status)["reason"])
        took = {answer.node for answer in answers if answer.release == bad}
        self.assertIn(0, took, "the canary had it")
        self.assertEqual(len(took), 2, "two had it, and the third failed")
        history = json.loads(self.site.run("releases", CHANNEL, "--json", "--socket", fleet.agents[5].socket).stdout)
        newest = history["releases"][0]
        self.assertEqual((newest["seq"], newest["manifest"], len(newest["nodes"])), (2, bad, NODES))
        self.assertTrue(all(node["step"] == "halted" for node in newest["nodes"]), newest)
        bytes_in = [agent.bytes_in() for agent in fleet.agents]
        self.assertEqual(os.path.getsize(self.site.path("turns")), 3, "nobody came after the one that failed")
        wait = f"{1e3 * longest_wait(answers):.0f} ms"
        report(answers=len(answers), served_it=sorted(took), longest_wait=wait, bytes_in=sum(bytes_in))

    def test_the_publisher_dies_before_the_commit_and_another_commits(self):
        # One node is slow to take it: there is time to kill the publisher.
        fleet = self.fleet()
        fleet.ask_all_the_time()
        old = self.order[0]
        laggard = fleet.agents[NODES - 1]
        os.kill(laggard.process.pid, signal.SIGSTOP)
        try:
            manifest = self.publish(fleet, 1, "--policy", "synchronous")
            for agent in fleet.agents[:-1]:
                agent.wait_until("is prepared", lambda s: self.rollout(s)["phase"] == "staged")
            self.publisher.kill()
        finally:
            os.kill(laggard.process.pid, signal.SIGCONT)
        laggard.wait_until("is prepared", lambda s: self.rollout(s)["phase"] == "staged")
        for agent in fleet.agents:
            self.assertEqual(agent.status()["engines"][0]["serving"], old, "nobody switches without the word")
        key = ("--publisher-key", self.site.publisher_key, "--socket", fleet.agents[3].socket)
        self.site.run("release", "commit", CHANNEL, *key)
        fleet.wait_ready(manifest)
        fleet.wait_answers(manifest)
        answers = fleet.stop_asking()
        check_values(answers, self.values)
        check_no_mixture(answers, self.order)
        report(answers=len(answers), longest_wait=f"{1e3 * longest_wait(answers):.0f} ms")

    def test_an_operator_rolls_back_and_nothing_is_fetched(self):
        fleet = self.fleet()
        fleet.ask_all_the_time()
        first = self.order[0]
        second = self.publish(fleet, 1, "--policy", "synchronous")
        fleet.wait_ready(second)
        self.publisher.stop()
        before = [agent.bytes_in() for agent in fleet.agents]
        key = ("--publisher-key", self.site.publisher_key, "--socket", fleet.agents[3].socket)
        at = time.monotonic()
        self.site.run("rollback", CHANNEL, *key, "--json")
        fleet.wait_ready(first)
        took = time.monotonic() - at
        fleet.wait_answers(first)
        self.assertEqual([agent.bytes_in() for agent in fleet.agents], before, "what it goes back to is still here")
        answers = fleet.stop_asking()
        check_values(answers, self.values)
        status = fleet.agents[0].status()["channels"][0]
        self.assertEqual((status["seq"], status["manifest"], status["word"]), (3, first, "commit"))
        report(answers=len(answers), back_after=f"{took:.2f} s", longest_wait=f"{1e3 * longest_wait(answers):.0f} ms")

    def test_each_side_of_a_comparison_has_its_own(self):
        labels = [["ab=x"] if i % 2 else ["ab=y"] for i in range(NODES)]
        sides = {side: [i for i in range(NODES) if labels[i] == [f"ab={side}"]] for side in "xy"}
        fleet = self.fleet(labels)
        fleet.ask_all_the_time()
        begun = [agent.bytes_in() for agent in fleet.agents]
        tensor = 4 * 256 * 1024
        manifests = {}
        publishers = [self.publisher]
        # Both change one tensor in the same way, and another each in its own.
        for n, (side, own) in enumerate((("x", 5), ("y", 6)), 1):
            directory = self.site.path(f"side-{side}")
            value = checkpoint(directory, 1, (2, own))
            options = ("--policy", "synchronous", "--subset", f"ab={side}")
            publisher = self.site.publisher(f"publisher-{side}", directory, *options, peers=fleet.addresses(3))
            publishers.append(publisher)
            manifests[side] = publisher.manifest
            self.values[publisher.manifest] = value
        for side, nodes in sides.items():
            fleet.wait_ready(manifests[side], nodes)
            fleet.wait_answers(manifests[side], nodes)
        answers = fleet.stop_asking()
        check_values(answers, self.values)
        for answer in answers:
            side = "x" if answer.node in sides["x"] else "y"
            self.assertIn(answer.release, (self.order[0], manifests[side]))
        fetched = [agent.bytes_in() - before for agent, before in zip(fleet.agents, begun)]
        self.assertEqual(fetched, [2 * tensor] * NODES, "each fetches what changed for it, once")
        sent = sum(publisher_bytes_out(p, fleet) for p in publishers)
        report(answers=len(answers), fetched_by_each=fetched[0], from_publishers=sent)

    def rollout(self, status):
        return status["channels"][0]["rollout"] or {"step": "", "phase": "", "reason": ""}


def publisher_bytes_out(publisher, fleet):
    """What nodes say to have from it."""
    peers = [p for agent in fleet.agents for p in agent.status()["peers"] if p["name"] == publisher.name]
    return sum(peer["bytes_from"] for peer in peers)


if __name__ == "__main__":
    unittest.main()
