"""Which tensor of a release each parameter of a PyTorch module is."""

from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

from .errors import AquiferError
from .values import TensorInfo

#: For each parameter the tensor it is, or several that lie in it one after the other.
Names = Union[Mapping[str, Any], Callable[[str], Any], None]


@dataclass(frozen=True)
class Fused:
    """A parameter made of several tensors of the release, one after the other along ``dim``."""

    tensors: Sequence[str]
    dim: int = 0


@dataclass(frozen=True)
class Transposed:
    """A parameter that holds a tensor of the release with its two dimensions exchanged."""

    tensor: str


@dataclass
class Bound:
    """What :meth:`aquifer.Engine.bind_module` did."""

    #: Parameters and buffers, and what they were bound to.
    bound: Dict[str, Any]
    #: Those that share memory with one that was bound, such as tied embeddings.
    tied: List[str]
    #: Tensors of the release that no parameter took.
    unused: List[str]


def pairs(module: Any, names: Names, tensors: Dict[str, TensorInfo]) -> Tuple[Bound, List[Tuple[str, Any]]]:
    """What is to be bound: the tensor's name and the part of the parameter that it fills."""
    known: Dict[Tuple[int, Tuple[int, ...], Tuple[int, ...]], str] = {}
    result = Bound({}, [], [])
    todo: List[Tuple[str, Any]] = []
    missing: List[str] = []
    for name, parameter in module.state_dict(keep_vars=False).items():
        target = _target(names, name)
        if target is None or parameter.numel() == 0:
            continue
        place = (parameter.data_ptr(), tuple(parameter.shape), tuple(parameter.stride()))
        wanted = list(_wanted(target, parameter, tensors))
        if any(tensor not in tensors for tensor, _ in wanted):
            missing.append(name)
            continue
        known.setdefault(place, name)
        result.bound[name] = target
        todo.extend(wanted)
    for name, parameter in module.state_dict(keep_vars=False).items():
        place = (parameter.data_ptr(), tuple(parameter.shape), tuple(parameter.stride()))
        if name in missing and place in known:
            missing.remove(name)
            result.tied.append(name)
    if missing:
        raise AquiferError(
            f"the release has no tensor for {', '.join(repr(name) for name in missing[:5])}"
            f"{' and others' if len(missing) > 5 else ''}: say with names= what they are, or None to leave them out"
        )
    taken = {tensor for tensor, _ in todo}
    result.unused = [tensor for tensor in tensors if tensor not in taken]
    return result, todo


def _target(names: Names, name: str) -> Any:
    if names is None:
        return name
    if callable(names):
        return names(name)
    return names.get(name, name)


def _wanted(target: Any, parameter: Any, tensors: Dict[str, TensorInfo]) -> Iterator[Tuple[str, Any]]:
    if isinstance(target, Transposed):
        yield target.tensor, parameter.t()
    elif isinstance(target, Fused):
        begin = 0
        for tensor in target.tensors:
            info: Optional[TensorInfo] = tensors.get(tensor)
            length = info.shape[target.dim] if info else 0
            yield tensor, parameter.narrow(target.dim, begin, length)
            begin += length
        if begin != parameter.shape[target.dim] and all(tensor in tensors for tensor in target.tensors):
            raise AquiferError(
                f"{' and '.join(target.tensors)} have {begin} together in dimension {target.dim}, the parameter has "
                f"{parameter.shape[target.dim]}"
            )
    else:
        yield str(target), parameter
