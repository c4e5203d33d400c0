"""Engines whose memory is a GPU's, or rather a twin's: host memory that the agent treats as that of a device."""

import unittest

from mesh import MeshTest, Safetensors, model_directory, needs

TWIN = "GPU-7e57ed00-0000-4000-8000-000000000001"
INNER = "encoder.layer.0.intermediate.dense.weight"
WORDS = "embeddings.word_embeddings.weight"


def expected(file, names):
    import hashlib

    return {name: hashlib.sha256(file.tensor(name)).hexdigest() for name in names}


@needs("numpy", "torch")
class Gpu(MeshTest):
    def fleet(self, *options):
        publisher = self.site.publisher("publisher", model_directory())
        holder = self.site.agent("holder", "--hold", "all", peers=[publisher.address])
        node = self.site.agent("node", "--twin-gpu", TWIN, *options, peers=[holder.address])
        holder.wait_holds(publisher.manifest)
        engine = self.site.engine(node, "engine")
        engine.tell("allocate", hydrate=False)
        # One tensor a second time, where its rows do not follow each other: it lands in parts.
        file = Safetensors(f"{model_directory()}/model.safetensors")
        rows, columns = file.shape(INNER)
        engine.tell("bind", name=INNER, shape=[rows, columns], within=[[rows, columns + 32], [[0, rows, 1], [0, columns, 1]]], key="again")
        engine.tell("on_twin", device=TWIN)
        engine.tell("hydrate")
        return publisher, holder, node, engine

    def check(self, engine, directory, manifest):
        file = Safetensors(f"{directory}/model.safetensors")
        sums = expected(file, file.entries)
        sums["again"] = sums[INNER]
        found = engine.tell("sums")
        self.assertEqual(found["release"], manifest)
        self.assertEqual(found["sums"], sums)

    def test_landed_staged_and_applied(self):
        for landing in ("shadow", "host"):
            with self.subTest(landing):
                publisher, holder, node, engine = self.fleet("--landing", landing)
                self.assertEqual(engine.tell("wait"), publisher.manifest)
                self.check(engine, model_directory(), publisher.manifest)
                second, _ = self.site.variant(f"second-{landing}")
                later = self.site.publisher("later", second, peers=[holder.address])
                engine.expect(lambda l: l.get("event") == "resumed" and l["manifest"] == later.manifest, "it resumes")
                node.wait_engine("it serves the second", "engine", lambda e: e["serving"] == later.manifest)
                self.check(engine, second, later.manifest)
                for process in (engine, publisher, later, holder, node):
                    process.kill()

    def test_an_agent_that_died_leaves_what_the_next_one_finds(self):
        publisher, holder, node, engine = self.fleet()
        self.assertEqual(engine.tell("wait"), publisher.manifest)
        node.kill()
        node.start()
        node.wait_engine("it serves again", "engine", lambda e: e["serving"] == publisher.manifest and e["ready"])
        self.assertEqual(node.bytes_in(), 0, "what lies on the GPU is found there, not fetched")
        self.check(engine, model_directory(), publisher.manifest)

    def test_what_is_no_gpu_is_refused(self):
        publisher = self.site.publisher("publisher", model_directory())
        node = self.site.agent("node", peers=[publisher.address])
        engine = self.site.engine(node, "engine")
        engine.tell("allocate", names=[WORDS], hydrate=False)
        engine.tell("on_twin", device="GPU-7e57ed00-0000-4000-8000-00000000ffff")
        self.assertRegex(engine.refusal("hydrate"), "no NVIDIA driver is here|no GPU GPU-7e57ed00")
        wrong = self.site.engine(node, "wrong")
        wrong.tell("allocate", names=[WORDS], hydrate=False)
        wrong.tell("on_twin", device="0")
        self.assertIn("is not a GPU's UUID", wrong.refusal("hydrate"))
        # The agent is none the worse.
        right = self.site.engine(node, "right")
        right.tell("allocate", names=[WORDS])
        self.assertEqual(right.tell("wait"), publisher.manifest)


if __name__ == "__main__":
    unittest.main()
