"""Files of a stranger, each spoiled in one way: refused in a line or two that names the place, or read all the same."""

import codecs
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stranger import DATA, EVALUATION, RUN, change_json, original, place, refusal  # noqa: F401 (fixtures)

from msenc.evaluation.losses import read_metrics, read_predictions
from msenc.files import _DECODER, parse_json, read_json
from msenc.files.kinds import check, fits_json
from msenc.prepare.describe import BINS, read_bins
from msenc.raw.hashes import hash_clips
from msenc.report.collect import collect_runs
from msenc.report.items import read_items
from msenc.report.plots import read_curve
from msenc.runs.overrides import resumed_arguments
from msenc.runs.record import RunRecord, read_run
from msenc.runs.sweep import read_sweep
from msenc.store.flags import AUDIT, Flag, flags_csv, left_out
from msenc.store.labels import LABELS, VOICE_TURNS, read_labels
from msenc.store.manifest import DatasetManifest, read_rejections
from msenc.store.shards import ShardReader, write_stream
from msenc.talk.agent import read_talk
from msenc.talk.page import read_saved
from msenc.training.align import read_alignment
from msenc.training.assembly import build_datamodule
from msenc.training.checkpoints import read_checkpoint
from msenc.training.export import load_export
from msenc.training.restore import open_run
from msenc.types import Dialogue, Mark, MsencError, Utterance, VoiceAttributes

NUM_FUZZ, ALWAYS = 60, 2
"""Spoiled files of each format; those after the first `ALWAYS` have the marker `fuzz`."""
SWEEP, TALK, ALIGNED = Path("sweep"), Path("talk.json"), Path("alignments/audio-1")


@dataclass(frozen=True)
class Format:
    """A file of ours.

    Args:
        path: where it lies.
        read: what reads it.
        is_cache: what cannot be read is as good as absent.
    """

    path: Path
    read: Callable[[], Any]
    is_cache: bool = False


def datamodule() -> Any:
    module = build_datamodule(open_run(RUN, None)[1], "python prepare.py")
    module.setup()
    return module


def audited() -> Any:
    return left_out(DATA, ["no_silent"], DatasetManifest("demo", {}, {}, audit_hash="h"))


FORMATS = {
    "run.json": Format(RUN / "run.json", lambda: collect_runs(RUN)),
    "config.yaml": Format(RUN / ".hydra/config.yaml", lambda: open_run(RUN, None)),
    "overrides.yaml": Format(RUN / ".hydra/overrides.yaml", lambda: resumed_arguments([f"resume={RUN}"])),
    "metrics.json": Format(EVALUATION / "metrics.json", lambda: (collect_runs(RUN), read_metrics(EVALUATION))),
    "predictions.jsonl": Format(EVALUATION / "predictions.jsonl", lambda: read_items(EVALUATION / "predictions.jsonl")),
    "dataset.json": Format(DATA / "dataset.json", lambda: DatasetManifest.read(DATA)),
    "index.json": Format(DATA / "turns/index.json", lambda: ShardReader(DATA / "turns", "train").check()),
    "rejected.csv": Format(DATA / "rejected.csv", lambda: read_rejections(DATA / "rejected.csv")),
    "labels.jsonl": Format(DATA / LABELS, lambda: read_labels(DATA, LABELS, "")),
    "voice-turns.jsonl": Format(DATA / VOICE_TURNS, lambda: read_labels(DATA, VOICE_TURNS, "")),
    "voice-bins.json": Format(DATA / BINS, lambda: read_bins(DATA)),
    "audit.json": Format(DATA / AUDIT / "audit.json", audited),
    "audit.csv": Format(DATA / AUDIT / "audit.csv", audited),
    "export.json": Format(RUN / "export/export.json", lambda: load_export(RUN / "export")),
    "sweep.json": Format(SWEEP / "sweep.json", lambda: read_sweep(SWEEP)),
    "job.json": Format(SWEEP / "jobs/0.json", lambda: read_sweep(SWEEP)),
    "history": Format(TALK, lambda: (read_talk(TALK), read_saved(TALK, Path(), 99))),
    "alignment.json": Format(ALIGNED / "alignment.json", lambda: read_alignment(ALIGNED, torch.nn.Linear(2, 3))),
    "clip-hashes.json": Format(
        DATA / "clip-hashes.json", lambda: hash_clips(Path("clips"), ["a.mp4", None], DATA, 0), is_cache=True
    ),
    "lengths": Format(
        DATA / "lengths/train-ba66991984e5a1b9.json", lambda: datamodule().lengths("train"), is_cache=True
    ),
}  # fmt: skip


