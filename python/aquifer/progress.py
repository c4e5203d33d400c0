"""Progress for people: one line that is redrawn on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Optional, TextIO

from .values import Progress

#: Seconds between plain lines.
PLAIN_INTERVAL_S = 2.0
_BAR_WIDTH = 28


class Printer:
    def __init__(self, title: str, stream: Optional[TextIO] = None) -> None:
        self._title = title
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = self._stream.isatty()
        self._printed_at: Optional[float] = None
        self._last: Optional[str] = None

    def show(self, progress: Optional[Progress]) -> None:
        line = describe(progress)
        if line == self._last:
            return
        if self._terminal:
            bar = _bar(progress)
            self._write(f"\r\x1b[K{self._title} {bar}{line}")
        else:
            now = time.monotonic()
            if self._printed_at is not None and now - self._printed_at < PLAIN_INTERVAL_S:
                return
            self._printed_at = now
            self._write(f"{self._title}: {line}\n")
        self._last = line

    def end(self, line: str) -> None:
        self._write(f"\r\x1b[K{self._title}: {line}\n" if self._terminal else f"{self._title}: {line}\n")

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            pass  # A closed stderr is no reason not to load weights.


def describe(progress: Optional[Progress]) -> str:
    if progress is None:
        return "waiting for the agent"
    share = 100 * progress.bytes_done // max(progress.bytes_total, 1)
    text = f"{size(progress.bytes_done)} of {size(progress.bytes_total)} ({share} %)"
    if progress.bytes_per_s > 0:
        left = (progress.bytes_total - progress.bytes_done) / progress.bytes_per_s
        text += f", {size(progress.bytes_per_s)}/s, {_duration(left)} left"
    if progress.peers > 0:
        text += f", from {progress.peers} peer{'s' if progress.peers > 1 else ''}"
    return text


def size(count: float) -> str:
    """Bytes in decimal units: ``"90.9 MB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _bar(progress: Optional[Progress]) -> str:
    if progress is None:
        return ""
    filled = _BAR_WIDTH * progress.bytes_done // max(progress.bytes_total, 1)
    return f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] "
