"""What all work in processes of its own shares: an end with the parent, progress bars, and one job beside another."""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOBase
from multiprocessing.connection import Connection
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from msenc.types import MsencError


def watch_parent() -> None:
    """Called in a worker process: an interrupt is the parent's business, and so is the worker's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers; they would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def progress_bar(unit: str) -> Progress:
    """A bar with count, rate in `unit` per second, and remaining time."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(unit), TimeRemainingColumn()
    )


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} {self.unit}/s")


# ---------------------------------------------------------------------------------------------------- beside


class Beside:
    """A job in a process of its own, while this process does something else.

    Args:
        work: the job; picklable, and so is what it raises.
        what: names it: in the progress bar, and in messages.
    """

    def __init__(self, work: Callable[[], object], what: str) -> None:
        self.what = what
        self._error: BaseException | None = None
        self._is_done = False
        # spawn: a forked child would inherit the threads' locks of whatever runs in this process
        context = multiprocessing.get_context("spawn")
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_work_beside, args=(work, sender), name=what)
        self._process.start()
        sender.close()  # so that the pipe ends when the process does
        self._progress = Progress()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._progress.start()
        self._listener.start()

    @property
    def is_running(self) -> bool:
        """Whether it still takes a core."""
        return self._process.is_alive()

    def finish(self) -> None:
        """Wait for its end.

        Raises:
            MsencError: its process died; or whatever else it raised.
        """
        self._listener.join()
        self._process.join()
        if self._error is not None:
            raise self._error
        if not self._is_done:
            raise MsencError(
                f"{self.what}: its process ended without a word (exit status {self._process.exitcode}); memory that "
                "ran out is the usual cause. What else was prepared is kept, and the same command goes on; with "
                "prepare_workers=0 it does one thing after the other, in one process."
            )

    def end(self) -> None:
        """End it, wherever it is; nothing happens where it has ended."""
        self._process.kill()  # jobs of a launcher ignore SIGTERM, and what they start inherits that
        self._process.join()
        self._listener.join()
        self._progress.stop()

    def _listen(self) -> None:
        bar = self._progress.add_task(self.what, total=None)
        while True:
            try:
                kind, value = self._receiver.recv()
            except EOFError:
                return
            if kind == "bar":
                if value["completed"] < self._progress.tasks[bar].completed:
                    self._progress.reset(bar)  # the next lesson
                self._progress.update(bar, **value)
            elif kind == "text":
                self._progress.console.print(value, markup=False, highlight=False, soft_wrap=True)
            else:
                self._error, self._is_done = value, True


@contextmanager
def beside(work: Callable[[], object], what: str) -> Iterator[Beside]:
    """Run a job in a process of its own while the body runs; both have ended when this ends.

    Raises:
        MsencError: the job's process died; or whatever else it raised. An error of the body ends the job.
    """
    job = Beside(work, what)
    try:
        yield job
        job.finish()
    finally:
        job.end()


class _Beside(Progress):
    """A bar whose state goes to the parent, which shows it among its own."""

    def __init__(self, send: Callable[[tuple[str, Any]], None]) -> None:
        super().__init__(disable=True)
        self._send = send

    def update(self, task_id: Any, **values: Any) -> None:  # type: ignore[override]
        super().update(task_id, **values)
        task = self.tasks[task_id]
        self._send(("bar", {"description": task.description, "total": task.total, "completed": task.completed}))


class _Lines(TextIOBase):
    """Standard output as lines for the parent."""

    def __init__(self, send: Callable[[tuple[str, Any]], None]) -> None:
        self._send, self._begun = send, ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._send(("text", line))
        return len(text)


_send: Callable[[tuple[str, Any]], None] | None = None  # of a process that works beside its parent


def lone_bar() -> Progress:
    """A bar for one long job, wherever that runs."""
    return Progress() if _send is None else _Beside(_send)


def _work_beside(work: Callable[[], object], pipe: Connection) -> None:
    global _send
    watch_parent()
    _send = pipe.send
    sys.stdout = _Lines(_send)
    error = None
    try:
        work()
    except MsencError as e:
        error = e
    except Exception as e:
        error = RuntimeError(f"{e!r}, in a process of its own:\n{traceback.format_exc()}")
    _send(("end", error))