@pytest.fixture
def spoilt(place) -> Path:  # noqa: F811
    """The place, with the formats in it that the run has not left."""
    bins = {"settings": {}, "bins": {"rate": {"edges": [1.5], "words": ["slowly", "fast"], "source": "quantiles",
            "clips": 3, "percentiles": [1, 2, 3]}}}  # fmt: skip
    voice = {"rate": 3.5, "measured": {"pitch": "high"}}
    voices = "".join(json.dumps({"id": f"demo/train/dia0/utt{turn}", **voice}) + "\n" for turn in range(3))
    flags = flags_csv([Flag("demo/test/dia0", "test", "silent", "a, b.mp4", 'said "x"'), Flag("x", "val", "rotated")])
    record = {"schema_version": 1, "hash": "h", "content": "c"}
    sweep = {"schema_version": 1, "started": "now", "command": ["seed=1,2"], "jobs": [["seed=1"], ["seed=2"]]}
    talk = {"turns": [{"speaker": "Ana", "text": "Hello!"}, {"speaker": "Leo", "text": "Yes?", "description": "slow"}]}
    facts = {"source": "Emotion", "hash": "a", "utterances": 9, "without": 0, "different": 3}
    aligned = {
        "identity": {},
        "labels": facts,
        "scores": {"accuracy": 0.5, "chance": 0.2, "spread": 1.0},
        "seconds": 2.5,
    }
    for path, text in {
        DATA / BINS: json.dumps(bins),
        DATA / VOICE_TURNS: voices,
        DATA / AUDIT / "audit.csv": flags,
        DATA / AUDIT / "audit.json": json.dumps({**record, "flags": _sha256(flags)}),
        SWEEP / "sweep.json": json.dumps(sweep),
        SWEEP / "jobs/0.json": json.dumps({"run_dir": f"../{RUN}", "overrides": ["seed=1"], "process": 7}),
        TALK: json.dumps(talk),
        ALIGNED / "alignment.json": json.dumps(aligned),
        Path("clips/a.mp4"): "sound",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    torch.save({"state_dict": torch.nn.Linear(2, 3).state_dict()}, ALIGNED / "connector.ckpt")
    hash_clips(Path("clips"), ["a.mp4"], DATA, 0)
    return place


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_spoilt(name: str) -> None:
    """Read a spoiled file: it is refused, and the message names it; a cache is made anew."""
    form = FORMATS[name]
    said = refusal(form.read)
    if form.is_cache:
        assert not said
    else:
        assert form.path.name in said or str(form.path.parent) in said, said or "not refused"


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_as_it_was_written(name, spoilt):
    FORMATS[name].read()


# ---------------------------------------------------------------------------------------------------- bytes


def cut(data: bytes) -> bytes:
    return data[: data.rstrip().rfind(b"," if b"," in data else b":") + 1]


DEEP = 100_000
WAYS = {
    "empty": lambda data: b"",
    "blank": lambda data: b"\n\n",
    "cut": cut,
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "Latin-1": lambda data: data[:20] + b"\xe9\xff" + data[20:],
    "zeros": lambda data: b"\0" * len(data),
    "deep": lambda data: b"[" * DEEP,
    "deep objects": lambda data: b'{"a":' * DEEP,
    "deep and whole": lambda data: b"[" * 500 + b"]" * 500,
    "NaN": lambda data: b"NaN",
    "another": lambda data: b"\x89PNG\r\n\x1a\n" + b"\xff" * 99,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FORMATS)
def test_bytes_that_are_no_such_file(name, way, spoilt):
    path = FORMATS[name].path
    if name == "rejected.csv" and way == "cut":
        path.write_text(path.read_text() + "a,b,c,")
    elif way in ("blank", "cut") and name == "overrides.yaml":
        pytest.skip("fewer overrides are overrides")
    else:
        path.write_bytes(WAYS[way](path.read_bytes()))
    read_spoilt(name)


@pytest.mark.parametrize("name", FORMATS)
def test_a_folder_a_pipe_and_a_link_to_nothing_in_a_files_place(name, spoilt):
    path = FORMATS[name].path
    path.unlink()
    path.mkdir()
    if not FORMATS[name].is_cache:  # which has nowhere to be written then
        assert refusal(FORMATS[name].read) or name in (
            "run.json",
            "overrides.yaml",
            "metrics.json",
            "sweep.json",
            "job.json",
        )
    path.rmdir()
    os.mkfifo(path)
    refusal(FORMATS[name].read)
    path.unlink()
    path.symlink_to(spoilt.parent / "outside" / "nothing")
    refusal(FORMATS[name].read)


# ---------------------------------------------------------------------------------------------------- places

INF = 1e999  # which json.dumps writes as Infinity
HUGE = 10**400
NESTED: Any = 0
for _ in range(200):
    NESTED = [NESTED]
SAMPLE = ("samples", 0)

PLACES: list[tuple[str, tuple[str | int, ...], Any, str]] = [
    ("run.json", ("status",), 3, r"run.json, status: found 3, expected a text"),
    ("run.json", ("seed",), "1", r"run.json, seed: found '1', expected a whole number"),
    ("run.json", ("seed",), -1, r"run.json, seed: found -1, expected 0 or more"),
    ("run.json", ("seed",), HUGE, r"run.json, seed: found 1000.*at most 64 bits"),
    ("run.json", ("seconds",), INF, r"run.json: cannot be read as JSON \(Infinity is no number"),
    ("run.json", ("overrides",), "seed=1", r"run.json, overrides: found 'seed=1', expected a list"),
    ("run.json", ("overrides", 0), None, r"run.json, overrides\[0\]: found None, expected a text"),
    ("run.json", ("trainable_parameters",), [1], r"run.json, trainable_parameters: found a list of 1, expected an obj"),
    ("run.json", ("trainable_parameters", "llm"), -5, r"run.json, trainable_parameters.llm: found -5"),
    ("run.json", ("streams",), {"../x": "h"}, r"run.json, streams[.]{3}/x: found '../x', expected a name"),
    ("run.json", ("alignments",), {"audio": {"hash": "a"}}, r"run.json, alignments.audio: found no used"),
    ("run.json", ("warnings",), "x", r"run.json, warnings: found 'x', expected a list"),
    ("run.json", ("metrics", "val/loss"), "low", r"run.json, metrics.val/loss: found 'low', expected a number or null"),
    ("metrics.json", ("split",), "../test", r"metrics.json, split: found '../test', expected one of train, val, test"),
    ("metrics.json", ("data",), "/etc", r"metrics.json, data: found '/etc', expected a name"),
    ("metrics.json", ("settings",), None, r"metrics.json, settings: found None, expected a text"),
    ("metrics.json", ("nll",), math.nan, r"metrics.json: cannot be read as JSON \(NaN"),
    ("dataset.json", ("schema_version",), 2, r"dataset.json: found schema version 2, expected 1"),
    ("dataset.json", ("schema_version",), [], r"dataset.json: found schema version a list of 0"),
    ("dataset.json", ("name",), "../../x", r"dataset.json, name: found '../../x', expected a name"),
    ("dataset.json", ("more",), 1, r"dataset.json: found the key 'more', expected none but name, splits"),
    ("dataset.json", ("splits", "train", "dialogues"), True, r"splits.train.dialogues: found True, expected a whole"),
    ("dataset.json", ("splits", "train", "hours"), HUGE, r"splits.train.hours: found 1000"),
    ("dataset.json", ("splits", "dev"), {}, r"splits.dev: found 'dev', expected one of train, val, test"),
    ("dataset.json", ("streams", "audio-logmel", "dim"), "16", r"streams.audio-logmel.dim: found '16'"),
    ("dataset.json", ("streams", "audio-logmel", "kind"), "smell", r"streams.audio-logmel.kind: found 'smell'"),
    ("dataset.json", ("streams", "../a"), {}, r"streams.../a: found '../a', expected a name"),
    ("dataset.json", ("settings",), {"a": NESTED}, r"dataset.json, settings.* expected at most 64 lists"),
    ("index.json", ("shards", 0, "file"), "/etc/passwd", r"index.json, shards\[0\].file: found '/etc/passwd'"),
    ("index.json", ("shards", 0, "file"), "../../x.pth", r"index.json, shards\[0\].file: found '../../x.pth'"),
    ("index.json", ("shards", 0, "sha256"), "../../../x", r"index.json, shards\[0\].sha256: found '../../../x'"),
    ("index.json", ("shards", 0, "bytes"), -1, r"index.json, shards\[0\].bytes: found -1, expected 0 or more"),
    ("index.json", (*SAMPLE, "id"), "../../a", r"index.json, samples\[0\].id: found '../../a'"),
    ("index.json", (*SAMPLE, "shard"), 99, r"index.json, samples\[0\]: found shard 99, expected one of 3"),
    ("index.json", (*SAMPLE, "lengths"), [1, -1], r"index.json, samples\[0\].lengths\[1\]: found -1"),
    ("index.json", (*SAMPLE, "members"), {"turns.json": [0, 2**62]}, r"turns.json ends behind the end of its shard"),
    ("index.json", (*SAMPLE, "members"), {"turns.json": [0]}, r"turns.json: found a list of 1, expected a list of 2"),
    ("index.json", ("settings",), {"other": 1}, r"index.json: damaged; it does not hold what its hash says"),
    ("metrics.json", ("seconds_of_others",), 10**400, r"metrics.json, seconds_of_others: found .* 64 bits"),
    ("export.json", ("format_version",), 9, r"export.json: format_version 9"),
    ("export.json", ("streams", "audio", "dim"), "16", r"export.json, streams.audio.dim: found '16'"),
    ("export.json", ("llm", "trained"), "pickle", r"export.json, llm.trained: found 'pickle', expected one of adapter"),
    ("export.json", ("connector",), None, r"export.json, connector: found null, expected a connector"),
    ("export.json", ("connector", "num_blocks"), "x", r"export.json: cannot be loaded \('str' object cannot be"),
    ("export.json", ("connector", "other"), 1, r"export.json: cannot be loaded \(.* unexpected keyword"),
    ("export.json", ("prompt", "other"), 1, r"export.json: cannot be loaded \(.* unexpected keyword"),
    ("export.json", ("llm", "other"), 1, r"export.json, llm: found the key 'other', expected none but"),
    ("export.json", ("base_llm",), "x", r"export.json, base_llm: found 'x', expected an object"),
    ("sweep.json", ("jobs",), [["seed=1"], "seed=2"], r"sweep.json, jobs\[1\]: found 'seed=2', expected a list"),
    ("sweep.json", ("started",), "../../x", r"sweep.json, started: found '../../x', expected a name"),
    ("job.json", ("run_dir",), 5, r"0.json, run_dir: found 5, expected a text"),
    ("job.json", ("run_dir",), "a\0b", r"0.json, run_dir: found 'a\\x00b', expected a folder"),
    ("job.json", ("process",), -1, r"0.json, process: found -1"),
    ("history", ("turns", 0, "speaker"), " ", r"talk.json, turns\[0\].speaker: found ' ', expected a name"),
    ("history", ("turns", 0, "audio"), ["a.wav"], r"talk.json, turns\[0\].audio: found a list of 1"),
    ("history", ("turns", 1, "video"), "a\0b", r"talk.json, turns\[1\].video: found 'a\\x00b'"),
    ("history", ("turns",), {}, r"talk.json, turns: found an object of 0, expected a list"),
    ("voice-bins.json", ("bins", "rate", "edges"), ["x"], r"voice-bins.json, bins.rate.edges\[0\]: found 'x'"),
    ("voice-bins.json", ("bins", "rate", "words"), ["slowly"], r"bins.rate: found 1 words for 1 edges"),
    ("voice-bins.json", ("bins", "rate"), {}, r"voice-bins.json, bins.rate: found no edges, words, source"),
    ("audit.json", ("flags",), None, r"audit.json, flags: found None, expected a text"),
    ("audit.json", ("schema_version",), "1", r"audit.json: found schema version '1', expected 1"),
    ("alignment.json", ("scores", "accuracy"), "high", r"alignment.json, scores.accuracy: found 'high'"),
    ("alignment.json", ("labels",), {}, r"alignment.json, labels: found no source, hash"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "keys", "value", "said"), PLACES, ids=lambda v: None if isinstance(v, tuple) else str(v)[:30]
)
def test_a_place_that_holds_something_else_is_named(name, keys, value, said, spoilt):
    change_json(FORMATS[name].path, *keys, value=value)
    assert re.search(said, refusal(FORMATS[name].read))


DROPPED = [
    ("run.json", "status"), ("run.json", "task_hash"), ("metrics.json", "split"), ("dataset.json", "streams"),
    ("index.json", "samples"), ("export.json", "prompt"), ("sweep.json", "jobs"), ("job.json", "run_dir"),
    ("history", "turns"), ("voice-bins.json", "bins"), ("audit.json", "hash"), ("alignment.json", "seconds"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "key"), DROPPED)
def test_a_key_that_is_missing_is_named(name, key, spoilt):
    change_json(FORMATS[name].path, key, drop=True)
    assert f"found no {key}, expected it beside" in refusal(FORMATS[name].read)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("nll", [[1]], r"line 2, nll[0]: found a list of 1, expected a number or null"),
        ("turn", -1, r"line 2, turn: found -1, expected 0 or more"),
        ("turn", True, r"line 2, turn: found True, expected a whole number"),
        ("bits", {"planted_text": "1"}, r"line 2, bits.planted_text: found '1', expected a number"),
        ("speech", "../../.ssh/id", r"line 2, speech: found '../../.ssh/id', expected speech/NAME"),
        ("speech", "speech/../../x", r"line 2, speech: found 'speech/../../x', expected speech/NAME"),
        ("reply", "Yes.", r"line 2, reply: found 'Yes.', expected an object"),
        ("reply", {"text": 1, "description": None}, r"line 2, reply.text: found 1, expected a text"),
        ("scores", {"rouge_l": [1]}, r"line 2, scores.rouge_l: found a list of 1"),
        ("kinds", [], r"line 2: found"),
    ],
)
def test_a_prediction_that_is_none_is_named_by_its_line(key, value, said, spoilt):
    path = EVALUATION / "predictions.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), key: value})
    path.write_text("\n".join(lines))
    assert said in refusal(lambda: read_predictions(EVALUATION))


