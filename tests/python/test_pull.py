"""A whole model directory through the mesh, and back as files."""

import json
import os
import unittest

from mesh import CHANNEL, MODEL_BYTES, MeshTest, model_directory, needs, sums


@needs()
class Pull(MeshTest):
    def test_the_model_directory_is_rebuilt_bit_for_bit(self):
        source = model_directory()
        expected = sums(source)
        self.assertEqual(os.path.getsize(os.path.join(source, "model.safetensors")), MODEL_BYTES)
        self.assertGreater(len(expected), 5, "a model directory is more than its weights")
        publisher = self.site.publisher("publisher", source)
        first, again = self.site.path("first"), self.site.path("again")

        pulled = self.pull(CHANNEL, first, publisher)
        self.assertEqual(sums(first), expected)
        self.assertEqual(pulled["manifest"], publisher.manifest)
        self.assertEqual(pulled["bytes_in"], self.site.manifest(source)["distinct_bytes"])
        self.site.run("manifest", "verify", source, first)
        self.assertEqual(
            self.site.manifest(first)["manifest"], publisher.manifest, "the same content has the same manifest"
        )

        # By the manifest's hash alone, and what is there is not fetched again.
        pulled = self.pull(publisher.manifest, first, publisher)
        self.assertEqual(pulled["bytes_in"], 0)
        self.pull(publisher.manifest, again, publisher)
        self.assertEqual(sums(again), expected)

    def test_a_damaged_file_is_found_and_mended(self):
        source, target = model_directory(), self.site.path("pulled")
        publisher = self.site.publisher("publisher", source)
        self.pull(CHANNEL, target, publisher)
        with open(os.path.join(target, "model.safetensors"), "r+b") as file:
            file.seek(MODEL_BYTES // 2)
            byte = file.read(1)
            file.seek(MODEL_BYTES // 2)
            file.write(bytes([byte[0] ^ 1]))
        os.remove(os.path.join(target, "vocab.txt"))
        said = self.site.run("manifest", "verify", source, target, code=4)
        for name in ("model.safetensors", "vocab.txt"):
            self.assertIn(name, said.stdout + said.stderr)
        self.assertNotIn("tokenizer.json", said.stdout + said.stderr)

        pulled = self.pull(CHANNEL, target, publisher)
        self.assertEqual(sums(target), sums(source))
        self.assertLess(pulled["bytes_in"], MODEL_BYTES // 5, "what was right is not fetched again")
        self.site.run("manifest", "verify", source, target)

    def test_from_an_agent_after_the_publisher_is_gone(self):
        publisher = self.site.publisher("publisher", model_directory())
        holder = self.site.agent("holder", "--hold", "all", peers=[publisher.address])
        holder.wait_holds(publisher.manifest)
        publisher.kill()
        target = self.site.path("pulled")
        self.pull(CHANNEL, target, holder)
        self.assertEqual(sums(target), sums(model_directory()))

    def pull(self, what, target, source):
        """Runs ``aquifer pull`` to its end; returns what it reports."""
        options = ("--to", target, "--json", "--timeout", "100", "--trust", self.site.trust)
        command = self.site.node("pull", what, *options, name="puller", peers=[source.address])
        done = self.site.run(*command[3:])
        return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    unittest.main()
