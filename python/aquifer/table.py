"""The tensors of a release as columns: a million of them are names and numbers, and no objects."""

import contextlib
import gc
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple, Union

from . import arrays
from .errors import AquiferError
from .memory import ALIGN_BYTES, Mapping, align
from .values import TensorInfo

#: Ranges of the numbers of tensors, ascending.
Numbers = List[Tuple[int, int]]


class Kind(NamedTuple):
    """What many tensors have in common."""

    dtype: str
    shape: Tuple[int, ...]
    bytes: int


class Table:
    """All tensors of one release, sorted by name."""

    def __init__(self, manifest: str) -> None:
        #: The release's hash.
        self.manifest = manifest
        #: Whether the agent told it in pages, and so knows what a row is.
        self.paged = True
        self.names: List[str] = []
        self.kind_of: List[int] = []
        self.kinds: List[Kind] = []
        self._infos: Optional[Dict[str, TensorInfo]] = None

    @staticmethod
    def fetch(ask: Callable[[int], Dict[str, Any]]) -> "Table":
        """``ask(number)`` is the agent's answer to ``manifest`` from that tensor on."""
        while True:
            page = ask(0)
            table = Table(page["release"]["manifest"])
            if "tensors" in page:
                table._add_all(page["tensors"])
                return table
            table._add(page)
            while len(table.names) < page["count"]:
                page = ask(len(table.names))
                if page["release"]["manifest"] != table.manifest:
                    break  # There is a newer release meanwhile.
                table._add(page)
            else:
                return table

    def _add(self, page: Dict[str, Any]) -> None:
        names, kind_of = page["names"], page["kind_of"]
        if len(names) != len(kind_of) or page["from"] != len(self.names) or (not names and page["count"]):
            raise AquiferError(f"the agent told tensors from {page['from']} on that do not fit {len(self.names)}")
        known = len(self.kinds)
        self.kinds += [Kind(kind["dtype"], tuple(kind["shape"]), kind["bytes"]) for kind in page["kinds"]]
        self.names += names
        self.kind_of += [known + kind for kind in kind_of] if known else kind_of

    def _add_all(self, tensors: List[Dict[str, Any]]) -> None:
        self.paged = False
        numbers: Dict[Kind, int] = {}
        for tensor in tensors:
            kind = Kind(tensor["dtype"], tuple(tensor["shape"]), tensor["bytes"])
            self.names.append(tensor["name"])
            self.kind_of.append(numbers.setdefault(kind, len(numbers)))
        self.kinds = list(numbers)

    def __len__(self) -> int:
        return len(self.names)

    def infos(self) -> Dict[str, TensorInfo]:
        """By name, made when first asked for."""
        if self._infos is None:
            kinds = self.kinds
            with without_collections():
                self._infos = {
                    name: TensorInfo(name, kinds[kind].dtype, kinds[kind].shape, kinds[kind].bytes)
                    for name, kind in zip(self.names, self.kind_of)
                }
        return self._infos

    def choose(self, names: Union[None, Iterable[str], Callable[[str], bool]]) -> Numbers:
        """All of them, or some names, or those of which a function says yes."""
        if names is None:
            return _ranges(range(len(self)))
        if callable(names):
            return _ranges(number for number, name in enumerate(self.names) if names(name))
        known = {name: number for number, name in enumerate(self.names)}
        return _ranges(sorted({arrays.look_up(known, name) for name in names}))


class Row:
    """Tensors of a release, whole, one after the other in a region, at multiples of :data:`ALIGN_BYTES`."""

    def __init__(self, table: Table, numbers: Numbers) -> None:
        self.table = table
        self.numbers = numbers
        self._count = sum(end - begin for begin, end in numbers)
        rooms = [align(kind.bytes) for kind in table.kinds]
        end = sum(rooms[kind] for begin, end in numbers for kind in table.kind_of[begin:end])
        if self._count:
            last = table.kinds[table.kind_of[numbers[-1][1] - 1]]
            end += last.bytes - align(last.bytes)
        #: How long the region must be.
        self.bytes = end

    def __len__(self) -> int:
        return self._count

    def views(self, mapping: Mapping, framework: str) -> Callable[[], Dict[str, Any]]:
        """Makes them arrays, tensors or memoryviews by name. What can fail does so now, and what takes long
        is done when the result is called."""
        views = [mapping.views(framework, *kind) for kind in self.table.kinds]
        return lambda: self._made(views)

    def _made(self, views: List[Callable[[int], Any]]) -> Dict[str, Any]:
        made: Dict[str, Any] = {}
        offset = 0
        table = self.table
        rooms = [align(kind.bytes) for kind in table.kinds]
        with without_collections():
            for begin, end in self.numbers:
                for name, kind in zip(table.names[begin:end], table.kind_of[begin:end]):
                    made[name] = views[kind](offset)
                    offset += rooms[kind]
        return made

    def request(self, region: int) -> Dict[str, Any]:
        """The fields of a ``bind_row``."""
        ranges = [list(pair) for pair in self.numbers]
        return {"manifest": self.table.manifest, "tensors": ranges, "region": region, "align": ALIGN_BYTES}

    def bindings(self, region: int) -> Iterator[Dict[str, Any]]:
        """The same one by one, for an agent that does not have its release, or knows no rows."""
        table = self.table
        offset = 0
        for begin, end in self.numbers:
            for name, number in zip(table.names[begin:end], table.kind_of[begin:end]):
                dtype, shape, length = table.kinds[number]
                yield {"tensor": name, "dtype": dtype, "shape": list(shape), "region": region, "offset": offset}
                offset += align(length)


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """No garbage collection inside. Each would look at all that was made before, and find nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _ranges(numbers: Iterable[int]) -> Numbers:
    if isinstance(numbers, range):
        return [(numbers.start, numbers.stop)] if numbers else []
    ranges: Numbers = []
    begin = end = -1
    for number in numbers:
        if number != end:
            if begin >= 0:
                ranges.append((begin, end))
            begin = number
        end = number + 1
    return ranges + [(begin, end)] if begin >= 0 else ranges
