"""Sweeps that are killed, fail in part, or grow: the same command again does what is left, and reports on all."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import joblib
import pandas as pd
import pytest
import torch
from conftest import ROOT, SMALL_DEMO, run_driver
from filelock import FileLock
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from hydra_plugins.hydra_submitit_launcher import submitit_launcher
from omegaconf import OmegaConf

from msenc.files import read_json, write_json
from msenc.pipelines import cluster
from msenc.runs.sweep import job_folder, note_run, read_submitted, read_sweep, sweep_name, write_submitted, write_sweep
from msenc.types import MsencError

FAST = ["data.batch_size=4", "trainer.max_epochs=1", "decoding.max_new_tokens=1", "evaluate=val"]
"""Four steps."""

SWEEP = ["sweep=modality", "modality=text,text_audio", "seed=1,2", *FAST, "callbacks.checkpoints.every_n_steps=1"]


@pytest.fixture(scope="module")
def swept(demo_home, tmp_path_factory):
    """The same sweep twice, each with runs of its own: unbroken, and killed in its third job and started again."""
    home = tmp_path_factory.mktemp("sweeps")
    spec = []
    for name, moments in (("whole", []), ("killed", ["kill job 2 2"])):
        (home / name).mkdir()
        command = [*SWEEP, f"paths.runs_dir={home / name}"]
        spec.append(
            {"folder": str(home / name), "first": command, "again": command, "moments": moments, "is_sweep": True}
        )
    (whole,), (killed, again) = run_driver(Path(__file__).parent / "kill_driver.py", spec, home)
    assert whole["status"] == again["status"] == 0, whole["said"] + again["said"]
    assert killed["signal"] == 9
    return home, again["said"]


def sweep_folder(runs):
    (folder,) = (runs / "sweeps").iterdir()
    return folder


def records(folder):
    return [read_json(job.run_dir / "run.json") for job in read_sweep(folder)]


def table(folder):
    return pd.read_csv(folder / "report" / "table.csv").drop(columns=["seconds", "peak memory MiB"])


def test_a_sweep_killed_in_its_third_job_goes_on_there(swept):
    home, said = swept
    assert said.count("Already finished") == 2
    assert said.count("Resuming") == said.count("Training resumes from step 2") == 1
    killed, whole = sweep_folder(home / "killed"), sweep_folder(home / "whole")
    assert killed.name == whole.name
    assert [r["resumed"] for r in records(killed)] == [0, 0, 1, 0]
    assert [r["seed"] for r in records(killed)] == [1, 2, 1, 2]
    assert len(list(killed.glob("*/*/run.json"))) == 4  # nothing was begun a second time
    pd.testing.assert_frame_equal(table(killed), table(whole), check_exact=True)
    assert table(whole)["seeds"].tolist() == [2, 2]
    compared = [(folder / "report" / "comparisons.csv").read_text() for folder in (killed, whole)]
    assert compared[0] == compared[1]
    assert "text_audio" in compared[0]
    assert (killed / "report" / "report.html").is_file()


def test_seeds_that_are_added_join_what_is_there(swept, call_script, capsys):
    home, _ = swept
    runs = home / "grown"
    shutil.copytree(home / "whole", runs)
    capsys.readouterr()
    call_script("train.py", *SWEEP, "modality=text", "seed=1,4,2", f"paths.runs_dir={runs}")
    assert capsys.readouterr().out.count("Already finished") == 2
    assert [r["seed"] for r in records(sweep_folder(runs))] == [1, 4, 2]
    assert table(sweep_folder(runs))["seeds"].tolist() == [3]
    call_script("train.py", *SWEEP, "seed=1", f"paths.runs_dir={runs}")  # the report is of what was asked for
    assert table(sweep_folder(runs))["seeds"].tolist() == [1, 1]


def test_a_job_takes_a_run_from_wherever_it_lies(swept, call_script):
    home, _ = swept
    (sweep := home / "elsewhere").mkdir()
    call_script("train.py", *SWEEP, f"paths.runs_dir={home / 'whole'}", f"hydra.sweep.dir={sweep}")
    assert {job.run_dir.parents[1] for job in read_sweep(sweep)} == {sweep_folder(home / "whole")}
    pd.testing.assert_frame_equal(table(sweep), table(sweep_folder(home / "whole")), check_exact=True)


def test_a_dry_run_says_what_is_left(swept, call_script, capsys):
    home, _ = swept
    command = [*SWEEP, "modality=text", "seed=1,5", f"paths.runs_dir={home / 'whole'}", "dry_run=true"]
    before = files_of(home)
    capsys.readouterr()
    for more in ([], ["trainer.max_epochs=2"]):
        with pytest.raises(SystemExit) as end:
            call_script("train.py", *command, *more)
        assert not end.value.code
    said = capsys.readouterr().out
    first, second = said.split("2 jobs; none started")[1:]
    one, other = (line for line in first.splitlines() if "seed=" in line)
    assert "finished" in one
    assert "new" in other
    assert "MiB" in other
    assert "mean of 2 finished runs that differ only in the seed" in first
    assert second.count("new") == 2
    assert "Time of jobs 0, 1: per step, from 2 finished runs" in second
    assert files_of(home) == before


def files_of(folder):
    return {(p, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def test_a_dry_run_lists_what_is_not_prepared(call_script, capsys, tmp_path):
    paths = [f"paths.data_dir={tmp_path / 'data'}", f"paths.runs_dir={tmp_path / 'runs'}"]
    with pytest.raises(SystemExit):
        call_script("train.py", "sweep=llm_freeze", *paths, "dry_run=true")
    said = " ".join(capsys.readouterr().out.split())
    assert "6 jobs; none started" in said
    assert "Unknown of jobs 0, 1, 2, 3, 4, 5:" in said
    assert "this LLM does not exist yet; prepare.py or the first job" in said
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_one_run_is_refused(call_script, tmp_path):
    with pytest.raises(SystemExit, match="this is a single run"):
        call_script("train.py", "modality=text", "dry_run=true", f"paths.output_dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def test_a_job_waits_for_its_run_if_another_process_is_at_it(call_script, tmp_path, capsys):
    command = ["modality=text", *FAST, f"paths.runs_dir={tmp_path}"]
    call_script("train.py", *command, "seed=1")
    (earlier,) = (tmp_path / "single").iterdir()
    before = (earlier / "run.json").read_text()
    holder = f"""
