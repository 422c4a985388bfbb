import csv
import gc
import json
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from msenc.store.manifest import (
    DatasetManifest,
    StreamInfo,
    count_rejections,
    count_splits,
    write_rejections,
)
from msenc.store.shards import ShardReader, read_index, write_stream
from msenc.types import Dialogue, MsencError, Rejection, Utterance

SETTINGS = {"encoder": "logmel", "dim": 4}
HINT = "Run: python prepare.py data=demo"


def dialogues(num_train: int = 5) -> list[tuple[str, str, dict]]:
    rng = np.random.default_rng(0)
    samples = []
    for split, number in (("train", num_train), ("val", 2)):
        for i in range(number):
            lengths = rng.integers(0, 6, size=3 + i)
            features = rng.standard_normal((int(lengths.sum()), 4)).astype(np.float16)
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            samples.append((f"demo/{split}/dia{i}", split, {"features.npy": features, "offsets.npy": offsets}))
    return samples


def assert_holds(reader: ShardReader, samples: list) -> None:
    assert reader.ids == [id for id, _, _ in samples]
    assert len(reader) == len(samples)
    for i, (id, _, members) in enumerate(samples):
        for found in (reader[i], reader.read(id)):
            assert found.keys() == members.keys()
            for name, array in members.items():
                assert found[name].dtype == array.dtype
                np.testing.assert_array_equal(found[name], array)
        assert reader.lengths[i] == np.diff(members["offsets.npy"]).tolist()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_features_come_back_from_many_shards(tmp_path):
    samples = dialogues()
    index = write_stream(tmp_path / "audio-logmel", samples, SETTINGS, max_shard_bytes=500)
    assert len(index["shards"]) > 3
    assert index == read_index(tmp_path / "audio-logmel")
    assert (index["stream"], index["settings"]) == ("audio-logmel", SETTINGS)
    assert_holds(ShardReader(tmp_path / "audio-logmel", "train"), samples[:5])
    assert_holds(ShardReader(tmp_path / "audio-logmel", "val"), samples[5:])


def test_turns_come_back(tmp_path):
    dialogue = Dialogue("demo/val/dia0", "val", (Utterance("0", "Zoë", "Olá!"), Utterance("1", "Ben", "Hi (you)")))
    write_stream(tmp_path / "turns", [(dialogue.id, "val", {"turns.json": dialogue.to_json()})], {})
    reader = ShardReader(tmp_path / "turns", "val")
    assert Dialogue.from_json(reader[0]["turns.json"]) == dialogue
    assert reader.lengths == [[4, 8]]


def test_arrays_are_writable_so_that_torch_takes_them_without_a_copy(tmp_path):
    write_stream(tmp_path / "s", dialogues(), SETTINGS)
    features = ShardReader(tmp_path / "s", "train")[0]["features.npy"]
    torch.from_numpy(features)[:] = 1  # warns, and so fails, when it is read-only
    assert (features == 1).all()


def test_interleaved_splits_and_same_bytes_for_same_samples(tmp_path):
    samples = dialogues()
    mixed = [samples[i] for i in (0, 5, 1, 6, 2, 3, 4)]
    first = write_stream(tmp_path / "s", mixed, SETTINGS)
    before = contents(tmp_path / "s")
    assert write_stream(tmp_path / "s", mixed, SETTINGS) == first
    assert contents(tmp_path / "s") == before
    assert_holds(ShardReader(tmp_path / "s", "train"), samples[:5])
    samples[0][2]["features.npy"] = samples[0][2]["features.npy"] + np.float16(1)
    changed = [write_stream(tmp_path / "s", samples, settings)["hash"] for settings in (SETTINGS, {})]
    assert len({first["hash"], *changed}) == 3


# webdataset leaves the files that it read to the garbage collector, which warns
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:unclosed file:ResourceWarning")
def test_webdataset_alone_reads_the_shards(tmp_path):
    import webdataset

    samples = dialogues()
    write_stream(tmp_path / "s", samples, SETTINGS, max_shard_bytes=500)
    urls = sorted(str(p) for p in (tmp_path / "s").glob("train-*.tar"))
    assert len(urls) > 1
    found = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [f["__key__"] for f in found] == [id for id, _, _ in samples[:5]]
    for sample, (_, _, members) in zip(found, samples, strict=False):
        np.testing.assert_array_equal(sample["features.npy"], members["features.npy"])
        np.testing.assert_array_equal(sample["offsets.npy"], members["offsets.npy"])
    gc.collect()  # here, not in the next test


def test_only_shards_of_the_split_are_opened(tmp_path, monkeypatch):
    samples = dialogues()
    write_stream(tmp_path / "s", samples, SETTINGS)
    (tmp_path / "s" / "train-000000.tar").unlink()
    opened = []
    original = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *rest, **kw: opened.append(Path(path).name) or original(path, *rest, **kw)
    )
    reader = ShardReader(tmp_path / "s", "val")
    assert opened == []
    assert_holds(reader, samples[5:])
    assert opened == ["val-000000.tar"]


