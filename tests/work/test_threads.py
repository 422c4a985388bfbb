import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from msenc.work import threads
from msenc.work.threads import (
    SMALL,
    choose_threads,
    one_thread,
    quota_cores,
    settle_threads,
    usable_cores,
    wanted_threads,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def kept_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_size_decides_and_the_cores_bound():
    assert choose_threads(SMALL - 1, 16, {}) == 1
    assert [choose_threads(SMALL, cores, {}) for cores in (1, 2, 16)] == [1, 2, 16]


def test_the_users_number_rules_and_a_run_keeps_its_own():
    assert choose_threads(SMALL - 1, 2, {"OMP_NUM_THREADS": "3"}) == 3
    assert choose_threads(SMALL, 16, {"OMP_NUM_THREADS": "3"}, before=5) == 3
    assert choose_threads(SMALL - 1, 2, {}, before=5) == 5
    assert choose_threads(SMALL, 16, {}, before=1) == 1
    assert choose_threads(SMALL, 16, {"OMP_NUM_THREADS": "3"}, before=5, given=2) == 2


@pytest.mark.parametrize(
    ("value", "wanted"), [("4", 4), (" 4 ", 4), ("4,2", 4), ("", None), ("0", None), ("-1", None), ("many", None)]
)
def test_what_openmp_does_not_take_says_nothing(value, wanted):
    assert wanted_threads({"OMP_NUM_THREADS": value}) == wanted
    assert wanted_threads({}) is None


def test_the_cores_are_those_that_are_left_to_the_process(monkeypatch, tmp_path):
    assert [quota_cores(t) for t in ("max 100000\n", "150000 100000\n", "10000 100000\n")] == [None, 2, 1]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 4, 6}, raising=False)
    monkeypatch.setattr(threads, "QUOTA", tmp_path / "cpu.max")
    assert usable_cores() == 3
    threads.QUOTA.write_text("max 100000\n")
    assert usable_cores() == 3
    threads.QUOTA.write_text("200000 100000\n")
    assert usable_cores() == 2
    threads.QUOTA.write_text("900000 100000\n")
    assert usable_cores() == 3


def test_torch_computes_with_the_number_that_was_chosen(monkeypatch, kept_threads):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert settle_threads(1) == torch.get_num_threads() == 3
    with pytest.raises(ValueError, match=r"^1$"), one_thread():
        raise ValueError(torch.get_num_threads())
    assert torch.get_num_threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert settle_threads(1, before=2) == torch.get_num_threads() == 2
    assert settle_threads(1) == torch.get_num_threads() == 1
    assert settle_threads(1, given=2) == torch.get_num_threads() == 2


@pytest.mark.parametrize("script", ["train.py", "prepare.py", "evaluate.py", "respond.py"])
def test_scripts_settle_how_threads_wait_before_torch_is_there(script):
    """OpenMP reads its environment when it is loaded."""
    code = (
        "import os, runpy, sys\n"
        "from msenc.work import threads\n"
        "settled, real = [], threads.wait_passively\n"
        "threads.wait_passively = lambda: (settled.append('torch' in sys.modules), real())\n"
        f"sys.argv = [{script!r}, '--help']\n"
        f"try: runpy.run_path({script!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(settled, os.environ['OMP_WAIT_POLICY'], file=sys.stderr)\n"
    )
    for given, kept in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        clean = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
        env = {**clean, "PYTHONPATH": str(ROOT), **given}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
        )
        assert done.stderr.splitlines()[-1] == f"[False] {kept}"
        if script != "train.py":
            break