from filelock import FileLock
with FileLock({str(earlier / ".lock")!r}):
    print("held", flush=True)
    input()
"""
    with subprocess.Popen([sys.executable, "-c", holder], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout.readline() == "held\n"
        threading.Timer(5.0, lambda: (process.stdin.write("\n"), process.stdin.flush())).start()
        call_script("train.py", "-m", *command, "seed=1,2")
    said = " ".join(capsys.readouterr().out.split())
    assert "waiting for it" in said
    assert said.index("waiting for it") < said.index("Already finished")
    assert (earlier / "run.json").read_text() == before
    assert [read_json(path)["status"] for path in (tmp_path / "sweeps").rglob("run.json")] == ["finished"]


def test_a_failed_job_is_named_and_tried_again(call_script, demo_home, tmp_path, capsys):
    good, late = demo_home / "data" / "tiny-llm", tmp_path / "late-llm"
    llms = f"model.llm.name_or_path={late},{good}"
    command = ["-m", "modality=text", *FAST, "model/llm=smollm2", llms, f"paths.runs_dir={tmp_path}"]
    with pytest.raises(SystemExit) as end:
        call_script("train.py", *command)
    assert end.value.code == 1
    folder = sweep_folder(tmp_path)
    failed, finished = records(folder)
    assert (failed["status"], finished["status"]) == ("failed", "finished")
    said = " ".join(capsys.readouterr().out.split())
    assert "1 of 2 jobs did not finish: job 0 (modality=text" in said
    assert f"failed: MsencError: AutoTokenizer: cannot load '{late}'" in said
    assert "Traceback" not in said
    assert table(folder)["seeds"].tolist() == [1]
    shutil.copytree(good, late)
    call_script("train.py", *command)
    assert [r["status"] for r in records(folder)] == ["finished", "finished"]
    assert capsys.readouterr().out.count("Already finished") == 1
    assert table(folder)["seeds"].tolist() == [1, 1]


def test_two_at_once_are_refused(call_script, tmp_path):
    command = [*SWEEP, f"hydra.sweep.dir={tmp_path}"]
    with FileLock(tmp_path / ".lock"), pytest.raises(SystemExit, match="another process runs this sweep"):
        call_script("train.py", *command)
    assert not (tmp_path / "sweep.json").exists()


def test_a_bug_in_a_hook_is_no_warning(call_script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("msenc.pipelines.sweep.write_sweep", lambda *a: 1 / 0)
    with pytest.raises(SystemExit) as end:
        call_script("train.py", *SWEEP, f"hydra.sweep.dir={tmp_path}")
    assert end.value.code == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_jobs_side_by_side_stop_together_and_go_on(swept, run_script, demo_home, tmp_path):
    home, _ = swept
    runs = tmp_path / "runs"
    shutil.copytree(home / "whole", runs)
    more = ["data.batch_size=2", "trainer.max_epochs=24", "callbacks.checkpoints.every_n_steps=8"]
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    command = [*SWEEP, "modality=text", "seed=1,2,3", f"paths.runs_dir={runs}", *more, *launcher]
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}  # the launcher shares the cores out
    process = subprocess.Popen(
        [sys.executable, "train.py", *command], cwd=ROOT, env=env, stdout=-1, stderr=-1, text=True
    )
    while len(list(runs.glob("sweeps/*/*/?/checkpoints/last.ckpt"))) < 4 + 2 and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = "".join(process.communicate(timeout=100))
    assert process.returncode == 75, said
    assert "Stopped by SIGTERM; run the same command to continue" in said
    (folder,) = {f for f in (runs / "sweeps").iterdir() if f.name != sweep_folder(home / "whole").name}
    assert [job.run_dir is None for job in read_sweep(folder)] == [False, False, True]
    stopped = [read_json(path) for path in folder.glob("*/?/run.json")]
    assert [r["status"] for r in stopped] == ["interrupted"] * 2
    assert [r["threads"] for r in stopped] == [max(joblib.cpu_count() // 2, 1)] * 2
    done = run_script("train.py", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(r["seed"], r["status"], r["resumed"]) for r in records(folder)] == [
        (1, "finished", 1),
        (2, "finished", 1),
        (3, "finished", 0),
    ]
    assert table(folder)["seeds"].tolist() == [3]


def test_jobs_side_by_side_prepare_what_is_missing(run_script, demo_home, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(demo_home / "data", data, ignore=shutil.ignore_patterns("audio-*", "video-*", "dataset.json"))
    places = [f"paths.data_dir={data}", f"paths.runs_dir={tmp_path / 'runs'}"]
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = run_script("train.py", "-m", "modality=text,text_audio", *SMALL_DEMO, *FAST, *places, *launcher)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [r["status"] for r in records(sweep_folder(tmp_path / "runs"))] == ["finished", "finished"]


def test_a_cluster_executor_skips_and_reports_as_well(swept, run_script, tmp_path):
    home, _ = swept
    runs = tmp_path / "runs"
    shutil.copytree(home / "whole", runs)
    launcher = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"]
    done = run_script("train.py", *SWEEP, "modality=text", "seed=2,6", f"paths.runs_dir={runs}", *launcher)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = sweep_folder(runs)
    old, new = read_sweep(folder)
    assert old.run_dir.parent != new.run_dir.parent  # the first is of the copied start
    assert [r["seed"] for r in records(folder)] == [2, 6]
    assert table(folder)["seeds"].tolist() == [2]


def test_jobs_that_outlive_the_sweeps_process_are_waited_for_and_a_killed_one_goes_on(swept, run_script, tmp_path):
    home, _ = swept
    runs = tmp_path / "runs"
    shutil.copytree(home / "whole", runs)
    launcher = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"]
    more = ["data.batch_size=2", "trainer.max_epochs=48", "callbacks.checkpoints.every_n_steps=8"]
    command = [*SWEEP, "modality=text", "seed=1,2", f"paths.runs_dir={runs}", *more, *launcher]
    # no pipes: the jobs hold them too, and to read them would be to wait for the jobs
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "train.py", *command], cwd=ROOT, **silent)
    while len(list(runs.glob("sweeps/*/*/?/checkpoints/last.ckpt"))) < 4 + 2 and process.poll() is None:
        time.sleep(0.1)
    process.kill()
    process.wait()
    (folder,) = {f for f in (runs / "sweeps").iterdir() if f.name != sweep_folder(home / "whole").name}
    os.kill(read_json(next(folder.glob("jobs/0-*.json")))["process"], signal.SIGKILL)
    killed, _ = read_sweep(folder)
    with FileLock(killed.run_dir / ".lock"):  # it is dead
        step = torch.load(killed.run_dir / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    done = run_script("train.py", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(r["status"], r["resumed"]) for r in records(folder)] == [("finished", 1), ("finished", 0)]
    said = " ".join(" ".join(path.read_text() for path in folder.rglob("*_log.out")).split())
    assert said.count("waiting for it") == 1  # the second job's run was at work
    assert said.count("Training resumes from") == said.count(f"Training resumes from step {step:,} (last.ckpt)") == 1
    assert len(list(folder.glob("*/?/run.json"))) == 2
    assert table(folder)["seeds"].tolist() == [2]


# ------------------------------------------------------------------------------------------------ Slurm


class FakeLauncher:
    """What is asked of the plugin's launcher."""

    _EXECUTOR = "slurm"


