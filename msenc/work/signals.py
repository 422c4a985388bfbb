"""SIGTERM, which clusters send before they take a machine away: exit at a safe point, with a special status."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

STOPPED = os.EX_TEMPFAIL
"""Exit status after a SIGTERM (75): nothing is wrong, and the same run can be resumed."""


class Termination:
    """While entered, SIGTERM ends the process with status `STOPPED`: at once, or later while `is_held`.

    Attributes:
        is_asked: SIGTERM has been received.
        is_held: defer the exit; the holder checks `is_asked` and calls `leave`.
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
        """Install the handler again, replacing any other; only possible in the main thread."""
        if _is_main_thread():
            signal.signal(signal.SIGTERM, self._note)

    def leave(self) -> None:
        """End the process."""
        raise SystemExit(STOPPED)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A second SIGTERM (to the group, and from its leader) must not interrupt the exit.
        is_first, self.is_asked = not self.is_asked, True
        if is_first and not self.is_held:
            self.leave()


def ignore_termination(worker: int) -> None:
    """For loader processes: ignore a SIGTERM to the whole group; their parent ends them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
