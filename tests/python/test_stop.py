"""A request to terminate is heard whenever it comes."""

import random
import time
import unittest

from mesh import CHANNEL, MeshTest, Process, model_directory, needs

TIMES = 20
SEED = 5


@needs()
class Stop(MeshTest):
    def test_a_publisher_ends_whenever_it_is_asked(self):
        instants = random.Random(SEED)
        for turn in range(TIMES):
            name = f"publisher-{turn}"
            options = ("--channel", CHANNEL, "--json", "--publisher-key", self.site.publisher_key)
            command = self.site.node("publish", model_directory(), *options, name=name, peers=[])
            publisher = self.site.started(Process(self.site, name, command, self.site.environment))
            publisher.event("hashed")
            # Not to wait for something: anywhere in its busy first moments.
            time.sleep(instants.uniform(0, 0.05))
            self.assertIn(publisher.stop(), (0, -15), "it left the mesh, or was not in it yet")

    def test_an_agent_ends_when_asked(self):
        publisher = self.site.publisher("publisher", model_directory())
        for turn in range(3):
            agent = self.site.agent(f"agent-{turn}", peers=[publisher.address])
            self.assertEqual(agent.stop(), 0)


if __name__ == "__main__":
    unittest.main()