# ---------------------------------------------------------------------------------------------------- YAML

LINES = "\n".join(f"a{n}: [" + ", ".join([f"*a{n - 1}"] * 9) + "]" for n in range(1, 12))
DOUBLING = "\n".join(f"a{n}: ${{a{n - 1}}}${{a{n - 1}}}" for n in range(1, 60))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"a0: &a0 [x]\n{LINES}", "an anchor, alias or tag in line 1"),
        ("a: &a\n  b: *a", "an anchor, alias or tag in line 1"),
        (f"a0: xxxxxxxx\n{DOUBLING}", "interpolations that make more than 10,000,000 characters"),
        ("a: !!python/object/apply:os.system ['true']", "an anchor, alias or tag in line 1"),
        ("a: !!binary aGk=", "an anchor, alias or tag in line 1"),
        ("[" * 200 + "]" * 200, "more than 64 lists and mappings in each other"),
        ("a: 1\na: 2", "found duplicate key a"),
        ("x: " + "y" * 300_000, "300,003 bytes, expected at most 262,144"),
        ("a: [1", "cannot be read as a config"),
        ("a: .nan", "a: found nan, expected a finite number"),
        ("a: -.inf", "a: found -inf, expected a finite number"),
        ("a: 1" + "0" * 400, "expected a whole number of at most 64 bits"),
        ("- 1", "found no config"),
        ("3", "cannot be read as a config"),
        ("a: ${${b}}\nb: a", "whose name is interpolated"),
        ("a: \x01", "cannot be read as a config"),
    ],
)
def test_a_config_that_holds_more_than_a_config_is_refused_at_once(text, said, spoilt):
    (RUN / ".hydra/config.yaml").write_text(text)
    found = refusal(lambda: read_run(RUN))
    assert said in found
    assert "config.yaml" in found


