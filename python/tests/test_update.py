import struct
import threading
import unittest

from support import PATIENCE, AgentTest, manifest, release

import aquifer

#: Large enough that reading it takes long compared with writing a part.
COUNT = 4096


def version(seq):
    return {"w": struct.pack(f"<{COUNT}i", *[seq] * COUNT)}


def wait_until_shut(engine):
    while True:
        try:
            with engine.serving(timeout=0):
                pass
        except TimeoutError:
            return


class Updating(AgentTest):
    tensors = {"w": ("I32", (COUNT,), version(1)["w"])}

    def serving_engine(self, **options):
        engine, peer = self.engine(**options)
        weights = engine.allocate("memoryview")
        peer.expect("manifest")
        self.hydrated(engine, peer)
        return engine, peer, weights["w"]


class Updates(Updating):
    def test_a_release_is_heard_applied_and_served(self):
        engine, peer, weights = self.serving_engine()
        heard = threading.Event()
        told = []

        @engine.on_release
        def _(announced):
            told.append(("release", announced.seq))
            heard.set()

        engine.on_pause(lambda r: told.append(("pause", r.seq, engine.release)))
        engine.on_resume(lambda r: told.append(("resume", r.seq, weights[0])))
        peer.event("release", release=release(2))
        self.assertTrue(heard.wait(PATIENCE))
        self.assertEqual((engine.wanted, engine.release), (manifest(2), manifest(1)))
        self.update(peer, 2, version(2))
        self.assertEqual(told, [("release", 2), ("pause", 2, manifest(1)), ("resume", 2, 2)])
        self.assertEqual((engine.wanted, engine.release), (manifest(2), manifest(2)))

    def test_queries_see_one_release_or_another(self):
        engine, peer, weights = self.serving_engine()
        done = threading.Event()
        seen, mixed = set(), []

        def query():
            while not done.is_set():
                with engine.serving() as served:
                    values = set(weights)
                    if values != {int(served, 16)}:
                        mixed.append((served, values))
                    seen.update(values)

        threads = [threading.Thread(target=query) for _ in range(3)]
        for thread in threads:
            thread.start()
        for seq in range(2, 30):
            self.update(peer, seq, version(seq))
        done.set()
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual(mixed, [])
        self.assertTrue(seen)

    def test_pausing_waits_for_queries_and_holds_back_new_ones(self):
        engine, peer, _ = self.serving_engine()
        inside, leave = threading.Event(), threading.Event()
        order = []

        def long_query():
            with engine.serving():
                inside.set()
                leave.wait(PATIENCE)
                with engine.serving():  # A nested one must not wait for the update that waits for it.
                    order.append("left")

        def next_query():
            with engine.serving() as served:
                order.append(served)

        threads = [threading.Thread(target=long_query)]
        threads[0].start()
        self.assertTrue(inside.wait(PATIENCE))
        engine.on_pause(lambda _: order.append("paused"))
        peer.event("pause", release=release(2), bytes=1)
        wait_until_shut(engine)
        threads.append(threading.Thread(target=next_query))
        threads[1].start()
        self.assertTrue(peer.requests.empty())
        leave.set()
        peer.expect("paused")
        peer.event("applied", release=release(2))
        peer.expect("resumed")
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual(order, ["left", "paused", manifest(2)])

    def test_an_update_is_put_off_when_queries_do_not_end(self):
        engine, peer, _ = self.serving_engine(pause_timeout=0.01)
        with engine.serving():
            peer.event("pause", release=release(2), bytes=1)
            refused = peer.expect("refused")
        self.assertEqual((refused["stage"], refused["manifest"]), ("pause", manifest(2)))
        self.assertIn("still running after 0.01 s", refused["message"])
        with engine.serving(PATIENCE) as served:
            self.assertEqual(served, manifest(1))
        self.update(peer, 2, version(2))

    def test_a_pause_that_fails_keeps_the_old_release(self):
        engine, peer, _ = self.serving_engine()
        engine.pause = lambda _: 1 / 0
        peer.event("pause", release=release(2), bytes=1)
        refused = peer.expect("refused")
        self.assertEqual((refused["stage"], refused["message"]), ("pause", "ZeroDivisionError: division by zero"))
        with engine.serving(PATIENCE) as served:
            self.assertEqual(served, manifest(1))
        engine.pause = None
        self.update(peer, 2, version(2))

    def test_a_resume_that_fails_keeps_it_paused_until_another_release(self):
        engine, peer, weights = self.serving_engine()
        checked = []

        def check(applied):
            with engine.serving(PATIENCE) as served:  # Only the callback may look.
                checked.append((served, weights[0]))
            if applied.seq == 2:
                raise ValueError("nonsense out")

        engine.resume = check
        peer.event("pause", release=release(2), bytes=1)
        peer.expect("paused")
        peer.land(version(2))
        peer.event("applied", release=release(2))
        self.assertEqual(peer.expect("refused")["stage"], "resume")
        self.assertFalse(engine.ready)
        with self.assertRaises(TimeoutError):
            with engine.serving(timeout=0):
                self.fail("served what its own check refused")
        peer.land(version(1))
        peer.event("applied", release=release(1))
        peer.expect("resumed")
        self.assertEqual(engine.release, manifest(1))
        self.assertEqual(checked, [(manifest(2), 2), (manifest(1), 1)])

    def test_an_update_is_called_off(self):
        engine, peer, _ = self.serving_engine()
        told = []
        engine.on_resume(lambda r: told.append(r.seq))
        peer.event("pause", release=release(2), bytes=1)
        peer.expect("paused")
        self.assertFalse(engine.ready)
        peer.event("aborted", release=release(2))
        with engine.serving(PATIENCE) as served:
            self.assertEqual(served, manifest(1))
        self.assertEqual(told, [1])

    def test_a_failed_release_leaves_the_old_one_serving(self):
        engine, peer, _ = self.serving_engine()
        failed = threading.Event()
        reasons = []
        engine.on_failed(lambda reason: (reasons.append(reason), failed.set()))
        peer.event("failed", manifest=manifest(2), code="incompatible", message="tensor 'w' is gone")
        self.assertTrue(failed.wait(PATIENCE))
        self.assertEqual(reasons, ["tensor 'w' is gone (incompatible)"])
        self.assertEqual(engine.release, manifest(1))
        engine.wait_hydrated(PATIENCE, progress=False)

    def test_callbacks_that_cannot_be_called_are_refused_at_once(self):
        engine, _ = self.engine()
        for add in (engine.on_release, engine.on_pause, engine.on_resume):
            with self.assertRaisesRegex(TypeError, "must take one argument, the release"):
                add(lambda: None)
        with self.assertRaisesRegex(TypeError, "must take one argument"):
            engine.pause = lambda a, b: None

    def test_what_a_newer_agent_says_is_skipped(self):
        engine, peer, _ = self.serving_engine()
        peer.event("weather", sky="grey")
        self.update(peer, 2, version(2))


