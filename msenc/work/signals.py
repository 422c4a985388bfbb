"""SIGTERM, as a cluster sends it before it takes a machine away: leave at a good moment, with a status of its own."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

STOPPED = os.EX_TEMPFAIL
"""Exit status after a SIGTERM (75): nothing is wrong, and the same run can be resumed."""


class Termination:
    """While it is entered, SIGTERM ends the process with status `STOPPED`: at once, or, while `is_held`, later.

    Attributes:
        is_asked: SIGTERM has come.
        is_held: do not leave in the middle of what is going on; who holds it looks at `is_asked` and calls `leave`.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self.is_held = False
        self._before: Any = None

    def __enter__(self) -> "Termination":
        self._before = signal.getsignal(signal.SIGTERM)
        self.listen()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if _is_main_thread():
            signal.signal(signal.SIGTERM, self._before)

    def listen(self) -> None:
        """Take SIGTERM over, from whoever has taken it since; only a process's main thread can."""
        if _is_main_thread():
            signal.signal(signal.SIGTERM, self._note)

    def leave(self) -> None:
        """End the process."""
        raise SystemExit(STOPPED)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A second one, from the group's leader as well as to the group, must not cut short what leaving takes.
        is_first, self.is_asked = not self.is_asked, True
        if is_first and not self.is_held:
            self.leave()


def ignore_termination(worker: int) -> None:
    """For loader processes: a SIGTERM to the whole group must leave them to the process that they load for."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
