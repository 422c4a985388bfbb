"""Preference tuning from command to export: alone, killed and resumed, in several processes; and what is refused."""

import csv
import json
import signal
from pathlib import Path

import pytest
import torch
from conftest import run_driver
from omegaconf import OmegaConf
from test_resume import flat

from msenc.files import read_json
from msenc.runs.identity import run_identity
from msenc.training.checkpoints import read_checkpoint
from msenc.training.export import load_export
from msenc.types import MsencError

MODEL = ["modality=text_audio", "model/llm=tiny_lora", "model.connector.num_blocks=1"]
DPO = [
    *(*MODEL, "objective=dpo", "data.batch_size=10", "evaluate=null", "optimizer.lr=0.01"),
    *("trainer.max_epochs=2", "trainer.log_every_n_steps=1", "callbacks.checkpoints.every_n_steps=2"),
]
TWO = {"ddp": ["trainer=ddp", "trainer.accelerator=cpu"], "fsdp2": ["trainer=fsdp2", "trainer.accelerator=cpu"]}


@pytest.fixture(scope="module")
def runs(demo_home, tmp_path_factory):
    """A short run, and runs of preferences from it on: whole, killed, of two processes."""
    home = tmp_path_factory.mktemp("preference")
    start = home / "start" / "run"
    specs = {
        "start": {"first": [*MODEL, "trainer.max_steps=4", "optimizer.lr=0.01", "evaluate=null"]},
        "whole": {},
        "killed": {"moments": ["kill batch 0 1", "kill batch 0 3", "kill validation 0", "kill best", "kill batch 1 1"]},
        **{name: {"processes": [2], "more": [*more, "trainer.precision=32-true"]} for name, more in TWO.items()},
    }
    spec = []
    for name, run in specs.items():
        folder = home / name / "run"
        folder.parent.mkdir()
        first = [*run.pop("first", [*DPO, f"init_from.run={start}"]), *run.pop("more", [])]
        usual = {"moments": [], "again": [f"resume={folder}"]}
        spec.append({"folder": str(folder), "first": [*first, f"paths.output_dir={folder}"], **usual, **run})
    results = run_driver(Path(__file__).parent / "kill_driver.py", spec, home)
    for starts in results:
        assert starts[-1]["status"] == 0, starts[-1]["said"]
    return {name: (home / name / "run", starts) for name, starts in zip(specs, results, strict=True)}


def load(folder, name):
    return read_checkpoint(folder / "checkpoints" / f"{name}.ckpt")