class Crashes(Updating):
    def test_while_serving_it_serves_on(self):
        engine, peer, weights = self.serving_engine()
        self.agent.crash()
        with engine.serving() as served:
            self.assertEqual((served, set(weights)), (manifest(1), {1}))
        self.agent.listen()
        peer = self.agent.peer()
        self.assertEqual(peer.hello["serving"], manifest(1))
        peer.expect("hydrate")
        self.assertEqual((peer.regions[0].fresh, len(peer.bindings)), (False, 1))
        self.update(peer, 2, version(2))
        self.assertEqual(set(weights), {2})

    def test_while_paused_it_stays_paused_until_all_is_verified(self):
        engine, peer, weights = self.serving_engine()
        resumed = []
        engine.on_resume(lambda r: resumed.append((r.seq, set(weights))))
        peer.event("pause", release=release(2), bytes=1)
        peer.expect("paused")
        peer.regions[0].map[:8] = b"halfdone"
        self.agent.crash()
        with self.assertRaises(TimeoutError):
            with engine.serving(timeout=0.05):
                self.fail("a mixture was served")
        self.agent.listen()
        peer = self.agent.peer()
        self.assertIsNone(peer.hello["serving"])
        peer.expect("hydrate")
        self.assertFalse(peer.regions[0].fresh)
        self.assertFalse(engine.ready)
        peer.land(version(2))
        peer.event("hydrated", release=release(2))
        with engine.serving(PATIENCE) as served:
            self.assertEqual((served, set(weights)), (manifest(2), {2}))
        self.assertEqual(resumed, [(2, {2})])

    def test_while_hydrating_it_starts_over(self):
        engine, peer = self.engine()
        weights = engine.allocate("memoryview")
        peer.expect("manifest")
        peer.expect("hydrate")
        self.agent.crash()
        self.agent.listen()
        peer = self.agent.peer()
        self.assertIsNone(peer.hello["serving"])
        self.hydrated(engine, peer)
        self.assertEqual(set(weights["w"]), {1})

    def test_to_an_agent_without_its_release_a_row_is_said_one_by_one(self):
        engine, peer = self.engine()
        weights = engine.allocate("memoryview")
        peer.expect("manifest")
        peer.expect("hydrate")
        said = peer.bindings
        self.agent.crash()
        self.agent.seq = 2
        self.agent.listen()
        peer = self.agent.peer()
        self.hydrated(engine, peer, seq=2)
        self.assertEqual((peer.rows, peer.bindings), (0, said))
        self.assertEqual(set(weights["w"]), {1})

    def test_while_waiting_for_a_release_it_asks_again(self):
        self.agent.tensors = None
        engine, peer = self.engine()
        allocated = []
        thread = threading.Thread(target=lambda: allocated.append(engine.allocate("memoryview")))
        thread.start()
        peer.expect("manifest")
        self.agent.crash()
        self.agent.tensors = dict(self.tensors)
        self.agent.listen()
        peer = self.agent.peer()
        peer.expect("manifest")
        peer.expect("hydrate")
        thread.join(PATIENCE)
        self.assertEqual(list(allocated[0]), ["w"])

    def test_an_agent_that_refuses_what_is_registered_says_why(self):
        engine, peer = self.engine()
        engine.allocate("memoryview")
        peer.expect("manifest")
        peer.expect("hydrate")
        self.agent.crash()
        self.agent.refuse["bind_row"] = "tensor 'w' is unknown here"
        self.agent.listen()
        self.agent.peer()
        with self.assertRaisesRegex(aquifer.HydrationError, "unknown here"):
            engine.wait_hydrated(PATIENCE, progress=False)

    def test_garbage_from_the_agent_is_an_end_like_any_other(self):
        for garbage in (b"\xff\xff\xff\xff", b"\x02\0\0\0[]", b"\x01\0\0\0{", b'\x14\0\0\0{"event":"progress"}'):
            engine, peer, _ = self.serving_engine()
            peer.connection.sendall(garbage)
            again = self.agent.peer()
            self.assertEqual(again.hello["serving"], manifest(1))
            again.expect("hydrate")
            engine.close()


if __name__ == "__main__":
    unittest.main()
