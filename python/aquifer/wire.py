"""Frames on the agent's Unix socket, and one conversation over it.

A frame is a length (u32, little endian) and one JSON object of that many bytes; a file descriptor
travels with the first byte of the frame that needs it. ``docs/engine-protocol.md`` has the messages.
"""

import array
import itertools
import json
import logging
import os
import socket
import struct
import threading
from typing import Any, Callable, Dict, Optional

from .errors import AgentUnavailable, AquiferError, RequestRefused, SessionLost

log = logging.getLogger("aquifer")

PROTOCOL_VERSION = 1

#: Longest frame, as on the agent's side.
FRAME_BYTES_MAX = 64 << 20

Message = Dict[str, Any]


def default_socket_path() -> str:
    """``$AQUIFER_SOCKET``, else ``$XDG_RUNTIME_DIR/aquifer.sock``, else ``/tmp/aquifer-<uid>.sock``."""
    chosen = os.environ.get("AQUIFER_SOCKET")
    if chosen:
        return chosen
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return os.path.join(runtime, "aquifer.sock") if runtime else f"/tmp/aquifer-{os.getuid()}.sock"


def request_status(path: Optional[str] = None, timeout: float = 10.0) -> Message:
    """The state of the node whose agent listens on ``path``."""
    session = Session(path or default_socket_path())
    session.start()
    try:
        return session.call("status", timeout=timeout)
    except SessionLost as lost:
        raise AgentUnavailable(f"the agent hung up before it answered: {lost}") from lost
    finally:
        session.close()


class Session:
    """One connection. Requests may come from any thread; a thread of its own reads.

    ``on_event(session, message)`` and, once and last, ``on_lost(session)`` are called on the reading
    thread and must not wait for anything the agent says.
    """

    def __init__(
        self,
        path: str,
        on_event: Optional[Callable[["Session", Message], None]] = None,
        on_lost: Optional[Callable[["Session"], None]] = None,
    ) -> None:
        self._socket = _connect(path)
        self._on_event = on_event
        self._on_lost = on_lost
        self._sending = threading.Lock()
        self._ids = itertools.count(1)
        self._changed = threading.Condition()
        self._waiting: Dict[int, Optional[Message]] = {}
        #: Why it is over; ``None`` while it is not.
        self.lost: Optional[str] = None

    def start(self) -> None:
        threading.Thread(target=self._read, name="aquifer-reader", daemon=True).start()

    def call(self, op: str, fd: Optional[int] = None, timeout: Optional[float] = None, **fields: Any) -> Message:
        """Asks and waits for the answer.

        Raises :class:`RequestRefused` if that is no, :class:`SessionLost` if none will come, and
        :class:`TimeoutError` if none came within ``timeout`` seconds.
        """
        number = next(self._ids)
        with self._changed:
            self._waiting[number] = None
        try:
            self._send({"id": number, "op": op, **fields}, fd)
            with self._changed:
                if not self._changed.wait_for(lambda: self._waiting[number] or self.lost, timeout):
                    raise TimeoutError(f"the agent did not answer '{op}' within {timeout} s")
                reply = self._waiting[number]
        finally:
            with self._changed:
                del self._waiting[number]
        if reply is None:
            raise SessionLost(self.lost)
        if "error" in reply:
            error = reply["error"]
            raise RequestRefused(str(error.get("code")), str(error.get("message")))
        ok = reply.get("ok")
        return ok if isinstance(ok, dict) else {}

    def tell(self, op: str, **fields: Any) -> None:
        """Asks, and does not wait for the answer: if that is no, the log says so. Raises :class:`SessionLost`
        if the question cannot be sent."""
        self._send({"id": next(self._ids), "op": op, **fields}, None)

    def close(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # The agent was faster.

    def _send(self, message: Message, fd: Optional[int]) -> None:
        content = json.dumps(message, separators=(",", ":")).encode()
        if len(content) > FRAME_BYTES_MAX:
            raise AquiferError(f"a request of {len(content)} bytes, allowed are {FRAME_BYTES_MAX}")
        frame = struct.pack("<I", len(content)) + content
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        with self._sending:
            try:
                sent = self._socket.sendmsg([frame], rights)
                self._socket.sendall(frame[sent:])
            except OSError as error:
                # The agent may have said why before it closed: that is for the reader to find.
                with self._changed:
                    self._changed.wait_for(lambda: self.lost)
                raise SessionLost(self.lost) from error

    def _read(self) -> None:
        why = "the agent closed the connection"
        try:
            while True:
                message = self._receive()
                if "event" in message:
                    if self._on_event:
                        self._on_event(self, message)
                elif message.get("re") == 0:
                    why = str(message.get("error", {}).get("message"))
                else:
                    self._answer(message)
        except EOFError:
            pass
        except Exception as error:  # Whatever it was, those who wait must hear of it.
            why = f"{type(error).__name__}: {error}"
        self._end(why)

    def _answer(self, reply: Message) -> None:
        with self._changed:
            if reply.get("re") in self._waiting:
                self._waiting[reply["re"]] = reply
                self._changed.notify_all()
            elif "error" in reply:
                log.warning("aquifer: the agent does not take what it was told: %s", reply["error"].get("message"))

    def _end(self, why: str) -> None:
        with self._changed:
            self.lost = why
            self._changed.notify_all()
        with self._sending:
            self._socket.close()
        if self._on_lost:
            self._on_lost(self)

    def _receive(self) -> Message:
        (length,) = struct.unpack("<I", self._read_exactly(4))
        if length > FRAME_BYTES_MAX:
            raise ValueError(f"the agent sent a frame of {length} bytes, allowed are {FRAME_BYTES_MAX}")
        message = json.loads(self._read_exactly(length))
        if not isinstance(message, dict):
            raise ValueError("the agent sent something that is not a message")
        return message

    def _read_exactly(self, count: int) -> bytes:
        buffer = bytearray(count)
        rest = memoryview(buffer)
        while rest:
            received = self._socket.recv_into(rest)
            if received == 0:
                raise EOFError
            rest = rest[received:]
        return bytes(buffer)


def _connect(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(path)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        connection.close()
        raise AgentUnavailable(f"no agent is listening on {path}: start one with `aquifer agent`") from error
    except OSError as error:
        connection.close()
        raise AgentUnavailable(f"cannot connect to the agent at {path}: {error}") from error
    return connection
