"""Element types: the names safetensors gives them, and what each framework calls them.

A dtype that a framework lacks appears as raw bits, with its shape kept:

- NumPy: BF16 as ``uint16``, F8 kinds as ``uint8``.
- PyTorch: each F8 kind as ``uint8`` and U16, U32, U64 as ``int16``, ``int32``, ``int64`` where the
  installed version has no such dtype.
- memoryview: F16 and BF16 as ``H``, F8 kinds as ``B``, C64 as ``Q``.

Dtypes whose elements do not fill bytes (F4, F6) and unknown ones appear as a flat array of bytes.
"""

from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence


@dataclass(frozen=True)
class _Row:
    bits: int
    numpy: Optional[str] = None
    torch: Optional[str] = None
    format: Optional[str] = None


_TABLE: Dict[str, _Row] = {
    "F64": _Row(64, "float64", "float64", "d"),
    "F32": _Row(32, "float32", "float32", "f"),
    "F16": _Row(16, "float16", "float16"),
    "BF16": _Row(16, None, "bfloat16"),
    "F8_E4M3": _Row(8, None, "float8_e4m3fn"),
    "F8_E5M2": _Row(8, None, "float8_e5m2"),
    "F8_E8M0": _Row(8, None, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": _Row(8, None, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": _Row(8, None, "float8_e5m2fnuz"),
    "F6_E2M3": _Row(6),
    "F6_E3M2": _Row(6),
    "F4": _Row(4),
    "C64": _Row(64, "complex64", "complex64"),
    "I64": _Row(64, "int64", "int64", "q"),
    "I32": _Row(32, "int32", "int32", "i"),
    "I16": _Row(16, "int16", "int16", "h"),
    "I8": _Row(8, "int8", "int8", "b"),
    "U64": _Row(64, "uint64", "uint64", "Q"),
    "U32": _Row(32, "uint32", "uint32", "I"),
    "U16": _Row(16, "uint16", "uint16", "H"),
    "U8": _Row(8, "uint8", "uint8", "B"),
    "BOOL": _Row(8, "bool", "bool", "?"),
}

#: Raw bits by element size in bytes.
_RAW_NUMPY = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}
_RAW_TORCH = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}
_RAW_FORMAT = {1: "B", 2: "H", 4: "I", 8: "Q"}


def element_bytes(name: str) -> Optional[int]:
    """Bytes of one element; ``None`` if unknown or not a whole number."""
    row = _TABLE.get(name)
    return row.bits // 8 if row and row.bits % 8 == 0 else None


def tensor_bytes(name: str, shape: Sequence[int]) -> Optional[int]:
    """Bytes of a whole tensor; ``None`` if the dtype is unknown."""
    row = _TABLE.get(name)
    if row is None:
        return None
    bits = row.bits
    for size in shape:
        bits *= size
    if bits % 8:
        raise ValueError(f"{name} of shape {list(shape)} does not fill whole bytes")
    return bits // 8


def numpy_name(name: str) -> str:
    """The NumPy dtype that elements of ``name`` appear as. For dtypes with whole bytes."""
    row = _TABLE[name]
    return row.numpy or _RAW_NUMPY[row.bits // 8]


def torch_name(name: str, torch: Any) -> str:
    row = _TABLE[name]
    return row.torch if row.torch and hasattr(torch, row.torch) else _RAW_TORCH[row.bits // 8]


def format_of(name: str) -> str:
    row = _TABLE[name]
    return row.format or _RAW_FORMAT[row.bits // 8]


def _whole() -> List[str]:
    return [name for name, row in _TABLE.items() if row.bits % 8 == 0]


def names_of_numpy(dtype: str) -> List[str]:
    """The dtypes that may lie in a NumPy array of this dtype, its own first."""
    names = [name for name in _whole() if numpy_name(name) == dtype]
    return sorted(names, key=lambda name: _TABLE[name].numpy != dtype)


def names_of_torch(dtype: str, torch: Any) -> List[str]:
    names = [name for name in _whole() if torch_name(name, torch) == dtype]
    return sorted(names, key=lambda name: _TABLE[name].torch != dtype)


def names_of_format(form: str, size: int) -> List[str]:
    """``size`` tells ``l`` from ``q``: native formats depend on the machine."""
    form = form.lstrip("@=<")
    form = {("l", 8): "q", ("L", 8): "Q", ("l", 4): "i", ("L", 4): "I"}.get((form, size), form)
    names = [name for name in _whole() if format_of(name) == form]
    return sorted(names, key=lambda name: _TABLE[name].format != form)


def is_known(name: str) -> bool:
    return name in _TABLE
