"""A lock that many readers hold while they use the weights, and one writer shuts to change them."""

import contextlib
import threading
from typing import Iterator, Optional


class Gate:
    """Shut at first. A thread that is inside may enter again, also while the gate is being shut."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open = False
        self._inside = 0
        self._mine = threading.local()
        self._failure: Optional[Exception] = None

    def enter(self, timeout: Optional[float] = None) -> None:
        """Waits until it is open. Raises what :meth:`fail` was given, or :class:`TimeoutError`."""
        depth = getattr(self._mine, "depth", 0)
        with self._changed:
            if depth == 0 and not self._changed.wait_for(lambda: self._open or self._failure, timeout):
                raise TimeoutError(f"the engine was not ready to serve within {timeout} s")
            if depth == 0 and not self._open and self._failure:
                raise self._failure
            self._inside += 1
        self._mine.depth = depth + 1

    def leave(self) -> None:
        self._mine.depth -= 1
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def shut(self, timeout: Optional[float] = None) -> bool:
        """Lets nobody in, and waits until nobody is inside. If that takes too long: opens again, False."""
        with self._changed:
            was_open = self._open
            self._open = False
            empty = self._changed.wait_for(lambda: self._inside == 0, timeout)
            if not empty:
                self._open = was_open
                self._changed.notify_all()
            return empty

    def open(self) -> None:
        with self._changed:
            self._failure = None
            self._open = True
            self._changed.notify_all()

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Inside, this thread may enter although it is shut: it is the one that shut it."""
        self._mine.depth = getattr(self._mine, "depth", 0) + 1
        try:
            yield
        finally:
            self._mine.depth -= 1

    def fail(self, failure: Optional[Exception]) -> None:
        """Whoever waits, and whoever comes, gets ``failure`` until the gate opens. None takes it back."""
        with self._changed:
            self._failure = failure
            self._changed.notify_all()
