"""Model weights in shared memory, kept current and verified by the node's Aquifer agent.

    import aquifer
    engine = aquifer.Engine(channel="demo/minilm")
    weights = engine.allocate()          # name -> tensor, array or memoryview
    engine.wait_hydrated()               # every byte verified
    with engine.serving() as release:    # no update happens inside
        answer = model(weights, query)

See :class:`Engine` for all of it.
"""

from .arrays import ArrayError
from .engine import Engine
from .errors import AgentUnavailable, AquiferError, HydrationError, HydrationTimeout, Paused, RequestRefused
from .gpu import GpuError
from .memory import Arena, empty
from .modules import Bound, Fused, Transposed
from .values import Progress, Release, Standing, TensorInfo
from .wire import default_socket_path, request_status

__version__ = "0.1.0"

__all__ = [
    "AgentUnavailable",
    "AquiferError",
    "Arena",
    "ArrayError",
    "Bound",
    "Engine",
    "Fused",
    "GpuError",
    "HydrationError",
    "HydrationTimeout",
    "Paused",
    "Progress",
    "Release",
    "RequestRefused",
    "Standing",
    "TensorInfo",
    "Transposed",
    "default_socket_path",
    "empty",
    "request_status",
]
