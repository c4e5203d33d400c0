"""A lock that many readers hold while they use the weights, and one writer shuts to change them."""

import contextlib
import threading
from typing import Iterator, Optional

from .errors import Paused


class Gate:
    """Shut at first. A thread that is inside may enter again, also while the gate is being shut.

    One that ``refuses`` keeps nobody waiting who comes while it is shut for an update.
    """

    def __init__(self, refuses: bool = False) -> None:
        self._changed = threading.Condition()
        self._refuses = refuses
        self._open = False
        self._updating = False
        self._inside = 0
        self._mine = threading.local()
        self._failure: Optional[Exception] = None

    def enter(self, timeout: Optional[float] = None) -> None:
        """Waits until it is open. Raises what :meth:`fail` was given, :class:`TimeoutError`, or :class:`Paused`."""
        depth = getattr(self._mine, "depth", 0)
        if not self._is_mine():
            with self._changed:
                if depth == 0:
                    self._wait(timeout)
                self._inside += 1
        self._mine.depth = depth + 1

    def _wait(self, timeout: Optional[float]) -> None:
        def refused() -> bool:
            return self._refuses and self._updating

        if not self._changed.wait_for(lambda: self._open or self._failure or refused(), timeout):
            raise TimeoutError(f"the engine was not ready to serve within {timeout} s")
        if not self._open and self._failure:
            raise self._failure
        if not self._open:
            raise Paused("an update is being applied: ask again, or another engine")

    def leave(self) -> None:
        self._mine.depth -= 1
        if not self._is_mine():
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def _is_mine(self) -> bool:
        return getattr(self._mine, "owner", False)

    def shut(self, timeout: Optional[float] = None) -> bool:
        """Lets nobody in, and waits until nobody is inside. If that takes too long: opens again, False."""
        with self._changed:
            was_open, was_updating = self._open, self._updating
            self._open = False
            self._updating = was_open or was_updating
            self._changed.notify_all()
            empty = self._changed.wait_for(lambda: self._inside == 0, timeout)
            if not empty:
                self._open, self._updating = was_open, was_updating
                self._changed.notify_all()
            return empty

    def open(self) -> None:
        with self._changed:
            self._failure = None
            self._open = True
            self._updating = False
            self._changed.notify_all()

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Inside, this thread may enter although it is shut, and nobody waits for it to leave: it is the one that
        shut it, or one that it waits for as long as it likes."""
        self._mine.owner = True
        try:
            yield
        finally:
            self._mine.owner = False

    def fail(self, failure: Optional[Exception]) -> None:
        """Whoever waits, and whoever comes, gets ``failure`` until the gate opens. None takes it back."""
        with self._changed:
            self._failure = failure
            self._changed.notify_all()
