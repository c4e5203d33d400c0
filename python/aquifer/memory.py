"""Memory that can be shared with the agent: memfds, mapped here, and arrays in them."""

import bisect
import ctypes
import fcntl
import importlib
import mmap
import os
import platform
import threading
import weakref
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

from . import dtypes
from .errors import AquiferError

#: Tensors begin at multiples of this many bytes, as in CUDA's allocator.
ALIGN_BYTES = 256

# From linux/fcntl.h and linux/memfd.h; Python has them from 3.8 on, where its libc does.
_F_ADD_SEALS = 1033
_F_SEAL_SHRINK_AND_GROW = 0x2 | 0x4
_MFD_CLOEXEC_AND_ALLOW_SEALING = 0x1 | 0x2
_MEMFD_CREATE_CALL = {"x86_64": 319, "aarch64": 279, "riscv64": 279, "ppc64le": 360, "s390x": 350}

Shape = Union[int, Sequence[int]]


class Mapping(mmap.mmap):
    """A sealed memfd and its mapping. Lives as long as any array in it."""

    fd: int
    address: int
    #: Length in bytes.
    length: int
    #: True if nothing but zeros can be in it.
    fresh: bool

    @staticmethod
    def new(length: int, fresh: bool = False) -> "Mapping":
        length = max(length, 1)
        fd = _memfd()
        try:
            os.ftruncate(fd, length)
            fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK_AND_GROW)
            mapping = Mapping(fd, length)
        except BaseException:
            os.close(fd)
            raise
        mapping.fd = fd
        mapping.length = length
        mapping.fresh = fresh
        mapping.address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        _known.add(mapping)
        return mapping

    def claim(self, first: bool) -> Dict[str, Any]:
        """What is said of it to the agent. Only the ``first`` time can it be empty for sure."""
        return {"fd": self.fd, "bytes": self.length, "fresh": first and self.fresh}

    def view(self, framework: str, offset: int, dtype: str, shape: Sequence[int], length: int) -> Any:
        """The ``length`` bytes at ``offset`` as an array, tensor or memoryview of ``shape``."""
        return self.views(framework, dtype, shape, length)(offset)

    def views(self, framework: str, dtype: str, shape: Sequence[int], length: int) -> Callable[[int], Any]:
        """What makes the ``length`` bytes at an offset an array, tensor or memoryview of ``shape``. All that can
        be done once for many offsets is done here."""
        if dtypes.element_bytes(dtype) is None:
            dtype, shape = "U8", (length,)
        makers: Dict[str, Callable[..., Callable[[int], Any]]] = {
            "torch": self._as_torch,
            "numpy": self._as_numpy,
            "memoryview": self._as_memoryview,
        }
        return makers[framework](dtype, tuple(shape), length)

    def _as_torch(self, dtype: str, shape: Tuple[int, ...], length: int) -> Callable[[int], Any]:
        torch = importlib.import_module("torch")
        kind = getattr(torch, dtypes.torch_name(dtype, torch))
        if length == 0:  # frombuffer refuses.
            return lambda _offset: torch.empty(shape, dtype=kind)
        count = length // (dtypes.element_bytes(dtype) or 1)
        of_buffer = torch.frombuffer
        return lambda offset: of_buffer(self, dtype=kind, count=count, offset=offset).reshape(shape)

    def _as_numpy(self, dtype: str, shape: Tuple[int, ...], length: int) -> Callable[[int], Any]:
        numpy = importlib.import_module("numpy")
        array, kind = numpy.ndarray, numpy.dtype(dtypes.numpy_name(dtype))
        if length == 0:
            return lambda _offset: array(shape, kind, buffer=b"")
        return lambda offset: array(shape, kind, self, offset)

    def _as_memoryview(self, dtype: str, shape: Tuple[int, ...], length: int) -> Callable[[int], Any]:
        form: Any = dtypes.format_of(dtype)
        flat = memoryview(self)
        if length == 0:  # cast() knows no dimension of length 0.
            return lambda offset: flat[offset:offset].cast(form)
        return lambda offset: flat[offset : offset + length].cast(form, shape)


