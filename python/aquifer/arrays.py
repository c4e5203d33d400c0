"""Where an array lies, and which part of which tensor it is to be."""

import ctypes
import difflib
import math
import sys
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple, TypeVar, Union

from . import dtypes, gpu, memory
from .errors import AquiferError
from .values import TensorInfo

T = TypeVar("T")
Ranges = List[Tuple[int, int]]


class ArrayError(AquiferError, ValueError):
    """An array that cannot be bound as asked."""


@dataclass(frozen=True)
class Placed:
    """An array as memory. ``strides`` are in bytes; ``dtypes`` are what it may hold, best first."""

    mapping: Union[memory.Mapping, gpu.Allocation]
    #: Of its first element, in bytes from the mapping's beginning.
    offset: int
    shape: Tuple[int, ...]
    strides: Tuple[int, ...]
    dtypes: List[str]
    element_bytes: int

    def is_packed(self) -> bool:
        return self.strides == packed_strides(self.shape, self.element_bytes)


def place(array: Any) -> Optional[Placed]:
    """Finds the memory of a NumPy array, a tensor on the CPU or a GPU, or a contiguous memoryview.

    ``None`` if it has no elements and so needs no memory.
    """
    address, shape, strides, element_bytes, names = _describe(array)
    if not names:
        raise ArrayError(f"an array of dtype {getattr(array, 'dtype', None)} has no name in safetensors")
    if 0 in shape:
        return None
    # The step along a dimension of one element is never taken, and frameworks leave anything there.
    packed = packed_strides(shape, element_bytes)
    strides = tuple(p if n == 1 else s for n, s, p in zip(shape, strides, packed))
    if any(s < 0 for s in strides):
        raise ArrayError("the array runs backwards in memory (a negative stride): bind the array it was made from")
    extent = _extent_without_overlap(shape, strides, element_bytes)
    if _is_on_gpu(array):
        allocation, offset = gpu.find(address, extent, array)
        return Placed(allocation, offset, shape, strides, names, element_bytes)
    mapping = memory.find(address, extent)
    if mapping is None:
        raise ArrayError(
            "the array is not in memory that can be shared with the agent: make it with "
            "aquifer.empty(shape, dtype) or aquifer.Arena, and have the model use that"
        )
    return Placed(mapping, address - mapping.address, shape, strides, names, element_bytes)


def _is_on_gpu(array: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor) and array.device.type == "cuda"


def packed_strides(shape: Sequence[int], element_bytes: int) -> Tuple[int, ...]:
    strides = []
    stride = element_bytes
    for size in reversed(shape):
        strides.append(stride)
        stride *= size
    return tuple(reversed(strides))


def ranges(index: Any, shape: Sequence[int]) -> Ranges:
    """NumPy's slices as ``(start, end)`` for each dimension of ``shape``."""
    parts = list(index) if isinstance(index, tuple) else [index]
    dots = sum(part is Ellipsis for part in parts)
    if dots > 1:
        raise ArrayError("an index can have a single '...'")
    if len(parts) - dots > len(shape):
        raise ArrayError(f"{len(parts) - dots} indices for a tensor of {len(shape)} dimensions")
    at = next((i for i, part in enumerate(parts) if part is Ellipsis), len(parts))
    missing = len(shape) - (len(parts) - dots)
    parts[at : at + 1] = [slice(None)] * missing
    return [_range(part, size, d) for d, (part, size) in enumerate(zip(parts, shape))]


def _range(part: Any, size: int, dimension: int) -> Tuple[int, int]:
    if isinstance(part, bool) or not isinstance(part, slice):
        if hasattr(part, "__index__") and not isinstance(part, bool):
            number = part.__index__()
            raise ArrayError(f"index {number} drops dimension {dimension}: write {number}:{number + 1}")
        raise ArrayError(f"index {part!r} of dimension {dimension}: only slices and '...' can be bound")
    if part.step not in (None, 1):
        raise ArrayError(f"a step of {part.step} in dimension {dimension}: only contiguous slices can be bound")
    start, stop, _ = part.indices(size)
    for name, given in (("start", part.start), ("stop", part.stop)):
        if given is not None and not -size <= given <= size:
            raise ArrayError(f"{name} {given} is outside of dimension {dimension}, which has {size}")
    return start, max(start, stop)