def logged(folder, name):
    with (folder / "logs" / "csv" / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_a_run_of_preferences_leaves_what_any_run_does(runs):
    start, (folder, starts) = runs["start"][0], runs["whole"]
    record = read_json(folder / "run.json")
    assert record["status"] == "finished"
    assert record["preferences"]["train"] > 3 * record["preferences"]["val"] > 6
    assert f"{record['preferences']['train']:,} of train" in starts[0]["said"]
    for kind in ("train", "val"):
        accuracies, margins = (logged(folder, f"{kind}/rewards/{name}") for name in ("accuracies", "margins"))
        assert all(0 <= share <= 1 for share in accuracies)
        chosen, rejected = (logged(folder, f"{kind}/rewards/{name}") for name in ("chosen", "rejected"))
        assert margins == pytest.approx([a - b for a, b in zip(chosen, rejected, strict=True)], abs=1e-5)
    assert len(logged(folder, "val/loss")) == 2
    assert logged(folder, "train/rewards/margins")[0] == 0  # it starts at the reference
    assert logged(folder, "train/loss")[0] > 0.7  # ln 2 of the pairs, and the preferred replies' own loss
    assert record["best_loss"] == pytest.approx(min(logged(folder, "val/loss")))
    last, best = load(folder, "last"), load(folder, "best")
    assert "reference" not in best
    began = load(start, "best")
    began = {**began["state_dict"], **began["average"]} if "average" in began else began["state_dict"]
    assert last["reference"].keys() == last["state_dict"].keys()
    assert all(torch.equal(tensor, began[name]) for name, tensor in last["reference"].items())
    assert any(not torch.equal(tensor, last["state_dict"][name]) for name, tensor in last["reference"].items())
    model, _ = load_export(folder / "export")
    exported = dict(model.named_parameters())
    average = best.get("average", best["state_dict"])
    assert all(torch.equal(exported[n.removeprefix("model.")], t) for n, t in average.items())


def test_a_run_that_was_killed_again_and_again_is_the_unbroken_one(runs):
    (whole, _), (folder, starts) = runs["whole"], runs["killed"]
    assert [start["signal"] for start in starts] == [signal.SIGKILL] * 5 + [None]
    one, other = load(folder, "last"), load(whole, "last")
    for part in ("state_dict", "reference", "average", "optimizer_states", "resume"):
        assert flat(one[part]) == flat(other[part]), part
    assert flat(load(folder, "best")["state_dict"]) == flat(load(whole, "best")["state_dict"])
    for file in ("metrics.json", "logs/csv/metrics.csv"):
        assert (folder / file).read_text() == (whole / file).read_text()


@pytest.mark.parametrize("name", TWO)
def test_two_processes_train_as_one(runs, name):
    (whole, _), (folder, _) = runs["whole"], runs[name]
    for metric in ("train/loss", "val/loss", "train/rewards/margins", "val/rewards/accuracies", "val/logps/chosen"):
        assert logged(folder, metric) == pytest.approx(logged(whole, metric), rel=1e-4, abs=1e-5), metric
    assert load(folder, "last")["reference"].keys() == load(whole, "last")["reference"].keys()


def test_a_run_is_evaluated_on_the_targets_of_the_data(runs, compose):
    from msenc.pipelines.evaluate import evaluate

    given = [f"run_dir={runs['whole'][0]}", "generate=false", "device=cpu", "split=val", "conflict=true"]
    (metrics,) = evaluate(compose(given, "evaluate"))
    assert metrics["targets"] == 14


def table(folder, text):
    path = folder / "p=1.csv"
    path.write_text("dialogue,utterance,rejected\n" + text, encoding="utf-8")
    return path


def test_a_table_is_part_of_what_a_run_is_known_by(runs, train, tmp_path):
    start = runs["start"][0]
    short = [*DPO, f"init_from.run={start}", "trainer.max_steps=1", f"paths.runs_dir={tmp_path / 'runs'}"]
    rows = "demo/train/dia0,1,Who cares?\ndemo/train/dia1,1,Who cares?\ndemo/val/dia0,1,Who cares?\n"
    records = []
    for number, (folder, text) in enumerate((("a", rows), ("b", rows), ("b", rows.replace("Who", "What")))):
        (tmp_path / folder).mkdir(exist_ok=True)
        quoted = f"objective.pairs='{table(tmp_path / folder, text)}'"
        records.append(read_json(train([*short, quoted], f"run{number}").folder / "run.json"))
    assert [record["preferences"] for record in records] == [{"train": 2, "val": 1}] * 3
    assert records[0]["identity"] == records[1]["identity"] != records[2]["identity"]
    assert records[1]["pairs_hash"] != records[2]["pairs_hash"]
    # A run is not resumed with another table.
    copied = tmp_path / "run1" / "run.json"
    copied.write_text(json.dumps({**records[1], "status": "running"}))
    with pytest.raises(MsencError, match="not the data that the run was trained on"):
        train([*short, f"objective.pairs='{tmp_path / 'b' / 'p=1.csv'}'", f"resume={tmp_path / 'run1'}"], "run1")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"objective=dpo: found new connectors for audio, expected a trained run .*init_from=RUN"),
        (["modality=text"], r"objective\.pairs=conflict: this run reads text alone, and no turn of the split train"),
        (["data.drop.audio=0.5"], r"data\.drop: found .*, but objective=dpo takes none: the reference would"),
        (["loss.weights.description=2"], r"loss\.weights: found .*, but objective=dpo takes none"),
        (["stage=align"], r"stage: found 'align', but objective=dpo takes none"),
        (
            ["model.layout=sample", "data.batch_size=null", "data.max_tokens_per_batch=500"],
            "only keeps to in the layout",
        ),
        (["objective.beta=0"], r"objective\.beta: found 0.*, expected more than 0"),
        (["objective.label_smoothing=0.5"], r"objective\.label_smoothing: found 0\.5, expected from 0 to below 0\.5"),
        (["objective.rpo_alpha=-1"], r"objective\.rpo_alpha: found -1.*, expected"),
        (["objective.pairs=conflicts"], r"objective\.pairs: found 'conflicts', expected conflict, wrong or a CSV file"),
        (["modality=text", "objective.pairs=none.csv"], r"none\.csv: missing\. Expected a table with the columns"),
        (["modality=text", "objective.pairs=wrong", "objective.labels=[Pitch]"], "found no label Pitch that varies"),
    ],
)
def test_what_cannot_be_preferred_or_compared_is_refused_in_a_line(train, overrides, message):
    own = [o for o in DPO if "connector" not in o] if "modality=text" in overrides else DPO
    with pytest.raises(MsencError, match=message) as refused:
        train([*own, *overrides])
    assert "\n" not in str(refused.value)


def test_without_a_loss_of_the_preferred_replies_a_run_is_known_as_before_there_was_one(compose):
    cfg = compose([*DPO, "objective.rpo_alpha=0"], "train")
    older = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
    del older.objective.rpo_alpha
    assert run_identity(cfg, {}) == run_identity(older, {}) != run_identity(compose(DPO, "train"), {})


def test_a_plan_counts_pairs_and_the_copy_of_the_start(runs, call_script, capsys):
    start = runs["start"][0]
    call_script("train.py", "plan=true", *DPO, f"init_from={start}")
    said = capsys.readouterr().out
    assert "reference" in said
    batches = read_json(runs["whole"][0] / "run.json")["batches"]
    assert f"{batches['batches_per_epoch']:,}" in said
