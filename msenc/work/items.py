"""Long work, split into items whose results are saved at once, so that a kill only loses items in progress.

A stage names its items by a hash of their input. `run_items` processes those without a result, here or in
several processes, of the whole list or of one part of it (a job of a cluster); when all are there, the stage puts them
together with `read_result`, and may delete the folder.
"""

import os
import signal
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from msenc.store.members import decode_member, encode_member
from msenc.store.shards import disk_errors
from msenc.types import MsencError
from msenc.work.pool import pool_of
from msenc.work.progress import progress_bar

T = TypeVar("T")
Members = dict[str, Any]
"""A result: ``name.json`` with plain values, or ``name.npy`` with an array; as in a shard."""


@dataclass(frozen=True)
class Item:
    """One piece of work.

    Args:
        id: readable name: a dialogue, a video, a clip.
        key: `digest` of everything that determines its result; names the result.
        input: of the work; picklable.
        size: in units of the progress bar.
        outputs: files that the work writes atomically besides its result; the item counts as done only
            while all of them exist.
    """

    id: str
    key: str
    input: Any
    size: int = 1
    outputs: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Part:
    """Part `number` (from 1) of `of` parts of a list; they are disjoint, and make the whole.

    Example:
        >>> Part.parse("2/3").select("abcdefg")
        ['b', 'e']
    """

    number: int
    of: int

    @staticmethod
    def parse(text: str) -> "Part":
        """Read ``3/16``.

        Raises:
            MsencError: it is malformed.
        """
        number, slash, of = text.partition("/")
        if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise MsencError(f"part={text}: expected the part's number and the number of parts, as in part=3/16.")
        return Part(int(number), int(of))

    def select(self, values: Sequence[T]) -> list[T]:
        """This part's values: every `of`-th one, so that long and short ones spread evenly."""
        return list(values[self.number - 1 :: self.of])

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


@dataclass(frozen=True)
class Stage:
    """A stage's items, in their order.

    Args:
        description: of the stage.
        items: all of them.
        missing: those without a result.
    """

    description: str
    items: list[Item]
    missing: list[Item]


_surveys: list[list[Stage]] = []


@contextmanager
def surveying() -> Iterator[list[Stage]]:
    """Within, `run_items` does nothing but note what there is to do: yields the list that it fills."""
    _surveys.append([])
    try:
        yield _surveys[-1]
    finally:
        _surveys.pop()


def run_items(
    items: Sequence[Item],
    folder: Path,
    make_work: Callable[[], Callable[[Any], Members]],
    num_workers: int,
    description: str,
    unit: str = "items",
    part: Part | None = None,
) -> list[Item]:
    """Process items that have no result yet; each writes its own to `folder`, atomically.

    Several parts may run at the same time on one folder, and the same part only once.

    Args:
        items: all of them, in an order that does not change between calls.
        folder: of the results; created if missing.
        make_work: builds the function from an item's input to its result, once per process and only if there is
            something to do; picklable (a class, or `functools.partial` of one).
        num_workers: processes; 0 works in this one.
        description: of the progress bar.
        unit: what `Item.size` counts.
        part: process only these.

    Returns:
        The items that still have no result: those of other parts.

    Raises:
        MsencError: a worker died (names possible items), the disk is full, or whatever the work raises.
            Existing results stay.
    """
    if _surveys:
        _surveys[-1].append(Stage(description, list(items), missing := missing_items(items, folder)))
        return missing
    own = part.select(items) if part else list(items)
    todo = list({item.key: item for item in missing_items(own, folder)}.values())
    if todo:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in _in_hand_files(folder, todo):
                leftover.unlink(missing_ok=True)
        with progress_bar(unit) as progress:
            total, left = (sum(item.size for item in some) for some in (own, todo))
            bar = progress.add_task(description, total=total, completed=total - left)
            for item in _run(todo, folder, make_work, num_workers, description):
                progress.advance(bar, item.size)
    return missing_items(items, folder)


def missing_items(items: Sequence[Item], folder: Path) -> list[Item]:
    """The items without a complete result, in order."""
    return [item for item in items if not _is_done(folder, item)]


def say_missing(items: Sequence[Item], missing: Sequence[Item], part: Part) -> str:
    """The work that a job with a part leaves to others: how many items, and in which parts.

    Example:
        >>> items = [Item(f"dia{i}", str(i), None) for i in range(5)]
        >>> say_missing(items, items[1:4], Part(1, 3))
        '3 of 5 items remain, of the parts 1/3, 2/3, 3/3'
    """
    keys = {item.key for item in missing}
    parts = [Part(number, part.of) for number in range(1, part.of + 1)]
    waiting = [str(p) for p in parts if any(item.key in keys for item in p.select(items))]
    return f"{len(missing):,} of {len(items):,} items remain, of the parts {', '.join(waiting)}"


