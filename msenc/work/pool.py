"""Work in other processes: the pool, which ends with its parent, and a job in the background with its progress bar."""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from io import TextIOBase
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, TypeVar

from rich.progress import Progress

from msenc.types import MsencError
from msenc.work.progress import Bar

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Ctrl-C is heard afterwards, and never by processes started in the body: a child keeps a signal blocked.

    Blocking is for the children. This process hears the signal all the same, by any thread that does not block it: a
    library's, or a progress bar's. So its handler waits too.
    """
    resource_tracker.ensure_running()  # spawning would start it, and unblock the signal thereby
    heard: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    # Only the main thread is interrupted, and may set handlers; None is a handler that Python did not set.
    waits = handler is not None and threading.current_thread() is threading.main_thread()
    if waits:
        signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    finally:
        if waits:
            signal.signal(signal.SIGINT, handler)
        if heard:
            signal.raise_signal(signal.SIGINT)


class _Process(SpawnProcess):
    """Hears no Ctrl-C, from its first moment on: its parent ends it."""

    def start(self) -> None:
        with _ctrl_c_waits():
            super().start()


class _Spawn(SpawnContext):
    """spawn: a forked child would inherit the threads' locks of whatever runs in this process."""

    Process = _Process  # type: ignore[assignment]


class _Pool(ProcessPoolExecutor):
    """Knows each process that it started: interrupted in between, it would wait for one that it cannot end."""

    def submit(self, *arguments: Any, **more: Any) -> Future:
        with _ctrl_c_waits():
            return super().submit(*arguments, **more)


@contextmanager
def pool_of(
    num_workers: int, start: Callable[..., object] | None = None, *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes that ends with this process and with the body; work not started by then is dropped.

    Args:
        num_workers: processes, 1 or more.
        start: called in each with the arguments, after `watch_parent`.
        *arguments: picklable.
    """
    pool = _Pool(num_workers, _Spawn(), initializer=_start, initargs=(start, arguments))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(start: Callable[..., object] | None, arguments: tuple[Any, ...]) -> None:
    watch_parent()
    if start is not None:
        start(*arguments)


def map_in_order(
    make_work: Callable[[], Callable[[T], R]], values: Sequence[T], num_workers: int, doing: str, advice: str
) -> Iterator[R]:
    """Results in the order of the values.

    Args:
        make_work: builds the function called with each value, once per process; picklable.
        values: picklable.
        num_workers: processes; 0 works in this one.
        doing: the activity, for messages.
        advice: what to do if a process dies.

    Raises:
        MsencError: a process died; or whatever the work raises.
    """
    if num_workers == 0:
        yield from map(make_work(), values)
        return
    with pool_of(min(num_workers, len(values)) or 1, _keep_maker, make_work) as pool:
        try:
            yield from pool.map(_work_in_worker, values)
        except BrokenProcessPool as error:
            raise MsencError(
                f"{doing}: a worker process died ({error}); running out of memory is the usual cause. {num_workers} "
                f"workers ran. {advice}"
            ) from error


_worker: dict[str, Any] = {}  # of a process: how its work is made, and the work once it is


def _keep_maker(make_work: Callable[[], Callable[[Any], Any]]) -> None:
    _worker["make_work"] = make_work


def _work_in_worker(value: Any) -> Any:
    if "work" not in _worker:  # here, not in the initializer, where an error would break the pool
        _worker["work"] = _worker["make_work"]()
    return _worker["work"](value)


def watch_parent() -> None:
    """Called in a worker process: end with the parent."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers, which would wait for work forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


# ---------------------------------------------------------------------------------------------------- beside


class Beside:
    """A background job in its own process.

    Args:
        work: the job; picklable, as are its exceptions.
        what: its name in the progress bar and in messages.
    """

    def __init__(self, work: Callable[[], object], what: str) -> None:
        self.what = what
        self._error: BaseException | None = None
        self._is_done = False
        context = _Spawn()
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_work_beside, args=(work, sender), name=what)
        self._process.start()
        sender.close()  # so that the pipe ends when the process does
        self._progress = Bar()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._progress.start()
        self._listener.start()

    @property
    def is_running(self) -> bool:
        """Whether it still uses a core."""
        return self._process.is_alive()

    def finish(self) -> None:
        """Wait for its end.

        Raises:
            MsencError: its process died; or whatever it raised.
        """
        self._listener.join()
        self._process.join()
        if self._error is not None:
            raise self._error
        if not self._is_done:
            raise MsencError(
                f"{self.what}: its process died (exit status {self._process.exitcode}); running out of "
                "memory is the usual cause. Everything else that was prepared is kept: repeat the command to continue; "
                "with prepare_workers=0, it does everything in one process, one after the other."
            )

    def end(self) -> None:
        """End it, if it is still running."""
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
                    self._progress.reset(bar)  # the next stage
                self._progress.update(bar, **value)
            elif kind == "text":
                self._progress.console.print(value, markup=False, highlight=False, soft_wrap=True)
            else:
                self._error, self._is_done = value, True


@contextmanager
def beside(work: Callable[[], object], what: str) -> Iterator[Beside]:
    """Run a job in its own process while the body runs; both have ended when this returns.

    Raises:
        MsencError: the job's process died; or whatever it raised. An error in the body ends the job.
    """
    job = None
    try:
        with _ctrl_c_waits():  # until there is a job to end
            job = Beside(work, what)
        yield job
        job.finish()
    finally:
        if job is not None:
            job.end()


class _Beside(Progress):
    """A progress bar whose state is sent to the parent, which displays it."""

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
    """A progress bar for one long job, in whichever process it runs."""
    return Bar() if _send is None else _Beside(_send)


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
        error = RuntimeError(f"{e!r}, in another process:\n{traceback.format_exc()}")
    _send(("end", error))