class FakeJob:
    def __init__(self, job_id, error=None):
        self.job_id, self.error = job_id, error

    def results(self):
        if self.error:
            raise RuntimeError(self.error)
        return [None]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """``slurm(answers, finished)``: submits six jobs of a sweep's; squeue answers in turn -> those submitted."""
    (tmp_path / "bin").mkdir()
    queue = tmp_path / "queue"
    squeue = tmp_path / "bin" / "squeue"
    squeue.write_text(f'#!/bin/sh\nhead -1 {queue} | tr " " "\\n"\nsed -i 1d {queue}\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(cluster, "ASK_EVERY", 0)
    monkeypatch.setattr(submitit_launcher, "BaseSubmititLauncher", FakeLauncher)
    folder = tmp_path / "sweep"
    write_sweep(folder, ["seed=0,1,2,3,4,5"], [[f"seed={n}"] for n in range(6)])
    submitted = []

    def submit(launcher, left):
        submitted.extend(left)
        return [FakeJob(f"90_{n}", "node failed\nand more" if n == 5 else None) for n, _ in left]

    monkeypatch.setattr(cluster, "_submit", submit)

    def call(answers, finished=()):
        queue.write_text("".join(f"{line}\n" for line in answers))
        runs = {f"seed={n}": tmp_path / "runs" / str(n) for n in finished}
        cluster.take_over(folder, lambda overrides: runs.get(overrides[0]), False, "test")
        returned = FakeLauncher().launch([[f"seed={n}"] for n in range(6)], 0)
        assert [r.return_value for r in returned] == [None] * 6
        assert queue.read_text() == ""  # every answer was asked for
        return [number for number, _ in submitted]

    return SimpleNamespace(call=call, folder=folder)


def test_what_is_finished_or_in_slurms_queue_is_not_submitted(slurm, capsys):
    before = {("seed=0",): "7_0", ("seed=1", "detach=true"): "7_1", ("seed=2",): "8", ("seed=3",): "12"}
    write_submitted(slurm.folder, before)
    # 8 has left the queue without a result: it is submitted again. 4 is finished, whoever has run it.
    assert slurm.call(["7_0 7_1 12 77", "7_1 77", "77"], finished=[3, 4]) == [2, 5]
    said = capsys.readouterr().out
    assert "job 0: Slurm has it already, as 7_0" in said
    assert "job 3: finished already" in said
    assert "job 2: submitted to Slurm as 90_2" in said
    assert "job 5: node failed" in said
    assert "and more" not in said
    assert [job.number for job in read_sweep(slurm.folder) if job.run_dir is not None] == [3, 4]
    noted = {tuple(overrides): job for overrides, job in read_submitted(slurm.folder)}
    assert noted == {
        ("seed=0",): "7_0",
        ("seed=1",): "7_1",
        ("seed=2",): "90_2",
        ("seed=3",): "12",
        ("seed=5",): "90_5",
    }


def test_without_a_queue_nothing_is_submitted_twice(slurm, monkeypatch, tmp_path):
    write_submitted(slurm.folder, {("seed=0",): "7"})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MsencError, match="squeue does not answer"):
        slurm.call([])


