"""Nodes that leave: one that only it can give is handed over first; one that is killed is waited for."""

import json
import signal
import unittest

from answering_fleet import Fleet, checkpoint
from mesh import CHANNEL, PATIENCE, MeshTest, needs
from web import Web

NODES = 8
#: Of the only holder: one copy of the checkpoint takes it seconds.
UPLOAD_LIMIT = "24MiB"


@needs("numpy")
class Drain(MeshTest):
    def only_holder(self):
        """A node that holds a release which nobody else has any more, and gives it slowly."""
        self.value = checkpoint(self.site.path("release"), 0, rows=2048)
        publisher = self.site.publisher("publisher", self.site.path("release"))
        options = ("--hold", "all", "--store", self.site.path("store"), "--upload-limit", UPLOAD_LIMIT)
        holder = self.site.agent("holder", *options, peers=[publisher.address])
        holder.wait_holds(publisher.manifest)
        self.manifest = publisher.manifest
        publisher.kill()
        return holder

    def pulling(self, holder):
        """Eight nodes with an engine each that wait for that release; returns when they have some of it."""
        fleet = Fleet(self.site, NODES, peers=[holder.address])
        fleet.engines = [fleet.start_engine(i) for i in range(NODES)]
        for agent in fleet.agents:
            agent.wait_until("an engine waits", lambda status: status["engines"])
        # All of them together have less than there is, and so does each.
        fleet.agents[0].wait_until("some of it is here", lambda status: status["traffic"]["chunks_verified"] >= 1)
        self.assertGreater(len(holder.status()["peers"]), 0)
        return fleet

    def assert_complete(self, fleet):
        for engine in fleet.engines:
            self.assertEqual(engine.event("ready")["manifest"], self.manifest)
        fleet.wait_ready(self.manifest)
        fleet.ask_all_the_time()
        fleet.wait_answers(self.manifest)
        self.assertEqual({answer.value for answer in fleet.stop_asking()}, {self.value})
        for agent in fleet.agents:
            with open(agent.process.log, encoding="utf-8") as file:
                wrong = [line for line in file if " ERROR " in line or "engine" in line and " WARN " in line]
            self.assertEqual(wrong, [], agent.name)

    def test_the_only_holder_hands_over_what_it_alone_has(self):
        holder = self.only_holder()
        web = Web(holder)
        fleet = self.pulling(holder)
        with web.events() as events:
            drained = self.site.run("drain", "--socket", holder.socket, "--grace", "100s", "--json")
            told = []
            for kind, _, _ in events:
                told.append(kind)
                if kind == "left":
                    break
        self.assertEqual(json.loads(drained.stdout), {"event": "drained", "whole": True, "sole_chunks": 0})
        self.assertEqual([kind for kind in told if not kind.startswith("peer-")], ["draining", "drained", "left"])
        self.assertEqual(holder.process.wait(), 0)
        self.assert_complete(fleet)

    def test_a_request_to_terminate_drains_too_and_a_second_one_does_not_wait(self):
        holder = self.only_holder()
        self.pulling(holder)
        holder.process.child.send_signal(signal.SIGTERM)
        holder.wait_until("it drains", lambda status: status["draining"])
        self.assertEqual(Web(holder).ask("/readyz")[0], 503)
        holder.process.child.send_signal(signal.SIGTERM)
        self.assertEqual(holder.process.wait(), 0)

    def test_a_grace_that_is_too_short_is_kept_and_told(self):
        holder = self.only_holder()
        self.pulling(holder)
        drained = json.loads(self.site.run("drain", "--socket", holder.socket, "--grace", "0s", "--json").stdout)
        self.assertFalse(drained["whole"])
        self.assertGreater(drained["sole_chunks"], 0)
        self.assertEqual(holder.process.wait(), 0)

    def test_one_that_is_killed_costs_time_and_nothing_else(self):
        holder = self.only_holder()
        fleet = self.pulling(holder)
        holder.kill()
        for agent in fleet.agents:
            web = Web(agent)
            status, body = web.ask("/readyz")
            self.assertEqual((status, body["channels"][0]["manifest"]), (503, self.manifest))
        # It listens on another port than before; a node of its own machine would not.
        holder.peers = [fleet.agents[0].address]
        holder.start()
        self.assert_complete(fleet)

    def test_the_publisher_may_return_in_its_place(self):
        holder = self.only_holder()
        fleet = self.pulling(holder)
        holder.kill()
        self.site.publisher("publisher-again", self.site.path("release"), peers=[fleet.agents[0].address])
        self.assert_complete(fleet)


if __name__ == "__main__":
    unittest.main()
