"""What the agent tells, as immutable values."""

from dataclasses import dataclass, fields
from typing import Any, Dict, Optional, Tuple, Type, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Release:
    """A signed "this channel now points at that manifest"."""

    channel: str
    seq: int
    #: Hash of the manifest, 64 hexadecimal digits: the name of these exact weights.
    manifest: str
    rollback: bool
    note: str
    #: The publisher's clock, milliseconds since 1970.
    created_unix_ms: int
    #: Public key that signed it, 64 hexadecimal digits.
    publisher: str


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a release. ``dtype`` is as in safetensors, ``bytes`` its length."""

    name: str
    dtype: str
    shape: Tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Standing:
    """Where the node stands with the channel, true of all its engines together: what ``aquifer status`` says."""

    #: Hash of the manifest to get to, or arrived at.
    wanted: str
    #: Hash of the manifest that the engines are to serve now; ``None``: nothing yet.
    due: Optional[str]
    #: ``heard``, ``planned``, ``fetched``, ``verified``, ``staged``, ``paused``, ``checked``, ``ready``, ``failed``
    #: or ``rolled back``.
    phase: str
    #: All of them serve ``due``, and nobody can be ready with another release that must not be.
    ready: bool
    #: What it waits for, or what went wrong; for people.
    reason: str


@dataclass(frozen=True)
class Progress:
    """How far a release has come. ``peers`` is how many nodes its bytes came from."""

    manifest: str
    bytes_done: int
    bytes_total: int
    chunks_done: int
    chunks_total: int
    peers: int
    bytes_per_s: int


def parse(kind: Type[T], record: Dict[str, Any]) -> T:
    """Builds ``kind`` from what the agent sent, skipping fields of a newer agent."""
    known = {field.name: record[field.name] for field in fields(kind)}  # type: ignore[arg-type]
    if "shape" in known:
        known["shape"] = tuple(known["shape"])
    return kind(**known)