def read_result(item: Item, folder: Path) -> Members:
    """The members that an item's work returned; arrays cannot be written to.

    Raises:
        MsencError: there is no result, or a damaged one, which is removed.
    """
    path = _result_file(folder, item)
    try:
        with zipfile.ZipFile(path) as file:
            return {name: decode_member(name, np.frombuffer(file.read(name), np.uint8)) for name in file.namelist()}
    except FileNotFoundError as error:
        raise MsencError(f"{path}: the result of {item.id} is missing. Repeat the command.") from error
    except (zipfile.BadZipFile, ValueError, RuntimeError, MsencError) as error:
        path.unlink()
        raise MsencError(
            f"{path}: the result of {item.id} was damaged ({error}) and has been removed. Repeat the command, which "
            "will recreate it."
        ) from error


def _is_done(folder: Path, item: Item) -> bool:
    path = _result_file(folder, item)
    return path.is_file() and zipfile.is_zipfile(path) and all(output.is_file() for output in item.outputs)


def _result_file(folder: Path, item: Item) -> Path:
    return folder / f"{item.key}.zip"


def _in_hand_files(folder: Path, items: Sequence[Item]) -> dict[Path, Item]:
    """Temporary files in `folder` of items in progress, or that were when their process was killed."""
    of_key = {item.key: item for item in items}
    files = {path: of_key.get(path.name.split(".")[1]) for path in folder.glob(".*.writing-*")}
    return {path: item for path, item in files.items() if item is not None}


def _run(
    todo: list[Item],
    folder: Path,
    make_work: Callable[[], Callable[[Any], Members]],
    num_workers: int,
    description: str,
) -> Iterator[Item]:
    """Process items; yields each once its result is saved."""
    if num_workers == 0:
        work = make_work()
        for item in todo:
            _perform(item, folder, work)
            yield item
        return
    with pool_of(min(num_workers, len(todo)), _start, folder, make_work) as pool:
        try:
            futures = {pool.submit(_perform_in_worker, item): item for item in todo}
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BrokenProcessPool as error:
            pool.shutdown()  # the others tell what they have in hand by leaving
            in_hand = " or ".join(item.id for item in _in_hand_files(folder, todo).values())
            raise MsencError(
                f"{description}: a worker process died{in_hand and f' on {in_hand}'}; running out of memory is the "
                f"usual cause. {num_workers} workers ran; set fewer. Finished results are kept."
            ) from error


def _perform(item: Item, folder: Path, work: Callable[[Any], Members]) -> None:
    temporary = _temporary(item, folder)
    try:
        with disk_errors(folder):
            temporary.touch()  # before the work: marks the item as in progress
        with _memory_errors(item):
            result = work(item.input)
        with disk_errors(folder):
            with zipfile.ZipFile(temporary, "w") as file:
                for name, value in result.items():
                    file.writestr(zipfile.ZipInfo(name), encode_member(name, value))  # ZipInfo: a fixed time
            temporary.replace(_result_file(folder, item))
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _memory_errors(item: Item) -> Iterator[None]:
    """A GPU whose memory is full, as a refusal: its processes share it."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which need not be imported here
            raise
        raise MsencError(
            f"{item.id}: the GPU has too little memory for this. Each worker has the model and its batch there: set "
            "fewer (prepare_workers=1), or smaller batches (the encoder's batch_s or batch_frames). Finished results "
            "are kept."
        ) from error


def _temporary(item: Item, folder: Path) -> Path:
    return folder / f".{item.key}.writing-{os.getpid()}"


_folder: Path | None = None  # of this worker process, as is what follows
_make_work: Callable[[], Callable[[Any], Members]] | None = None
_work: Callable[[Any], Members] | None = None
_in_hand: Path | None = None


def _start(folder: Path, make_work: Callable[[], Callable[[Any], Members]]) -> None:
    global _folder, _make_work
    _folder, _make_work = folder, make_work
    signal.signal(signal.SIGTERM, _let_go)


def _let_go(*_: Any) -> None:
    """The pool ends the others when one worker dies; only what that one had in hand is to be found afterwards."""
    if _in_hand is not None:
        _in_hand.unlink(missing_ok=True)
    os._exit(1)


def _perform_in_worker(item: Item) -> None:
    global _work, _in_hand
    _in_hand = _temporary(item, _folder)
    if _work is None:
        _work = _make_work()  # here, so that its errors arrive whole
    _perform(item, _folder, _work)