def _read_in_child(reader, queue):
    queue.put([sample["features.npy"].sum() for sample in (reader[i] for i in range(len(reader)))])


def test_a_reader_survives_pickling_and_a_fork(tmp_path):
    samples = dialogues()
    write_stream(tmp_path / "s", samples, SETTINGS, max_shard_bytes=500)
    reader = ShardReader(tmp_path / "s", "train")
    assert_holds(reader, samples[:5])
    copy = pickle.loads(pickle.dumps(reader))
    reader_descriptors = dict(reader._descriptors)
    assert_holds(copy, samples[:5])
    copy.close()
    assert reader._descriptors == reader_descriptors
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_read_in_child, args=(reader, queue))
    child.start()
    assert_holds(reader, samples[:5])
    expected = [members["features.npy"].sum() for _, _, members in samples[:5]]
    assert queue.get() == expected
    child.join()
    assert child.exitcode == 0


def test_an_unknown_dialogue_is_named(tmp_path):
    write_stream(tmp_path / "s", dialogues(), SETTINGS)
    with pytest.raises(KeyError, match=r"no dialogue 'demo/val/dia0' in .*split train"):
        ShardReader(tmp_path / "s", "train").read("demo/val/dia0")


def test_what_is_missing_or_changed_is_refused(tmp_path):
    folder = tmp_path / "s"

    def refused(message: str, split: str = "train") -> None:
        with pytest.raises(MsencError, match=rf"(?s){message}.*{HINT}"):
            ShardReader(folder, split, hint=HINT).check()

    refused("no such folder of shards")
    write_stream(folder, dialogues(), SETTINGS)
    refused("no dialogue of the split 'test'; found train, val", "test")
    shard, index = folder / "train-000000.tar", folder / "index.json"
    data, text = bytearray(shard.read_bytes()), index.read_text()

    data[700] ^= 1
    shard.write_bytes(data)
    refused("train-000000.tar: found content that differs from its sha256")
    with pytest.raises(MsencError, match="differs from its sha256"):
        ShardReader(folder, "train")[0]
    ShardReader(folder, "train", verify=False).check()
    shard.write_bytes(data[:-512])
    refused(r"train-000000.tar: found \d+ bytes, expected \d+")
    shard.unlink()
    refused("train-000000.tar: found missing; the index names it")

    index.write_text(text[:-9])
    refused("index.json: cannot be read")
    index.write_text(json.dumps({**json.loads(text), "schema_version": 99}))
    refused("index.json: found schema version 99, expected 1")
    index.write_text(json.dumps({"schema_version": 1, "stream": "s"}))
    refused("index.json: found no settings, hash, shards, samples")
    index.unlink()
    refused("index.json: missing")


@pytest.mark.parametrize(
    ("ids", "message"),
    [([], "no dialogue to write"), (["a/b", "a/b"], "found twice"), (["a/b.c"], "dot"), (["a b"], "space")],
)
def test_unfit_samples_are_refused_and_nothing_is_left(tmp_path, ids, message):
    with pytest.raises(MsencError, match=message):
        write_stream(tmp_path / "s", ((id, "train", {"turns.json": {}}) for id in ids), {})
    assert list(tmp_path.iterdir()) == []


