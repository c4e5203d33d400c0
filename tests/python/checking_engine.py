"""An engine process with checks, which does what it is told, one JSON line after the other. Needs the standard
library alone.

``{"do": "answer"}`` is answered by ``{"of": "answer", "done": ...}`` or ``{"of": "answer", "error": "..."}``.
What the agent makes known is ``{"event": ...}``. It ends when stdin does.
"""

import hashlib
import os
import sys
import threading

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, os.pardir)
sys.path.insert(0, os.path.join(ROOT, "python"))

import aquifer
from obeying import obey, say


class Engine:
    def __init__(self):
        self.mode = "pass"
        self.outcome = None
        self.decided = threading.Event()
        self.slow = False

    def open(self, **options):
        self.engine = aquifer.Engine(connect_timeout=60, **options)
        self.engine.on_pause(lambda release: self._pause())
        self.engine.on_resume(lambda release: say({"event": "resumed", "manifest": release.manifest}))
        self.engine.on_failed(lambda reason: say({"event": "failed", "reason": reason}))

    def pause_slowly(self):
        """The next pause takes until it is told to :meth:`decide`."""
        self.slow = True

    def _pause(self):
        if self.slow:
            self.slow = False
            say({"event": "pausing"})
            self.decided.wait()
            self.decided.clear()

    def check(self, command=None, timeout=60):
        if command is not None:
            return self.engine.on_check(command=command, timeout=timeout)
        self.engine.on_check(self._check, timeout=timeout)

    def _check(self, release):
        with self.engine.serving() as served:
            sums = self._sums()
        say({"event": "checking", "manifest": release.manifest, "served": served, "sums": sums})
        if self.mode == "ask":
            self.decided.wait()
            self.decided.clear()
            if self.outcome:
                raise ValueError(self.outcome)
        elif self.mode == "hang":
            threading.Event().wait()

    def checks(self, mode):
        """What a check does from now on: it passes, asks what to say, or does not end."""
        self.mode = mode

    def decide(self, outcome=None):
        self.outcome = outcome
        self.decided.set()

    def allocate(self, twin=None):
        """``twin``: the memory is said to be that of a GPU, which the agent makes of host memory."""
        self.weights = self.engine.allocate(framework="memoryview", hydrate=False)
        for region in self.engine._registration._regions if twin else []:
            host = region.claim
            gpu = {"device": twin, "handle": "00" * 64, "offset": 0}
            region.claim = lambda first, host=host: {**host(first), "gpu": gpu}
        self.engine.hydrate()

    def wait(self, timeout=120):
        self.engine.wait_hydrated(timeout, progress=False)
        return self.engine.release

    def answer(self):
        """The release that is answered from, and SHA-256 of each tensor."""
        with self.engine.serving(60) as release:
            return {"release": release, "sums": self._sums()}

    def _sums(self):
        return {name: hashlib.sha256(tensor).hexdigest() for name, tensor in self.weights.items()}


if __name__ == "__main__":
    obey(Engine())
