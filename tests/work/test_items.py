import os
import resource
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msenc.files import digest
from msenc.types import MsencError
from msenc.work.items import Item, Members, Part, missing_items, read_result, run_items, say_missing


def square(log: Path, number: int) -> Members:
    """Writes down each call, so that work done twice shows."""
    with log.open("a") as file:
        file.write(f"{number}\n")
    return {"square.npy": np.full((2, number), number**2, np.int64), "said.json": {"number": number, "text": "é"}}


def make_square(log: Path) -> Callable[[Any], Members]:
    return partial(square, log)


def refuse() -> None:
    raise MsencError("model id 'no/such' cannot be loaded")


def make_deadly() -> Callable[[Any], Members]:
    return deadly


def deadly(number: int) -> Members:
    """Number 3 kills its process while 1 is worked on elsewhere."""
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 1:
        time.sleep(60)
    return {"said.json": number}


def interrupted(number: int) -> Members:
    if number == 2:
        raise KeyboardInterrupt
    return {"said.json": number}


def make_items(*numbers: int) -> list[Item]:
    return [Item(f"dia{n}", digest(["square", n]), n, size=n + 1) for n in numbers]


def run(items, folder, log, num_workers=0, part=None) -> list[str]:
    missing = run_items(items, folder, partial(make_square, log), num_workers, "squares", part=part)
    return [item.id for item in missing]


def calls(log: Path) -> list[int]:
    return sorted(int(line) for line in log.read_text().split()) if log.is_file() else []


@pytest.fixture
def log(tmp_path) -> Path:
    return tmp_path / "calls.txt"


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "items"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_results_are_kept_and_read_back(folder, log):
    items = make_items(0, 1, 5)
    assert run(items, folder, log) == []
    members = read_result(items[2], folder)
    assert members["said.json"] == {"number": 5, "text": "é"}
    np.testing.assert_array_equal(members["square.npy"], np.full((2, 5), 25))
    assert members["square.npy"].dtype == np.int64
    assert read_result(items[0], folder)["square.npy"].shape == (2, 0)


def test_what_is_there_is_not_done_again(folder, log):
    run(make_items(1, 2), folder, log)
    run(make_items(2, 3, 3), folder, log)
    assert calls(log) == [1, 2, 3]
    run_items(make_items(1, 2, 3), folder, refuse, 0, "squares")  # nothing to do: nothing is built


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_bytes_do_not_depend_on_the_number_of_workers(folder, tmp_path, log, num_workers):
    items = make_items(4, 1, 3, 2, 0)
    run(items, tmp_path / "here", log)
    run(items, folder, log, num_workers)
    assert calls(log) == sorted([0, 1, 2, 3, 4] * 2)
    assert contents(folder) == contents(tmp_path / "here")
    assert len(contents(folder)) == 5


def test_a_cut_off_or_lost_result_is_made_anew(folder, log):
    items = make_items(1, 2, 3)
    run(items, folder, log)
    before = contents(folder)
    first, second, _ = sorted(folder.iterdir())
    first.write_bytes(first.read_bytes()[:-5])
    second.unlink()
    assert len(missing_items(items, folder)) == 2
    run(items, folder, log)
    assert contents(folder) == before
    assert len(calls(log)) == 5


def test_damaged_bytes_are_refused_once(folder, log):
    (item,) = items = make_items(3)
    run(items, folder, log)
    (path,) = folder.iterdir()
    data = bytearray(path.read_bytes())
    data[data.index(b"number") + 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(MsencError, match=r"result of dia3 was damaged .* removed"):
        read_result(item, folder)
    run(items, folder, log)
    assert read_result(item, folder)["said.json"]["number"] == 3
    with pytest.raises(MsencError, match=r"the result of dia9 is missing"):
        read_result(make_items(9)[0], folder)


def test_a_missing_output_is_work(folder, log, tmp_path):
    (plain,) = make_items(3)
    item = Item(plain.id, plain.key, plain.input, outputs=(tmp_path / "clip.wav",))
    assert run([item], folder, log) == ["dia3"]  # its work wrote no such file
    (tmp_path / "clip.wav").touch()
    assert run([item], folder, log) == []
    assert calls(log) == [3]


def test_parts_make_the_whole(folder, log):
    items = make_items(*range(7))
    assert run(items, folder, log, part=Part(2, 3)) == ["dia0", "dia2", "dia3", "dia5", "dia6"]
    assert calls(log) == [1, 4]
    assert say_missing(items, missing_items(items, folder), Part(2, 3)) == "5 of 7 items remain, of the parts 1/3, 3/3"
    run(items, folder, log, part=Part(3, 3))
    assert run(items, folder, log, part=Part(1, 3)) == []
    assert calls(log) == list(range(7))


@pytest.mark.parametrize("text", ["", "3", "0/2", "3/2", "a/b", "1/", "-1/2", "1/2/3", "1.0/2"])
def test_no_part(text):
    with pytest.raises(MsencError, match=r"expected the part's number and the number of parts, as in part=3/16"):
        Part.parse(text)


def test_a_killed_worker_is_named_and_loses_its_item_alone(folder, log):
    items = make_items(0, 1, 3, 4)
    with pytest.raises(
        MsencError, match=r"squares: a worker process died on dia3; running out of memory .* 2 workers ran;"
    ):
        run_items(items, folder, make_deadly, 2, "squares")
    assert [item.id for item in missing_items(items, folder)] == ["dia1", "dia3", "dia4"]
    assert run(items, folder, log) == []
    assert calls(log) == [1, 3, 4]
    assert len(contents(folder)) == 4  # nothing is left of what was in hand


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_arrive_whole(folder, num_workers):
    with pytest.raises(MsencError, match="model id 'no/such' cannot be loaded"):
        run_items(make_items(1, 2), folder, refuse, num_workers, "squares")
    assert contents(folder) == {}


def test_an_interrupt_keeps_what_is_finished(folder):
    with pytest.raises(KeyboardInterrupt):
        run_items(make_items(1, 2, 3), folder, lambda: interrupted, 0, "squares")
    assert [item.id for item in missing_items(make_items(1, 2, 3), folder)] == ["dia2", "dia3"]
    assert len(contents(folder)) == 1


def test_a_full_disk_keeps_what_is_finished(folder, log):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))  # as on a disk that is full
    try:
        with pytest.raises(MsencError, match=r"items: cannot be written \(File too large\).*Free space"):
            run(make_items(1, 2000, 3), folder, log)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(contents(folder)) == 1
    assert run(make_items(1, 2000, 3), folder, log) == []
    assert calls(log) == [1, 3, 2000, 2000]


def test_a_gpu_that_is_full_is_a_refusal(tmp_path):
    def no_memory(value):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(MsencError, match=r"^dia0: the GPU has too little memory .*prepare_workers=1"):
        run_items([Item("dia0", "a", 1)], tmp_path, lambda: no_memory, 0, "work")