CONFIGS = [
    ("name: demo", "name: ../../x", "data.name: found '../../x', expected a name"),
    ("name: logmel", "name: a/b", "model.streams.audio.name: found 'a/b', expected a name"),
    ("dim: 16", "dim: -1", "model.streams.audio.dim: found -1, expected 0 or more"),
    ("seed: 1\nmodality", "seed: x\nmodality", "seed: found 'x', expected a whole number"),
    ("max_history_tokens: 1024", "max_history_tokens: [1]", "data.max_history_tokens: found a list of 1"),
    ("  target: text_description", "  other: 1", "prompt: found no target"),
    ("dir: ${paths.data_dir}/demo", "dir: ${data.dir}", "config.yaml"),
    ("dir: ${paths.data_dir}/demo", "dir: ${nowhere}", "Interpolation key 'nowhere' not found"),
    ("_target_: msenc.prompt.Prompt", "_target_: 3", "prompt._target_: found 3, which is none"),
    ("optimizer:\n  groups: {}", "optimizer:\n  groups: x", "optimizer.groups: found 'x', expected an object or null"),
    ("modality: text_audio_video", "modality: 3", "modality: found 3, expected a text"),
    ("    num_queries: 4", "    num_queries: x", "model.connector.num_queries: found 'x'"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after", "said"), CONFIGS)
def test_a_place_of_a_config_that_holds_something_else_is_named(before, after, said, spoilt):
    path = RUN / ".hydra/config.yaml"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    assert said in refusal(lambda: open_run(RUN, None))


# ---------------------------------------------------------------------------------------------------- shards


def rewrite(stream: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Write a stream anew with the train split's first dialogue changed, by whoever keeps every hash right."""
    samples = []
    for split in ("train", "val", "test"):
        reader = ShardReader(DATA / stream, split)
        samples += [(id, split, reader.read(id)) for id in reader.ids]
    change(samples[0][2])
    lengths = [sample["lengths"] for sample in read_json(DATA / stream / "index.json")["samples"]]
    settings = ShardReader(DATA / stream, "train").settings
    before = ShardReader(DATA / stream, "train").hash
    write_stream(DATA / stream, samples, settings)
    for number, known in enumerate(lengths):
        change_json(DATA / stream / "index.json", "samples", number, "lengths", value=known)
    after = json.loads((DATA / stream / "index.json").read_text())["hash"]
    path = DATA / "dataset.json"
    path.write_text(path.read_text().replace(before, after))


def read_train() -> None:
    dataset = datamodule().dataset("train")
    for index in range(len(dataset)):
        dataset[index]


def of_turn(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda members: members["turns.json"]["utterances"][0].update(changes)


MARK = {"kind": "audio", "field": "text", "start": 0, "end": 3, "bits": 1.0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (of_turn(text=3), r"turns.json, utterances[0].text: found 3, expected a text"),
        (of_turn(text=" "), r"turns.json, utterances[0].text: found ' ', expected words"),
        (of_turn(id="../../x"), r"utterances[0].id: found '../../x', expected a name"),
        (of_turn(clip="../../x.mp4"), r"utterances[0].clip: found '../../x.mp4', expected a path below"),
        (of_turn(clip="/etc/passwd"), r"utterances[0].clip: found '/etc/passwd', expected a path below"),
        (of_turn(start_s=HUGE), r"utterances[0].start_s: found 1000"),
        (of_turn(start_s=math.nan), "NaN is no number"),
        (of_turn(more=1), r"utterances[0]: found the key 'more'"),
        (of_turn(marks=[{**MARK, "end": 10**6}]), r"utterances[0].marks: found"),
        (of_turn(marks=[{**MARK, "kind": "smell"}]), r"utterances[0].marks: found"),
        (of_turn(marks=[{**MARK, "start": -1}]), r"utterances[0].marks: found"),
        (of_turn(attributes={"pitch": 3}), r"utterances[0].attributes.pitch: found 3"),
        (of_turn(text="\ud800"), "surrogates not allowed"),
        (lambda members: members["turns.json"].update(id="demo/train/dia9"), r"the index says ('demo/train/dia0'"),
        (lambda members: members["turns.json"]["utterances"].pop(), r"the index says ('demo/train/dia0'"),
        (lambda members: members.update({"turns.json": NESTED}), r"turns.json: found a list of 1, expected an object"),
    ],
)
def test_turns_that_are_none_are_refused(change, said, spoilt, monkeypatch):
    monkeypatch.setattr("msenc.store.shards.encode_member", lambda _, value: json.dumps(value).encode())
    monkeypatch.setattr("msenc.store.shards._lengths", lambda members: [])  # `rewrite` keeps those that were there
    rewrite("turns", change)
    found = refusal(read_train)
    assert said in found
    assert "demo/train/dia0" in found


def of_features(number: float) -> Callable[[dict[str, Any]], Any]:
    def change(members: dict[str, Any]) -> None:
        members["features.npy"] = members["features.npy"].copy()
        members["features.npy"][-1, -1] = number

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (of_features(math.nan), "found NaN or infinity in 1 frames, first in utterance"),
        (of_features(math.inf), "found NaN or infinity in 1 frames"),
        (of_features(-math.inf), "found NaN or infinity in 1 frames"),
        (lambda m: m.update({"features.npy": m["features.npy"][:, :5]}), "found features 5 wide, dataset.json says 16"),
        (lambda m: m.update({"features.npy": m["features.npy"][1:]}), "expected float16"),
        (lambda m: m.update({"features.npy": m["features.npy"].astype(np.int32)}), "found int32"),
        (lambda m: m.update({"offsets.npy": m["offsets.npy"][::-1].copy()}), "offsets.npy: found"),
        (lambda m: m.update({"offsets.npy": m["offsets.npy"] + 1}), "offsets.npy: found"),
        (lambda m: m.update({"offsets.npy": m["offsets.npy"].astype(np.float32)}), "offsets.npy: found float32"),
        (lambda m: m.update({"offsets.npy": m["offsets.npy"][:-1]}), "offsets.npy: found int64"),
    ],
)
def test_features_that_are_none_are_refused_before_anything_learns_from_them(change, said, spoilt):
    rewrite("audio-logmel", change)
    found = refusal(read_train)
    assert said in found
    assert "demo/train/dia0" in found


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f2', 'fortran_order': False, 'shape': (1000000000000, 16), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
        "{'descr': '<f2', 'fortran_order': True, 'shape': (3, 16), }",
        "{'descr': '<f2', 'fortran_order': False, 'shape': (-1, 16), }",
        "(" * 3000,
        "__import__('os').abort()",
        "",
    ],
)
def test_an_array_whose_header_is_none_is_refused(header, spoilt, monkeypatch):
    def encode(name: str, value: Any) -> bytes:
        if name == "features.npy":
            text = header.encode().ljust(118) + b"\n"
            return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + value.tobytes()
        buffer = io.BytesIO()
        np.save(buffer, value)
        return buffer.getvalue()

    monkeypatch.setattr("msenc.store.shards.encode_member", encode)
    rewrite("audio-logmel", lambda members: None)
    found = refusal(read_train)
    assert "features.npy: found" in found


