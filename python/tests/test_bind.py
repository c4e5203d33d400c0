import gc
import itertools
import os
import struct
import unittest

from support import AgentTest, numpy, torch

import aquifer
from aquifer import arrays

WHOLE = list(range(8 * 6))
TENSORS = {
    "w": ("F32", (8, 6), struct.pack("<48f", *WHOLE)),
    "h": ("BF16", (4,), struct.pack("<4H", 0x3F80, 0x4000, 0xC040, 0)),
    "v": ("F32", (3,), struct.pack("<3f", 7, 8, 9)),
    "p": ("F4", (4, 2), bytes(range(4))),
}


def bound(test, *bindings):
    """Binds `(name, array, options)`, lands the tensors, and returns the agent's view."""
    engine, peer = test.engine()
    for name, array, options in bindings:
        engine.bind(name, array, **options)
    engine.hydrate()
    while peer.requests.queue and peer.requests.queue[0]["op"] == "manifest":
        peer.expect("manifest")
    test.hydrated(engine, peer)
    return peer


class Memoryview(AgentTest):
    tensors = TENSORS

    def test_whole(self):
        view = aquifer.empty((8, 6), "F32", framework="memoryview")
        peer = bound(self, ("w", view, {}))
        self.assertEqual(list(itertools.chain(*view.tolist())), WHOLE)
        self.assertEqual(peer.bindings, [{"tensor": "w", "dtype": "F32", "shape": [8, 6], "region": 0, "offset": 0}])
        self.assertFalse(peer.regions[0].fresh)

    def test_slice(self):
        view = aquifer.empty((2, 6), "F32", framework="memoryview")
        bound(self, ("w", view, {"index": slice(3, 5)}))
        self.assertEqual(list(itertools.chain(*view.tolist())), WHOLE[18:30])

    def test_raw_bits_take_their_dtype_from_the_release_or_the_caller(self):
        halves = [aquifer.empty(4, "BF16", framework="memoryview") for _ in range(2)]
        packed = aquifer.empty((4, 2), "F4", framework="memoryview")
        peer = bound(self, ("h", halves[0], {}), ("h", halves[1], {"dtype": "BF16"}), ("p", packed, {}))
        self.assertEqual([b["dtype"] for b in peer.bindings], ["BF16", "BF16", "F4"])
        self.assertEqual(halves[0].tolist(), [0x3F80, 0x4000, 0xC040, 0])
        self.assertEqual(halves[1].tobytes(), halves[0].tobytes())
        self.assertEqual(packed.tolist(), [0, 1, 2, 3])

    def test_an_arena_is_one_region(self):
        arena = aquifer.Arena(4096)
        views = [arena.empty((8, 6), "F32", "memoryview"), arena.empty(3, "F32", "memoryview")]
        peer = bound(self, ("w", views[0], {}), ("v", views[1], {}))
        self.assertEqual([(b["region"], b["offset"]) for b in peer.bindings], [(0, 0), (0, 256)])
        self.assertEqual(views[1].tolist(), [7, 8, 9])
        with self.assertRaisesRegex(aquifer.AquiferError, "do not fit the arena: 512 of 4096"):
            arena.empty(4096, "U8", "memoryview")

    def refused(self, reason, name, array, **options):
        engine, _ = self.engine()
        with self.assertRaisesRegex(aquifer.ArrayError, reason):
            engine.bind(name, array, **options)

    def test_a_dtype_that_the_release_does_not_have(self):
        engine, _ = self.engine()
        engine.tensors()
        with self.assertRaisesRegex(aquifer.ArrayError, "tensor 'w' is F32, not F16"):
            engine.bind("w", aquifer.empty((8, 6), "F16", framework="memoryview"), dtype="F16")

    def test_what_cannot_be_bound_is_refused(self):
        view = aquifer.empty((8, 6), "F32", framework="memoryview")
        self.refused(
            "not in memory that can be shared.*aquifer.empty", "w", memoryview(bytearray(192)).cast("f", (8, 6))
        )
        self.refused("list is not an array", "w", [1.0])
        self.refused("no tensor 'x'", "x", view, index=slice(0, 2))
        self.refused(r"slice of 'w' has shape \[2, 6\], the array has \[8, 6\]", "w", view, index=slice(0, 2))
        self.refused("index 3 drops dimension 0: write 3:4", "w", view, index=3)
        self.refused("a step of 2 in dimension 1", "w", view, index=(slice(None), slice(0, 6, 2)))
        self.refused("stop 9 is outside of dimension 0, which has 8", "w", view, index=slice(0, 9))
        self.refused("3 indices for a tensor of 2", "w", view, index=(slice(1), slice(1), slice(1)))
        self.refused("only slices", "w", view, index=[0, 1])
        self.refused(
            "tensor 'w' is F32; an array that holds I32", "w", aquifer.empty(4, "I32", "memoryview"), index=...
        )
        self.refused("elements are not whole bytes", "p", aquifer.empty(2, "U8", "memoryview"), index=slice(0, 2))
        self.refused("has 4 bytes, the array 5", "p", aquifer.empty(5, "U8", "memoryview"))

    def test_memory_lives_as_long_as_its_arrays(self):
        view = aquifer.empty(3, "F32", framework="memoryview")
        fd = arrays.place(view).mapping.fd
        inode = os.fstat(fd).st_ino
        part = view[1:]
        del view
        gc.collect()
        self.assertEqual(os.fstat(fd).st_ino, inode)
        del part
        gc.collect()
        with self.assertRaises(OSError):
            os.fstat(fd)


