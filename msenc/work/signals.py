"""Signals by which a cluster announces that it will take a machine away: exit at a safe point, with status 75."""

import os
import shutil
import signal
import subprocess
import threading
from types import FrameType, TracebackType
from typing import Any

STOPPED = os.EX_TEMPFAIL
"""Exit status after such a signal (75): nothing is wrong, and the same run can be resumed."""

INTERRUPTED = 128 + signal.SIGINT
"""Exit status after Ctrl-C, as of a shell's command (130)."""

HEARD = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""SIGTERM: Slurm, torchrun, Kubernetes; SIGUSR1: ``sbatch --signal=USR1@120``; SIGUSR2: submitit, near a time limit."""


class Termination:
    """While entered, a signal of `HEARD` ends the process with status `STOPPED`: at once or, while held, later.

    So does Ctrl-C while held, with status `INTERRUPTED`; a second one, or one at any other time, interrupts at once.

    Attributes:
        asked_by: the first signal received; None before.
        is_held: defer the exit; the holder checks `is_asked` and calls `leave`.
    """

    def __init__(self) -> None:
        self.asked_by: signal.Signals | None = None
        self.is_held = False
        self._before: dict[signal.Signals, Any] = {}

    @property
    def is_asked(self) -> bool:
        """Whether a signal has come."""
        return self.asked_by is not None

    def __enter__(self) -> "Termination":
        self._before = {number: signal.getsignal(number) for number in (*HEARD, signal.SIGINT)}
        self.listen()
        if _START.is_asked:  # heard before, but whoever was importing or setting up swallowed the exit
            self.asked_by = _START.asked_by
            self.leave()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if _is_main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def listen(self) -> None:
        """Install the handlers again, replacing any others; only possible in the main thread."""
        if _is_main_thread():
            for number in HEARD:
                signal.signal(number, self._note)
            signal.signal(signal.SIGINT, self._note_keyboard)

    def leave(self) -> None:
        """End the process."""
        raise SystemExit(INTERRUPTED if self.asked_by == signal.SIGINT else STOPPED)

    def ask_for_requeue(self, is_first_process: bool) -> None:
        """After everything is saved: let the launcher start the job again, if the signal was its way to ask for that.

        submitit's handler of SIGUSR2 submits the job anew and exits, or raises if it may not. In a plain Slurm job,
        SIGUSR1 and SIGUSR2 requeue it, as Lightning does. SIGTERM never does: it also comes from ``scancel``. Nor does
        Ctrl-C.

        Args:
            is_first_process: of the run's processes; one of them asks.
        """
        if self.asked_by in (None, signal.SIGTERM, signal.SIGINT):
            return
        launcher = self._before.get(self.asked_by)
        if callable(launcher) and not launcher.__module__.startswith("msenc."):
            launcher(self.asked_by, None)
        elif is_first_process:
            requeue_slurm_job()

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A second signal (to the group, and from its leader) must not interrupt the exit.
        is_first = not self.is_asked
        if is_first:
            self.asked_by = signal.Signals(number)
        if is_first and not self.is_held:
            self.leave()

    def _note_keyboard(self, number: int, frame: FrameType | None) -> None:
        if not self.is_held or self.is_asked:
            raise KeyboardInterrupt
        self.asked_by = signal.SIGINT
        os.write(2, b"\nStopping after this step, with a checkpoint. Ctrl-C again stops at once.\n")


_START = Termination()


def listen_from_start() -> None:
    """For the first line of a script: a signal during its imports and set-up ends it as one during its work does."""
    _START.listen()


def requeue_slurm_job() -> None:
    """Have Slurm start the job that this process belongs to again; does nothing elsewhere."""
    if "SLURM_JOB_ID" not in os.environ or shutil.which("scontrol") is None:
        return
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    subprocess.run(["scontrol", "requeue", job], check=False)


def ignore_termination(worker: int) -> None:
    """For loader processes: ignore signals to the whole group, as Ctrl-C's; their parent ends them."""
    for number in (*HEARD, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