# ---------------------------------------------------------------------------------------------------- weights


def of_checkpoint(change: Callable[[dict[str, Any]], Any]) -> str:
    path = RUN / "checkpoints" / "best.ckpt"
    saved = torch.load(path, weights_only=True)
    torch.save(change(saved) or saved, path)
    return refusal(lambda: read_checkpoint(path))


def first(saved: dict[str, Any], tensor: Any) -> None:
    name = next(iter(saved["state_dict"]))
    saved["state_dict"][name] = tensor


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: first(s, torch.full((2, 2), math.nan)), "found NaN or infinity in 4 of 4 values"),
        (lambda s: first(s, torch.tensor([1.0, -math.inf])), "found NaN or infinity in 1 of 2 values"),
        (lambda s: first(s, torch.zeros(1).expand(10**9, 10**9)), "expected a tensor"),
        (lambda s: first(s, torch.zeros(3, 3).to_sparse()), "expected a tensor"),
        (lambda s: first(s, [1.0]), "found a list, expected a tensor"),
        (lambda s: s["state_dict"].update({3: torch.zeros(1)}), "3: found a Tensor, expected a tensor"),
        (lambda s: s.update(state_dict=[1]), "it has no state_dict"),
        (lambda s: s.update(average={"other": torch.zeros(1)}), "average: its names differ"),
        (lambda s: s.update(average=3), "average: its names differ"),
        (lambda s: s.update(msenc="x"), "msenc: found 'x'"),
        (lambda s: s.update(global_step="x"), "global_step: found 'x', expected a number"),
        (lambda s: [1, 2], "it has no state_dict"),
    ],
)
def test_a_checkpoint_that_is_none_is_refused(change, said, spoilt):
    found = of_checkpoint(change)
    assert said in found
    assert "best.ckpt" in found


