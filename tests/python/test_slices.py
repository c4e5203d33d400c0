"""Engines that hold parts of tensors, in arrays of their own layout."""

import hashlib
import threading
import unittest

from mesh import MeshTest, Safetensors, model_directory, needs

WORDS = "embeddings.word_embeddings.weight"
POSITIONS = "embeddings.position_embeddings.weight"
TYPES = "embeddings.token_type_embeddings.weight"
LAYER = "encoder.layer.{}."
INNER = LAYER.format(0) + "intermediate.dense.weight"
OUTER = LAYER.format(0) + "output.dense.weight"
BIAS = LAYER.format(0) + "output.dense.bias"
DENSE = LAYER.format(1) + "attention.output.dense.weight"
QUERY, KEY, VALUE = (LAYER.format(2) + f"attention.self.{part}.weight" for part in ("query", "key", "value"))
F32 = 4


class Parts:
    """What is bound where, and what must lie there in the end."""

    def __init__(self, file):
        self._file = file
        self._bound = {}

    def bind(self, engine, name, index=None, **how):
        """Tells ``engine`` to bind a slice of a tensor, all of it if there is no ``index``."""
        shape = self._file.shape(name)
        part = index or [[0, n] for n in shape]
        slices = {} if index is None else {"index": index, "tensor_shape": shape}
        engine.tell("bind", name=name, shape=[end - start for start, end in part], **slices, **how)
        self._bound.setdefault(engine, {})[name] = part

    def tensors(self):
        return {name for parts in self._bound.values() for name in parts}

    def expected(self, engine, file):
        return {name: sum_of(file, name, part) for name, part in self._bound[engine].items()}


def sum_of(file, name, part):
    """SHA-256 of a slice in row-major order."""
    content = memoryview(file.tensor(name))
    if len(part) == 1:
        return hashlib.sha256(content[part[0][0] * F32 : part[0][1] * F32]).hexdigest()
    (top, bottom), (left, right) = part
    columns = file.shape(name)[1]
    rows = (content[(row * columns + left) * F32 : (row * columns + right) * F32] for row in range(top, bottom))
    return hashlib.sha256(b"".join(rows)).hexdigest()


@needs("torch", "numpy")
class Slices(MeshTest):
    def test_three_engines_share_one_node(self):
        second, _ = self.site.variant("second", layers=[])
        old, new = (Safetensors(f"{place}/model.safetensors") for place in (model_directory(), second))
        publisher = self.site.publisher("publisher", model_directory())
        holder = self.site.agent("holder", "--hold", "all", peers=[publisher.address])
        node = self.site.agent("node", peers=[holder.address])
        ranks = [self.site.engine(node, f"rank{rank}") for rank in (0, 1)]
        views = self.site.engine(node, "views")
        engines = [*ranks, views]
        parts = Parts(old)
        for rank, engine in enumerate(ranks):
            # Neither cut is a chunk's edge: one chunk of the words, and each of the others, is in both.
            for name in (WORDS, INNER):
                rows, columns = old.shape(name)
                half = rows // 2
                parts.bind(engine, name, [[rank * half, rank * half + half], [0, columns]])
            rows, columns = old.shape(OUTER)
            parts.bind(engine, OUTER, [[0, rows], [rank * columns // 2, (rank + 1) * columns // 2]])
            parts.bind(engine, BIAS)
        size = old.shape(QUERY)[0]
        for number, name in enumerate((QUERY, KEY, VALUE)):
            beside = [[size, 3 * size], [[0, size, 1], [number * size, (number + 1) * size, 1]]]
            parts.bind(views, name, within=beside)
        parts.bind(views, DENSE, within="transposed")
        rows, columns = old.shape(POSITIONS)
        parts.bind(views, POSITIONS, within=[[2 * rows, columns], [[0, 2 * rows, 2], [0, columns, 1]]])
        parts.bind(views, INNER, [[100, 101], [7, 300]])
        parts.bind(views, TYPES, [[1, 2], [0, 384]])

        for engine in engines:
            engine.tell("hydrate")
        self.together(engines, lambda engine: self.assertEqual(engine.tell("wait"), publisher.manifest))
        for engine in engines:
            self.assertEqual(engine.tell("sums"), {"release": publisher.manifest, "sums": parts.expected(engine, old)})
        fetched = self.chunk_bytes(model_directory(), parts.tensors())
        self.assertEqual(node.bytes_in(), fetched, "each chunk is fetched once for all engines")
        self.assertLess(fetched, old.bytes(old.entries), "and what none of them holds not at all")

        publisher = self.site.publisher("publisher-2", second, peers=[holder.address])
        for engine in engines:
            engine.expect(
                lambda e: e.get("event") == "resumed" and e["manifest"] == publisher.manifest, "that it resumed"
            )
            self.assertEqual(engine.tell("sums"), {"release": publisher.manifest, "sums": parts.expected(engine, new)})
        again = self.chunk_bytes(second, parts.tensors())
        self.assertEqual(node.bytes_in(), fetched + again)

    def test_all_tensors_twice_on_one_node(self):
        publisher = self.site.publisher("publisher", model_directory())
        node = self.site.agent("node", peers=[publisher.address])
        file = Safetensors(f"{model_directory()}/model.safetensors")
        expected = {name: hashlib.sha256(file.tensor(name)).hexdigest() for name in file.entries}
        engines = [self.site.engine(node, f"engine{number}") for number in (0, 1)]
        for engine in engines:
            engine.tell("allocate")
        for engine in engines:
            self.assertEqual(engine.tell("wait"), publisher.manifest)
            self.assertEqual(engine.tell("sums")["sums"], expected)
        self.assertEqual(node.bytes_in(), self.chunk_bytes(model_directory(), expected))

    def together(self, engines, do):
        """For each engine at the same time."""
        faults = []

        def guarded(engine):
            try:
                do(engine)
            except BaseException as error:
                faults.append(error)

        threads = [threading.Thread(target=guarded, args=(engine,)) for engine in engines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if faults:
            raise faults[0]

    def chunk_bytes(self, directory, names):
        """Length of the distinct chunks that some tensors consist of."""
        manifest = self.site.manifest(directory)
        tensors = [t for t in manifest["tensors"] if t["name"] in names]
        own = [chunk for t in tensors for chunk in t.get("chunks", [])]
        packs = [manifest["packs"][t["packed"]["pack"]] for t in tensors if "packed" in t]
        return sum(dict(tuple(chunk) for chunk in own + packs).values())


if __name__ == "__main__":
    unittest.main()
