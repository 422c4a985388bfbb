"""Signals from a cluster, from the first moment of a process on, and what is asked of the launcher afterwards."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import SMALL_DEMO

from msenc.files import read_json
from msenc.work import signals
from msenc.work.signals import HEARD, INTERRUPTED, STOPPED, Termination, listen_from_start

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in (*HEARD, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", HEARD)
def test_a_signal_during_imports_is_no_crash(number, tmp_path):
    (tmp_path / "hydra.py").write_text(f"import os\nos.kill(os.getpid(), {int(number)})\n")
    done = subprocess.run(
        [sys.executable, ROOT / "train.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    )
    assert done.returncode == STOPPED
    assert [p.name for p in tmp_path.iterdir() if p.suffix != "" or p.name == "runs"] == ["hydra.py"]


def test_one_that_an_import_swallowed_ends_the_set_up(monkeypatch):
    monkeypatch.setattr(signals, "_START", Termination())
    listen_from_start()
    with suppress(SystemExit):  # as a bare except in a library would
        os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(SystemExit) as end, Termination():
        pytest.fail("it has been asked to leave")
    assert end.value.code == STOPPED


@pytest.mark.parametrize("number", HEARD)
def test_what_is_held_ends_later_and_handlers_come_back(number):
    heard = []
    signal.signal(number, lambda *given: heard.append(given[0]))
    with Termination() as termination:
        termination.is_held = True
        os.kill(os.getpid(), number)
        assert termination.asked_by == number
        with pytest.raises(SystemExit):
            termination.leave()
    assert heard == []
    os.kill(os.getpid(), number)
    assert heard == [number]


def test_ctrl_c_waits_for_the_step_and_a_second_one_does_not(capfd):
    with Termination() as termination:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        termination.is_held = True
        os.kill(os.getpid(), signal.SIGINT)
        assert termination.asked_by == signal.SIGINT
        assert "Ctrl-C again stops at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(SystemExit) as end:
            termination.leave()
    assert end.value.code == INTERRUPTED == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def interrupted(*command, there):
    """Its output after Ctrl-C, sent when a file is there, as a terminal sends it: to all of its processes."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
        start_new_session=True,
    )
    end = time.monotonic() + 240
    while not any(there.parent.glob(there.name)) and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == INTERRUPTED, said
    assert "Traceback" not in said
    return said


def test_a_run_with_loader_processes_that_ctrl_c_ends_has_saved_and_says_how_to_go_on(demo_home, tmp_path):
    place = f"paths.output_dir={tmp_path / 'run'}"
    endless = [
        "modality=text_audio",
        "trainer.max_epochs=10000",
        "evaluate=null",
        *SMALL_DEMO,
        place,
    ]
    more = ["callbacks.checkpoints.every_n_steps=1", "data.num_workers=1"]
    said = interrupted("train.py", *endless, *more, there=tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert f"To continue: python train.py resume={tmp_path / 'run'}" in said
    assert read_json(tmp_path / "run" / "run.json")["status"] == "interrupted"
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


def test_a_preparation_that_ctrl_c_ends_goes_on_with_the_same_command(home, tmp_path):
    command = ["prepare.py", f"paths.data_dir={tmp_path / 'data'}", "prepare_workers=2", "model/llm=tiny"]
    said = interrupted(*command, there=tmp_path / "data" / "*")  # while worker processes start
    assert "Interrupted. To continue, repeat the command." in said


def stop(termination, number):
    with pytest.raises(SystemExit), termination:
        os.kill(os.getpid(), number)
    return termination


def test_the_launchers_own_handler_requeues():
    heard = []
    signal.signal(signal.SIGUSR2, lambda *given: heard.append(given))
    stop(Termination(), signal.SIGUSR2).ask_for_requeue(is_first_process=True)
    assert heard == [(signal.SIGUSR2, None)]


@pytest.mark.parametrize(
    ("number", "is_first", "job", "asked"),
    [
        (signal.SIGUSR1, True, {"SLURM_JOB_ID": "7"}, "requeue 7"),
        (
            signal.SIGUSR2,
            True,
            {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "8", "SLURM_ARRAY_TASK_ID": "1"},
            "requeue 8_1",
        ),
        (signal.SIGUSR1, False, {"SLURM_JOB_ID": "7"}, None),
        (signal.SIGUSR1, True, {}, None),
        (signal.SIGTERM, True, {"SLURM_JOB_ID": "7"}, None),  # scancel sends it, too
    ],
)
def test_a_plain_slurm_job_is_requeued_by_its_first_process(number, is_first, job, asked, tmp_path, monkeypatch):
    said = tmp_path / "said"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {said}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for key in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(key, raising=False)
    for key, value in job.items():
        monkeypatch.setenv(key, value)
    signal.signal(number, signal.SIG_DFL)
    stop(Termination(), number).ask_for_requeue(is_first)
    assert (said.read_text().strip() if said.exists() else None) == asked
