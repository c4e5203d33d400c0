import io
import struct
import threading
import unittest

from support import PATIENCE, AgentTest, manifest, numpy, release, torch

import aquifer
from aquifer import progress

TENSORS = {
    "a.weight": ("F32", (2, 3), struct.pack("<6f", *range(6))),
    "b.scalar": ("I64", (), struct.pack("<q", -5)),
    "c.empty": ("F32", (0, 4), b""),
    "d.half": ("BF16", (3,), struct.pack("<3H", 0x3F80, 0x4000, 0xC040)),
    "e.eight": ("F8_E4M3", (2, 2), bytes([0x38, 0x40, 0xB8, 0])),
    "f.packed": ("F4", (4, 2), bytes(range(4))),
    "g.strange": ("X9", (7,), b"strange"),
    "h.flags": ("BOOL", (3,), bytes([1, 0, 1])),
    "i.f16": ("F16", (2,), struct.pack("<2e", 1.5, -2)),
}


class Allocate(AgentTest):
    tensors = TENSORS

    def allocate(self, framework):
        engine, peer = self.engine()
        weights = engine.allocate(framework=framework)
        peer.expect("manifest")
        self.hydrated(engine, peer)
        self.assertEqual(list(weights), sorted(TENSORS))
        return weights

    def test_memoryview(self):
        weights = self.allocate("memoryview")
        self.assertEqual(weights["a.weight"].tolist(), [[0, 1, 2], [3, 4, 5]])
        self.assertEqual(weights["b.scalar"].tobytes(), struct.pack("<q", -5))
        self.assertEqual(weights["c.empty"].nbytes, 0)
        self.assertEqual(weights["d.half"].tolist(), [0x3F80, 0x4000, 0xC040])
        self.assertEqual(weights["e.eight"].tolist(), [[0x38, 0x40], [0xB8, 0]])
        self.assertEqual(weights["f.packed"].tolist(), [0, 1, 2, 3])
        self.assertEqual(weights["g.strange"].tobytes(), b"strange")
        self.assertEqual(weights["h.flags"].tolist(), [True, False, True])

    @unittest.skipUnless(numpy, "needs NumPy")
    def test_numpy(self):
        weights = self.allocate("numpy")
        self.assertEqual(weights["a.weight"].dtype, numpy.float32)
        self.assertEqual(weights["a.weight"].tolist(), [[0, 1, 2], [3, 4, 5]])
        self.assertEqual(weights["b.scalar"].shape, ())
        self.assertEqual(int(weights["b.scalar"]), -5)
        self.assertEqual(weights["c.empty"].shape, (0, 4))
        self.assertEqual(weights["d.half"].dtype, numpy.uint16)
        self.assertEqual(weights["e.eight"].dtype, numpy.uint8)
        self.assertEqual(weights["f.packed"].tolist(), [0, 1, 2, 3])
        self.assertEqual(weights["g.strange"].tobytes(), b"strange")
        self.assertEqual(weights["i.f16"].tolist(), [1.5, -2])

    @unittest.skipUnless(torch, "needs PyTorch")
    def test_torch(self):
        weights = self.allocate("torch")
        self.assertEqual(weights["a.weight"].tolist(), [[0, 1, 2], [3, 4, 5]])
        self.assertEqual(weights["b.scalar"].item(), -5)
        self.assertEqual(tuple(weights["c.empty"].shape), (0, 4))
        self.assertEqual(weights["d.half"].dtype, torch.bfloat16)
        self.assertEqual(weights["d.half"].tolist(), [1, 2, -3])
        eight = weights["e.eight"]
        self.assertEqual(eight.dtype, getattr(torch, "float8_e4m3fn", torch.uint8))
        self.assertEqual(eight.view(torch.uint8).tolist(), [[0x38, 0x40], [0xB8, 0]])
        self.assertEqual(weights["f.packed"].tolist(), [0, 1, 2, 3])
        self.assertEqual(weights["h.flags"].tolist(), [True, False, True])
        self.assertEqual(weights["i.f16"].tolist(), [1.5, -2])

    def test_auto_is_the_first_that_is_installed(self):
        weights = self.allocate("auto")
        expected = torch.Tensor if torch else numpy.ndarray if numpy else memoryview
        self.assertIsInstance(weights["a.weight"], expected)

    def test_memory_is_one_fresh_region_and_aligned(self):
        engine, peer = self.engine()
        engine.allocate("memoryview")
        peer.expect("manifest")
        peer.expect("hydrate")
        self.assertEqual(list(peer.regions), [0])
        self.assertTrue(peer.regions[0].fresh)
        self.assertTrue(all(binding["offset"] % 256 == 0 for binding in peer.bindings))
        self.assertEqual([binding["tensor"] for binding in peer.bindings], sorted(TENSORS))

    def test_names_choose(self):
        engine, _ = self.engine()
        self.assertEqual(list(engine.allocate("memoryview", names=["b.scalar", "a.weight"])), ["a.weight", "b.scalar"])
        engine, _ = self.engine()
        self.assertEqual(list(engine.allocate("memoryview", names=lambda name: "e" in name[0])), ["e.eight"])
        engine, _ = self.engine()
        with self.assertRaisesRegex(aquifer.ArrayError, r"no tensor 'a.weigth'.*did you mean 'a.weight'"):
            engine.allocate("memoryview", names=["a.weigth"])

    def test_a_row_is_said_at_once(self):
        engine, peer = self.engine()
        engine.allocate("memoryview", names=lambda name: name[0] not in "ch")
        peer.expect("manifest")
        self.hydrated(engine, peer)
        self.assertEqual(peer.rows, 1)
        self.assertEqual("".join(binding["tensor"][0] for binding in peer.bindings), "abdefgi")

    def test_an_agent_that_knows_no_rows(self):
        self.agent.page = None
        weights = self.allocate("memoryview")
        self.assertEqual(weights["i.f16"].tobytes(), TENSORS["i.f16"][2])

    def test_tensors_are_told_in_pages(self):
        for page in (1, 4, len(TENSORS)):
            self.agent.page = page
            engine, _ = self.engine()
            tensors = engine.tensors()
            self.assertEqual(list(tensors), sorted(TENSORS))
            for name, tensor in tensors.items():
                dtype, shape, data = TENSORS[name]
                self.assertEqual(tensor, aquifer.TensorInfo(name, dtype, shape, len(data)))

    def test_a_release_between_two_pages(self):
        told = self.agent.manifest_reply

        def reply(begin):
            if begin == 4 and self.agent.seq == 1:
                self.agent.seq = 2
                del self.agent.tensors["a.weight"]
            return told(begin)

        self.agent.manifest_reply = reply
        engine, peer = self.engine()
        self.assertEqual(list(engine.allocate("memoryview")), sorted(TENSORS)[1:])
        self.assertEqual(peer.rows, 1)

    def test_an_unknown_framework_is_refused(self):
        engine, _ = self.engine()
        with self.assertRaisesRegex(aquifer.AquiferError, "expected auto, torch"):
            engine.allocate("jax")


