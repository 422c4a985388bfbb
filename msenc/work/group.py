"""The processes of one evaluation: each does its share, and all get all results, or the news that one has failed.

They meet at the same points in the same order. Whatever one of them fails at, it says at the next such point, where
all others give up as well.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

from rich.progress import Progress

from msenc.types import MsencError

T = TypeVar("T")

LONGEST = timedelta(days=30)
"""How long processes wait for each other: shares take as long as they take, and a process that dies is noticed."""
LAST_WORDS_S = 30.0
"""Seconds within which the first process reports a failure, before the others exit."""
POLL_S = 0.05
"""Seconds between two looks at what the other processes do."""


class ElsewhereError(MsencError):
    """Another process has failed."""


class Group:
    """The processes that work together; by default, this one alone.

    Args:
        rank: of this process.
        size: number of processes.
        device: where this process computes; None leaves it open.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: Any = None) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.is_first = rank == 0
        self._meetings = 0
        self._parent = os.getppid()
        if size > 1:
            import torch.distributed as dist

            # For Python objects, on the CPU; and unlike NCCL, gloo notices when a process dies.
            self._gloo = dist.new_group(backend="gloo", timeout=LONGEST)
            address = os.environ["MASTER_ADDR"]
            store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False) if self.is_first else None
            (port, *_) = self._gather(store and store.port)
            self._store = store or dist.TCPStore(address, port, is_master=False, wait_for_workers=False)

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.is_first or not isinstance(error, Exception):
            return
        # Whoever started the processes ends all of them when one fails: the first one has to report before.
        end = time.monotonic() + LAST_WORDS_S
        while os.getppid() == self._parent and time.monotonic() < end:
            time.sleep(POLL_S)
        if isinstance(error, MsencError):  # which the first one has reported
            raise SystemExit(1) from error

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """The body succeeds in all processes, or fails in all.

        Raises:
            ElsewhereError: another process has failed, with its message, or is gone.
        """
        try:
            yield
            self.exchange(None)
        except ElsewhereError:
            raise
        except Exception as error:
            if self.size > 1:
                with suppress(ElsewhereError, RuntimeError):  # the others are gone
                    self._store.set(self._failure, "")
                    self.exchange(None, error=str(error) if isinstance(error, MsencError) else repr(error))
            raise

    def told(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them."""
        return self.exchange(make() if self.is_first else None)[0]

    def gather(self, results: Iterable[T], total: int, progress: Progress | None = None, doing: str = "") -> list[T]:
        """The results of all processes.

        Args:
            results: of this process's share, made while they are iterated over.
            total: their number in all processes together.
            progress: shows one bar for all of them, in the first process; None shows none.
            doing: the bar's title.

        Raises:
            ElsewhereError: another process has failed.
        """
        if progress is None or not self.is_first:
            progress = Progress(disable=True)
        mine: list[T] = []
        with progress:
            bar = progress.add_task(doing, total=total)
            for result in results:
                mine.append(result)
                progress.update(bar, completed=len(mine) if self.size == 1 else self._count(1))
            shares = self.exchange(mine, lambda: progress.update(bar, completed=self._count(0)))
            progress.update(bar, completed=total)
        return [result for share in shares for result in share]

    def exchange(self, value: T, while_waiting: Callable[[], None] | None = None, error: str | None = None) -> list[T]:
        """The value of every process, in all of them.

        Args:
            value: of this process; picklable.
            while_waiting: called by the first process until all have arrived.
            error: at which this process has failed.

        Raises:
            ElsewhereError: another process has failed, or is gone.
        """
        if self.size == 1:
            return [value]
        found = self._gather((value, error), while_waiting)
        self._meetings += 1
        failed = [f"process {rank} of {self.size}: {text}" for rank, (_, text) in enumerate(found, start=1) if text]
        if failed and error is None:
            raise ElsewhereError("; ".join(failed))
        return [value for value, _ in found]

    @property
    def _failure(self) -> str:
        """Key that is set when a process comes to the next meeting with an error."""
        return f"failed/{self._meetings}"

    def _count(self, new: int) -> int:
        """Add to the number of results since the last meeting; returns that of all processes.

        Raises:
            ElsewhereError: another process has failed, so that the rest of the share is needless.
        """
        if not self.is_first and os.getppid() != self._parent:
            raise ElsewhereError("the process that started this one has ended.")
        try:
            has_failed, done = self._store.check([self._failure]), self._store.add(f"done/{self._meetings}", new)
        except RuntimeError as e:
            raise ElsewhereError("the first process has ended.") from e
        if has_failed and new:
            self.exchange(None)
        return done

    def _gather(self, value: Any, while_waiting: Callable[[], None] | None = None) -> list[Any]:
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        try:
            arrival = dist.barrier(self._gloo, async_op=True)
            while not arrival.is_completed():
                if while_waiting is not None and self.is_first:
                    while_waiting()
                time.sleep(POLL_S)
            arrival.wait()
            dist.all_gather_object(found, value, group=self._gloo)
        except RuntimeError as e:
            raise ElsewhereError(
                f"another of the {self.size} processes has ended without a word. If it was killed, running out of "
                "memory is the usual cause."
            ) from e
        return found


ALONE = Group()


def open_group(trainer: Mapping[str, Any], num_processes: int) -> Group:
    """The processes that a trainer's config asks for, for work on copies of a model.

    They are started unless they exist, from a training or because torchrun or Slurm has started them. A process that
    is started here runs the same script, and arrives at the same call.

    Args:
        trainer: its ``accelerator``, ``devices`` and ``num_nodes`` count.
        num_processes: of all nodes; 1 starts none.
    """
    from lightning.fabric import Fabric

    settings = {key: trainer[key] for key in ("accelerator", "devices", "num_nodes") if key in trainer}
    if num_processes == 1:
        return Group(device=Fabric(**settings).device)
    name_the_dead()
    fabric = Fabric(**settings, strategy="ddp")
    fabric.launch()
    return Group(fabric.global_rank, fabric.world_size, fabric.device)


def name_the_dead() -> None:
    """Have Lightning say which process has died, before it kills all others and itself."""
    from lightning.fabric.strategies.launchers import subprocess_script

    observer = subprocess_script._ChildProcessObserver
    end_all = observer._terminate_all
    if hasattr(end_all, "__wrapped__"):
        return

    def say_and_end_all(self: Any) -> None:
        for number, process in enumerate(self._child_processes, start=2):
            if process.returncode:
                how = (
                    f"was killed by signal {-process.returncode}; running out of memory is the usual cause"
                    if process.returncode < 0
                    else f"ended with status {process.returncode}; it has said why"
                )
                print(
                    f"error: process {number} of {len(self._child_processes) + 1} of this run {how}. The others are "
                    "ended, too.",
                    file=sys.stderr,
                    flush=True,
                )
        end_all(self)

    say_and_end_all.__wrapped__ = end_all
    observer._terminate_all = say_and_end_all
