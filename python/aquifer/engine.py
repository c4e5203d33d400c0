"""The engine's side of the agreement with its agent."""

import contextlib
import inspect
import logging
import os
import sys
import threading
import time
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

from . import arrays, checks, dtypes, gpu, memory, modules, progress as progress_lines
from .errors import AquiferError, HydrationError, HydrationTimeout, RequestRefused
from .gate import Gate
from .link import CLOSED, Link, deadline_of, left
from .registration import Registration
from .table import Row, Table
from .values import Progress, Release, Standing, TensorInfo, parse
from .wire import PROTOCOL_VERSION, Message, Session, default_socket_path

log = logging.getLogger("aquifer")

Callback = Callable[[Release], Any]

#: What ``while_paused`` is called in the protocol.
_DURING_PAUSE = {"hold": "held", "refuse": "refused"}


class Engine:
    """An inference process whose weights the node's agent keeps current.

    ``channel`` names the line of releases to follow. ``socket`` is the agent's; see
    :func:`aquifer.default_socket_path`. ``name`` is what status and logs call this engine.
    ``connect_timeout`` is how long to look for an agent, in seconds; later on the engine looks for
    ever. ``pause_timeout`` is how long an update may wait for those inside :meth:`serving`, in
    seconds; after that it is put off. ``None`` waits as long as the agent does, which is ten minutes.
    ``while_paused`` is what :meth:`serving` does while an update is applied: ``"hold"`` lets requests wait,
    ``"refuse"`` turns them away at once with :class:`aquifer.Paused`, for engines whose callers have another
    node to ask.

    Every byte that the engine is given was verified in place. While a release is served its memory
    does not change, except between the pause and the resume callbacks. Without callbacks of one's
    own it is enough to use the weights inside ``with engine.serving()``.

    Callbacks run on one thread of the package, in order. Methods may be called from any thread.
    """

    def __init__(
        self,
        channel: str,
        socket: Optional[str] = None,
        name: Optional[str] = None,
        *,
        connect_timeout: float = 5.0,
        pause_timeout: Optional[float] = None,
        while_paused: str = "hold",
    ) -> None:
        if while_paused not in _DURING_PAUSE:
            raise ValueError(f"while_paused must be 'hold' or 'refuse', not {while_paused!r}")
        self.channel = channel
        self.name = name or f"{os.path.basename(sys.argv[0]).strip('-') or 'python'}-{os.getpid()}"
        self.socket = socket or default_socket_path()
        self._pause_timeout = pause_timeout
        self._while_paused = while_paused
        self._gate = Gate(refuses=while_paused == "refuse")
        self._checks = checks.Checks(self._trying)
        #: On the thread of a check: the release that is tried there.
        self._tried = threading.local()
        self._registration = Registration()
        self._callbacks: Dict[str, List[Callback]] = {"release": [], "pause": [], "resume": [], "failed": []}
        self._own: Dict[str, Optional[Callback]] = {"pause": None, "resume": None}
        # All below is changed under `_changed`, and but for `_manifest` and `_frozen` on the link's worker.
        self._changed = threading.Condition(threading.RLock())
        self._frozen = False
        self._registered = False
        self._refusal: Optional[RequestRefused] = None
        self._serving: Optional[Release] = None
        self._wanted: Optional[Release] = None
        self._paused = False
        self._paused_at: Optional[float] = None
        self._last_pause: Optional[float] = None
        self._failure: Optional[HydrationError] = None
        self._progress: Optional[Progress] = None
        self._standing: Optional[Standing] = None
        self._manifest: Optional[Table] = None
        self._link = Link(self.socket, self._greet, self._restore, self._handle, self._overhear, self._fail)
        self._link.open(connect_timeout)

    # ---- memory

    def allocate(
        self,
        framework: str = "auto",
        names: Union[None, Iterable[str], Callable[[str], bool]] = None,
        *,
        hydrate: bool = True,
        timeout: Optional[float] = None,
    ) -> Dict[str, Any]:
        """Makes memory for the channel's tensors, registers it, and starts to fill it.

        Returns tensors (``"torch"``), arrays (``"numpy"``) or memoryviews (``"memoryview"``) by name;
        ``"auto"`` is the first of these that is installed. Dtypes that a framework lacks appear as
        raw bits; :mod:`aquifer.dtypes` has the table. ``names`` chooses: some names, or a function
        that is asked of each. Waits until the channel has a release, ``timeout`` seconds at most.
        ``hydrate=False`` leaves room for more :meth:`bind`.

        Read the weights after :meth:`wait_hydrated`, not before.
        """
        framework = memory.choose_framework(framework)
        self._refuse_if_frozen()
        table = self._tensors(timeout)
        row = Row(table, table.choose(names))
        mapping = memory.Mapping.new(row.bytes, fresh=True)
        views = row.views(mapping, framework)
        self._registration.add_row(row, self._registration.region(mapping))
        if hydrate:
            self.hydrate()
        # While the agent is fetching.
        return views()

    def bind(
        self,
        name: str,
        array: Any,
        index: Any = None,
        tensor_shape: Optional[Tuple[int, ...]] = None,
        dtype: Optional[str] = None,
    ) -> None:
        """Registers one's own array as the tensor ``name``, or as the part of it that ``index`` selects.

        The array must lie in memory from :func:`aquifer.empty` or :class:`aquifer.Arena`, or be a PyTorch
        tensor on a GPU; views of such arrays, transposed or with steps, will do. ``index`` is slices as in NumPy
        (``np.s_[0:512]``, ``np.s_[..., 64:]``), without steps, and counts in the whole tensor, whose
        shape is ``tensor_shape``. ``dtype`` is safetensors' name, for an array that holds raw bits.
        What is not said is looked up in the channel's release, for which this waits: that is
        ``tensor_shape`` if there is an ``index``, and ``dtype`` if the array's own leaves a choice.
        """
        self._refuse_if_frozen()
        placed = arrays.place(array)
        if placed is None:
            return
        has_shape = tensor_shape is not None or (index is None and not (dtype and dtypes.element_bytes(dtype) is None))
        unsure = not has_shape or (dtype is None and len(placed.dtypes) > 1)
        tensor = arrays.look_up(self.tensors(), name) if unsure or self._manifest is not None else None
        dtype = arrays.choose_dtype(name, placed, dtype, tensor)
        shape = placed.shape if tensor is None else tensor.shape
        if tensor_shape is not None:
            shape = tuple(tensor_shape)
        if tensor is not None and shape != tensor.shape:
            raise arrays.ArrayError(f"tensor '{name}' has shape {list(tensor.shape)}, not {list(shape)}")
        part = None if index is None else arrays.ranges(index, shape)
        made = arrays.binding(name, placed, dtype, shape, part, self._registration.region(placed.mapping))
        self._registration.add(made)

    def bind_module(self, module: Any, names: modules.Names = None) -> modules.Bound:
        """Registers the parameters and persistent buffers of a PyTorch module, such as a model on a GPU.

        Each is the release's tensor of its own name, or what ``names`` says for it, a dict or a function of
        the parameter's name: another name; :class:`aquifer.Fused` if it is made of several tensors (fused
        QKV, gate and up); :class:`aquifer.Transposed`; ``None`` to leave it out. A parameter that the release
        lacks must share memory with one that was bound (tied weights). Waits until the channel has a release.
        """
        result, todo = modules.pairs(module, names, self.tensors())
        for name, tensor in todo:
            self.bind(name, tensor)
        return result

    def hydrate(self) -> None:
        """Says that registration is complete: from now on the agent fills what was bound.

        Raises :class:`RequestRefused` if the agent finds fault with it; to mend that takes a new engine.
        """
        with self._changed:
            if self._refusal is not None:
                raise self._refusal
            if self._frozen:
                return
            if not len(self._registration):
                raise AquiferError("nothing is registered: call allocate() or bind() first")
            self._frozen = True
        self._link.run(self._register)

    def wait_hydrated(self, timeout: Optional[float] = None, progress: bool = True) -> None:
        """Waits until all that is registered holds a release, verified.

        Raises :class:`HydrationError` with the reason if it cannot be had, and
        :class:`HydrationTimeout` after ``timeout`` seconds. ``progress`` shows how far it is, on
        stderr.
        """
        self.hydrate()
        printer = progress_lines.Printer(f"hydrating {self.channel}") if progress and not self.ready else None
        deadline = deadline_of(timeout)
        begun = time.monotonic()
        with self._changed:
            while not self.ready:
                if self._failure is not None:
                    raise self._failure
                if self._link.closed:
                    raise HydrationError(CLOSED)
                patience = left(deadline)
                if patience == 0:
                    state = progress_lines.describe(self._progress)
                    raise HydrationTimeout(f"{self.channel} was not there within {timeout} s: {state}")
                if printer:
                    printer.show(self._progress)
                self._changed.wait(0.5 if patience is None else min(patience, 0.5))
            release = self._serving
            done = self._progress.bytes_done if self._progress else 0
        if printer and release:
            seconds = time.monotonic() - begun
            what = f"{progress_lines.size(done)} in {seconds:.1f} s, " if done else ""
            printer.end(f"{what}verified: {release.manifest[:12]}")

    def tensors(self, timeout: Optional[float] = None) -> Dict[str, TensorInfo]:
        """The tensors of the channel's release, by name. Waits until there is one."""
        return self._tensors(timeout).infos()

    def _tensors(self, timeout: Optional[float] = None) -> Table:
        if self._manifest is None:
            deadline = deadline_of(timeout)
            what = f"release of channel {self.channel}"
            try:
                table = Table.fetch(lambda number: self._link.ask("manifest", left(deadline), what, **{"from": number}))
            except TimeoutError as error:
                raise HydrationTimeout(f"no {what} within {timeout} s") from error
            with self._changed:
                self._manifest = table
        return self._manifest

    # ---- serving

    @property
    def release(self) -> Optional[str]:
        """Hash of the manifest served now; ``None`` before hydration and while nothing may be served."""
        with self._changed:
            return self._serving.manifest if self._serving and not self._paused else None

    @property
    def wanted(self) -> Optional[str]:
        """Hash of the newest manifest that was announced for the channel."""
        with self._changed:
            newest = self._wanted or self._serving
            return newest.manifest if newest else None

    @property
    def standing(self) -> Optional[Standing]:
        """Where the node stands with the channel, as it said last: a health check is to report ``standing.ready`` and
        its ``reason``. It may be false while this engine serves a release: in a synchronous rollout others may be
        answering from a newer one. ``None`` before the node said anything, or while there is no agent."""
        with self._changed:
            return None if self._link.closed else self._standing

    @property
    def last_pause(self) -> Optional[float]:
        """Seconds for which the last update kept the weights from being read: from when nothing read them any
        more until :meth:`serving` let somebody in again. ``None`` before the first."""
        with self._changed:
            return self._last_pause

    @property
    def ready(self) -> bool:
        """True if the weights are verified and no update is being applied."""
        return self.release is not None

    @contextlib.contextmanager
    def serving(self, timeout: Optional[float] = None) -> Iterator[str]:
        """No update is applied inside; yields the hash of the manifest that the weights are.

        Waits while an update is applied and before hydration, ``timeout`` seconds at most
        (:class:`TimeoutError`); with ``while_paused="refuse"`` raises :class:`aquifer.Paused` at once while an
        update is applied. Keep it as short as one query: an update waits for it.
        """
        self._gate.enter(timeout)
        try:
            release = getattr(self._tried, "release", None) or self._serving
            yield release.manifest if release else ""
        finally:
            self._gate.leave()

    # ---- callbacks

    def on_release(self, callback: Callback) -> Callback:
        """Calls ``callback(release)`` for each release announced from now on. Also a decorator."""
        return self._add("release", callback)

    def on_pause(self, callback: Callback) -> Callback:
        """Calls ``callback(release)`` before ``release`` is applied; nothing may read the weights
        from its return until resume. If it raises, the old release stays. Also a decorator.

        Called when nobody is inside :meth:`serving` any more.
        """
        return self._add("pause", callback)

    def on_resume(self, callback: Callback) -> Callback:
        """Calls ``callback(release)`` when ``release`` is in place, and before :meth:`serving` lets
        anyone in. It is the old one if the update was called off, or failed its check. If it raises, the
        engine stays paused, the agent is told, and puts the old release back. Also a decorator.
        """
        return self._add("resume", callback)

    def on_check(
        self,
        callback: Optional[Callback] = None,
        *,
        command: Optional[Sequence[str]] = None,
        timeout: float = checks.TIMEOUT_S,
    ) -> Any:
        """Has ``callback(release)`` called when ``release`` is in place and nobody is let in yet: it runs sample
        inferences, and raises, or returns ``False``, if they are no good. Then the agent puts the old
        release back, and the engine serves that. Also a decorator, with or without ``timeout``.

        It runs on a thread of its own, where :meth:`serving` may be entered. If it takes longer than ``timeout``
        seconds it has failed, and is left alone: what it reads then changes under it. Instead of a callback,
        ``command`` is a program and its arguments, with ``AQUIFER_CHANNEL``, ``AQUIFER_MANIFEST`` and
        ``AQUIFER_SEQ`` in its environment; unless it ends with 0, the last line of its stderr is the reason.

        Several checks run in the order they were added; those added before :meth:`hydrate` also look at the first
        release. One that passed is not checked again while the engine stays connected. A first release that
        fails is not served: :meth:`wait_hydrated` raises :class:`HydrationError` with the reason, and another
        release is waited for.
        """
        if callback is not None and command is not None:
            raise TypeError("on_check() takes a callback or a command, not both")
        if timeout <= 0:
            raise ValueError(f"a check needs some time, not {timeout} s")
        if command is not None:
            if isinstance(command, (str, bytes)) or not command:
                raise TypeError("command must be a list: the program and its arguments")
            self._add_check(checks.command(command, timeout))
            return None
        if callback is None:
            return lambda wanted: self.on_check(wanted, timeout=timeout)
        self._add_check(checks.Check(_checked(callback), timeout))
        return callback

    def on_failed(self, callback: Callable[[str], Any]) -> Callable[[str], Any]:
        """Calls ``callback(reason)`` when a release cannot be served here, or failed its check. Also a decorator."""
        self._callbacks["failed"].append(callback)  # type: ignore[arg-type]
        return callback

    @property
    def pause(self) -> Optional[Callback]:
        """The one pause callback that is set by ``engine.pause = fn``; see :meth:`on_pause`."""
        return self._own["pause"]

    @pause.setter
    def pause(self, callback: Optional[Callback]) -> None:
        self._own["pause"] = callback and _checked(callback)

    @property
    def resume(self) -> Optional[Callback]:
        """The one resume callback that is set by ``engine.resume = fn``; see :meth:`on_resume`."""
        return self._own["resume"]

    @resume.setter
    def resume(self, callback: Optional[Callback]) -> None:
        self._own["resume"] = callback and _checked(callback)

    # ---- end

    def close(self) -> None:
        """Leaves the agent. Memory stays as it is, as long as arrays in it are in use."""
        self._link.close()
        self._gate.fail(AquiferError(CLOSED))
        with self._changed:
            self._changed.notify_all()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # ---- what the link asks for

    def _greet(self, session: Session) -> None:
        session.call(
            "hello",
            protocol=PROTOCOL_VERSION,
            client="aquifer-python 0.1.0",
            pid=os.getpid(),
            name=self.name,
            channel=self.channel,
            serving=self.release,
            **self._conduct(),
        )

    def _conduct(self) -> Dict[str, Any]:
        """How the engine behaves when it is given another release, for the agent."""
        said: Dict[str, Any] = {"checks": len(self._checks) > 0, "during_pause": _DURING_PAUSE[self._while_paused]}
        if self._pause_timeout is not None:
            said["pause_timeout_ms"] = int(self._pause_timeout * 1000)
        if len(self._checks):
            said["check_timeout_ms"] = int(self._checks.timeout * 1000)
        return said

    def _tell_conduct(self, session: Session) -> None:
        try:
            session.call("conduct", **self._conduct())
        except RequestRefused as refusal:
            if refusal.code != "unknown-op":
                raise
            log.warning("aquifer: the agent is older than this package, and lets no release be checked")

    def _add_check(self, check: checks.Check) -> None:
        self._checks.add(check)
        self._link.post(self._tell_conduct)

    @contextlib.contextmanager
    def _trying(self, release: Release) -> Iterator[None]:
        self._tried.release = release
        with self._gate.owned():
            yield

    def _register(self, session: Session) -> None:
        with self._changed:
            self._registered = True
        try:
            self._registration.send(session, first=True)
        except RequestRefused as refusal:
            with self._changed:
                self._registered = False
                self._refusal = refusal
            raise

    def _restore(self, session: Session) -> None:
        if self._registered:
            self._registration.send(session, first=False)

    def _overhear(self, message: Message) -> bool:
        """On the reader's thread."""
        if message["event"] not in ("progress", "standing"):
            return False
        with self._changed:
            if message["event"] == "progress":
                self._progress = parse(Progress, message)
            else:
                self._standing = parse(Standing, message)
            self._changed.notify_all()
        return True

    def _handle(self, session: Session, message: Message) -> None:
        handlers = {
            "release": self._on_release_heard,
            "hydrated": self._on_hydrated,
            "pause": self._on_pause,
            "check": self._on_check,
            "applied": self._on_applied,
            "aborted": self._on_aborted,
            "failed": self._on_failed,
        }
        handler = handlers.get(message["event"])
        if handler is not None:
            handler(session, message)

    def _on_release_heard(self, _session: Session, message: Message) -> None:
        release = parse(Release, message["release"])
        with self._changed:
            self._wanted = release
        self._forget_failure()
        for callback in self._callbacks["release"]:
            try:
                callback(release)
            except Exception:
                log.exception("aquifer: a release callback failed")

    def _on_hydrated(self, session: Session, message: Message) -> None:
        release = parse(Release, message["release"])
        if self._paused:
            self._resume_with(session, release)
        else:
            self._serve(release)

    def _on_pause(self, session: Session, message: Message) -> None:
        release = parse(Release, message["release"])
        if not self._gate.shut(self._pause_timeout):
            why = f"queries were still running after {self._pause_timeout} s"
            session.call("refused", manifest=release.manifest, stage="pause", message=why)
            return
        try:
            self._call("pause", release)
        except Exception as error:
            log.exception("aquifer: a pause callback failed; the old release stays")
            self._gate.open()
            session.call("refused", manifest=release.manifest, stage="pause", message=_reason(error))
            return
        # Whatever reads the weights was asked for before; it may still be under way on a GPU.
        try:
            gpu.synchronize(self._registration.on_gpus())
        except gpu.GpuError as error:
            self._gate.open()
            session.call("refused", manifest=release.manifest, stage="pause", message=_reason(error))
            return
        # From here on, whether or not the answer arrives, bytes may change.
        with self._changed:
            self._paused = True
            self._paused_at = time.monotonic()
        # Not waited for: what comes next is that it is applied, and every hand-over from thread to thread counts.
        session.tell("paused", manifest=release.manifest)

    def _on_check(self, session: Session, message: Message) -> None:
        release = parse(Release, message["release"])
        self._forget_failure()
        try:
            self._checks.run(release)
        except checks.CheckFailed as failed:
            self._on_check_failed(release, str(failed))
            session.call("refused", manifest=release.manifest, stage="check", message=str(failed))
            return
        session.call("checked", manifest=release.manifest)

    def _on_check_failed(self, release: Release, reason: str) -> None:
        log.error("aquifer: release %.12s failed its check: %s", release.manifest, reason)
        if not self._paused:
            # Nothing was served before that could be put back; or what was turned out to be no good.
            self._gate.shut()
            with self._changed:
                self._serving = None
            self._fail(f"the release failed its check: {reason}")
        self._call_failed(f"{reason} (check)")

    def _on_applied(self, session: Session, message: Message) -> None:
        release = parse(Release, message["release"])
        if self._resume_with(session, release):
            session.call("resumed", manifest=release.manifest)

    def _on_aborted(self, session: Session, _message: Message) -> None:
        if self._paused and self._serving is not None:
            self._resume_with(session, self._serving)

    def _on_failed(self, _session: Session, message: Message) -> None:
        reason = f"{message.get('message')} ({message.get('code')})"
        log.error("aquifer: release %.12s cannot be served: %s", message.get("manifest"), reason)
        self._fail(reason)
        self._call_failed(reason)

    def _call_failed(self, reason: str) -> None:
        for callback in self._callbacks["failed"]:
            try:
                callback(reason)  # type: ignore[arg-type]
            except Exception:
                log.exception("aquifer: a failure callback failed")

    def _resume_with(self, session: Session, release: Release) -> bool:
        with self._changed:
            self._serving = release
        try:
            self._call("resume", release)
        except Exception as error:
            log.exception("aquifer: a resume callback failed; the engine stays paused")
            session.call("refused", manifest=release.manifest, stage="resume", message=_reason(error))
            return False
        self._serve(release)
        return True

    def _serve(self, release: Release) -> None:
        with self._changed:
            self._serving = release
            if self._paused and self._paused_at is not None:
                self._last_pause = time.monotonic() - self._paused_at
            self._paused = False
            self._failure = None
            self._changed.notify_all()
        self._gate.open()

    def _fail(self, reason: str) -> None:
        """Says why there is nothing to serve, to those who wait for it."""
        with self._changed:
            if not self.ready:
                self._failure = HydrationError(reason)
                self._gate.fail(self._failure)
                self._changed.notify_all()

    def _forget_failure(self) -> None:
        """That was about another release, or an earlier attempt."""
        with self._changed:
            self._failure = None
        self._gate.fail(None)

    def _call(self, stage: str, release: Release) -> None:
        own = self._own[stage]
        with self._gate.owned():
            for callback in self._callbacks[stage] + ([own] if own else []):
                callback(release)

    def _add(self, stage: str, callback: Callback) -> Callback:
        self._callbacks[stage].append(_checked(callback))
        return callback

    def _refuse_if_frozen(self) -> None:
        if self._frozen:
            raise AquiferError("registration is complete (hydrate() was called): nothing can be added to this engine")


def _checked(callback: Callback) -> Callback:
    """Fails now, and not in the middle of an update, if it cannot be called with a release."""
    try:
        signature = inspect.signature(callback)
    except (TypeError, ValueError):
        return callback  # Not every callable tells.
    try:
        signature.bind(None)
    except TypeError as error:
        raise TypeError(f"the callback must take one argument, the release: {error}") from error
    return callback


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
