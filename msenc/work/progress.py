"""Progress of long work: bars in a terminal, and where there is none (Slurm's logs, pipes) a line a minute."""

import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from msenc.work.console import console

LINE_EVERY_S = 60.0
"""Seconds between two lines, where there is no terminal to draw a bar in."""


def shows_bars() -> bool:
    """Whether bars can be drawn: in a terminal, or a notebook."""
    return console.is_terminal or console.is_jupyter


class Pace:
    """Says when the next line is due."""

    def __init__(self) -> None:
        self.begun = self._said = time.monotonic()

    def is_due(self) -> bool:
        """Whether a line is due now, which then counts as printed."""
        if shows_bars() or time.monotonic() - self._said < LINE_EVERY_S:
            return False
        self.count()
        return True

    def count(self) -> None:
        """Count a line that was printed before it was due."""
        self._said = time.monotonic()

    def minutes(self) -> str:
        """Time since the start."""
        return f"{(time.monotonic() - self.begun) / 60:.0f} min"


class Bar(Progress):
    """Rich's progress bars; without a terminal, a line a minute says how far the last one is."""

    def __init__(self, *columns: ProgressColumn, **options: Any) -> None:
        super().__init__(*columns, **options)
        self._pace = Pace()

    def update(self, task_id: Any, **values: Any) -> None:  # type: ignore[override]
        """As rich's."""
        super().update(task_id, **values)
        self._say(task_id)

    def advance(self, task_id: Any, advance: float = 1) -> None:
        """As rich's."""
        super().advance(task_id, advance)
        self._say(task_id)

    def _say(self, task_id: Any) -> None:
        if not self.disable and self._pace.is_due():
            task = self.tasks[self.task_ids.index(task_id)]
            total = "" if task.total is None else f" of {task.total:,.0f}"
            console.print(f"{task.description}: {task.completed:,.0f}{total}, {self._pace.minutes()}", soft_wrap=True)


def progress_bar(unit: str) -> Progress:
    """A bar with count, rate in `unit` per second, and remaining time."""
    return Bar(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(unit), TimeRemainingColumn())


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} {self.unit}/s")
