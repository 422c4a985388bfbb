"""Two processes (gloo, started by Lightning or by torchrun) against one: the same batches, losses, weights, files."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from msenc.files import read_json, write_json
from msenc.pipelines.evaluate import evaluate
from msenc.training.assembly import build_datamodule

COMMON = [
    "modality=text_audio",
    "model/llm=tiny_lora",
    "model.llm.lora.lora_dropout=0",
    "trainer.max_epochs=100",
    "trainer.max_steps=20",
    "trainer.log_every_n_steps=1",
    "evaluate=null",
]

# AdamW divides a gradient by its own size, noise too: that of the Q-Former's key biases is nothing else (see QFormer).
CASES = {
    "a number of dialogues, accumulated": (
        [
            "data.batch_size=7",
            "trainer.accumulate_grad_batches=2",
            "optimizer._target_=torch.optim.SGD",
            "optimizer.lr=0.2",
        ],
        "nothing",
    ),
    "a token budget": (["data.batch_size=null", "data.max_tokens_per_batch=500", "seed=3"], "key.bias"),
}


def files(folder):
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if "tfevents" not in name}


def losses(folder, name):
    with (folder / "logs" / "csv" / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(train, run_script, compose, tmp_path, case):
    overrides, noise = CASES[case]
    overrides = [*COMMON, *overrides]
    datamodule = build_datamodule(compose(overrides), "")
    datamodule.setup()
    sizes = [len(batch) for batch in datamodule.train_batches().batches_of(0)]
    assert len(sizes) % 2
    if datamodule.max_tokens_per_batch:
        assert min(sizes) == 1  # which leaves one process without a dialogue

    alone = train(overrides, "one").folder
    # The second process knows the folder from the first alone, and must not take its run for an earlier one.
    places = [f"paths.runs_dir={tmp_path / 'two'}", "resume=auto"]
    finished = run_script("train.py", *overrides, "trainer=ddp", "trainer.accelerator=cpu", *places)
    assert finished.returncode == 0, finished.stderr
    (both,) = (tmp_path / "two" / "single").iterdir()
    assert finished.stdout.count("Run folder:") == finished.stdout.count("batches per epoch") == 1

    assert len(losses(alone, "train/loss")) == 20
    for name in ("train/loss", "val/loss", "val/token_accuracy", "val/perplexity"):
        assert losses(both, name) == pytest.approx(losses(alone, name), rel=1e-5, abs=1e-6)
    first, second = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (alone, both))
    first, second = ({k: v for k, v in c["state_dict"].items() if noise not in k} for c in (first, second))
    torch.testing.assert_close(second, first, rtol=0, atol=1e-5)
    assert any(v.abs().max() > 1e-3 for k, v in first.items() if "lora_B" in k)  # which began at zero
    assert files(both) - files(alone) <= {"train.log"}
    assert read_json(both / "run.json")["status"] == "finished"


# ------------------------------------------------------------------------------------------------ torchrun


STARTERS = {"torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"], "Lightning": []}


def start(starter, runs):
    """Two processes of one run: started from outside, as by a cluster, or the second by the first."""
    command = [sys.executable, *STARTERS[starter], "train.py"]
    command += [*COMMON, "data.batch_size=4", "trainer.max_steps=60", "callbacks.checkpoints.every_n_steps=3"]
    command += ["trainer=ddp", "trainer.accelerator=cpu", "resume=auto", f"paths.runs_dir={runs}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, text=True, env={**os.environ, "COLUMNS": "200"})


@pytest.mark.parametrize("starter", STARTERS)
def test_a_run_of_two_processes_that_is_stopped_goes_on_in_its_own_folder(demo_home, tmp_path, starter):
    whole = start(starter, tmp_path / "whole")
    said, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors
    (expected,) = (tmp_path / "whole").rglob("last.ckpt")

    stopped, steps = tmp_path / "stopped", []
    while len(steps) < 4 and not any(step % 4 for step in steps):  # 16 dialogues: an epoch has 4 steps
        process = start(starter, stopped)
        while process.poll() is None:
            written = [path for path in stopped.rglob("last.ckpt") if torch_step(path) > max(steps, default=0)]
            if written:
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.02)
        process.communicate(timeout=120)
        assert process.returncode == (1 if starter == "torchrun" else 75)  # as docs/cluster.md says
        (record,) = stopped.rglob("run.json")
        assert read_json(record)["status"] == "interrupted"
        steps.append(torch_step(record.parent / "checkpoints" / "last.ckpt"))
    assert any(step % 4 for step in steps)

    last = start(starter, stopped)
    said, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors
    assert f"resumes from step {steps[-1]}" in said
    (record,) = stopped.rglob("run.json")
    assert [folder.name for folder in (stopped / "single").iterdir()] == [record.parent.name]
    assert read_json(record)["status"] == "finished"
    first, second = (
        torch.load(path, weights_only=True)["state_dict"] for path in (expected, *stopped.rglob("last.ckpt"))
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def torch_step(path):
    """The step of a checkpoint; 0 while it is being renamed."""
    with suppress(FileNotFoundError, RuntimeError):
        return torch.load(path, weights_only=True)["global_step"]
    return 0


# ------------------------------------------------------------------------------------------------ evaluation

NO_BIN = {"edges": None, "words": ["low", "high"], "source": "given", "clips": 0, "percentiles": None}
BINS = dict.fromkeys(["pitch/woman", "pitch/man", "range", "loudness", "pauses", "noise"], NO_BIN)
BINS["rate"] = NO_BIN | {"edges": [4.0], "words": ["slow", "fast"]}


def contents(folder):
    """What the files of a folder hold, but not when they were written."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def bars(text, title):
    return [line for line in text.splitlines() if line.startswith(title)]