def binding(
    name: str,
    placed: Placed,
    dtype: str,
    shape: Sequence[int],
    index: Optional[Ranges],
    region: int,
) -> Dict[str, Any]:
    """The binding as the agent wants it, after checking that array and slice have one shape."""
    made: Dict[str, Any] = {
        "tensor": name,
        "dtype": dtype,
        "shape": list(shape),
        "region": region,
        "offset": placed.offset,
    }
    size = dtypes.element_bytes(dtype)
    if size is None:
        _check_raw(name, placed, dtype, shape, index)
        return made
    wanted = tuple(e - s for s, e in index) if index is not None else tuple(shape)
    if wanted != placed.shape:
        what = "the slice" if index is not None else "the tensor"
        raise ArrayError(f"{what} of '{name}' has shape {list(wanted)}, the array has {list(placed.shape)}")
    if index is not None and wanted != tuple(shape):
        made["index"] = [list(pair) for pair in index]
    if not placed.is_packed():
        made["strides"] = list(placed.strides)
    return made


def choose_dtype(name: str, placed: Placed, asked: Optional[str], tensor: Optional[TensorInfo]) -> str:
    """Which of the dtypes that the array may hold is meant."""
    if asked and tensor and asked != tensor.dtype:
        raise ArrayError(f"tensor '{name}' is {tensor.dtype}, not {asked}")
    wanted = asked or (tensor.dtype if tensor else placed.dtypes[0])
    raw = dtypes.element_bytes(wanted) is None and "U8" in placed.dtypes
    if wanted not in placed.dtypes and not raw:
        raise ArrayError(
            f"tensor '{name}' is {wanted}; an array that holds {' or '.join(placed.dtypes)} cannot take it"
        )
    return wanted


def look_up(tensors: Dict[str, T], name: str) -> T:
    if name in tensors:
        return tensors[name]
    close = difflib.get_close_matches(name, tensors, n=3)
    hint = f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
    raise ArrayError(f"the release has no tensor '{name}' among its {len(tensors)}{hint}")


def _check_raw(name: str, placed: Placed, dtype: str, shape: Sequence[int], index: Optional[Ranges]) -> None:
    if index is not None and any((s, e) != (0, n) for (s, e), n in zip(index, shape)):
        raise ArrayError(
            f"tensor '{name}' is {dtype}, whose elements are not whole bytes: it is bound whole or not at all"
        )
    if not placed.is_packed():
        raise ArrayError(f"tensor '{name}' is {dtype}: it needs a contiguous array of bytes")
    length = dtypes.tensor_bytes(dtype, shape)
    if length is not None and length != math.prod(placed.shape):
        raise ArrayError(f"tensor '{name}' has {length} bytes, the array {math.prod(placed.shape)}")


def _describe(array: Any) -> Tuple[int, Tuple[int, ...], Tuple[int, ...], int, List[str]]:
    """Address, shape, strides in bytes, bytes of an element, possible dtypes."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        if array.device.type not in ("cpu", "cuda"):
            raise ArrayError(f"the tensor is on {array.device}; memory of the host and of NVIDIA's GPUs can be bound")
        if array.layout != torch.strided:
            raise ArrayError(f"the tensor's layout is {array.layout}; only dense tensors can be bound")
        size = array.element_size()
        strides = tuple(s * size for s in array.stride())
        names = dtypes.names_of_torch(str(array.dtype)[len("torch.") :], torch)
        return array.data_ptr(), tuple(array.shape), strides, size, names
    interface = getattr(array, "__array_interface__", None)
    if interface is not None:
        if not array.dtype.isnative:
            raise ArrayError("the array's byte order is not this machine's")
        names = dtypes.names_of_numpy(array.dtype.name)
        return interface["data"][0], tuple(array.shape), tuple(array.strides), array.itemsize, names
    if isinstance(array, (memoryview, bytearray)):
        view = memoryview(array)
        if not view.c_contiguous or view.readonly:
            raise ArrayError("a memoryview can be bound if it is contiguous and writable")
        address = ctypes.addressof(ctypes.c_char.from_buffer(view)) if view.nbytes else 0
        names = dtypes.names_of_format(view.format, view.itemsize)
        return address, tuple(view.shape or ()), tuple(view.strides or ()), view.itemsize, names
    raise ArrayError(f"{type(array).__name__} is not an array: bind NumPy arrays, PyTorch tensors or memoryviews")


def _extent_without_overlap(shape: Tuple[int, ...], strides: Tuple[int, ...], element_bytes: int) -> int:
    """Bytes from the first to behind the last element, if no two elements share any."""
    extent = element_bytes
    for stride, size in sorted(zip(strides, shape)):
        if size > 1 and stride < extent:
            raise ArrayError("elements of the array share memory (a broadcast or overlapping view): bind a real array")
        extent += (size - 1) * stride
    return extent
