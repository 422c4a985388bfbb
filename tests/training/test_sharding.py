"""One LLM over two processes (FSDP2, gloo) against one process: losses, checkpoints, exports, memory."""

import csv
import itertools
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import run_driver
from safetensors.torch import load_file, save_file
from test_resume import flat
from tiny_models import build_conversation
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from msenc.config.schema import plain
from msenc.files import hash_file, read_json
from msenc.pipelines.plan import memory_of
from msenc.pipelines.train import _check_choices
from msenc.training.assembly import build_datamodule
from msenc.training.averaging import learned_state
from msenc.training.checkpoints import CheckpointFiles, read_checkpoint
from msenc.training.export import load_export
from msenc.training.sharding import shard
from msenc.types import MsencError

SHORT = [
    "modality=text_audio",
    "data.batch_size=3",  # 16 dialogues: the sixth batch has one, which leaves one process without any
    "model.connector.num_blocks=1",
    "model.llm.dropout=0",
    "trainer.max_steps=8",
    "trainer.log_every_n_steps=1",
    "callbacks.checkpoints.every_n_steps=2",
    "optimizer.lr=0.01",
    "evaluate=null",
]
TWO = ["trainer=fsdp2", "trainer.accelerator=cpu", "trainer.precision=32-true"]
LORA = ["model/llm=tiny_lora", "model.llm.lora.lora_dropout=0"]
SGD = ["optimizer._target_=torch.optim.SGD", "optimizer.lr=0.02"]

SETTINGS = {
    "lora": LORA,
    "bfloat16, lora": [*LORA, "model.llm.dtype=bfloat16", "trainer.precision=bf16-mixed", *SGD],
    "whole, recomputed": ["model.llm.gradient_checkpointing=true", "trainer.accumulate_grad_batches=2"],
    "tied": ["model.llm.name_or_path={tied}", "trainer.gradient_clip_val=0.1"],
    "without checkpoints": [*LORA, "~callbacks.checkpoints", "callbacks.average=null"],
}


@pytest.fixture(scope="module")
def drive(demo_home, tmp_path_factory):
    """``drive({name: {"processes": ..., "first": ..., ...}})`` -> {name: (folder, starts)}; see `kill_driver`."""
    home = tmp_path_factory.mktemp("runs")

    def call(runs):
        spec = []
        for name, run in runs.items():
            folder = run.pop("folder", None) or home / name.replace(", ", "-") / "run"
            folder.parent.mkdir(exist_ok=True)
            first = [*SHORT, *run.pop("overrides", []), f"paths.output_dir={folder}"]
            usual = {"first": first, "again": [f"resume={folder}"], "moments": []}
            spec.append({"folder": str(folder), **usual, **run})
        results = run_driver(Path(__file__).parents[1] / "kill_driver.py", spec, home)
        return {name: (Path(run["folder"]), starts) for name, run, starts in zip(runs, spec, results, strict=True)}

    return call


@pytest.fixture(scope="module")
def llms(demo_home, tmp_path_factory):
    """The demo's LLM with its embeddings as output layer, too; and one of 160 MB in several files."""
    home = tmp_path_factory.mktemp("llms")
    tied = shutil.copytree(demo_home / "data" / "tiny-llm", home / "tied")
    llm = AutoModelForCausalLM.from_pretrained(tied)
    llm.config.tie_word_embeddings = True
    llm.tie_weights()
    llm.save_pretrained(tied)
    large = shutil.copytree(tied, home / "large")
    config = LlamaConfig(vocab_size=4096, hidden_size=384, intermediate_size=1056, num_hidden_layers=32)
    config.update({"eos_token_id": llm.config.eos_token_id, "pad_token_id": llm.config.pad_token_id})
    LlamaForCausalLM(config).save_pretrained(large, max_shard_size="50MB")
    (large / "model.safetensors").unlink()
    return {"tied": tied, "large": large}


