"""Two processes (gloo, started by Lightning as for users) against one: the same batches, losses, weights and files."""

import csv

import pytest
import torch

from msenc.files import read_json
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
    both = tmp_path / "two"
    # resume=auto in runs' own folder: the second process must not take the first one's run for an earlier one
    places = [f"hydra.run.dir={both}", f"paths.runs_dir={tmp_path}", "resume=auto"]
    finished = run_script("train.py", *overrides, "trainer=ddp", "trainer.accelerator=cpu", *places)
    assert finished.returncode == 0, finished.stderr
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