class Hydrate(AgentTest):
    tensors = {"a": TENSORS["a.weight"]}

    def test_nothing_registered(self):
        engine, _ = self.engine()
        with self.assertRaisesRegex(aquifer.AquiferError, "call allocate"):
            engine.wait_hydrated(PATIENCE)

    def test_state_before_and_after(self):
        engine, peer = self.engine()
        self.assertEqual((engine.ready, engine.release, engine.wanted), (False, None, None))
        self.assertEqual(peer.hello["serving"], None)
        self.assertEqual(
            (peer.hello["protocol"], peer.hello["channel"], peer.hello["name"]), (1, "demo/test", "engine")
        )
        engine.allocate("memoryview")
        peer.expect("manifest")
        with self.assertRaises(TimeoutError):
            with engine.serving(timeout=0):
                self.fail("unverified weights were served")
        self.hydrated(engine, peer)
        self.assertEqual((engine.ready, engine.release, engine.wanted), (True, manifest(1), manifest(1)))
        with engine.serving() as served:
            self.assertEqual(served, manifest(1))
        with self.assertRaisesRegex(aquifer.AquiferError, "registration is complete"):
            engine.allocate("memoryview")

    def test_a_failure_is_raised_with_its_reason_until_there_is_hope(self):
        engine, peer = self.engine()
        engine.allocate("memoryview")
        peer.expect("manifest")
        peer.expect("hydrate")
        peer.event("failed", manifest=manifest(1), code="incompatible", message="tensor 'a' has another shape")
        with self.assertRaisesRegex(aquifer.HydrationError, r"another shape \(incompatible\)"):
            engine.wait_hydrated(PATIENCE, progress=False)
        with self.assertRaisesRegex(aquifer.HydrationError, "another shape"):
            with engine.serving(PATIENCE):
                pass
        heard = threading.Event()
        engine.on_release(lambda _: heard.set())
        peer.event("release", release=release(2))
        self.assertTrue(heard.wait(PATIENCE))
        peer.event("hydrated", release=release(2))
        with engine.serving(PATIENCE) as served:
            self.assertEqual(served, manifest(2))

    def test_time_runs_out(self):
        engine, peer = self.engine()
        engine.allocate("memoryview")
        with self.assertRaisesRegex(aquifer.HydrationTimeout, "not there within 0.01 s"):
            engine.wait_hydrated(0.01, progress=False)
        self.agent.tensors = None
        engine, peer = self.engine()
        with self.assertRaisesRegex(aquifer.HydrationError, "no release of channel demo/test"):
            engine.allocate("memoryview", timeout=0.01)

    def test_the_agent_refuses_what_is_registered(self):
        self.agent.refuse["bind_row"] = "tensor 'a' is not what you think"
        engine, _ = self.engine()
        with self.assertRaisesRegex(aquifer.RequestRefused, "not what you think"):
            engine.allocate("memoryview")
        for call in (engine.hydrate, engine.wait_hydrated):
            with self.assertRaisesRegex(aquifer.RequestRefused, "not what you think"):
                call()

    def test_closing_ends_every_wait(self):
        self.agent.tensors = None
        engine, peer = self.engine()
        errors = []

        def wait(call):
            try:
                call()
            except aquifer.AquiferError as error:
                errors.append(str(error))

        def serve():
            with engine.serving():
                pass

        threads = [threading.Thread(target=wait, args=(call,)) for call in (engine.allocate, serve)]
        for thread in threads:
            thread.start()
        peer.expect("manifest")
        engine.close()
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual(errors, ["the engine is closed"] * 2)
        self.assertEqual(peer.expect("closed"), {"op": "closed"})

    def test_progress_is_told(self):
        engine, peer = self.engine()
        engine.allocate("memoryview")
        peer.expect("manifest")
        peer.expect("hydrate")
        stream = io.StringIO()
        printer = progress.Printer("x", stream)
        printer.show(aquifer.Progress(manifest(1), 45_000_000, 90_000_000, 1, 2, 3, 9_000_000))
        self.assertEqual(stream.getvalue(), "x: 45.0 MB of 90.0 MB (50 %), 9.0 MB/s, 5 s left, from 3 peers\n")
        stream.isatty = lambda: True
        printer = progress.Printer("x", stream)
        printer.show(aquifer.Progress(manifest(1), 0, 0, 0, 0, 0, 0))
        self.assertIn("\r\x1b[K", stream.getvalue())


class NoAgent(unittest.TestCase):
    def test_is_said(self):
        with self.assertRaisesRegex(aquifer.AgentUnavailable, "no agent is listening on /nowhere.*aquifer agent"):
            aquifer.Engine("a/b", socket="/nowhere", connect_timeout=0)
        with self.assertRaisesRegex(aquifer.AgentUnavailable, "/nowhere"):
            aquifer.request_status("/nowhere")


class Status(AgentTest):
    def test_needs_no_hello(self):
        self.assertEqual(aquifer.request_status(self.agent.path), {"node": "fake", "engines": 1})


if __name__ == "__main__":
    unittest.main()
