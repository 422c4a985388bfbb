"""What all stages that spread clips over processes share: an end with the parent, and a progress bar."""

import multiprocessing
import os
import signal
import threading

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


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