def test_only_slurm_goes_on_by_itself(call_script, tmp_path):
    for extra in ([], ["hydra/launcher=joblib"], ["hydra/launcher=submitit_local"]):
        with pytest.raises(SystemExit, match="detach=true: jobs go on by themselves on Slurm alone"):
            call_script("train.py", *SWEEP, f"hydra.sweep.dir={tmp_path / 'sweep'}", "detach=true", *extra)
    with pytest.raises(SystemExit, match="detach=true leaves the jobs of a sweep to Slurm, but this is a single run"):
        call_script("train.py", "detach=true")


def test_the_launchers_for_slurm_compose():
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = (
            GlobalHydra.instance()
            .config_loader()
            .load_configuration(
                "train",
                ["hydra/launcher=slurm_multi_node", "trainer=multi_node", "trainer.devices=4", "trainer.num_nodes=3"],
                RunMode.MULTIRUN,
            )
        )
        launcher = OmegaConf.to_container(config.hydra.launcher, resolve=False)
        assert (config.hydra.launcher.nodes, config.hydra.launcher.tasks_per_node) == (3, 4)
    assert launcher["_target_"].endswith("SlurmLauncher")
    assert launcher["signal_delay_s"] == 120
    assert launcher["max_num_timeout"] > 0


# ------------------------------------------------------------------------------------------------ the folder