@pytest.mark.parametrize("file", ["connectors.safetensors", "adapter/adapter_model.safetensors"])
@pytest.mark.parametrize("way", ["cut", "empty", "NaN", "other"])
def test_an_exports_weights_that_are_none_are_refused(file, way, spoilt):
    from safetensors.torch import load_file, save_file

    path = RUN / "export" / file
    tensors = load_file(path)
    if way == "cut":
        path.write_bytes(path.read_bytes()[:-50])
    elif way == "empty":
        path.write_bytes(b"")
    elif way == "NaN":
        save_file({name: torch.full_like(tensor, math.nan) for name, tensor in tensors.items()}, path)
    else:
        save_file({name: torch.zeros(7) for name in tensors}, path)
    assert str(RUN / "export") in refusal(lambda: load_export(RUN / "export"))


# ---------------------------------------------------------------------------------------------------- logs, fuzz


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xfe",
        b"",
        b"epoch\n",
        b'epoch,val/loss\n"',
        b"epoch,val/loss\n9e99,nan\n\0,1\n",
        b"epoch,val/loss\n0,inf\n99999999999999999999,1\n",
    ],
)
def test_a_log_that_is_none_draws_no_curve(data, spoilt):
    path = RUN / "logs" / "csv" / "metrics.csv"
    path.write_bytes(data)
    found = refusal(lambda: read_curve(RUN))
    assert found == "" or "metrics.csv" in found


