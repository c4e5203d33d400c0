"""GPU memory that the agent is to fill: where a tensor lies, and how another process opens that.

All of it is asked of the driver (libcuda), whichever framework made the tensor.
"""

import ctypes
import threading
from typing import Any, Dict, List, Optional, Tuple

from .errors import AquiferError

_HANDLE_BYTES = 64
_POINTER_DEVICE_ORDINAL = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
_INVALID_VALUE = 1  # CUDA_ERROR_INVALID_VALUE


class GpuError(AquiferError):
    """GPU memory that cannot be bound."""


class Allocation:
    """All of one allocation of the driver's, in which tensors lie. PyTorch puts many into one.

    ``keep`` is what must live as long as the agent may write there.
    """

    #: What is in it is not known.
    fresh = False

    def __init__(self, address: int, length: int, device: str, handle: bytes, ordinal: int, keep: Any) -> None:
        self.address = address
        self.length = length
        self.device = device
        self.handle = handle
        self.ordinal = ordinal
        self._keep = [keep]

    def claim(self, _first: bool) -> Dict[str, Any]:
        """What is said of it to the agent."""
        gpu = {"device": self.device, "handle": self.handle.hex(), "offset": 0}
        return {"bytes": self.length, "fresh": False, "gpu": gpu}

    def keep(self, more: Any) -> None:
        self._keep.append(more)


class _Driver:
    def __init__(self) -> None:
        try:
            self._lib = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise GpuError(f"the NVIDIA driver's library cannot be loaded: {error}") from error
        self._lock = threading.Lock()
        self._contexts: Dict[int, ctypes.c_void_p] = {}

    def allocation(self, address: int, keep: Any) -> Allocation:
        ordinal = ctypes.c_int()
        pointer = ctypes.c_uint64(address)
        self._call("cuPointerGetAttribute", ctypes.byref(ordinal), _POINTER_DEVICE_ORDINAL, pointer)
        with _Current(self, ordinal.value):
            base, length = ctypes.c_uint64(), ctypes.c_size_t()
            self._call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(length), pointer)
            handle = ctypes.create_string_buffer(_HANDLE_BYTES)
            code = self._lib.cuIpcGetMemHandle(handle, base)
        if code == _INVALID_VALUE:
            raise GpuError(
                "the tensor's memory cannot be shared with the agent by CUDA IPC: if PYTORCH_CUDA_ALLOC_CONF has "
                "expandable_segments:True, leave that out"
            )
        self._check("cuIpcGetMemHandle", code)
        return Allocation(base.value, length.value, self._uuid(ordinal.value), handle.raw, ordinal.value, keep)

    def synchronize(self, ordinal: int) -> None:
        with _Current(self, ordinal):
            self._call("cuCtxSynchronize")

    def context(self, ordinal: int) -> ctypes.c_void_p:
        """The device's primary context, which PyTorch uses as well. Kept until the process ends."""
        with self._lock:
            if ordinal not in self._contexts:
                context = ctypes.c_void_p()
                self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device(ordinal))
                self._contexts[ordinal] = context
            return self._contexts[ordinal]

    def push(self, context: ctypes.c_void_p) -> None:
        self._call("cuCtxPushCurrent_v2", context)

    def pop(self) -> None:
        self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _device(self, ordinal: int) -> ctypes.c_int:
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        return device

    def _uuid(self, ordinal: int) -> str:
        raw = ctypes.create_string_buffer(16)
        self._call("cuDeviceGetUuid_v2" if hasattr(self._lib, "cuDeviceGetUuid_v2") else "cuDeviceGetUuid", raw,
                   self._device(ordinal))
        digits = raw.raw.hex()
        return "GPU-" + "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))

    def _call(self, name: str, *arguments: Any) -> None:
        self._check(name, getattr(self._lib, name)(*arguments))

    def _check(self, name: str, code: int) -> None:
        if code != 0:
            text = ctypes.c_char_p()
            self._lib.cuGetErrorString(code, ctypes.byref(text))
            raise GpuError(f"{name}: {text.value.decode() if text.value else 'error'} ({code})")


class _Current:
    """A device's context, current on this thread for a while."""

    def __init__(self, driver: _Driver, ordinal: int) -> None:
        self._driver = driver
        self._ordinal = ordinal

    def __enter__(self) -> None:
        self._driver.push(self._driver.context(self._ordinal))

    def __exit__(self, *_: Any) -> None:
        self._driver.pop()


_driver: Optional[_Driver] = None
_driver_lock = threading.Lock()


def _the_driver() -> _Driver:
    global _driver
    with _driver_lock:
        if _driver is None:
            _driver = _Driver()
        return _driver


def find(address: int, length: int, keep: Any) -> Tuple[Allocation, int]:
    """The allocation that holds ``length`` bytes at ``address``, and where in it they begin."""
    allocation = _the_driver().allocation(address, keep)
    offset = address - allocation.address
    if offset + length > allocation.length:
        raise GpuError("the tensor reaches beyond the allocation that it begins in: bind its parts")
    return allocation, offset


def synchronize(allocations: List[Allocation]) -> None:
    """Waits until the GPUs have done all that this process asked of them."""
    for ordinal in sorted({allocation.ordinal for allocation in allocations}):
        _the_driver().synchronize(ordinal)