def test_objects_are_never_pickled(tmp_path):
    with pytest.raises(ValueError, match="allow_pickle=False"):
        write_stream(tmp_path / "s", [("a", "train", {"x.npy": np.array([{}, None])})], {})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def file_limit():
    """Files cannot grow beyond 200 kB, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_refuses_loses_nothing(tmp_path, file_limit):
    write_stream(tmp_path / "s", dialogues(), SETTINGS)
    before = contents(tmp_path)
    closed = []

    def large():
        try:
            for i in range(9):
                yield f"dia{i}", "train", {"features.npy": np.zeros((50_000, 1), np.float16)}
        finally:
            closed.append(True)

    samples = large()  # held, so that nothing but the writer ends it
    with pytest.raises(MsencError, match=r"s: cannot be written \(File too large\)"):
        write_stream(tmp_path / "s", samples, SETTINGS)
    assert contents(tmp_path) == before
    assert closed == [True]


def test_a_failure_of_the_samples_loses_nothing_and_keeps_its_name(tmp_path):
    write_stream(tmp_path / "s", dialogues(), SETTINGS)
    before = contents(tmp_path)

    def failing():
        yield "dia0", "train", {"turns.json": {}}
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        write_stream(tmp_path / "s", failing(), SETTINGS)
    assert contents(tmp_path) == before


def test_a_killed_writer_loses_nothing_and_is_cleared_up(tmp_path):
    write_stream(tmp_path / "s", dialogues(), SETTINGS)
    before = contents(tmp_path)
    code = (
        "import os, signal, sys; from pathlib import Path; from msenc.store.shards import write_stream\n"
        "def samples():\n"
        "    yield 'dia0', 'train', {'turns.json': {}}\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_stream(Path(sys.argv[1]), samples(), {})\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "s")], check=False)
    assert done.returncode == -signal.SIGKILL
    left = {name: data for name, data in contents(tmp_path).items() if name.startswith("s/")}
    assert left == before
    assert len(list(tmp_path.iterdir())) == 2  # what the killed writer left
    write_stream(tmp_path / "s", dialogues(), SETTINGS)
    assert contents(tmp_path) == before


def test_a_writer_killed_between_its_renames_gives_the_old_folder_back(tmp_path):
    write_stream(tmp_path / "s", dialogues(), SETTINGS)
    before = contents(tmp_path)
    (tmp_path / "s").rename(tmp_path / ".s.replaced-1")
    with pytest.raises(MsencError, match="no dialogue to write"):
        write_stream(tmp_path / "s", [], SETTINGS)
    assert contents(tmp_path) == before


def manifest() -> DatasetManifest:
    turns = (Utterance("0", "Ana", "Hi", start_s=1.0, end_s=19.0), Utterance("1", "Ben", "Yes", start_s=3.0))
    return DatasetManifest(
        name="demo",
        splits=count_splits([Dialogue("demo/train/dia0", "train", turns)], clips={"train": 2}),
        streams={"audio-logmel": StreamInfo("audio", "logmel", 4, SETTINGS, "abc", {"train": 2})},
        rejected={"audio: silent": 1},
        turns_hash="def",
    )


def test_a_manifest_comes_back(tmp_path):
    written = manifest()
    assert written.splits["train"].hours == 0.005
    assert (written.splits["train"].samples, written.splits["train"].clips) == (1, 2)
    written.write(tmp_path)
    assert DatasetManifest.read(tmp_path) == written
    assert [p.name for p in tmp_path.iterdir()] == ["dataset.json"]


def test_a_bad_manifest_is_refused(tmp_path):
    path = tmp_path / "dataset.json"

    def refused(message: str) -> None:
        with pytest.raises(MsencError, match=rf"dataset.json{message}.*{HINT}"):
            DatasetManifest.read(tmp_path, hint=HINT)

    refused(": missing")
    manifest().write(tmp_path)
    value = json.loads(path.read_text())
    path.write_text("{")
    refused(": cannot be read")
    path.write_text(json.dumps({**value, "schema_version": 0}))
    refused(": found schema version 0, expected 1")
    path.write_text(json.dumps({k: v for k, v in value.items() if k != "streams"}))
    refused(": found no streams")
    path.write_text(json.dumps({**value, "splits": {"train": {"hours": 1}}}))
    refused(r", splits\.train: found no dialogues, utterances, samples")


def test_rejections_are_listed_and_counted(tmp_path):
    rejections = [
        Rejection("demo/train/dia0/utt1", "audio", "silent", "dia0_utt1.mp4"),
        Rejection("demo/train/dia0/utt2", "row", "duplicate utterance id", "a.csv", 4, 'He said "no",\nand left'),
    ]
    write_rejections(tmp_path / "rejected.csv", rejections)
    with (tmp_path / "rejected.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["reason"] for row in rows] == ["silent", "duplicate utterance id"]
    assert (rows[0]["row"], rows[1]["row"], rows[1]["found"]) == ("", "4", 'He said "no",\nand left')
    assert count_rejections(rejections) == {"audio: silent": 1, "row: duplicate utterance id": 1}
    with pytest.raises(MsencError, match=r"rejected\.csv: cannot be written"):
        write_rejections(tmp_path / "rejected.csv" / "rejected.csv", rejections)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.longdouble, ">f2"])
def test_features_of_another_precision_are_refused_as_a_batch_would_overflow(tmp_path, dtype):
    features = np.full((3, 4), 1e5 if np.dtype(dtype).itemsize > 2 else 1, dtype)
    members = {"features.npy": features, "offsets.npy": np.array([0, 3], np.int64)}
    write_stream(tmp_path / "audio-x", [("demo/train/dia0", "train", members)], SETTINGS)
    with pytest.raises(MsencError, match=r"dia0, features\.npy: found \S+ \(3, 4\), expected float16 \(3, D\)"):
        ShardReader(tmp_path / "audio-x", "train")[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "0"}, r"turns\.json: found two utterances '0', expected each id once"),
        (
            {"description": "a man (loud)"},
            r"utterances\[1\]\.description: found 'a man \(loud\)', expected words without",
        ),
        ({"description": " "}, r"utterances\[1\]\.description: found ' ', expected words"),
    ],
)
def test_turns_that_no_target_can_be_made_of_are_refused(tmp_path, change, message):
    turns = Dialogue("demo/train/dia0", "train", tuple(Utterance(str(n), "Ana", "Hi") for n in range(2))).to_json()
    turns["utterances"] = [turns["utterances"][0], turns["utterances"][1] | change]
    write_stream(tmp_path / "turns", [("demo/train/dia0", "train", {"turns.json": turns})], SETTINGS)
    with pytest.raises(MsencError, match=message):
        ShardReader(tmp_path / "turns", "train")[0]
