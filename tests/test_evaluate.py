import json
import os
import re
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import CONFIGS
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from msenc.files import digest
from msenc.pipelines import evaluate as evaluation
from msenc.pipelines.evaluate import _print_runs, evaluate, find_runs
from msenc.pipelines.report import report
from msenc.report.collect import collect_runs
from msenc.store.manifest import DatasetManifest, SplitCounts
from msenc.store.shards import read_index, write_stream
from msenc.types import Dialogue, MsencError, Utterance

SHORT = ["trainer.max_steps=1", "evaluate=null", "model/llm=tiny_lora", "model.llm.lora.r=2"]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture(scope="session")
def sweep(demo_home, tmp_path_factory):
    """Two finished runs (text; text and audio), a failed one and a killed one, as a sweep leaves them."""
    from msenc.pipelines.train import train

    folder = tmp_path_factory.mktemp("sweep")
    for job, modality in (("2", "text"), ("10", "text_audio")):
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            overrides = [*SHORT, f"modality={modality}", f"paths.output_dir={folder / job}"]
            GlobalHydra.instance().hydra.run("train", train, overrides, False)
    write(folder / "0" / "run.json", {"status": "failed", "error": "MsencError: too hot"})
    write(folder / "1" / "run.json", {"status": "running"})
    return folder


@pytest.fixture
def runs(sweep, tmp_path):
    """A copy of the sweep, without an evaluation."""
    return shutil.copytree(sweep, tmp_path / "sweep")


def measure(compose, run_dir, *overrides):
    given = [f"run_dir={run_dir}", "generate=false", "device=cpu", "split=val", *overrides]
    return evaluate(compose(given, "evaluate"))


def evaluated(folder):
    return sorted(
        p.parent.parent.parent.name for p in folder.rglob("metrics.json") if p.parents[1].name == "evaluation"
    )


# ------------------------------------------------------------------------------------------------ many runs


def test_a_sweep_is_evaluated_in_one_call(runs, compose, capsys):
    text, audio = measure(compose, runs)
    assert text["streams"] == {}
    assert set(audio["streams"]) == {"audio"}
    assert text["task_hash"] == audio["task_hash"] == read(runs / "2" / "run.json")["task_hash"]
    assert evaluated(runs) == ["10", "2"]
    shown = "".join(capsys.readouterr().out.split())
    assert "notfinished(failed)" in shown
    assert "notfinished(running)" in shown
    assert "2of2runsevaluatedonval" in shown


def test_a_missing_best_checkpoint_is_said_once(runs, compose, capsys):
    (runs / "2" / "checkpoints" / "best.ckpt").unlink(missing_ok=True)
    measure(compose, runs / "2")
    assert capsys.readouterr().out.count("using the last one") == 1


def test_runs_on_different_data_stand_in_one_table_with_their_data(runs, capsys, monkeypatch):
    monkeypatch.setattr("msenc.pipelines.evaluate.console._width", 300)  # the variable is read when it is made
    measured = {runs / "2": {"data": "demo", "nll": 0.3}, runs / "10": {"data": "meld", "nll": 12.5}}
    _print_runs(measured, "2 of 2 runs evaluated on val")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"2 of 2 runs evaluated on val, in {runs}"  # whole, however narrow the table
    rows = [line.split() for line in lines[1:] if line.strip(" ─")]
    assert rows == [["run", "data", "nll"], ["2", "demo", "0.3000"], ["10", "meld", "12.5000"]]
    _print_runs({run: {**found, "data": "demo"} for run, found in measured.items()}, "")
    assert "demo" not in capsys.readouterr().out


def test_runs_are_found_each_once_and_job_2_before_job_10(runs):
    folders, left_out = find_runs([str(runs / "10"), str(runs), str(runs / "2")])
    assert [f.name for f in folders] == ["10", "2"]
    assert [(f.name, status) for f, status in left_out] == [("0", "failed"), ("1", "running")]
    assert [f.name for f in find_runs([str(runs)])[0]] == ["2", "10"]