def test_a_sweep_has_one_name_whatever_its_seeds():
    name = sweep_name("modality", ["sweep=modality", "seed=1,2", "optimizer.lr=0.1"], ["modality", "seed"])
    assert name.startswith("modality-")
    same = [
        ["seed=4", "optimizer.lr=0.1", "sweep=modality"],
        ["sweep=modality", "optimizer.lr=0.1", "modality=text", "data.num_workers=3", "~logger.csv", "resume=auto"],
    ]
    assert {sweep_name("modality", o, ["modality"]) for o in same} == {name}
    other = [["sweep=modality"], ["sweep=modality", "optimizer.lr=0.1", "data=meld"]]
    assert name not in {sweep_name("modality", o, ["modality"]) for o in other}
    assert name != sweep_name("modality", same[0], ["modality", "data.batch_size"])


def test_a_sweeps_jobs_are_read_back(tmp_path):
    folder = tmp_path / "sweep"
    assert read_sweep(tmp_path) is None
    write_sweep(folder, ["seed=1,2"], [["seed=1"], ["seed=2"]])
    note_run(folder, 1, tmp_path / "single" / "x", ["seed=2"])
    first, second = read_sweep(folder)
    assert (first.overrides, first.run_dir) == (("seed=1",), None)
    assert (second.overrides, second.run_dir) == (("seed=2",), tmp_path / "single" / "x")
    shutil.move(tmp_path, moved := tmp_path.with_name(f"{tmp_path.name}-moved"))
    assert read_sweep(moved / "sweep")[1].run_dir == moved / "single" / "x"
    write_sweep(moved / "sweep", ["seed=1"], None)
    assert read_sweep(moved / "sweep") == []


def test_what_runs_elsewhere_keeps_its_run_when_the_sweep_starts_anew(tmp_path):
    folder = tmp_path / "sweep"
    write_sweep(folder, ["seed=1,2"], [["seed=1"], ["seed=2"]])
    note_run(folder, 0, tmp_path / "runs" / "one", ["seed=1", "detach=true"])
    note_run(folder, 1, tmp_path / "runs" / "two", ["seed=2"])
    write_sweep(folder, ["seed=0,1,2"], [[f"seed={n}"] for n in range(3)], running=[("seed=1",)])
    assert [job.run_dir for job in read_sweep(folder)] == [None, tmp_path / "runs" / "one", None]
    # It is requeued, and begins again with the number that it was submitted with.
    assert job_folder(folder, 0, ["seed=1", "detach=true"]) != job_folder(folder, 0, ["seed=0"])
    note_run(folder, 0, tmp_path / "runs" / "one again", ["seed=1", "detach=true"])
    note_run(folder, 0, tmp_path / "runs" / "zero", ["seed=0"])
    runs = [job.run_dir and job.run_dir.name for job in read_sweep(folder)]
    assert runs == ["zero", "one again", None]


def test_jobs_that_an_earlier_version_noted_are_read(tmp_path):
    write_sweep(tmp_path, ["seed=1,2"], [["seed=1"], ["seed=2"]])
    for number, note in enumerate([{"run_dir": "x/0"}, {"run_dir": "x/1", "overrides": ["seed=2"]}]):
        write_json(tmp_path / "jobs" / f"{number}.json", note)
    assert [job.run_dir for job in read_sweep(tmp_path)] == [tmp_path / "x/0", tmp_path / "x/1"]
    write_sweep(tmp_path, ["seed=1,2"], [["seed=1"], ["seed=2"]])
    assert [job.run_dir for job in read_sweep(tmp_path)] == [None, None]