def test_two_processes_evaluate_as_one(run_script, compose, demo_home, tmp_path):
    """At the end of a training, resumed in it, and by evaluate.py, started by Lightning and by torchrun."""
    decoding = ["decoding.max_new_tokens=8", "decoding.batch_size=4"]
    ddp = ["trainer=ddp", "trainer.accelerator=cpu"]
    data = ["data.batch_size=null", "data.max_tokens_per_batch=300"]
    short = ["modality=text_audio", "model/llm=tiny_lora", "trainer.max_steps=2", f"paths.runs_dir={tmp_path}"]
    asked = ["evaluate=val", "control=shuffle"]
    done = run_script("train.py", *short, *data, *asked, *decoding, *ddp)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "single").iterdir()
    both = contents(run / "evaluation")
    assert len(both) == 2 * 3
    for title in ("scoring val", "generating replies of val", "shuffle_text on val"):
        assert len(bars(done.stdout, title)) == 1

    options = [f"run_dir={run}", "split=val", *decoding, "device=cpu"]
    evaluate(compose([*options, "control=shuffle", "overwrite=true"], "evaluate"))
    alone = contents(run / "evaluation")
    assert alone == both
    (lines,) = {text for path, text in alone.items() if path.suffix == ".jsonl" and b'"reply": ' in text}
    assert len({json.loads(line)["dialogue"] for line in lines.splitlines()}) == 4

    shutil.rmtree(run / "evaluation")
    write_json(run / "run.json", read_json(run / "run.json") | {"status": "running"})  # as if killed while it evaluated
    done = run_script("train.py", f"resume={run}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_json(run / "run.json")["status"] == "finished"
    assert contents(run / "evaluation") == alone

    described = tmp_path / "data"
    shutil.copytree(demo_home / "data", described)
    write_json(described / "demo" / "voice-bins.json", {"bins": BINS})
    options += [f"data_dir={described}", "speech=espeak", "recogniser=null", "speech_workers=1", "decoding=sample"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = run_script(*torchrun, "evaluate.py", *options, *ddp)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [len(bars(done.stdout, title)) for title in ("speaking", "voices")] == [1, 1]
    (spoken,) = {path.parent for path in contents(run / "evaluation") if path.suffix == ".wav"}
    both = contents(run / "evaluation" / spoken.parent)
    predictions = [json.loads(line) for line in both[Path("predictions.jsonl")].splitlines()]
    assert any(prediction["spoken_attributes"] for prediction in predictions)
    shutil.rmtree(run / "evaluation" / spoken.parent)
    evaluate(compose(options, "evaluate"))
    assert contents(run / "evaluation" / spoken.parent) == both


FAILING = """
import os, signal
from msenc.models.conversation import ConversationModel

def fail(self, batch):
    {what}

if os.environ.get("LOCAL_RANK", "0") == "{rank}":
    ConversationModel.forward = fail
"""
RAISE, REFUSE = 'raise ValueError("no luck")', 'from msenc.types import MsencError; raise MsencError("no luck.")'
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
FAILURES = {  # what fails, in which process; the exit status, and what is said
    "the other fails": (RAISE, 1, 1, r"^error: process 2 of 2: ValueError\('no luck'\)$"),
    "the other refuses": (REFUSE, 1, 1, r"^error: process 2 of 2: no luck\.$"),
    "the first refuses": (REFUSE, 0, 1, r"^error: no luck\.$"),
    "the other is killed": (KILL, 1, 1, r"^error: another of the 2 processes has ended without a word\. .* memory"),
    "the first is killed": (KILL, 0, -9, ""),
}


@pytest.mark.parametrize("case", FAILURES)
def test_if_one_process_fails_all_end_and_nothing_is_written(short_run, run_script, tmp_path, case):
    what, rank, status, said = FAILURES[case]
    run = shutil.copytree(short_run, tmp_path / "run")
    (tmp_path / "failing.py").write_text(FAILING.format(what=what, rank=rank))
    ddp = ["trainer=ddp", "trainer.accelerator=cpu"]
    paths = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    # returns when all processes have closed their output
    done = run_script("evaluate.py", f"run_dir={run}", "split=train", "plugins=[failing]", *ddp, env=paths)
    assert done.returncode == status, done.stdout + done.stderr
    assert re.search(said, done.stderr, re.MULTILINE), done.stderr
    assert done.stderr.count("error: ") == (said != "")
    assert ("Traceback" in done.stderr) == (what == RAISE)  # of a bug, where it happened
    assert not (run / "evaluation").exists()
