"""msenc on a real Slurm: a sweep, the time limit, scancel, two nodes, an array of parts."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL_DEMO

from msenc.files import read_json
from msenc.runs.sweep import read_submitted, read_sweep

pytestmark = pytest.mark.slurm

JOBS = [
    "modality=text",
    "trainer.max_epochs=-1",
    "decoding.max_new_tokens=1",
    "hydra.launcher.gpus_per_node=null",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=2",
]
ONE_NODE = [*JOBS, "hydra/launcher=slurm", "hydra.launcher.timeout_min=20"]


@pytest.fixture
def place(tmp_path):
    """``place.overrides`` for the runs of a test, ``place.sweep()`` -> the folder of its sweep, once it is there."""

    class Place:
        overrides: tuple[str, ...] = (f"paths.runs_dir={tmp_path / 'runs'}",)

        def sweep(self) -> Path | None:
            return next((tmp_path / "runs" / "sweeps").glob("*"), None)

        def submitted(self) -> list[str]:
            return [job for _, job in read_submitted(sweep)] if (sweep := self.sweep()) else []

        def record(self, number: int = 0) -> dict:
            """Of a job's run; empty before it has one."""
            jobs = read_sweep(self.sweep()) if self.sweep() and (self.sweep() / "sweep.json").exists() else []
            folder = next((job.run_dir for job in jobs if job.number == number), None)
            return read_json(folder / "run.json") if folder and (folder / "run.json").exists() else {}

        def step(self) -> int:
            """Of the first job's checkpoint."""
            last = read_sweep(self.sweep())[0].run_dir / "checkpoints" / "last.ckpt"
            return torch.load(last, weights_only=True)["global_step"]

    return Place()


def test_a_sweep_whose_waiting_process_is_killed_is_not_submitted_twice(slurm, place):
    sweep = [*ONE_NODE, *place.overrides, "seed=1,2", "trainer.max_steps=8", "evaluate=val"]
    waiting = slurm.start("train.py", "-m", *sweep)
    slurm.wait(lambda: len(place.submitted()) == 2 and place.record())  # a job has noted its run
    waiting.kill()
    waiting.communicate()
    jobs = place.submitted()

    said = slurm.call("train.py", "-m", *sweep)
    assert "submitted to Slurm" not in said
    assert [place.record(n)["status"] for n in (0, 1)] == ["finished", "finished"]
    assert (place.sweep() / "report" / "report.html").exists()
    assert len(re.findall(r"\bJobId=\d+", slurm.ask("scontrol", "show", "job", "--oneliner"))) == len(jobs)

    again = slurm.call("train.py", "-m", *sweep)
    assert again.count("finished already") == 2


def test_a_run_is_requeued_at_its_time_limit_and_goes_on_after_scancel(slurm, place):
    # More steps than there is time for.
    endless = [
        *[o for o in ONE_NODE if "timeout" not in o],
        *place.overrides,
        "seed=3",
        "trainer.max_steps=10000000",
        "trainer.check_val_every_n_epoch=100000",
        "callbacks.checkpoints.every_n_steps=10000000",
        "hydra.launcher.timeout_min=2",
        "hydra.launcher.signal_delay_s=60",
    ]
    waiting = slurm.start("train.py", "-m", *endless)
    slurm.wait(lambda: place.record().get("resumed") == 1)
    first = place.step()
    assert first > 0
    (job,) = place.submitted()
    assert "Restarts=1" in slurm.ask("scontrol", "show", "job", job)

    slurm.wait(lambda: place.step() > first)
    slurm.ask("scancel", job)
    said, _ = waiting.communicate(timeout=120)
    assert waiting.returncode, said
    assert place.record()["status"] == "interrupted"
    second = place.step()
    assert second > first

    waiting = slurm.start("train.py", "-m", *endless)
    slurm.wait(lambda: place.record().get("resumed") == 2 and place.step() > second)
    (another,) = place.submitted()
    assert another != job
    slurm.ask("scancel", another)
    waiting.communicate(timeout=120)
    assert place.step() > second


def test_two_nodes_train_as_one_process(slurm, place, run_script, tmp_path):
    without_dropout = ["model/llm=tiny_lora", "model.llm.lora.lora_dropout=0"]
    short = [*without_dropout, "seed=4", "trainer.max_steps=6", "evaluate=null", "trainer.precision=32-true"]
    nodes = ["hydra/launcher=slurm_multi_node", "trainer=multi_node", "trainer.accelerator=cpu", "trainer.devices=1"]
    said = slurm.call("train.py", "-m", *JOBS, *place.overrides, *short, *nodes, "hydra.launcher.timeout_min=20")
    record = place.record()
    assert record["status"] == "finished", said
    assert record["processes"] == 2

    alone = run_script(
        "train.py",
        *[o for o in JOBS if "launcher" not in o],
        *short,
        f"paths.runs_dir={tmp_path / 'alone'}",
    )
    assert alone.returncode == 0, alone.stderr
    (single,) = (tmp_path / "alone" / "single").iterdir()
    both = read_sweep(place.sweep())[0].run_dir
    states = [torch.load(f / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for f in (single, both)]
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=1e-5)


def test_an_array_prepares_in_parts(slurm, demo_home, tmp_path):
    arguments = [*SMALL_DEMO, f"paths.data_dir={tmp_path / 'data'}", "prepare_workers=0"]
    command = shlex.join([sys.executable, "prepare.py", *arguments])
    script = tmp_path / "parts.sh"
    script.write_text(
        f"#!/bin/bash\n#SBATCH --array=1-2 --cpus-per-task=1 --mem=2000 --output={tmp_path}/part-%a.log\n"
        f"cd {ROOT}\n{command} part=$SLURM_ARRAY_TASK_ID/2\n"
    )
    job = slurm.ask("sbatch", "--parsable", str(script))
    slurm.wait(lambda: slurm.ask("squeue", "--noheader", f"--jobs={job}") == "")
    slurm.call("prepare.py", *arguments)
    whole, parts = demo_home / "data" / "demo", tmp_path / "data" / "demo"
    shards = [path.relative_to(whole) for path in whole.rglob("*.tar")]
    assert len(shards) >= 3
    assert all((parts / shard).read_bytes() == (whole / shard).read_bytes() for shard in shards)
    logs = [(tmp_path / f"part-{number}.log").read_text() for number in (1, 2)]
    assert all(f"{number}/2" in log for number, log in enumerate(logs, start=1)), logs
