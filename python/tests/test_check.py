"""What an engine does with a release before it serves it: its checks, and what becomes of requests meanwhile."""

import os
import sys
import threading
import unittest

from support import PATIENCE, manifest, release
from test_update import Updating, version

import aquifer


class Checking(Updating):
    """Engines with a check that does what the test says."""

    def checked_engine(self, check, **options):
        """One that serves its first release already."""
        engine, peer, weights = self.serving_engine(**options)
        engine.on_check(check, timeout=options.pop("timeout", PATIENCE))
        peer.expect("conduct")
        return engine, peer, weights

    def pause(self, peer, seq=2):
        peer.event("pause", release=release(seq), bytes=1)
        peer.expect("paused")
        peer.land(version(seq))

    def refused(self, peer, seq=2):
        """The reason for which its check was refused; the agent puts the first release back."""
        peer.event("check", release=release(seq))
        refused = peer.expect("refused")
        self.assertEqual((refused["stage"], refused["manifest"]), ("check", manifest(seq)))
        peer.land(version(1))
        peer.event("applied", release=release(1))
        self.assertEqual(peer.expect("resumed")["manifest"], manifest(1))
        return refused["message"]


class Checks(Checking):
    def test_a_release_is_tried_before_anybody_is_let_in(self):
        seen = []

        def check(tried):
            with engine.serving(PATIENCE) as served:
                seen.append((tried.seq, served, weights[0]))

        engine, peer, weights = self.checked_engine(check)
        self.pause(peer)
        peer.event("check", release=release(2))
        self.assertEqual(peer.expect("checked")["manifest"], manifest(2))
        self.assertEqual(seen, [(2, manifest(2), 2)])
        self.assertIsNone(engine.release)
        with self.assertRaises(TimeoutError):
            with engine.serving(timeout=0.01):
                self.fail("let in before it is applied")
        peer.event("applied", release=release(2))
        peer.expect("resumed")
        with engine.serving(PATIENCE) as served:
            self.assertEqual(served, manifest(2))

    def test_what_fails_is_not_served_and_the_old_release_is(self):
        for check, reason in (
            (lambda _: False, "the check returned False"),
            (lambda _: 1 / 0, "ZeroDivisionError: division by zero"),
            (lambda _: sys.exit(3), "SystemExit: 3"),
        ):
            engine, peer, weights = self.checked_engine(check)
            failed, resumed = [], []
            engine.on_failed(failed.append)
            engine.on_resume(lambda r: resumed.append((r.seq, set(weights))))
            self.pause(peer)
            self.assertEqual(self.refused(peer), reason)
            with engine.serving(PATIENCE) as served:
                self.assertEqual((served, set(weights)), (manifest(1), {1}))
            self.assertEqual((resumed, failed), ([(1, {1})], [f"{reason} (check)"]))
            engine.close()

    def test_a_check_that_hangs_is_left_alone(self):
        let_go = threading.Event()
        self.addCleanup(let_go.set)

        def hang(_):
            with engine.serving(PATIENCE):
                let_go.wait(PATIENCE)

        engine, peer, weights = self.serving_engine()
        engine.on_check(timeout=0.05)(hang)
        self.assertEqual(peer.expect("conduct")["check_timeout_ms"], 50)
        self.pause(peer)
        self.assertEqual(self.refused(peer), "the check did not end within 0.05 s")
        with engine.serving(PATIENCE) as served:
            self.assertEqual((served, set(weights)), (manifest(1), {1}))
        # That it is still inside keeps no update waiting.
        self.pause(peer, 3)
        let_go.set()
        peer.event("applied", release=release(3))
        peer.expect("resumed")

    def test_several_run_in_order_and_the_first_that_fails_counts(self):
        ran = []
        engine, peer, _ = self.checked_engine(lambda r: ran.append("first"))

        @engine.on_check
        def _(_release):
            ran.append("second")
            return False

        engine.on_check(lambda r: ran.append("third"))
        self.assertEqual([peer.expect("conduct")["checks"] for _ in range(2)], [True, True])
        self.pause(peer)
        self.refused(peer)
        self.assertEqual(ran, ["first", "second"])

    def test_the_first_release_is_checked_too(self):
        engine, peer = self.engine()
        self.assertFalse(peer.hello["checks"])
        outcomes = [False, True]
        engine.on_check(lambda _: outcomes.pop(0))
        peer.expect("conduct")
        engine.allocate("memoryview")
        peer.expect("manifest")
        peer.expect("hydrate")
        peer.event("check", release=release(1))
        self.assertEqual(peer.expect("refused")["stage"], "check")
        with self.assertRaisesRegex(aquifer.HydrationError, "failed its check: the check returned False"):
            engine.wait_hydrated(PATIENCE, progress=False)
        peer.event("check", release=release(2))
        peer.expect("checked")
        peer.event("hydrated", release=release(2))
        engine.wait_hydrated(PATIENCE, progress=False)
        self.assertEqual(engine.release, manifest(2))
        # A later agent is told at once.
        self.agent.crash()
        self.agent.listen()
        self.assertTrue(self.agent.peer().hello["checks"])

    def test_an_agent_from_before_there_were_checks_asks_for_none(self):
        self.agent.unknown = {"conduct"}
        engine, peer, weights = self.serving_engine()
        engine.on_check(lambda _: False)
        self.update(peer, 2, version(2))
        self.assertEqual(engine.release, manifest(2))

    def test_what_cannot_be_a_check_is_refused_at_once(self):
        engine, _ = self.engine()
        for arguments in ({"command": "true"}, {"command": []}, {"callback": lambda: None}):
            with self.assertRaises(TypeError):
                engine.on_check(**arguments)
        with self.assertRaises(TypeError):
            engine.on_check(lambda r: None, command=["true"])
        with self.assertRaisesRegex(ValueError, "needs some time"):
            engine.on_check(lambda r: None, timeout=0)


