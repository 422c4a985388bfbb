import json
import math
import os
import shlex
import shutil
import signal
import sys
import weakref
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import torch
from conftest import SMALL_DEMO
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from msenc.config.schema import plain
from msenc.evaluation.metrics.text import DEFAULT_METRICS
from msenc.models.llm import load_tokenizer
from msenc.pipelines import prepare as pipelines_prepare
from msenc.pipelines import train as pipelines_train
from msenc.pipelines.evaluate import evaluate
from msenc.pipelines.prepare import ensure_llm, prepare, prepare_command
from msenc.pipelines.train import train
from msenc.prompt import TOKEN_KINDS
from msenc.store.manifest import DatasetManifest, count_splits
from msenc.store.shards import write_stream
from msenc.training import assembly
from msenc.types import Dialogue, MsencError, Utterance

CONFIGS = Path(__file__).parents[1] / "configs"
FAST = ["trainer.max_epochs=2", "decoding.max_new_tokens=3"]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def evaluations(folder):
    """Metrics and predictions of each evaluation in a run's folder, by its name."""
    found = {}
    for path in sorted((folder / "evaluation").iterdir()):
        lines = (path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        found[path.name] = read(path / "metrics.json"), [json.loads(line) for line in lines]
    return found


@pytest.fixture(scope="module")
def finished(demo_home, tmp_path_factory):
    """A finished run of text and audio, with an LLM of its own that tests may spoil in a copy."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(demo_home / "data" / "tiny-llm", folder / "llm")
    overrides = [*FAST, "modality=text_audio", "model/llm=tiny_lora", "optimizer.lr=0.02"]
    overrides += [f"model.llm.name_or_path={folder / 'llm'}"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        job = hydra.run("train", train, [*overrides, f"paths.output_dir={folder / 'run'}"], False)
    return SimpleNamespace(folder=folder, run=folder / "run", loss=job.return_value)


@pytest.fixture
def spoilt(finished, tmp_path):
    """A copy of the finished run, whose config names a copy of its LLM."""
    folder = shutil.copytree(finished.folder, tmp_path / "spoilt")
    path = folder / "run" / ".hydra" / "config.yaml"
    text = path.read_text(encoding="utf-8")
    assert str(finished.folder / "llm") in text
    path.write_text(text.replace(str(finished.folder / "llm"), str(folder / "llm")), encoding="utf-8")
    return folder


def measure(compose, run_dir, *overrides):
    given = [f"run_dir={run_dir}", "decoding.max_new_tokens=3", "device=cpu", *overrides]
    (metrics,) = evaluate(compose(given, "evaluate"))
    return metrics


# ------------------------------------------------------------------------------------------------ what a run leaves


def test_a_finished_run_explains_itself(finished):
    run = read(finished.run / "run.json")
    assert run["status"] == "finished"
    assert run["stop_reason"] == "all epochs done"
    assert (run["seed"], run["modality"], run["epochs"], run["steps"], run["device"]) == (1, "text_audio", 2, 8, "cpu")
    assert run["seconds"] > 0
    assert run["trainable_parameters"]["llm"] > 0
    assert run["trainable_parameters"]["connector.audio"] > 0
    assert set(run["trainable_parameters"]) == {"llm", "connector.audio"}
    assert len(run["task_hash"]) == 12
    assert set(run["streams"]) == {"audio"}
    assert len(run["streams"]["audio"]) == 64
    assert run["versions"]["torch"] == torch.__version__
    assert "modality=text_audio" in run["overrides"]
    assert run["history"]["targets"] == run["described_targets"] == 55
    assert len(set(run["speakers"])) == 2
    assert run["batches"]["batch_size"] == 4
    assert run["batches"]["steps"] == 2 * run["batches"]["batches_per_epoch"] == 8
    assert (finished.run / "checkpoints" / "best.ckpt").is_file()
    assert (finished.run / "logs" / "csv" / "metrics.csv").is_file()
    assert read(finished.run / "metrics.json")["val/loss"] == pytest.approx(run["metrics"]["val/loss"])


def test_checkpoints_hold_adapters_and_connectors_alone(finished):
    for name in ("best", "last"):
        saved = torch.load(finished.run / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert all("lora_" in key or key.startswith("model.connectors.audio.") for key in saved["state_dict"])
        assert saved["msenc"]["base_fingerprint"] == read(finished.run / "run.json")["base_fingerprint"]


def test_training_ends_with_the_test_split(finished):
    ((name, (metrics, predictions)),) = [
        e for e in evaluations(finished.run).items() if e[0].startswith("demo-test-") and e[1][0]["targets"] == 12
    ]
    assert metrics["split"] == "test"
    assert metrics["task_hash"] == read(finished.run / "run.json")["task_hash"]
    assert {"bleu_1", "bleu_4", "rouge_l", "description/exact", "perplexity", "token_accuracy"} <= set(metrics)
    assert len(predictions) == 12
    assert all(set(p["reply"]) == {"text", "description"} for p in predictions)
    for rule in ("", "_majority", "_previous", "_speaker"):
        assert 0 <= metrics[f"description/gender/accuracy{rule}"] <= 1
    assert metrics["description/gender/accuracy_speaker"] == 1  # a speaker keeps the voice, so any model may know it
    scores = [p["scores"]["description/accuracy"] for p in predictions]
    assert metrics["description/accuracy"] == pytest.approx(sum(scores) / len(scores))
    assert all(set(p["attributes"]) == {"gender", "range"} for p in predictions)
    assert name.split("-")[2]


def test_predictions_add_up_to_the_metrics(finished, compose, demo_home):
    run = finished.run
    before = set(evaluations(run))
    returned = measure(compose, run, "split=val", "limit=2")
    (name,) = set(evaluations(run)) - before
    assert name.startswith("demo-val-")
    metrics, predictions = evaluations(run)[name]
    assert metrics == returned

    assert len({p["dialogue"] for p in predictions}) == 2
    assert metrics["targets"] == len(predictions)
    tokenizer = load_tokenizer(str(finished.folder / "llm"))
    by_kind, bits = defaultdict(list), defaultdict(float)
    for p in predictions:
        assert len(p["nll"]) == len(p["kinds"]) == len(p["correct"])
        assert p["kinds"].count("end") == 1
        assert p["kinds"][-1] == "end"
        target = f" {p['reference']['text']} ({p['reference']['description']})"
        assert len(p["nll"]) == len(tokenizer(target, add_special_tokens=False).input_ids) + 1
        assert p["history"][0] == 0
        assert p["history"][1] == p["turn"]
        for kind, nll in zip(p["kinds"], p["nll"], strict=True):
            by_kind[kind].append(nll)
        for kind, n in p["bits"].items():
            bits[kind] += n
    everything = [nll for values in by_kind.values() for nll in values]
    assert metrics["tokens"] == len(everything)
    assert metrics["nll"] == pytest.approx(sum(everything) / len(everything))
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["nll"]))
    assert metrics["token_accuracy"] == pytest.approx(sum(sum(p["correct"]) for p in predictions) / len(everything))
    for kind in TOKEN_KINDS:
        if kind in by_kind:
            assert metrics[f"nll/{kind}"] == pytest.approx(sum(by_kind[kind]) / len(by_kind[kind]))
    planted = {kind for kind in by_kind if kind.startswith("planted_")}
    assert planted == {k for k, n in bits.items() if n}
    assert len(planted) > 1
    for kind in planted:
        recovered = 1 - sum(by_kind[kind]) / math.log(2) / bits[kind]
        assert metrics[f"planted/{kind.removeprefix('planted_')}/recovered"] == pytest.approx(recovered)


def test_evaluating_again_gives_the_same(finished, compose):
    first = measure(compose, finished.run, "split=val")
    assert measure(compose, finished.run, "split=val", "overwrite=true") == first
    # what validation said while training is what evaluation says of the best checkpoint
    assert first["nll"] == pytest.approx(finished.loss, rel=1e-4)
    last = measure(compose, finished.run, "split=val", "checkpoint=last")
    assert last["nll"] >= first["nll"] - 1e-6
    alone = measure(compose, finished.run, "split=val", "generate=false")
    assert alone["nll"] == first["nll"]
    assert "bleu_1" not in alone


def test_metrics_of_replies_are_chosen_by_name(finished, compose):
    before = set(evaluations(finished.run))
    measure(compose, finished.run, "split=test", "limit=2", "metrics=[cider,meteor_no_wordnet]")
    (name,) = set(evaluations(finished.run)) - before
    metrics, predictions = evaluations(finished.run)[name]
    assert "bleu_1" not in metrics
    for key in ("cider", "description/cider", "meteor_no_wordnet", "description/meteor_no_wordnet"):
        scores = [p["scores"][key] for p in predictions]
        assert metrics[key] == pytest.approx(sum(scores) / len(scores))
    assert "metrics={'cider': None" in metrics["settings"]
    with pytest.raises(MsencError, match="metrics: found 'blue', expected names among bleu, "):
        measure(compose, finished.run, "metrics=[blue]")
    assert tuple(compose(["run_dir=RUN"], "evaluate").metrics) == DEFAULT_METRICS


def test_every_reply_lands_at_its_own_target(finished, compose):
    def replies(*overrides):
        before = set(evaluations(finished.run))
        measure(compose, finished.run, "split=test", "decoding.max_new_tokens=12", *overrides)
        (name,) = set(evaluations(finished.run)) - before
        return {(p["dialogue"], p["turn"]): p["reply"]["text"] for p in evaluations(finished.run)[name][1]}

    everything = replies()
    first = replies("limit=1")  # which puts them in another order, to decode like lengths together
    assert len(set(first.values())) > 1
    assert first == {target: everything[target] for target in first}
    assert replies("decoding.batch_size=2") == everything


def test_a_repeated_run_gives_the_same(finished, train):
    same = [*FAST, "modality=text_audio", "model/llm=tiny_lora", "optimizer.lr=0.02", "evaluate=null"]
    again = train(same, "again")
    assert again.loss == finished.loss
    other = train([*same, "seed=2"], "other")
    assert other.loss != finished.loss
    assert not (other.folder / "evaluation").exists()


# ------------------------------------------------------------------------------------------------ controls


def test_controls_cost_what_their_predictions_say_and_the_plain_evaluation_is_kept(spoilt, compose):
    run = spoilt / "run"
    shutil.rmtree(run / "evaluation")
    plain = measure(compose, run, "split=val")
    (before,) = (run / "evaluation").glob("demo-val-*")
    written = (before / "metrics.json").stat().st_mtime_ns
    assert measure(compose, run, "split=val", "control=shuffle", "control_draws=2") == plain
    assert (before / "metrics.json").stat().st_mtime_ns == written  # not measured twice
    found = {m.get("control"): (m, p) for m, p in evaluations(run).values() if m["split"] == "val"}
    assert set(found) == {None, "shuffle_text", "shuffle_audio"}
    for control in ("shuffle_text", "shuffle_audio"):
        metrics, predictions = found[control]
        pairs = list(zip(predictions, found[None][1], strict=True))
        assert all((c["dialogue"], c["turn"], c["kinds"]) == (p["dialogue"], p["turn"], p["kinds"]) for c, p in pairs)
        rise = sum(sum(c["nll"]) - sum(p["nll"]) for c, p in pairs) / plain["tokens"]
        assert metrics["control/delta"] == pytest.approx(rise, abs=1e-6)
        assert metrics["control/low"] < metrics["control/delta"] < metrics["control/high"]
        assert metrics["nll"] == pytest.approx(plain["nll"] + rise, abs=1e-6)
        assert metrics["control/verdict"] in ("used", "not used", "cannot tell")
        assert "control=shuffle" in metrics["settings"]
        assert any(c["nll"] != p["nll"] for c, p in pairs)


def test_a_control_measures_the_plain_losses_first_where_there_are_none(spoilt, compose):
    run = spoilt / "run"
    shutil.rmtree(run / "evaluation")
    measure(compose, run, "split=val", "limit=2", "control=zero_audio", "generate=false")
    found = {m.get("control"): m for m, _ in evaluations(run).values()}
    assert found.keys() == {None, "zero_audio"}
    assert found[None]["targets"] == found["zero_audio"]["targets"]


def test_a_run_ends_with_the_controls_it_asks_for(train):
    run = train([*FAST, "modality=text", "model.llm.freeze=true", "control=shuffle"])
    assert {m.get("control") for m, _ in evaluations(run.folder).values()} == {None, "shuffle_text"}


def test_noise_in_place_of_a_stream_is_another_stream_of_the_same_task(train, finished):
    run = train([*FAST, "modality=text_audio", "data.control=noise_audio", "optimizer.lr=0.02", "evaluate=null"])
    facts, plain = (read(folder / "run.json") for folder in (run.folder, finished.run))
    assert facts["task_hash"] == plain["task_hash"]
    assert facts["streams"]["audio"] != plain["streams"]["audio"]
    assert facts["identity"] != plain["identity"]
    assert run.loss != finished.loss


def test_dropped_turns_are_recorded_and_part_of_the_identity(train, finished):
    same = [*FAST, "modality=text_audio", "model/llm=tiny_lora", "optimizer.lr=0.02", "evaluate=null"]
    run = train([*same, "data.drop.audio=0.5"])
    facts, plain = (read(folder / "run.json") for folder in (run.folder, finished.run))
    assert (facts["drop"], plain["drop"]) == ({"audio": 0.5}, None)
    assert facts["task_hash"] == plain["task_hash"]
    assert facts["streams"] == plain["streams"]
    assert facts["identity"] != plain["identity"]
    assert run.loss != finished.loss
    with pytest.raises(MsencError, match=r"data\.drop.*: found 1\.5, expected from 0 to below 1"):
        train([*same, "data.drop={audio: 1.5}"], "other")
    with pytest.raises(MsencError, match=r"data\.drop: found video, but this run reads no such stream"):
        train([*same, "data.drop.video=0.5"], "another")


def test_controls_that_the_run_cannot_have_are_refused(finished, compose, train):
    before = evaluations(finished.run).keys()
    with pytest.raises(
        MsencError, match=r"control=zero_video: this run has no such control\. Expected one of: .*zero_audio"
    ):
        measure(compose, finished.run, "control=zero_video")
    with pytest.raises(MsencError, match=r"control_draws: found 0, expected .*1 or more"):
        measure(compose, finished.run, "control=shuffle", "control_draws=0")
    assert evaluations(finished.run).keys() == before
    with pytest.raises(MsencError, match="control=zero_audio: this run has no such control"):
        train([*FAST, "modality=text", "control=[zero_audio]"])


# ------------------------------------------------------------------------------------------------ what trains


def test_a_frozen_llm_trains_its_connector_alone(train):
    run = train([*FAST, "modality=text_audio", "model.llm.freeze=true"])
    facts = read(run.folder / "run.json")
    assert facts["trainable_parameters"]["llm"] == 0
    assert facts["trainable_parameters"]["connector.audio"] > 0
    saved = torch.load(run.folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert all(key.startswith("model.connectors.audio.") for key in saved["state_dict"])


def test_where_nothing_trains_the_llm_is_evaluated_as_it_is(train, compose):
    run = train([*FAST, "modality=text", "model.llm.freeze=true"])
    facts = read(run.folder / "run.json")
    assert facts["status"] == "finished"
    assert facts["trainable_parameters"] == {"llm": 0}
    assert "nothing to train" in facts["stop_reason"]
    ((_, (metrics, _)),) = evaluations(run.folder).items()
    assert measure(compose, run.folder, "generate=false")["nll"] == metrics["nll"]


def test_tied_connectors_train_and_are_found_again(train, compose):
    run = train(
        [
            *FAST,
            "modality=text_audio_video",
            "model/connector=qformer",
            "model.tie_connectors=true",
            "model.llm.freeze=true",
        ]
    )
    counts = read(run.folder / "run.json")["trainable_parameters"]
    assert counts["connector.video"] < counts["connector.audio"]
    ((_, (metrics, _)),) = evaluations(run.folder).items()
    assert measure(compose, run.folder, "generate=false")["nll"] == metrics["nll"]


def test_a_run_that_ends_before_its_first_validation_is_evaluated_as_trained(train, compose):
    options = [
        "modality=text",
        "data.batch_size=4",
        "trainer.max_steps=2",
        "optimizer.lr=0.05",
        "scheduler=epoch_decay",
    ]
    run = train([*FAST, *options])
    facts = read(run.folder / "run.json")
    assert (facts["steps"], facts["stop_reason"]) == (2, "trainer.max_steps reached")
    assert [p.name for p in (run.folder / "checkpoints").iterdir()] == ["last.ckpt"]
    ((_, (metrics, _)),) = evaluations(run.folder).items()
    assert measure(compose, run.folder, "checkpoint=last", "generate=false")["nll"] == metrics["nll"]
    untrained = train([*FAST, "modality=text", "model.llm.freeze=true"], "untrained")
    ((_, (before, _)),) = evaluations(untrained.folder).items()
    assert abs(metrics["nll"] - before["nll"]) > 1e-3


def test_what_was_trained_is_gone_before_it_is_evaluated(train, monkeypatch):
    alive, held = [], []
    fit = pipelines_train._fit

    def noting(config, model, *rest):
        held.extend([weakref.ref(model), weakref.ref(model.llm.get_input_embeddings().weight)])
        return fit(config, model, *rest)

    monkeypatch.setattr(pipelines_train, "_fit", noting)
    monkeypatch.setattr(
        pipelines_train, "evaluate_run", lambda *a, **k: alive.extend(ref() is not None for ref in held)
    )
    train([*FAST, "modality=text_audio"])
    assert alive == [False, False]


def test_a_run_that_goes_on_is_not_calibrated_anew(train, monkeypatch):
    calibrated, calibrate = [], assembly.calibrate
    monkeypatch.setattr(assembly, "calibrate", lambda *a: calibrated.append(a) or calibrate(*a))
    monkeypatch.setattr(pipelines_train, "evaluate_run", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train([*FAST, "modality=text_audio_video"])
    assert len(calibrated) == 2
    monkeypatch.undo()
    calibrated.clear()
    monkeypatch.setattr(assembly, "calibrate", lambda *a: calibrated.append(a))
    run = train([*FAST, "modality=text_audio_video", "resume=auto"])
    assert read(run.folder / "run.json")["status"] == "finished"
    assert calibrated == []


_opened: list[str] | None = None


def _note_open(event, args):
    if event == "open" and _opened is not None:
        _opened.append(str(args[0]))


def test_a_text_run_opens_no_audio_and_no_video(train, demo_home, monkeypatch):
    sys.addaudithook(_note_open)
    monkeypatch.setattr(sys.modules[__name__], "_opened", found := [])
    train([*FAST, "modality=text"])
    data = demo_home / "data" / "demo"
    read_from = {Path(name).relative_to(data).parts[0] for name in found if name.startswith(f"{data}/")}
    assert read_from - {"lengths"} == {"dataset.json", "turns"}


# ------------------------------------------------------------------------------------------------ refusals: runs


def test_evaluating_what_is_no_run_is_refused(finished, compose, tmp_path):
    with pytest.raises(MsencError, match=r"is not a run's folder \(no run\.json\)"):
        measure(compose, finished.folder / "llm")
    with pytest.raises(MsencError, match="does not exist"):
        measure(compose, tmp_path / "nowhere")
    with pytest.raises(MsencError, match="split: found 'dev', expected one of train, val, test"):
        measure(compose, finished.run, "split=dev")


def test_unfit_checkpoints_are_refused(spoilt, compose):
    run = spoilt / "run"
    whole = (run / "checkpoints" / "last.ckpt").read_bytes()
    with pytest.raises(MsencError, match=r"other\.ckpt: no such checkpoint\. Found: best\.ckpt, last\.ckpt"):
        measure(compose, run, f"checkpoint={run / 'checkpoints' / 'other.ckpt'}")
    measure(compose, run, f"checkpoint={run / 'checkpoints' / 'last.ckpt'}", "limit=1", "generate=false")
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(MsencError, match=r"\.ckpt: no such checkpoint\. Found: none\."):
        measure(compose, run)
    (run / "checkpoints" / "best.ckpt").write_bytes(b"no checkpoint at all")
    with pytest.raises(MsencError, match=r"best\.ckpt: cannot be read as a checkpoint"):
        measure(compose, run)
    (run / "checkpoints" / "best.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MsencError, match=r"best\.ckpt: cannot be read as a checkpoint"):
        measure(compose, run)
    for content in ([1, 2], {"weights": torch.zeros(2)}, {"state_dict": None}):
        torch.save(content, run / "checkpoints" / "best.ckpt")
        with pytest.raises(MsencError, match=r"best\.ckpt: not a checkpoint of train\.py"):
            measure(compose, run)


def test_a_checkpoint_of_other_base_weights_is_refused(spoilt, compose):
    from safetensors.torch import load_file, save_file

    path = spoilt / "llm" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 0.01
    save_file(tensors, path, metadata={"format": "pt"})
    expected = read(spoilt / "run" / "run.json")["base_fingerprint"]
    with pytest.raises(MsencError, match=rf"trained on base weights with fingerprint {expected}, the LLM loaded here"):
        measure(compose, spoilt / "run", "overwrite=true")


def test_a_checkpoint_of_another_connector_is_refused(spoilt, compose):
    path = spoilt / "run" / ".hydra" / "config.yaml"
    text = path.read_text(encoding="utf-8")
    assert "hidden_dim: 128" in text
    path.write_text(text.replace("hidden_dim: 128", "hidden_dim: 64"), encoding="utf-8")
    with pytest.raises(MsencError, match=r"the checkpoint does not fit the model: .*of another shape"):
        measure(compose, spoilt / "run", "overwrite=true")


# ---------------------------------------------------------------------------------------------- refusals: data, models


@pytest.mark.parametrize("split", ["val", "test"])
def test_what_does_not_fit_the_budget_is_refused_before_training(train, tmp_path, split):
    def dialogue(name):
        text = "Well, " * (200 if name == split else 1)
        return Dialogue(f"x/{name}/dia0", name, tuple(Utterance(str(i), "Ana", text, "a man") for i in range(3)))

    dialogues = [dialogue(name) for name in ("train", "val", "test")]
    samples = [(d.id, d.split, {"turns.json": d.to_json()}) for d in dialogues]
    index = write_stream(tmp_path / "data" / "turns", samples, {})
    DatasetManifest("x", count_splits(dialogues), {}, turns_hash=index["hash"]).write(tmp_path / "data")
    overrides = ["modality=text", f"data.dir={tmp_path / 'data'}", "data.batch_size=null"]
    with pytest.raises(MsencError, match=rf"=300: 2 targets .* the longest is turn 2 of x/{split}/dia0 with"):
        train([*FAST, *overrides, "data.max_tokens_per_batch=300"])
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_missing_data_is_refused_with_the_command_that_makes_it(train, compose, tmp_path):
    overrides = ["data=meld", f"data.dir={tmp_path / 'none'}", "modality=text_audio", "model/audio=whisper"]
    with pytest.raises(MsencError, match=r"dataset\.json: missing") as caught:
        train([*FAST, *overrides, "optimizer.lr=0.1", "seed=3"])
    command = str(caught.value).rpartition("Run: ")[2]
    assert shlex.split(command) == ["python", "prepare.py", *overrides, "data.root=FOLDER"]
    cfg = compose(shlex.split(command)[2:], "prepare")
    assert (cfg.data.name, cfg.model.streams.audio.name) == ("meld", "whisper_base")
    assert not (tmp_path / "run").exists()  # it is not known which run it would be


def test_a_run_that_fails_says_so_in_its_record(train, monkeypatch, tmp_path):
    def run_out(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pipelines_train, "_fit", run_out)
    with pytest.raises(RuntimeError, match="out of memory"):
        train([*FAST, "modality=text"])
    facts = read(tmp_path / "run" / "run.json")
    assert (facts["status"], facts["error"]) == ("failed", "RuntimeError: out of memory")
    assert (tmp_path / "run" / ".hydra" / "config.yaml").is_file()


def test_the_command_survives_a_shell(train, tmp_path):
    overrides = ["data=meld", f"data.dir={tmp_path / 'with space'}", "+data.generate={sizes:{train:1,val:1}}"]
    choices = {"data": "meld", "streams": "demo", "modality": "text"}
    command = prepare_command(overrides, choices)
    assert shlex.split(command) == ["python", "prepare.py", *overrides, "modality=text", "data.root=FOLDER"]
    assert "'+data.generate={sizes:{train:1,val:1}}'" in command


@pytest.mark.parametrize(
    ("overrides", "command"),
    [
        (["world=graded", "seed=2"], ["world=graded"]),
        (["experiment=known_answer", "data.generate.seed=2"], ["world=beats", "data.generate.seed=2"]),
        (["world=beats", "data=meld"], ["world=beats", "data=meld"]),
    ],
)
def test_the_command_makes_a_world(overrides, command, home):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = hydra_compose("train", overrides, return_hydra_config=True)
    root = ["data.root=FOLDER"] if "data=meld" in overrides else []
    found = shlex.split(prepare_command(overrides, cfg.hydra.runtime.choices))
    assert found == ["python", "prepare.py", *command, "modality=text_audio_video", *root]


def test_a_world_that_is_not_prepared_is_prepared(train, compose, tmp_path, capsys):
    small = [*SMALL_DEMO, "prepare_workers=0", f"paths.data_dir={tmp_path / 'data'}"]
    run = train([*FAST, *small, "world=beats", "modality=text_audio", "trainer.max_steps=1", "evaluate=null"])
    assert "data beats is not prepared yet" in " ".join(capsys.readouterr().out.split())
    assert {p.name for p in (tmp_path / "data").iterdir() if p.is_dir()} == {
        "beats-1-1",
        "beats-1-1-raw",
        "tiny-llm-beats",
    }
    assert read(run.folder / "run.json")["data"] == "beats"


def test_a_run_reads_its_data_from_a_url(train, compose, demo_home, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(str(demo_home / "data" / "demo"), "/far/demo", recursive=True)
    url = ["data.dir=memory://far/demo", f"paths.cache_dir={tmp_path / 'cache'}"]
    try:
        here, there = (train([*FAST, "modality=text_audio", *where], name) for where, name in (([], "a"), (url, "b")))
        assert there.loss == here.loss
        nll = measure(compose, there.folder, "generate=false")["nll"]
    finally:
        memory.rm("/far", recursive=True)
    assert nll == measure(compose, here.folder, "generate=false")["nll"]
    shards = {p.parent.name for p in (tmp_path / "cache").rglob("*.tar")}
    assert shards == {"turns", "audio-logmel"}


def test_a_url_without_data_is_refused_and_nothing_is_prepared(train, tmp_path):
    url = [f"data.dir=file://{tmp_path}/none", f"paths.cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(
        MsencError, match=r"none/dataset\.json: missing\..*data\.dir=FOLDER.*copy the folder to file://"
    ):
        train([*FAST, "modality=text", *url])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("key", ["data.dir", "data.root", "model.llm_recipe.folder"])
def test_nothing_is_prepared_to_a_url(demo_home, compose, tmp_path, monkeypatch, key):
    monkeypatch.chdir(tmp_path)
    to_url = [f"{key}=s3://bucket/x", "model.llm.name_or_path=s3://bucket/x"]
    cfg = compose([*SMALL_DEMO, *to_url, "prepare_workers=0"], "prepare")
    with pytest.raises(MsencError, match=rf"{key}=s3://bucket/x: a URL, expected a local folder"):
        prepare(cfg)
    assert not (tmp_path / "s3:").exists()


def test_the_command_has_what_an_experiment_chose(train, compose, demo_home):
    overrides = ["modality=text_audio", f"model.llm.name_or_path={demo_home / 'data' / 'tiny-llm'}"]
    with pytest.raises(MsencError, match=r"dataset\.json: missing") as caught:
        train(["experiment=paper_meld", *overrides, "trainer=cpu"])
    command = str(caught.value).rpartition("Run: ")[2]
    cfg = compose(shlex.split(command)[2:], "prepare")
    assert (cfg.data.name, cfg.model.streams.audio.name, cfg.data.root) == ("meld", "wavlm_large", "FOLDER")
    assert set(cfg.model.streams) == {"audio"}


def test_a_model_that_cannot_be_loaded_is_refused(train):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(MsencError, match=r"cannot load 'nobody/no-such-model'[\s\S]*as a hub id"):
        train([*FAST, "modality=text", "model/llm=smollm2", "model.llm.name_or_path=nobody/no-such-model"])


# ------------------------------------------------------------------------------------------------ real weights


@pytest.mark.real
def test_the_demonstration_with_a_real_llm_trains(train):
    llm = Path(os.environ.get("MSENC_MODELS", "nowhere")) / "smollm2-135m-instruct"
    if not llm.is_dir():
        pytest.skip("MSENC_MODELS names no folder with smollm2-135m-instruct")
    overrides = ["experiment=demo_smollm2", f"model.llm.name_or_path={llm}", "trainer.max_steps=2", "evaluate=null"]
    overrides += [o for o in SMALL_DEMO if o.startswith("data.")]  # its voices are measured, if none have been yet
    run = train([*overrides, "data.batch_size=1", "+trainer.num_sanity_val_steps=0", "+trainer.limit_val_batches=1"])
    facts = read(run.folder / "run.json")
    assert facts["steps"] == 2
    assert facts["trainable_parameters"]["llm"] == 4_884_480  # adapters of rank 16 on all linear layers
    assert facts["metrics"]["train/loss"] < 5


@pytest.mark.real
def test_real_weights_train_and_reply(train, demo_home, tmp_path):
    models = Path(os.environ.get("MSENC_MODELS", "nowhere"))
    llm, whisper = models / "smollm2-135m-instruct", models / "whisper-base"
    if not llm.is_dir() or not whisper.is_dir():
        pytest.skip("MSENC_MODELS names no folder with smollm2-135m-instruct and whisper-base")
    run = train(
        [
            "modality=text_audio",
            "model/llm=smollm2",
            f"model.llm.name_or_path={llm}",
            "model/audio=whisper",
            f"model.streams.audio.encoder.name_or_path={whisper}",
            "prompt=chat",
            f"data.dir={tmp_path / 'demo'}",
            f"data.root={tmp_path / 'raw'}",
            "data.generate.sizes={train:8,val:1,test:1}",
            "data.batch_size=1",
            "prepare_workers=0",
            "trainer.max_steps=5",
            "trainer.log_every_n_steps=1",
            "decoding.max_new_tokens=8",
            "+trainer.num_sanity_val_steps=0",
        ]
    )
    facts = read(run.folder / "run.json")
    assert facts["steps"] == 5
    assert facts["trainable_parameters"]["llm"] == 2_442_240  # adapters of rank 8 on all linear layers
    ((_, (_, predictions)),) = evaluations(run.folder).items()
    assert predictions
    assert all(p["reply"]["text"] for p in predictions)
    assert all(math.isfinite(nll) for p in predictions for nll in p["nll"])


def test_replies_are_spoken(finished, compose):
    metrics = measure(
        compose, finished.run, "speech=espeak", "speech_workers=0", "limit=4", "decoding.max_new_tokens=12"
    )
    folder = next(f for f in (finished.run / "evaluation").iterdir() if (f / "speech").is_dir())
    rows = evaluations(finished.run)[folder.name][1]
    files = {row["speech"] for row in rows if row["speech"]}
    assert metrics["speech/spoken"] == sum(row["speech"] is not None for row in rows) > 0
    assert files == {f"speech/{path.name}" for path in (folder / "speech").iterdir()}
    with pytest.raises(MsencError, match="generate=false, so there are no replies"):
        measure(compose, finished.run, "speech=espeak", "generate=false")
    before = len(list((finished.run / "evaluation").iterdir()))
    with pytest.raises(MsencError, match="expected an address"):  # before anything is scored
        measure(compose, finished.run, "speech=openai", "speech.base_url=nowhere", "limit=2")
    assert len(list((finished.run / "evaluation").iterdir())) == before


def test_a_part_that_is_null_is_none(train):
    overrides = ["callbacks.progress=null", "callbacks.checkpoints=null", "logger.tensorboard=null"]
    run = train(["modality=text", "trainer.max_steps=1", "evaluate=null", *overrides])
    assert not (run.folder / "checkpoints").exists()
    assert not (run.folder / "logs" / "tensorboard").exists()
    assert (run.folder / "logs" / "csv").is_dir()


SMALLEST_DEMO = ["data.generate.sizes={train:1,val:1,test:1}", *SMALL_DEMO[1:], "modality=text", "prepare_workers=2"]


def test_the_llm_is_pretrained_while_the_demo_is_made(demo_home, compose, tmp_path, monkeypatch, capsys):
    def build_and_note(node, place, **given):
        made.append((node["_target_"].rpartition(".")[2], given.get("num_workers"), torch.get_num_threads()))
        return build(node, place, **given)

    made, build, threads = [], pipelines_prepare.build, torch.get_num_threads()
    monkeypatch.setattr(pipelines_prepare, "build", build_and_note)
    data = tmp_path / "data"
    torch.set_num_threads(2)
    try:
        ensure_llm(plain(compose([*SMALLEST_DEMO, f"paths.data_dir={data}"])))
    finally:
        torch.set_num_threads(threads)
    assert (data / "demo" / "dataset.json").is_file()
    # One of two processes draws the clips; the other one made the LLM, which this one finds.
    assert made == [("write_demo", 1, 2), ("pretrain", None, 1)]
    assert "tiny LLM, unrevealed words" in capsys.readouterr().out
    for file in (demo_home / "data" / "tiny-llm").iterdir():  # made alone, without another process
        assert (data / "tiny-llm" / file.name).read_bytes() == file.read_bytes(), file.name


def killed_while_it_learns(recipe):
    def step(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    torch.optim.AdamW.step = step
    pipelines_prepare._pretrain(recipe)


def test_a_pretraining_that_dies_leaves_no_llm_and_the_demo(compose, tmp_path, monkeypatch):
    data = tmp_path / "data"
    config = compose([*SMALLEST_DEMO, f"paths.data_dir={data}"], "prepare")
    with monkeypatch.context() as patch:
        patch.setattr(pipelines_prepare, "_pretrain", killed_while_it_learns)
        with pytest.raises(MsencError, match=r"tiny LLM: its process died \(exit status -9\)"):
            prepare(config)
    assert not list(data.glob("tiny-llm*"))
    assert (data / "demo" / "dataset.json").is_file()
    config.prepare_workers = 0
    prepare(config)
    assert (data / "tiny-llm" / "recipe.json").is_file()


def test_an_llm_that_is_there_takes_no_lock(demo_home, compose, monkeypatch):
    """Read-only data have no place for one."""

    def locked(*_, **__):
        raise PermissionError

    monkeypatch.setattr("msenc.pipelines.prepare.folder_lock", locked)
    config = plain(compose(["modality=text"]))
    ensure_llm(config)
    config["model"]["llm"]["name_or_path"] = config["model"]["llm_recipe"]["folder"] = str(demo_home / "no-llm")
    with pytest.raises(PermissionError):
        ensure_llm(config)