def logged(folder, name):
    with (folder / "logs" / "csv" / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def compared(folder, name):
    """What a checkpoint holds, for comparison bit by bit."""
    return flat(read_checkpoint(folder / "checkpoints" / f"{name}.ckpt"))


# ---------------------------------------------------------------------------------------------- against one process


def rounded(name, tolerance):
    """bfloat16 has 8 bits: sums in another order differ by some of its last."""
    return 5e-3 if "bfloat16" in name else tolerance


@pytest.fixture(scope="module")
def pairs(drive, llms):
    runs = {}
    for name, overrides in SETTINGS.items():
        overrides = [o.format(**llms) for o in overrides]
        runs[f"one, {name}"] = {"processes": [1], "overrides": overrides}
        runs[f"two, {name}"] = {"processes": [2], "overrides": [*TWO, *overrides]}
    moments = ["kill batch 0 3", "kill batch 1 0"]
    runs["three, lora"] = {"processes": [2, 1, 2], "overrides": [*TWO, *LORA], "moments": moments}
    found = drive(runs)
    for _, starts in found.values():
        assert starts[-1]["status"] == 0, starts[-1]["said"]
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_that_share_one_llm_train_as_one(pairs, name):
    alone, both = pairs[f"one, {name}"][0], pairs[f"two, {name}"][0]
    for metric in ("train/loss", "val/loss"):
        assert logged(alone, metric)
        assert logged(both, metric) == pytest.approx(logged(alone, metric), rel=rounded(name, 1e-6)), metric
    for norm in ("grad_norm/llm", "grad_norm/connector.audio"):
        # A gradient is rounded in each layer again: on processors that multiply bfloat16, by up to 2 % in all.
        tolerance = 5 * rounded(name, 2e-6)
        assert logged(both, norm) == pytest.approx(logged(alone, norm), rel=tolerance), norm
    assert read_json(both / "run.json")["base_fingerprint"] == read_json(alone / "run.json")["base_fingerprint"]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_export_of_two_processes_is_that_of_one(pairs, name):
    alone, both = (pairs[f"{number}, {name}"][0] / "export" for number in ("one", "two"))
    files = [{str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()} for f in (alone, both)]
    assert files[0] == files[1]
    one, two = (load_export(folder)[0] for folder in (alone, both))
    parameters = dict(two.named_parameters())
    assert parameters.keys() == dict(one.named_parameters()).keys()
    for key, expected in one.named_parameters():  # AdamW divides a gradient by its own size, noise too
        assert (parameters[key] - expected).norm() <= 10 * rounded(name, 1e-4) * expected.norm(), key
    assert dict(two.named_buffers()).keys() == dict(one.named_buffers()).keys()
    if "without" in name:
        return
    run = pairs[f"two, {name}"][0]
    trained = learned_state(read_checkpoint(run / "checkpoints" / "best.ckpt"))
    assert all(torch.equal(parameters[n.removeprefix("model.")], t) for n, t in trained.items())


def test_a_run_goes_on_with_another_number_of_processes(pairs):
    folder, starts = pairs["three, lora"]
    assert [[line for line in s["said"].splitlines() if "this run has" in line] for s in starts][1:] != [[], []]
    assert "The checkpoint is from 2 processes, this run has 1" in starts[1]["said"]
    assert "The checkpoint is from 1 processes, this run has 2" in starts[2]["said"]
    for metric in ("train/loss", "val/loss"):
        expected = logged(pairs["one, lora"][0], metric)
        assert logged(folder, metric) == pytest.approx(expected, rel=2e-6), metric


# ---------------------------------------------------------------------------------------------- killed


MOMENTS = [
    *("kill batch 0 3", "kill write 2", "kill exchange last", "kill exchange previous", "kill batch 1 1", "kill best"),
    *("stop batch 2 1", "kill outcome"),
]
LONGER = [*TWO, "model/llm=tiny_lora", "trainer.max_steps=16", "evaluate=val", "decoding.max_new_tokens=1"]


@pytest.fixture(scope="module")
def killed(drive):
    return drive(
        {
            "unbroken": {"processes": [2], "overrides": LONGER},
            "killed": {"processes": [2], "overrides": LONGER, "moments": MOMENTS},
        }
    )


def test_two_processes_that_are_killed_again_and_again_give_the_unbroken_run(killed):
    (whole, _), (folder, starts) = killed["unbroken"], killed["killed"]
    for start in starts[:-1]:
        expected = (signal.SIGKILL, None) if start["moment"].startswith("kill") else (None, 75)
        assert (start["signal"], start["status"]) == expected, (start["moment"], start["said"])
    assert starts[-1]["status"] == 0, starts[-1]["said"]
    for name in ("last", "previous", "best"):
        assert compared(folder, name)["state_dict"] == compared(whole, name)["state_dict"], name
    one, other = compared(folder, "last"), compared(whole, "last")
    for part in ("optimizer_states", "lr_schedulers", "resume", "average"):
        assert one[part] == other[part], part
    for file in ("metrics.json", "logs/csv/metrics.csv"):
        assert (folder / file).read_text() == (whole / file).read_text()
    (one,), (other,) = ((f / "evaluation").glob("*/predictions.jsonl") for f in (folder, whole))
    assert one.read_text() == other.read_text()


def test_one_checkpoint_is_whole_at_any_time(killed):
    _, starts = killed["killed"]
    for start in starts[:-1]:
        assert {"last.ckpt", "previous.ckpt"} & set(start["files"])
    by_moment = {start["moment"]: later["said"] for start, later in itertools.pairwise(starts)}
    assert "last.ckpt: missing. Resuming from" in by_moment["kill exchange last"]
    assert not [name for name in starts[-1]["files"] if name.startswith(".")]


# ---------------------------------------------------------------------------------------------- damaged


def cut(folder):
    (folder / "meta.pt").write_bytes((folder / "meta.pt").read_bytes()[:-10])


def flip(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def lose(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def add(folder):
    (folder / "more.safetensors").write_bytes(b"")


def forget(folder):
    (folder / "checksums.json").unlink()


@pytest.mark.parametrize("spoil", [cut, flip, lose, add, forget])
def test_a_damaged_folder_gives_way_to_the_previous_one(pairs, tmp_path, spoil):
    folder = shutil.copytree(pairs["two, lora"][0] / "checkpoints", tmp_path / "checkpoints")
    before = compared(tmp_path, "previous")
    spoil(folder / "last.ckpt")
    with pytest.raises(MsencError, match=r"last\.ckpt: cannot be read as a checkpoint"):
        read_checkpoint(folder / "last.ckpt")
    said = []
    path, found = CheckpointFiles().newest(folder, said.append)
    assert path == folder / "previous.ckpt"
    assert "cannot be read" in said[0]
    assert found["global_step"] == before["global_step"]
    assert (folder / "unreadable.ckpt").is_dir()


def test_shares_that_do_not_make_a_whole_are_refused(pairs, tmp_path):
    """Also where the checksums are right: uninitialised memory would be taken for weights."""
    folder = shutil.copytree(pairs["two, lora"][0] / "checkpoints" / "best.ckpt", tmp_path / "best.ckpt")
    lose(folder)
    known = {file.name: hash_file(file) for file in folder.iterdir() if file.name != "checksums.json"}
    (folder / "checksums.json").write_text(json.dumps(known))
    with pytest.raises(MsencError, match=r"best\.ckpt: cannot be read as a checkpoint"):
        read_checkpoint(folder)


def test_other_base_weights_are_refused(drive, llms, tmp_path):
    llm = shutil.copytree(llms["tied"], tmp_path / "llm")
    overrides = [*TWO, *LORA, f"model.llm.name_or_path={llm}"]
    begun = {"processes": [2], "overrides": overrides, "moments": ["kill batch 0 5"], "again": ["resume=nowhere"]}
    folder, _ = drive({"begun": begun})["begun"]
    before = compared(folder, "last")
    tensors = load_file(llm / "model.safetensors")
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1}, llm / "model.safetensors")
    _, (start,) = drive({"other": {"processes": [2], "folder": folder, "first": [f"resume={folder}"]}})["other"]
    assert start["status"] == 1
    assert "the checkpoint was trained on base weights with fingerprint" in start["said"]
    assert compared(folder, "last") == before


# ---------------------------------------------------------------------------------------------- memory


def test_no_process_ever_holds_much_more_than_its_share(drive, llms, compose):
    """What a large LLM adds to a process that trains the demo's, which has a few hundred kilobytes."""
    common = [*LORA, "model.llm.gradient_checkpointing=true", "data.batch_size=2", "data.max_history_tokens=40"]
    common += ["trainer.max_steps=2", "data.val=null", "callbacks.average=null"]
    large = [*common, f"model.llm.name_or_path={llms['large']}"]
    found = drive(
        {
            f"{number} {size}": {"processes": [number], "overrides": [*more, *overrides], "measures": True}
            for number, more in ((1, []), (2, TWO))
            for size, overrides in (("small", common), ("large", large))
        }
    )
    assert all(starts[-1]["status"] == 0 for _, starts in found.values()), found["2 large"][1][-1]["said"]
    peaks = {name: starts[-1]["peaks"] for name, (_, starts) in found.items()}

    def added(number, kind):
        pairs_of = zip(peaks[f"{number} large"][kind], peaks[f"{number} small"][kind], strict=True)
        return max(large - small for large, small in pairs_of)

    weights = sum(file.stat().st_size for file in llms["large"].glob("*.safetensors"))
    assert added(1, "VmRSS") > weights
    assert added(2, "VmRSS") < 0.65 * added(1, "VmRSS")
    config = plain(compose([*SHORT, *TWO, *large]))
    datamodule = build_datamodule(config, "")
    datamodule.setup()
    assert memory_of(config, datamodule)["peak"] == pytest.approx(added(2, "RssAnon"), rel=0.2)


# ---------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("setting", [{"stage": "align"}, {"trainer": {"strategy": {}, "precision": "16-mixed"}}])
def test_what_needs_a_whole_llm_or_one_scale_is_refused(setting):
    with pytest.raises(MsencError, match=r"(stage=align|precision=16-mixed): found trainer=fsdp2"):
        _check_choices({"stage": None, "trainer": {"strategy": {}}, **setting})


def test_weights_of_two_types_that_train_together_are_refused(llms):
    model = build_conversation(llms["tied"], lora=None, dtype="bfloat16")
    with pytest.raises(MsencError, match=r"trainable weights of torch\.bfloat16 and torch\.float32.*model\.llm\.lora"):
        shard(model, mesh=None)