class Commands(Checking):
    def command_engine(self, code, timeout=PATIENCE):
        engine, peer, _ = self.serving_engine()
        engine.on_check(command=[sys.executable, "-c", code], timeout=timeout)
        peer.expect("conduct")
        self.pause(peer)
        return engine, peer

    def test_one_that_ends_well_passes(self):
        told = "os.environ['AQUIFER_CHANNEL'], os.environ['AQUIFER_MANIFEST'], os.environ['AQUIFER_SEQ']"
        expected = ("demo/test", manifest(2), "2")
        engine, peer = self.command_engine(f"import os; assert ({told}) == {expected}")
        peer.event("check", release=release(2))
        peer.expect("checked")

    def test_the_last_thing_it_says_is_the_reason(self):
        code = "import sys; print('accuracy\\n0.1 instead of 0.9', file=sys.stderr); sys.exit(4)"
        _, peer = self.command_engine(code)
        self.assertEqual(self.refused(peer), f"{sys.executable} ended with 4: 0.1 instead of 0.9")

    def test_one_that_does_not_end_is_killed(self):
        _, peer = self.command_engine("import time; time.sleep(1000)", timeout=0.2)
        self.assertEqual(self.refused(peer), f"{sys.executable} did not end within 0.2 s")

    def test_one_that_is_not_there(self):
        engine, peer, _ = self.serving_engine()
        engine.on_check(command=[os.path.join(self.agent.directory.name, "nothing")])
        peer.expect("conduct")
        self.pause(peer)
        self.assertIn("nothing cannot be run: [Errno 2]", self.refused(peer))


class Refusing(Updating):
    def test_whoever_comes_while_it_is_paused_is_turned_away(self):
        engine, peer, _ = self.serving_engine(while_paused="refuse")
        self.assertEqual(peer.hello["during_pause"], "refused")
        inside = engine.serving()
        inside.__enter__()
        peer.event("pause", release=release(2), bytes=1)

        def is_refused():
            try:
                with engine.serving(PATIENCE):
                    return False
            except aquifer.Paused:
                return True

        outcome = []
        thread = threading.Thread(target=lambda: outcome.append(any(is_refused() for _ in iter(int, 1))))
        thread.start()
        thread.join(PATIENCE)
        self.assertEqual(outcome, [True], "already while it waits for those inside")
        inside.__exit__(None, None, None)
        peer.expect("paused")
        with self.assertRaises(aquifer.Paused):
            engine.serving().__enter__()
        peer.event("applied", release=release(2))
        peer.expect("resumed")
        with engine.serving(PATIENCE) as served:
            self.assertEqual(served, manifest(2))

    def test_before_the_first_release_everybody_waits(self):
        engine, peer = self.engine(while_paused="refuse", pause_timeout=2.5)
        self.assertEqual(peer.hello["pause_timeout_ms"], 2500)
        with self.assertRaises(TimeoutError):
            engine.serving(timeout=0.01).__enter__()

    def test_there_is_no_third_way(self):
        with self.assertRaisesRegex(ValueError, "'hold' or 'refuse'"):
            self.engine(while_paused="drop")


if __name__ == "__main__":
    unittest.main()
