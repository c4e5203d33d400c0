"""The way to the node's agent: to one after the other, over the life of the engine."""

import logging
import queue
import threading
import time
from typing import Any, Callable, List, Optional

from .errors import AgentUnavailable, AquiferError, RequestRefused, SessionLost
from .wire import Message, Session

log = logging.getLogger("aquifer")

#: Seconds between two attempts to reach an agent that is gone: from the first, doubling, to the second.
_RECONNECT_WAIT_MIN_S = 0.05
_RECONNECT_WAIT_MAX_S = 5.0

#: Seconds of silence after which a long question says in the log what is waited for.
_SAY_WHY_AFTER_S = 5.0

CLOSED = "the engine is closed"


class Link:
    """A connection that comes back, and the thread that speaks for the engine.

    On that thread, the worker, run: ``handle(session, message)`` for each event, in order; ``restore(session)``
    after a reconnect; ``refused(reason)`` if a new agent does not want to hear that; and what :meth:`run`
    is given. ``greet(session)`` says hello, on the worker and, the first time, on the caller's thread.
    ``overhear(message)`` is called on the reader's thread, for events that must not queue up behind a
    slow callback; it returns True for those it has dealt with.
    """

    def __init__(
        self,
        path: str,
        greet: Callable[[Session], None],
        restore: Callable[[Session], None],
        handle: Callable[[Session, Message], None],
        overhear: Callable[[Message], bool],
        refused: Callable[[str], None],
    ) -> None:
        self._path = path
        self._greet = greet
        self._restore = restore
        self._handle = handle
        self._overhear = overhear
        self._refused = refused
        self._inbox: "queue.SimpleQueue[Callable[[], None]]" = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._session: Optional[Session] = None
        self._closed = threading.Event()
        self._waiting: "List[queue.SimpleQueue[Optional[Exception]]]" = []

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def open(self, timeout: float) -> None:
        """Finds an agent within ``timeout`` seconds, or raises :class:`AgentUnavailable`."""
        deadline = time.monotonic() + timeout
        while self._session is None:
            try:
                self._session = self._meet()
            except (AgentUnavailable, SessionLost) as error:
                if time.monotonic() >= deadline:
                    raise AgentUnavailable(str(error)) from error
                time.sleep(_RECONNECT_WAIT_MIN_S)
        threading.Thread(target=self._work, name="aquifer-engine", daemon=True).start()

    def close(self) -> None:
        with self._changed:
            self._closed.set()
            session, self._session = self._session, None
            for outcome in self._waiting:
                outcome.put(AquiferError(CLOSED))
            self._changed.notify_all()
        if session is not None:
            session.close()
        self._inbox.put(lambda: None)

    def run(self, task: Callable[[Session], None]) -> None:
        """Runs ``task`` on the worker and raises what it raises. If the agent is lost meanwhile, that is
        no error: ``restore`` will do."""
        outcome: "queue.SimpleQueue[Optional[Exception]]" = queue.SimpleQueue()
        with self._changed:
            if self.closed:
                raise AquiferError(CLOSED)
            self._waiting.append(outcome)
        self._inbox.put(lambda: outcome.put(self._outcome(task)))
        error = outcome.get()
        with self._changed:
            self._waiting.remove(outcome)
        if error is not None:
            raise error

    def post(self, task: Callable[[Session], None]) -> None:
        """The same without waiting, from any thread; what it raises is logged."""
        self._inbox.put(lambda: self._report(self._outcome(task)))

    def ask(self, op: str, timeout: Optional[float], what: str, **fields: Any) -> Message:
        """Asks until there is an answer, by this agent or a later one; ``what`` is waited for, for people."""
        deadline = deadline_of(timeout)
        patience: Optional[float] = _SAY_WHY_AFTER_S
        while True:
            session = self._current(deadline)
            waits = [seconds for seconds in (left(deadline), patience) if seconds is not None]
            try:
                return session.call(op, timeout=min(waits, default=None), **fields)
            except SessionLost:
                with self._changed:
                    self._changed.wait_for(lambda: self._session is not session, left(deadline))
            except TimeoutError as error:
                if left(deadline) == 0:
                    raise TimeoutError(f"no {what} within {timeout} s") from error
                patience = None
                log.warning("aquifer: waiting for %s", what)

    def _current(self, deadline: Optional[float]) -> Session:
        with self._changed:
            self._changed.wait_for(lambda: self._session or self.closed, left(deadline))
            if self.closed:
                raise AquiferError(CLOSED)
            if self._session is None:
                raise TimeoutError(f"the agent at {self._path} did not come back in time")
            return self._session

    def _meet(self) -> Session:
        session = Session(self._path, on_event=self._on_event, on_lost=self._on_lost)
        session.start()
        try:
            self._greet(session)
        except BaseException:
            session.close()
            raise
        return session

    def _on_event(self, session: Session, message: Message) -> None:
        if not self._overhear(message):
            self._inbox.put(lambda: self._dispatch(session, message))

    def _on_lost(self, session: Session) -> None:
        self._inbox.put(lambda: self._reconnect(session))

    # ---- on the worker

    def _work(self) -> None:
        while not self.closed:
            item = self._inbox.get()
            try:
                item()
            except SessionLost:
                pass  # That is an item of its own.
            except RequestRefused as error:
                log.warning("aquifer: the agent does not take an answer: %s", error)
            except Exception:
                log.exception("aquifer: unexpected")

    def _dispatch(self, session: Session, message: Message) -> None:
        if session is self._session:  # Else it concerns an agent that is gone.
            self._handle(session, message)

    def _outcome(self, task: Callable[[Session], None]) -> Optional[Exception]:
        session = self._session
        try:
            if session is not None:
                task(session)
        except SessionLost:
            pass
        except Exception as error:
            return error
        return None

    @staticmethod
    def _report(error: Optional[Exception]) -> None:
        if error is not None:
            raise error

    def _reconnect(self, lost: Session) -> None:
        if lost is not self._session:
            return
        log.warning("aquifer: the agent at %s is gone (%s); looking for it", self._path, lost.lost)
        with self._changed:
            self._session = None
        wait = _RECONNECT_WAIT_MIN_S
        while not self._closed.wait(wait):
            wait = min(2 * wait, _RECONNECT_WAIT_MAX_S)
            session = self._meet_again()
            if session is not None:
                self._adopt(session)
                return

    def _meet_again(self) -> Optional[Session]:
        session = None
        try:
            session = self._meet()
            self._restore(session)
            return session
        except (AgentUnavailable, SessionLost):
            return None
        except RequestRefused as error:
            log.error("aquifer: the agent refuses what is registered: %s", error)
            self._refused(f"the agent refuses what is registered: {error}")
        if session is not None:
            session.close()
        return None

    def _adopt(self, session: Session) -> None:
        with self._changed:
            self._session = None if self.closed else session
            self._changed.notify_all()
        if self.closed:
            session.close()
        log.info("aquifer: connected to the agent at %s", self._path)


def deadline_of(timeout: Optional[float]) -> Optional[float]:
    return None if timeout is None else time.monotonic() + timeout


def left(deadline: Optional[float]) -> Optional[float]:
    """Seconds until then; 0 if it is over, ``None`` for ever."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())
