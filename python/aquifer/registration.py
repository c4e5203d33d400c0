"""What an engine has registered: kept, because after a crash of the agent it must be said again."""

from typing import Any, Dict, List, Tuple, Union

from . import gpu
from .errors import RequestRefused
from .memory import Mapping
from .table import Row
from .wire import Session

#: Bindings in one request; each is some 200 bytes of JSON.
_BINDINGS_PER_REQUEST = 4096


class Registration:
    def __init__(self) -> None:
        self._regions: List[Union[Mapping, gpu.Allocation]] = []
        self._numbers: Dict[int, int] = {}
        self._bindings: List[Dict[str, Any]] = []
        self._rows: List[Tuple[Row, int]] = []

    def __len__(self) -> int:
        return len(self._bindings) + sum(len(row) for row, _ in self._rows)

    def region(self, mapping: Union[Mapping, gpu.Allocation]) -> int:
        """The number of the region that ``mapping`` is, from now on at the latest."""
        number = self._numbers.setdefault(mapping.address, len(self._regions))
        if number == len(self._regions):
            self._regions.append(mapping)
        elif isinstance(mapping, gpu.Allocation):
            self._regions[number].keep(mapping)  # type: ignore[union-attr]
        return number

    def on_gpus(self) -> List[gpu.Allocation]:
        return [region for region in self._regions if isinstance(region, gpu.Allocation)]

    def add(self, binding: Dict[str, Any]) -> None:
        self._bindings.append(binding)

    def add_row(self, row: Row, region: int) -> None:
        self._rows.append((row, region))

    def send(self, session: Session, first: bool) -> None:
        """Says all of it. Only the ``first`` time can memory be empty for sure."""
        for number, mapping in enumerate(self._regions):
            session.call("region", region=number, **mapping.claim(first))
        _bind(session, self._bindings)
        for row, region in self._rows:
            _bind_row(session, row, region)
        session.call("hydrate")


def _bind(session: Session, bindings: List[Dict[str, Any]]) -> None:
    for at in range(0, len(bindings), _BINDINGS_PER_REQUEST):
        session.call("bind", bindings=bindings[at : at + _BINDINGS_PER_REQUEST])


def _bind_row(session: Session, row: Row, region: int) -> None:
    if row.table.paged:
        try:
            session.call("bind_row", **row.request(region))
            return
        except RequestRefused as refusal:
            # An agent that came later may have a newer release only, or be an older program.
            if refusal.code not in ("unknown-manifest", "unknown-op"):
                raise
    _bind(session, list(row.bindings(region)))
