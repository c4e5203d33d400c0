"""Embeddings of a real model, served from registered memory that a mesh fills and updates."""

import random
import threading
import time
import unittest

from mesh import PATIENCE, Client, Failure, MeshTest, Safetensors, model_directory, needs

TEXTS = [
    "A man is eating food.",
    "Someone in a gorilla costume is playing a set of drums.",
    "The river carries what the mountain lets go.",
    "Wo ist der nächste Bahnhof?",
    "0.1 + 0.2 = 0.30000000000000004",
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer the slings and "
    "arrows of outrageous fortune, or to take arms against a sea of troubles",
]
#: As many as there are texts; each asks its own, again and again.
CLIENTS = len(TEXTS)
#: The processes are killed at instants drawn from this.
SEED = 7


class Queries:
    """Clients that ask all the time, and whose every answer is compared with what it may be."""

    def __init__(self, place, expected):
        self._place, self._expected = place, expected
        self._changed = threading.Condition()
        self._stop = False
        self._counts = {}
        self._faults = []
        self._threads = [threading.Thread(target=self._ask, args=(text,), daemon=True) for text in TEXTS]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        with self._changed:
            self._stop = True
        for thread in self._threads:
            thread.join(PATIENCE)
            if thread.is_alive():
                self._faults.append("a client still waits for its answer")

    def wait_for(self, manifest):
        """Until every client has had one more answer of ``manifest``."""
        with self._changed:
            goals = {text: self._counts.get((text, manifest), 0) + 1 for text in TEXTS}
            arrived = self._changed.wait_for(
                lambda: self._faults or all(self._counts.get((t, manifest), 0) >= n for t, n in goals.items()), PATIENCE
            )
            if not arrived or self._faults:
                raise Failure(f"no answers of {manifest}: counts {self._counts}, faults {self._faults}")

    def check(self):
        if self._faults:
            raise Failure(f"{len(self._faults)} faults, the first: {self._faults[0]}")
        return self._counts

    def _ask(self, text):
        client = Client(self._place)
        try:
            while not self._stop:
                self._note(text, *client.ask(text))
        except Exception as error:
            with self._changed:
                self._faults.append(f"{type(error).__name__}: {error}")
                self._changed.notify_all()
        finally:
            client.close()

    def _note(self, text, release, embedding):
        with self._changed:
            if release not in self._expected:
                self._faults.append(f"an answer of an unknown release: {release}")
            elif self._expected[release][text] != embedding:
                others = [m for m, answers in self._expected.items() if answers[text] == embedding]
                what = f"it is what {others[0]} says" if others else "no release says that"
                self._faults.append(f"the answer to {text!r} is said to be of {release}, and {what}")
            key = (text, release)
            self._counts[key] = self._counts.get(key, 0) + 1
            self._changed.notify_all()