def test_a_run_that_never_had_a_model_is_refused(runs, compose):
    shutil.copytree(runs / "2" / ".hydra", runs / "0" / ".hydra")
    with pytest.raises(MsencError, match=r"the run ended \(failed\) before it had a model"):
        measure(compose, runs / "0")


def test_folders_without_a_finished_run_are_refused(runs, tmp_path):
    for job in ("2", "10"):
        shutil.rmtree(runs / job)
    with pytest.raises(MsencError, match=r"no finished run in it\. Found 2: 0 \(failed\), 1 \(running\)"):
        find_runs([str(runs)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(MsencError, match="is not a run's folder"):
        find_runs([str(tmp_path / "empty")])
    with pytest.raises(MsencError, match="does not exist"):
        find_runs([str(tmp_path / "nowhere")])


def test_a_run_that_fails_is_named_at_the_end_and_the_others_are_measured(runs, call_script, capsys):
    shutil.rmtree(runs / "2" / "checkpoints")
    with pytest.raises(SystemExit) as left:
        call_script("evaluate.py", f"run_dir=[{runs / '2'},{runs / '10'}]", "generate=false", "split=val", "device=cpu")
    assert left.value.code == 1
    assert evaluated(runs) == ["10"]
    shown = "".join(capsys.readouterr().out.split())
    assert "1of2runsevaluatedonval" in shown
    assert "nosuchcheckpoint.Found:none" in shown.partition("Failed:")[2]


def test_what_was_measured_before_stays(runs, compose):
    run = runs / "2"

    def files():
        return {p: p.stat().st_mtime_ns for p in (run / "evaluation").rglob("*") if p.is_file()}

    (first,) = measure(compose, run)
    before = files()
    assert len(before) == 2
    assert measure(compose, run) == [first]
    assert files() == before
    # Others settings are another evaluation.
    measure(compose, run, "limit=1")
    assert len(files()) == 4
    assert files().items() >= before.items()
    assert measure(compose, run, "overwrite=true") == [first]
    (predictions,) = [p for p in before if p.suffix == ".jsonl"]
    assert files()[predictions] > before[predictions]
    # What is incomplete, or older than the checkpoint, is measured again.
    predictions.unlink()
    assert measure(compose, run) == [first]
    written = files()[predictions]
    latest = max(files().values()) + 10**9
    for path in (run / "checkpoints").iterdir():
        os.utime(path, ns=(latest, latest))
    assert measure(compose, run) == [first]
    assert files()[predictions] > written


def test_another_tokenizer_is_another_evaluation(runs, compose, capsys):
    given = ["generate=true", "limit=1", "decoding.max_new_tokens=4"]
    (plain,) = measure(compose, runs / "2", *given)
    (cut,) = measure(compose, runs / "2", *given, "metric_settings.tokenizer=words")
    names = {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"}
    assert names <= plain.keys()
    assert {f"{name}-words" for name in names} <= cut.keys()
    assert not names & cut.keys()


def test_models_of_metrics_are_on_the_device_of_the_evaluation(runs, compose, monkeypatch):
    build, places = evaluation.build_text_metrics, []
    monkeypatch.setattr(evaluation, "find_device", lambda name: torch.device("cpu", 0))
    monkeypatch.setattr(evaluation, "build_text_metrics", lambda *given: places.append(given[-1]) or build(*given[:-1]))
    monkeypatch.setattr(evaluation, "speak_replies", lambda *given: 0)
    monkeypatch.setattr(
        evaluation, "listen_to_replies", lambda *given: places.append(given[-2]) or {"speech/spoken": 0}
    )
    measure(compose, runs / "2", "generate=true", "limit=1", "decoding.max_new_tokens=1", "speech=espeak")
    assert places == ["cpu:0", "cpu:0"]


def test_several_processes_take_no_single_device(runs, compose):
    with pytest.raises(MsencError, match=r"device=cuda:1: found one device for 2 processes.*trainer\.devices=\[1,"):
        measure(compose, runs / "2", "trainer=ddp", "trainer.accelerator=cpu", "device=cuda:1")


def test_the_jobs_of_a_sweep_are_found_wherever_their_runs_lie(runs, tmp_path):
    folder = tmp_path / "elsewhere"
    write(folder / "sweep.json", {"jobs": [["modality=text"], ["modality=text_audio"]]})
    write(folder / "jobs" / "0.json", {"run_dir": str(runs / "2"), "overrides": ["modality=text"]})
    write(folder / "jobs" / "1.json", {"run_dir": str(runs / "0"), "overrides": ["modality=text_audio"]})
    found, left_out = find_runs([str(folder)])
    assert [run.resolve() for run in found] == [runs / "2"]
    assert [(run.name, status) for run, status in left_out] == [("0", "failed")]


def test_what_is_printed_fits_80_columns_with_a_line_per_control_and_loses_nothing(runs, compose, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    options = ["generate=true", "decoding.max_new_tokens=3", "control=shuffle"]
    (metrics,) = measure(compose, runs / "10", *options)
    shown = capsys.readouterr().out
    words = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
    tables = [line for line in shown.splitlines() if not line.startswith(("Written:", "  "))]
    assert max(map(len, tables)) <= 80
    assert "…" not in shown
    for control in ("shuffle_text", "shuffle_audio"):
        assert shown.count(f"{control} on val") == 1  # one bar for all draws
        cost = r"[+-]\d\.\d{4} \[-?\d\.\d{4}, -?\d\.\d{4}\]"
        assert re.search(rf"{control} +{cost}  (used|not used|cannot tell) *\n", shown)
        assert re.search(rf"{control}( +-?\d+\.\d)+ *\n", shown)  # the planted bits
    named = {k for k, v in metrics.items() if isinstance(v, float) and v == v}
    for name in named:
        inner = name.removeprefix("nll/").removeprefix("description/")
        inner = re.sub("/(recovered|in_words|in_descriptions)$", "", inner)
        row = words.get(name) or words.get(inner) or words.get(inner.replace("planted/", "planted_"))
        is_of_voices = name.startswith("description/") and ("accuracy" in name or "macro_f1" in name)
        value = f"{100 * metrics[name]:z.1f}" if is_of_voices or "planted/" in name else f"{metrics[name]:z.4f}"
        if is_of_voices:
            row = words[inner.split("/")[0] if "/" in inner else "mean"]
        assert value in row, name
    measure(compose, runs)
    assert max(len(line) for line in capsys.readouterr().out.splitlines() if line.split()[:1] in (["2"], ["10"])) <= 80


# ------------------------------------------------------------------------------------------------ other data


@pytest.fixture
def other(demo_home, tmp_path):
    """Prepared data of another name, without descriptions, with the demo's features for two dialogues of val."""
    demo, folder = demo_home / "data" / "demo", tmp_path / "other"
    manifest = DatasetManifest.read(demo)
    (folder / "audio-logmel").mkdir(parents=True)
    shutil.copytree(demo / "audio-logmel", folder / "audio-logmel", dirs_exist_ok=True)
    ids = [s["id"] for s in read_index(demo / "turns")["samples"] if s["split"] == "val"]
    lengths = {s["id"]: s["lengths"] for s in read_index(demo / "audio-logmel")["samples"]}
    texts = ("Well, look at that.", "I would rather not.", "Why is that?")
    dialogues = [
        Dialogue(id, "val", tuple(Utterance(str(k), "Zoe", texts[k % 3]) for k in range(len(lengths[id]))))
        for id in ids
    ]
    index = write_stream(folder / "turns", [(d.id, "val", {"turns.json": d.to_json()}) for d in dialogues], {})
    audio = {"audio-logmel": manifest.streams["audio-logmel"]}
    DatasetManifest("other", {}, audio, turns_hash=index["hash"]).write(folder)
    return SimpleNamespace(folder=folder, ids=ids, hash=index["hash"])


def test_a_run_is_evaluated_on_other_data(runs, compose, other):
    run = runs / "10"
    (own,) = measure(compose, run)
    (metrics,) = measure(compose, run, f"on_data={other.folder}")
    assert (metrics["data"], own["data"]) == ("other", "demo")
    assert metrics["task_hash"] != own["task_hash"]
    assert f"on_data=other-{digest([metrics['task_hash'], metrics['streams']])}" in metrics["settings"]
    manifest = DatasetManifest.read(other.folder)
    info = manifest.streams["audio-logmel"]
    # Without a train split, the data are for evaluation alone, and what the index says is the next thing looked at.
    for splits, message in (
        (["train", "val"], "no utterance of the split train has audio"),
        (["val"], "its index names"),
    ):
        counts = {s: SplitCounts(dialogues=1, utterances=2, samples=1, hours=0.0) for s in splits}
        audio = {"audio-logmel": replace(info, utterances={"val": 5})}
        replace(manifest, splits=counts, streams=audio).write(other.folder)
        with pytest.raises(MsencError, match=message):
            measure(compose, run, f"on_data={other.folder}")
    manifest.write(other.folder)
    (folder,) = (run / "evaluation").glob("other-val-*")
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {p["dialogue"] for p in lines} == set(other.ids)
    assert {p["reference"]["description"] for p in lines} == {None}
    assert len(evaluated(runs)) == 2
    with pytest.raises(MsencError, match=r"the split 'test'; found val"):
        measure(compose, run, f"on_data={other.folder}", "split=test")


def test_other_data_need_the_runs_encoders(runs, compose, other):
    manifest = DatasetManifest.read(other.folder)
    info = manifest.streams["audio-logmel"]
    for streams, message in (
        ({}, r"found no audio features; the config needs audio-logmel \(80 wide\)"),
        ({"audio-wavlm": {**vars(info), "dim": 1024}}, r"audio-wavlm \(1024 wide\); the config needs audio-logmel"),
        ({"audio-logmel": {**vars(info), "dim": 40}}, r"audio-logmel are 40 wide, the config says .*dim=80"),
    ):
        value = read(other.folder / "dataset.json") | {"streams": streams}
        write(other.folder / "dataset.json", value)
        with pytest.raises(MsencError, match=message) as caught:
            measure(compose, runs / "10", f"on_data={other.folder}")
        assert "python prepare.py data=..." in str(caught.value)


def test_zero_shot_is_a_row_of_the_report_beside_trained_runs(runs, train, compose, tiny_models, tmp_path):
    short = ["evaluate=val", "decoding.max_new_tokens=3"]
    zero_shot = train([*short, "experiment=zero_shot", f"model.llm.name_or_path={tiny_models['llama']}"], "zero_shot")
    facts = read(zero_shot.folder / "run.json")
    assert facts["trainable_parameters"] == {"llm": 0}
    assert facts["task_hash"] == read(runs / "2" / "run.json")["task_hash"]
    assert not (zero_shot.folder / "checkpoints").exists()
    for job in ("0", "1"):
        shutil.rmtree(runs / job)
    evaluate(compose([f"run_dir={runs}", "device=cpu", "split=val", "decoding.max_new_tokens=3"], "evaluate"))
    report(compose([f"sweep_dir=[{runs},{zero_shot.folder}]", "split=val"], "report"))
    table = (runs / "report" / "table.csv").read_text(encoding="utf-8").splitlines()
    assert len(table) == 4  # header, text, text and audio, zero-shot
    assert sum("zero_shot" in row for row in table) == 1


# ------------------------------------------------------------------------------------------------ the test split

_opened: list[str] | None = None


def _note_open(event, args):
    if event == "open" and _opened is not None:
        _opened.append(str(args[0]))


def test_training_reads_no_test_shard_and_evaluation_no_other(train, compose, monkeypatch):
    sys.addaudithook(_note_open)

    def splits():
        return {name.rpartition("/")[2].split("-")[0] for name in _opened if name.endswith(".tar")}

    monkeypatch.setattr(sys.modules[__name__], "_opened", [])
    run = train([*SHORT, "modality=text_audio"])
    assert splits() == {"train", "val"}
    _opened.clear()
    measure(compose, run.folder, "split=test")
    assert splits() == {"test"}


# ------------------------------------------------------------------------------------------------ beside it


def test_conflicts_and_missing_streams_are_measured_beside_the_evaluation_and_kept(runs, compose, capsys):
    run = runs / "10"
    (first,) = measure(compose, run, "split=train", "conflict=true", "missing=audio")
    (folder,) = {path.parent for path in run.glob("evaluation/demo-train-*/conflict.json")}
    shown = "".join(capsys.readouterr().out.split())
    assert "whattherunfollows" in shown
    assert "lossbytheshareofturnsthathaveaudio" in shown
    items = [json.loads(line) for line in (folder / "conflict.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {item["stream"] for item in items} == {"audio", "video"}  # the same as those of a run that sees
    assert [s["items"] for s in first["conflict"]] == [
        sum(item["stream"] == s["stream"] for item in items) for s in first["conflict"]
    ]
    points = read(folder / "missing.json")["curves"]["audio"]
    assert [point["share"] for point in points] == [0, 0.25, 0.5, 0.75, 1]
    assert points[-1]["nll"] == pytest.approx(first["nll"], abs=1e-6)
    assert points[-1]["delta"] == 0
    for point in points:
        assert point["delta"] == pytest.approx(point["nll"] - first["nll"], abs=1e-5)
    assert points[0]["nll"] != points[-1]["nll"]
    assert len(collect_runs(run)[0].evaluations) == 1  # neither is an evaluation of its own
    written = [(folder / name).stat().st_mtime_ns for name in ("conflict.json", "missing.json")]
    assert measure(compose, run, "split=train", "conflict=true", "missing=audio") == [first]
    assert [(folder / name).stat().st_mtime_ns for name in ("conflict.json", "missing.json")] == written
    (other,) = measure(compose, run, "split=train", "conflict=Emotion")
    assert {s["label"] for s in other["conflict"]} == {"Emotion"}


def test_streams_and_labels_that_are_not_there_are_refused_before_anything_is_measured(runs, compose):
    with pytest.raises(MsencError, match=r"missing: found video, but this run reads no such stream\. .*: audio\."):
        measure(compose, runs / "10", "missing=video")
    with pytest.raises(MsencError, match=r"conflict: .*found no label Mood that varies\. Known: planted, Emotion"):
        measure(compose, runs / "10", "conflict=[Mood]")
    assert evaluated(runs) == []


def test_a_trace_is_written_beside_the_metrics_once_and_a_text_run_has_none(runs, compose, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    options = ["trace=true", "split=train"]
    measure(compose, runs, *options)
    shown = capsys.readouterr().out
    assert "reads text alone" in " ".join(shown.split())
    (path,) = runs.rglob("trace.json")
    assert (path.parent / "metrics.json").is_file()
    assert path.parents[2] == runs / "10"
    labels = read(path)["streams"]["audio"]["labels"]
    assert "gender" in labels
    for name, label in labels.items():
        assert re.search(rf"^ ?{re.escape(name)} +\d\.\d\d ", shown, re.MULTILINE)
        assert label["verdict"] in shown
    assert re.search(r"scored on unseen (speakers|dialogues): .*gender", shown)
    table = shown.partition("bits that probes find")[2].partition("  probes are")[0]
    assert 40 < max(map(len, table.splitlines())) <= 80
    before = path.stat().st_mtime_ns
    measure(compose, runs / "10", *options)
    assert path.stat().st_mtime_ns == before
    measure(compose, runs / "10", *options, "overwrite=true")
    assert path.stat().st_mtime_ns > before
    path.write_text("{}")
    with pytest.raises(MsencError, match=r"trace\.json"):
        measure(compose, runs / "10", *options)
