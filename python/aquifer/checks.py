"""An engine's own look at a release before it is served."""

import os
import subprocess
import threading
from dataclasses import dataclass
from typing import Any, Callable, ContextManager, List, Optional, Sequence

from .values import Release

#: Seconds a check may take where it is not said. Guess: a few inferences of a large model, twice over.
TIMEOUT_S = 60.0

#: Of what a command says of its failure, the last line, and no more characters than this.
_REASON_CHARACTERS_MAX = 400


class CheckFailed(Exception):
    """Why a release is not served."""


@dataclass(frozen=True)
class Check:
    """``run(release)`` raises, or returns ``False``, if it is no good. It has ``timeout`` seconds."""

    run: Callable[[Release], Any]
    timeout: float


class Checks:
    """Run one after the other, each on a thread of its own. ``inside(release)`` is entered on that thread."""

    def __init__(self, inside: Callable[[Release], ContextManager[None]]) -> None:
        self._inside = inside
        self._checks: List[Check] = []

    def __len__(self) -> int:
        return len(self._checks)

    def add(self, check: Check) -> None:
        self._checks.append(check)

    @property
    def timeout(self) -> float:
        """Seconds that all of them together may take."""
        return sum(check.timeout for check in self._checks)

    def run(self, release: Release) -> None:
        """Raises :class:`CheckFailed` with the reason of the first that fails, or does not end in its time: that
        one is left alone on its thread, which ends when it does, or with the process."""
        for check in list(self._checks):
            self._run_one(check, release)

    def _run_one(self, check: Check, release: Release) -> None:
        outcome: List[Optional[str]] = []
        ended = threading.Event()

        def work() -> None:
            try:
                with self._inside(release):
                    passed = check.run(release)
                outcome.append("the check returned False" if passed is False else None)
            except CheckFailed as error:
                outcome.append(str(error))
            except BaseException as error:  # It may even try to end the process.
                outcome.append(f"{type(error).__name__}: {error}")
            finally:
                ended.set()

        threading.Thread(target=work, name="aquifer-check", daemon=True).start()
        if not ended.wait(check.timeout):
            raise CheckFailed(f"the check did not end within {check.timeout:g} s")
        if outcome[0] is not None:
            raise CheckFailed(outcome[0])


def command(arguments: Sequence[str], timeout: float) -> Check:
    """A check that is a program: it fails if that does not end with 0, and is killed when its time is over."""
    words = [os.fspath(argument) for argument in arguments]

    def run(release: Release) -> None:
        told = {
            "AQUIFER_CHANNEL": release.channel,
            "AQUIFER_MANIFEST": release.manifest,
            "AQUIFER_SEQ": str(release.seq),
        }
        try:
            done = subprocess.run(
                words,
                env={**os.environ, **told},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as error:
            raise CheckFailed(f"{words[0]} did not end within {timeout:g} s") from error
        except OSError as error:
            raise CheckFailed(f"{words[0]} cannot be run: {error}") from error
        if done.returncode != 0:
            lines = done.stderr.decode(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing on stderr")
            raise CheckFailed(f"{words[0]} ended with {done.returncode}: {last[:_REASON_CHARACTERS_MAX]}")

    # The program is given up first: that says more, and leaves no process behind.
    return Check(run, timeout + 1.0)