@needs("torch")
class Serving(MeshTest):
    def answers(self, name, directory):
        """What the model in a directory says to each text, from its file."""
        process = self.site.reference(name, directory)
        process.say({"texts": TEXTS[:1]})
        process.expect(lambda line: "embeddings" in line, "an embedding")
        found = {}
        for text in TEXTS:
            process.say({"texts": [text]})
            found[text] = process.expect(lambda line: "embeddings" in line, "an embedding")["embeddings"][0]
        process.kill()
        return found

    def mesh(self, *engine_node_options):
        """A publisher of the model, a node that holds all of it, one whose engine serves it."""
        publisher = self.site.publisher("publisher", model_directory())
        holder = self.site.agent("holder", "--hold", "all", peers=[publisher.address])
        node = self.site.agent("node", *engine_node_options, peers=[holder.address])
        engine = self.site.minilm(node, "engine")
        ready = engine.expect(lambda line: "ready" in line, "that it is ready")
        self.assertEqual(ready["release"], publisher.manifest)
        return publisher, holder, node, engine

    def test_an_update_while_it_is_queried(self):
        second, changed = self.site.variant("second")
        half, _ = self.site.variant("half", layers=[0])
        old, new = self.answers("old", model_directory()), self.answers("new", second)
        mixture = self.answers("mixture", half)
        for text in TEXTS:
            answers = [old[text], new[text], mixture[text]]
            self.assertTrue(all(a != b for i, a in enumerate(answers) for b in answers[:i]), "they can be told apart")
        publisher, _, node, engine = self.mesh()
        file = Safetensors(f"{model_directory()}/model.safetensors")
        self.assertLessEqual(node.bytes_in(), file.bytes(file.entries), "each chunk is fetched once")
        client = Client(engine.place)
        for text in TEXTS:
            self.assertEqual(client.ask(text), (publisher.manifest, old[text]), "bit for bit")
        client.close()

        before = node.bytes_in()
        expected = {publisher.manifest: old}
        with Queries(engine.place, expected) as queries:
            queries.wait_for(publisher.manifest)
            # Published by a process that knows one address; `expected` is complete before it is heard of.
            manifest = self.site.manifest(second)["manifest"]
            expected[manifest] = new
            self.site.publisher("publisher-2", second, peers=[node.address])
            status = node.wait_engine("serves the second", "engine", lambda e: e["serving"] == manifest and e["ready"])
            queries.wait_for(manifest)
        counts = queries.check()
        for text in TEXTS:
            self.assertGreater(counts[text, publisher.manifest], 0)
            self.assertGreater(counts[text, manifest], 0)
        self.assertIsNone(status["reason"])
        self.assertEqual(node.bytes_in() - before, file.bytes(changed), "only what changed moves")

    def test_updates_there_and_back_of_every_byte(self):
        second, _ = self.site.variant("second", change=1.25, layers=[])
        old, new = self.answers("old", model_directory()), self.answers("new", second)
        first, holder, node, engine = self.mesh()
        manifests = [first.manifest, self.site.manifest(second)["manifest"]]
        with Queries(engine.place, dict(zip(manifests, (old, new)))) as queries:
            for turn in range(1, 5):
                place = (model_directory(), second)[turn % 2]
                publisher = self.site.publisher(f"publisher-{turn}", place, peers=[holder.address])
                self.assertEqual(publisher.manifest, manifests[turn % 2])
                node.wait_engine("serves it", "engine", lambda e: e["serving"] == publisher.manifest and e["ready"])
                queries.wait_for(publisher.manifest)
        queries.check()

    def test_the_agent_is_killed_and_started_again(self):
        second, changed = self.site.variant("second")
        old, new = self.answers("old", model_directory()), self.answers("new", second)
        publisher, holder, node, engine = self.mesh()
        manifest = self.site.manifest(second)["manifest"]
        file = Safetensors(f"{model_directory()}/model.safetensors")
        with Queries(engine.place, {publisher.manifest: old, manifest: new}) as queries:
            queries.wait_for(publisher.manifest)
            node.kill()
            queries.wait_for(publisher.manifest)  # Nobody is there, and it serves on.
            node.start()
            node.wait_engine("is back", "engine", lambda e: e["serving"] == publisher.manifest and e["ready"])
            self.assertEqual(node.bytes_in(), 0, "what the engine's memory holds is not fetched again")
            self.site.publisher("publisher-2", second, peers=[holder.address])
            node.wait_engine("serves the second", "engine", lambda e: e["serving"] == manifest and e["ready"])
            queries.wait_for(manifest)
        queries.check()
        self.assertEqual(node.bytes_in(), file.bytes(changed))

    def test_the_agent_is_killed_in_the_middle_of_updates(self):
        second, _ = self.site.variant("second", change=1.25, layers=[])
        old, new = self.answers("old", model_directory()), self.answers("new", second)
        first, holder, node, engine = self.mesh()
        manifests = [first.manifest, self.site.manifest(second)["manifest"]]
        instants = random.Random(SEED)
        with Queries(engine.place, dict(zip(manifests, (old, new)))) as queries:
            for turn in range(1, 7):
                place = (model_directory(), second)[turn % 2]
                publisher = self.site.publisher(f"publisher-{turn}", place, peers=[holder.address])
                # Not to wait for something: anywhere between hearing of the release and serving it.
                time.sleep(instants.uniform(0, 0.5))
                node.kill()
                node.start()
                node.wait_engine("serves it", "engine", lambda e: e["serving"] == publisher.manifest and e["ready"])
                queries.wait_for(publisher.manifest)
        queries.check()


if __name__ == "__main__":
    unittest.main()