def test_a_run_that_goes_on_with_a_spoilt_record_is_refused(spoilt):
    (RUN / "run.json").write_text("{}")
    assert "run.json: found no status" in refusal(lambda: RunRecord.reopen(RUN))


@pytest.mark.parametrize(
    "text", ["1" * 5000, '"\\ud800"', "-Infinity", '{"a": 1, "a": 2}', "1e400", codecs.BOM_UTF8.decode() + "1"]
)
def test_json_that_python_reads_and_nobody_else(text):
    with pytest.raises(MsencError, match=r"^here: cannot be read as JSON \(.*\)\. Do it\.$"):
        parse_json(text, "here", advice="Do it.")


def test_what_is_soon_said_to_fit_is_what_the_naming_of_places_lets_pass():
    marks = (Mark("audio", "text", 0, 3, 1.5),)
    turns = (
        Utterance("0", "Ana", 'a \\"key": 3\n'),
        Utterance("1", "", "c: d", "e", 1.5, 2, "f", marks, VoiceAttributes()),
    )
    known = json.dumps(Dialogue("demo/train/dia0", "train", turns).to_json())
    assert fits_json(parse_json(known, "here"), Dialogue)
    rng, taken = random.Random(0), 0
    keys = [*re.findall(r'"\w+": ', known), '"key" : ', '"\\u0069d": ']
    values = [
        *re.findall(r'(?<=": )(?:null|[\d.]+|"[^"\\]*")', known),
        "true",
        "-1",
        "1e999",
        "9" * 20,
        "[]",
        "{}",
        '"\\ud800"',
    ]
    for _ in range(4000):
        text = spoil(known.encode(), rng).decode("utf-8", "replace") if rng.random() < 0.3 else known
        for _ in range(rng.randint(0, 2)):  # a key becomes another, maybe one that stands there already
            parts = rng.choice([keys, values, values])
            text = text.replace(rng.choice(parts), rng.choice(parts), rng.randint(1, 2))
        try:
            slow = _DECODER.decode(text)
            json.dumps(slow, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            with pytest.raises(MsencError):
                parse_json(text, "here", object)
            continue
        value = parse_json(text, "here", object)
        assert repr(value) == repr(slow)
        if fits_json(value, Dialogue):
            check(value, Dialogue)
            taken += text != known
    assert taken > 100


def spoil(data: bytes, rng: random.Random) -> bytes:
    """One to four changes of bytes, or of a value where it is JSON."""
    odd = [*b'null|-1|1e999|NaN|"../../x"|[]|{}|true|"\\ud800"|""|1.5'.split(b"|"), b"9" * 400]
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        way = rng.randrange(7)
        if way == 0:
            data = data[:at]
        elif way == 1:
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        elif way == 2:
            end = min(len(data), at + rng.randint(1, 40))
            data = data[:at] + data[end:]
        elif way == 3:
            data = data[:at] + data[max(0, at - 60) : at] + data[at:]
        else:  # what stands after a colon, comma or bracket becomes something odd
            starts = [i + 1 for i, byte in enumerate(data) if byte in b":,["] or [0]
            start = rng.choice(starts)
            ends = [i for i in range(start, len(data)) if data[i] in b",]}\n"] or [len(data)]
            data = data[:start] + b" " + rng.choice(odd) + data[ends[0] :]
    return data


CASES = [
    pytest.param(name, seed, marks=[pytest.mark.fuzz] if seed >= ALWAYS else [])
    for name in FORMATS
    for seed in range(NUM_FUZZ)
]


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_whatever_a_file_holds_it_is_read_or_refused(name, seed, spoilt):
    rng = random.Random(f"{name}/{seed}")
    form = FORMATS[name]
    form.path.write_bytes(spoil(form.path.read_bytes(), rng))
    found = refusal(form.read)
    assert not (form.is_cache and found)


def test_a_cache_that_was_poisoned_is_made_anew(spoilt):
    path = FORMATS["lengths"].path
    right = datamodule().lengths("train")
    known = json.loads(path.read_text())
    path.write_text(json.dumps({id: {**lengths, "turns": lengths["turns"][1:]} for id, lengths in known.items()}))
    assert datamodule().lengths("train") == right
    assert json.loads(path.read_text()) == known
    shutil.rmtree(path.parent)
    path.parent.symlink_to(spoilt.parent / "outside")
    assert datamodule().lengths("train") == right
