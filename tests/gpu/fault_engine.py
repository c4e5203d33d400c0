"""An engine process on a GPU, or on a twin of one, that does what it is told: see `tests/python/engine.py`.

Needs PyTorch with CUDA, or for a twin NumPy alone.
"""

import gc
import hashlib
import importlib.util
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))

# By its path: a file of that name lies beside this one as well.
_spec = importlib.util.spec_from_file_location("told_engine", os.path.join(HERE, os.pardir, "python", "engine.py"))
told = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(told)


class Engine(told.Engine):
    """Tensors of bytes, one in its own memory and one with gaps between its rows."""

    def open(self, **options):
        super().open(**options)
        self.engine.on_pause(lambda release: told.say({"event": "pausing", "manifest": release.manifest}))
        self.eaten = None

    def fill(self, tensors, twin=None, device=None):
        """Binds ``tensors`` (name -> [rows, columns] of bytes) and says that that is all. ``device`` is said in place
        of the GPU's own UUID."""
        for n, (name, (rows, columns)) in enumerate(sorted(tensors.items())):
            # The first one lands in parts.
            self.arrays[name] = self.memory(rows, columns + (32 if n == 0 else 0), twin)[:, :columns]
            self.engine.bind(name, self.arrays[name])
        if twin:
            self.on_twin(device or twin)
        elif device:
            for region in self.engine._registration._regions:
                region.device = device
        self.engine.hydrate()

    def memory(self, rows, columns, twin):
        if twin:
            import aquifer

            return aquifer.empty([rows, columns], "U8", framework="numpy")
        import torch

        return torch.zeros(rows, columns, dtype=torch.uint8, device="cuda")

    def sums(self):
        with self.engine.serving() as release:
            host = {n: a.cpu().contiguous().numpy() if hasattr(a, "cpu") else a for n, a in self.arrays.items()}
            found = {n: hashlib.sha256(a.tobytes()).hexdigest() for n, a in host.items()}
        return {"release": release, "sums": found}

    def eat(self, leave):
        """Takes all memory of the GPU but ``leave`` bytes. Returns what is free."""
        import torch

        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        self.eaten = torch.empty(max(free - leave, 0), dtype=torch.uint8, device="cuda")
        return torch.cuda.mem_get_info()[0]

    def give_back(self):
        import torch

        self.eaten = None
        torch.cuda.empty_cache()

    def free(self):
        """Lets go of everything that was bound, behind the agent's back, and of what the package keeps."""
        self.arrays.clear()
        for region in self.engine._registration._regions:
            if hasattr(region, "_keep"):
                region._keep.clear()
        gc.collect()
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()


if __name__ == "__main__":
    told.Engine = Engine
    told.main()