class Index(unittest.TestCase):
    def test_as_numpy_means_it(self):
        shape = (4, 5, 6)
        for index, expected in [
            (slice(1, 3), [(1, 3), (0, 5), (0, 6)]),
            (slice(None), [(0, 4), (0, 5), (0, 6)]),
            (..., [(0, 4), (0, 5), (0, 6)]),
            ((..., slice(2, 4)), [(0, 4), (0, 5), (2, 4)]),
            ((slice(-1, None), ..., slice(-2)), [(3, 4), (0, 5), (0, 4)]),
            ((slice(2, 2), slice(3, 1)), [(2, 2), (3, 3), (0, 6)]),
            ((), [(0, 4), (0, 5), (0, 6)]),
        ]:
            self.assertEqual(arrays.ranges(index, shape), expected, index)
        self.assertEqual(arrays.ranges(..., ()), [])


@unittest.skipUnless(numpy, "needs NumPy")
class Numpy(AgentTest):
    tensors = TENSORS

    def setUp(self):
        super().setUp()
        self.whole = numpy.array(WHOLE, dtype="float32").reshape(8, 6)

    def test_slices_and_strides(self):
        s = numpy.s_
        rows = aquifer.empty((2, 6), numpy.float32)
        columns = aquifer.empty((8, 10), numpy.float32)
        turned = aquifer.empty((6, 8), numpy.float32)
        spread = aquifer.empty((16, 3), numpy.float32)
        inner = aquifer.empty((8, 2, 3), numpy.float32)
        peer = bound(
            self,
            ("w", rows, {"index": s[3:5]}),
            ("w", columns[:, 1:7], {}),
            ("w", turned.T, {}),
            ("w", spread[::2, 1:], {"index": s[:, 4:]}),
            ("w", inner[:, 1], {"index": s[..., 3:], "tensor_shape": (8, 6)}),
        )
        self.assertTrue((rows == self.whole[3:5]).all())
        self.assertTrue((columns[:, 1:7] == self.whole).all())
        self.assertFalse(columns[:, 0].any() or columns[:, 7:].any())
        self.assertTrue((turned.T == self.whole).all())
        self.assertTrue((spread[::2, 1:] == self.whole[:, 4:]).all())
        self.assertFalse(spread[1::2].any() or spread[:, 0].any())
        self.assertTrue((inner[:, 1] == self.whole[:, 3:]).all())
        self.assertFalse(inner[:, 0].any())
        self.assertEqual(peer.bindings[1]["strides"], [40, 4])
        self.assertEqual(peer.bindings[2]["strides"], [4, 32])
        self.assertNotIn("strides", peer.bindings[0])

    def test_a_whole_tensor_needs_no_release(self):
        self.agent.tensors = None
        engine, peer = self.engine()
        engine.bind("w", aquifer.empty((8, 6), numpy.float32))
        engine.hydrate()
        peer.expect("hydrate")

    def test_what_cannot_be_bound_is_refused(self):
        array = aquifer.empty((8, 6), numpy.float32)
        for reason, wrong in [
            ("not in memory that can be shared", numpy.zeros((8, 6), "float32")),
            ("backwards", array[::-1]),
            ("share memory", numpy.broadcast_to(array[:1], (8, 6))),
            ("byte order", array.view(">f4")),
            ("no name in safetensors", array.view("S4")),
        ]:
            engine, _ = self.engine()
            with self.assertRaisesRegex(aquifer.ArrayError, reason):
                engine.bind("w", wrong)

    def test_empty_understands_dtypes(self):
        self.assertEqual(aquifer.empty(3, "int16", framework="numpy").dtype, numpy.int16)
        self.assertEqual(aquifer.empty(3, "BF16", framework="numpy").dtype, numpy.uint16)
        with self.assertRaisesRegex(aquifer.AquiferError, "not a dtype"):
            aquifer.empty(3, "float77")
        with self.assertRaisesRegex(aquifer.AquiferError, "not a dtype"):
            aquifer.empty(3, numpy.dtype("M8[s]"))


@unittest.skipUnless(torch, "needs PyTorch")
class Torch(AgentTest):
    tensors = TENSORS

    def test_slices_and_strides(self):
        whole = torch.tensor(WHOLE, dtype=torch.float32).reshape(8, 6)
        turned = aquifer.empty((6, 8), torch.float32)
        rows = aquifer.empty((4, 6), torch.float32)
        half = aquifer.empty(4, torch.bfloat16)
        bound(self, ("w", turned.t(), {}), ("w", rows[1:3], {"index": slice(2, 4)}), ("h", half, {}))
        self.assertTrue(torch.equal(turned.t(), whole))
        self.assertTrue(torch.equal(rows[1:3], whole[2:4]))
        self.assertFalse(rows[0].any() or rows[3].any())
        self.assertEqual(half.tolist(), [1, 2, -3, 0])

    def test_a_parameter_of_a_module(self):
        layer = torch.nn.Linear(6, 8)
        layer.weight.data = aquifer.empty((8, 6), torch.float32)
        bound(self, ("w", layer.weight, {}))
        self.assertEqual(layer.weight.flatten().tolist(), WHOLE)

    def test_other_memory_is_refused(self):
        engine, _ = self.engine()
        with self.assertRaisesRegex(aquifer.ArrayError, "not in memory that can be shared"):
            engine.bind("w", torch.zeros(8, 6))
        with self.assertRaisesRegex(aquifer.ArrayError, "only dense"):
            engine.bind("w", torch.zeros(8, 6).to_sparse())


if __name__ == "__main__":
    unittest.main()
