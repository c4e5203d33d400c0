"""An engine process that does what it is told, one JSON line after the other. Needs NumPy.

``{"do": "sums"}`` is answered by ``{"of": "sums", "done": ...}`` or ``{"of": "sums", "error": "..."}``.
What the agent makes known is ``{"event": ...}``. The functions of `Engine` are what can be done.
It ends when stdin does.
"""

import hashlib
import os
import sys

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, os.pardir)
sys.path.insert(0, os.path.join(ROOT, "python"))

import numpy as np

import aquifer
from obeying import obey, say


class Engine:
    def __init__(self):
        self.arrays = {}

    def open(self, connect_timeout=60, **options):
        self.engine = aquifer.Engine(connect_timeout=connect_timeout, **options)
        self.engine.on_release(lambda release: say({"event": "release", "manifest": release.manifest}))
        self.engine.on_resume(lambda release: say({"event": "resumed", "manifest": release.manifest}))
        self.engine.on_failed(lambda reason: say({"event": "failed", "reason": reason}))

    def tensors(self):
        return {t.name: [t.dtype, list(t.shape), t.bytes] for t in self.engine.tensors(60).values()}

    def allocate(self, names=None, hydrate=True):
        self.arrays.update(self.engine.allocate(framework="numpy", names=names, hydrate=hydrate))

    def bind(self, name, shape, dtype="F32", index=None, tensor_shape=None, within=None, key=None):
        """Binds an array of ``shape``; ``within`` is [shape, slices] of a larger one that it is a view of,
        and "transposed" one that is seen the other way round."""
        parts = None if index is None else tuple(np.s_[a:b] for a, b in index)
        if within == "transposed":
            array = aquifer.empty(tuple(reversed(shape)), dtype, framework="numpy").T
        elif within is not None:
            whole, slices = within
            array = aquifer.empty(whole, dtype, framework="numpy")[tuple(np.s_[a:b:c] for a, b, c in slices)]
        else:
            array = aquifer.empty(shape, dtype, framework="numpy")
        assert array.shape == tuple(shape), (array.shape, shape)
        self.engine.bind(name, array, index=parts, tensor_shape=tensor_shape and tuple(tensor_shape), dtype=dtype)
        self.arrays[key or name] = array

    def on_twin(self, device):
        """What was registered so far is said to be a GPU's: of a device that the agent makes of host memory."""
        for region in self.engine._registration._regions:
            host = region.claim
            gpu = {"device": device, "handle": "00" * 64, "offset": 0}
            region.claim = lambda first, host=host: {**host(first), "gpu": gpu}

    def scribble(self, names=None):
        """Writes over arrays, which an engine may not do, and can."""
        for name in names or self.arrays:
            np.bitwise_xor(self.arrays[name].view(np.uint8), 255, out=self.arrays[name].view(np.uint8))

    def pause(self):
        return self.engine.last_pause

    def hydrate(self):
        self.engine.hydrate()

    def wait(self, timeout=120):
        self.engine.wait_hydrated(timeout, progress=False)
        return self.engine.release

    def state(self):
        return {"release": self.engine.release, "wanted": self.engine.wanted, "ready": self.engine.ready}

    def sums(self):
        """What the arrays hold: SHA-256 of each in row-major order, and the release."""
        with self.engine.serving() as release:
            found = {n: hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest() for n, a in self.arrays.items()}
        return {"release": release, "sums": found}

    def raw(self, region_bytes, bindings, said_bytes=None):
        """Registers what the package would not: a region, and bindings as they are."""
        session = aquifer.wire.Session(self.engine.socket)
        session.start()
        try:
            channel = self.engine.channel
            session.call("hello", protocol=1, client="raw", pid=os.getpid(), name="raw", channel=channel, serving=None)
            mapping = aquifer.memory.Mapping.new(region_bytes, fresh=True)
            session.call("region", fd=mapping.fd, region=0, bytes=said_bytes or region_bytes, fresh=True)
            session.call("bind", bindings=bindings)
            session.call("hydrate")
        finally:
            session.close()


if __name__ == "__main__":
    obey(Engine())
