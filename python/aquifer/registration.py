"""What an engine has registered: kept, because after a crash of the agent it must be said again."""

from typing import Any, Dict, List

from .memory import Mapping
from .wire import Session

#: Bindings in one request; each is some 200 bytes of JSON.
_BINDINGS_PER_REQUEST = 4096


class Registration:
    def __init__(self) -> None:
        self._regions: List[Mapping] = []
        self._numbers: Dict[int, int] = {}
        self._bindings: List[Dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._bindings)

    def region(self, mapping: Mapping) -> int:
        """The number of the region that ``mapping`` is, from now on at the latest."""
        number = self._numbers.setdefault(mapping.address, len(self._regions))
        if number == len(self._regions):
            self._regions.append(mapping)
        return number

    def add(self, binding: Dict[str, Any]) -> None:
        self._bindings.append(binding)

    def send(self, session: Session, first: bool) -> None:
        """Says all of it. Only the ``first`` time can memory be empty for sure."""
        for number, mapping in enumerate(self._regions):
            fresh = first and mapping.fresh
            session.call("region", fd=mapping.fd, region=number, bytes=mapping.length, fresh=fresh)
        for at in range(0, len(self._bindings), _BINDINGS_PER_REQUEST):
            session.call("bind", bindings=self._bindings[at : at + _BINDINGS_PER_REQUEST])
        session.call("hydrate")