class _Known:
    """All mappings of this process, by address."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # A finalizer may run inside it.
        self._addresses: List[int] = []
        self._mappings: "weakref.WeakValueDictionary[int, Mapping]" = weakref.WeakValueDictionary()

    def add(self, mapping: Mapping) -> None:
        with self._lock:
            bisect.insort(self._addresses, mapping.address)
            self._mappings[mapping.address] = mapping
        weakref.finalize(mapping, self._forget, mapping.address, mapping.fd)

    def find(self, address: int, length: int) -> Optional[Mapping]:
        with self._lock:
            at = bisect.bisect_right(self._addresses, address) - 1
            mapping = self._mappings.get(self._addresses[at]) if at >= 0 else None
        inside = mapping is not None and address + length <= mapping.address + mapping.length
        return mapping if inside else None

    def _forget(self, address: int, fd: int) -> None:
        with self._lock:
            self._addresses.remove(address)
        os.close(fd)


_known = _Known()


def find(address: int, length: int) -> Optional[Mapping]:
    """The mapping that holds all of ``length`` bytes at ``address``."""
    return _known.find(address, length)


class Arena:
    """One memfd of ``nbytes`` from which several arrays are cut: one descriptor for all of them."""

    def __init__(self, nbytes: int) -> None:
        self._mapping = Mapping.new(nbytes)
        self._end = 0

    def empty(self, shape: Shape, dtype: Any = "F32", framework: str = "auto") -> Any:
        """Like :func:`empty`, in this arena. Arrays begin at multiples of 256 bytes."""
        framework, name = _choose(dtype, framework)
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        length = dtypes.tensor_bytes(name, shape) or 0
        begin = align(self._end)
        if begin + length > self._mapping.length:
            raise AquiferError(f"{length} bytes do not fit the arena: {begin} of {self._mapping.length} are used")
        self._end = begin + length
        return self._mapping.view(framework, begin, name, shape, length)


def empty(shape: Shape, dtype: Any = "F32", framework: str = "auto") -> Any:
    """A new array of zeros in memory that can be shared with the agent.

    ``dtype`` is a name of safetensors (``"BF16"``), a NumPy dtype or a PyTorch dtype; the latter two
    also say which of them is returned. For many small arrays, an :class:`Arena` saves descriptors.
    """
    framework, name = _choose(dtype, framework)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    return Arena(dtypes.tensor_bytes(name, shape) or 1).empty(shape, name, framework)


def align(offset: int) -> int:
    return -(-offset // ALIGN_BYTES) * ALIGN_BYTES


def choose_framework(framework: str) -> str:
    """``"auto"``: PyTorch if it is installed, else NumPy if it is, else memoryview."""
    if framework in ("torch", "numpy"):
        try:
            importlib.import_module(framework)
        except ImportError as error:
            raise AquiferError(f"framework='{framework}' was asked for, and it cannot be imported: {error}") from error
        return framework
    if framework == "memoryview":
        return framework
    if framework != "auto":
        raise AquiferError(f"framework='{framework}': expected auto, torch, numpy or memoryview")
    for candidate in ("torch", "numpy"):
        try:
            importlib.import_module(candidate)
            return candidate
        except ImportError:
            pass
    return "memoryview"


def _choose(dtype: Any, framework: str) -> Tuple[str, str]:
    """Framework, and safetensors' name of the dtype."""
    if isinstance(dtype, str):
        names = [dtype] if dtypes.is_known(dtype) else dtypes.names_of_numpy(dtype)
    elif str(dtype).startswith("torch."):
        framework = "torch" if framework == "auto" else framework
        names = dtypes.names_of_torch(str(dtype)[len("torch.") :], importlib.import_module("torch"))
    else:
        framework = "numpy" if framework == "auto" else framework
        try:
            names = dtypes.names_of_numpy(importlib.import_module("numpy").dtype(dtype).name)
        except (ImportError, TypeError):
            names = []
    if not names:
        raise AquiferError(f"'{dtype}' is not a dtype that is known here")
    return choose_framework(framework), names[0]


def _memfd() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("aquifer", _MFD_CLOEXEC_AND_ALLOW_SEALING)
    # A Python that was built on an older system lacks it, also where the kernel has it.
    number = _MEMFD_CREATE_CALL.get(platform.machine())
    if platform.system() != "Linux" or number is None:
        raise AquiferError("shared memory needs memfd_create, which this Python does not have")
    libc = ctypes.CDLL(None, use_errno=True)
    flags = ctypes.c_uint(_MFD_CLOEXEC_AND_ALLOW_SEALING)
    fd: int = libc.syscall(ctypes.c_long(number), ctypes.c_char_p(b"aquifer"), flags)
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"memfd_create: {os.strerror(code)}")
    return fd
