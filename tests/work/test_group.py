"""The processes of an evaluation; those of two, and what becomes of them, are in tests/test_processes.py."""

import signal
import subprocess

import pytest
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from rich.progress import Progress

from msenc.types import MsencError
from msenc.work.group import ALONE, name_the_dead


def test_one_process_has_its_own_results_and_its_own_errors(capsys):
    with ALONE as group, group.all_or_none():
        assert group.gather(iter("ab"), 2, Progress(), "reading") == ["a", "b"]
        assert group.told(lambda: "it") == "it"
    assert capsys.readouterr().out.count("reading") == 1
    with pytest.raises(MsencError, match="no luck"), ALONE as group, group.all_or_none():
        raise MsencError("no luck")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["sh", "-c", "kill -9 $$"], "process 3 of 3 of this run was killed by signal 9; running out of memory is"),
        (["false"], "process 3 of 3 of this run ended with status 1; it has said why"),
    ],
)
def test_before_lightning_ends_a_run_it_is_said_which_process_died(capsys, command, said):
    name_the_dead()
    name_the_dead()  # as training and evaluation do
    with subprocess.Popen(["sleep", "60"]) as main, subprocess.Popen(["sleep", "60"]) as other:
        with subprocess.Popen(command) as dead:
            dead.wait()
        assert _ChildProcessObserver(main.pid, [other, dead])._run()
        assert [main.wait(), other.wait()] == [-signal.SIGKILL] * 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {said}")
    assert errors.count("error: ") == 1
