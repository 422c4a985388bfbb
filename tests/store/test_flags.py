import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from msenc.data.datamodule import DialogueDataModule
from msenc.data.dataset import StreamSpec
from msenc.store.flags import AUDIT, FLAGS, FilteredReader, Flag, find_audit, flags_csv, left_out
from msenc.store.manifest import DatasetManifest, SplitCounts
from msenc.store.shards import ShardReader, write_stream
from msenc.types import Dialogue, MsencError, Utterance

DOCS = Path(__file__).parents[2] / "docs" / "audit.md"


@pytest.fixture
def folder(tmp_path):
    """Two dialogues of three turns: turns, features of turn lengths 1, 0 and 2, and an audit."""
    dialogues = [
        Dialogue(f"demo/test/dia{d}", "test", tuple(Utterance(str(2 * u), "Ana", f"text {u}") for u in range(3)))
        for d in range(2)
    ]
    write_stream(tmp_path / "turns", [(d.id, d.split, {"turns.json": d.to_json()}) for d in dialogues], {})
    features = np.arange(6, dtype=np.float16).reshape(3, 2)
    members = {"features.npy": features, "offsets.npy": np.array([0, 1, 1, 3])}
    write_stream(tmp_path / "audio-x", [(d.id, d.split, members) for d in dialogues], {})
    return tmp_path


def audited(folder: Path, *flags: Flag) -> DatasetManifest:
    import hashlib

    text = flags_csv(flags)
    (folder / AUDIT).mkdir()
    (folder / AUDIT / "audit.csv").write_text(text)
    record = {"schema_version": 1, "hash": "h", "content": "c", "flags": hashlib.sha256(text.encode()).hexdigest()}
    (folder / AUDIT / "audit.json").write_text(json.dumps(record))
    return DatasetManifest("demo", {"test": SplitCounts(2, 6, 4, 0.0)}, {}, audit_hash="h")


def test_the_documentation_lists_every_flag():
    assert re.findall(r"^- `(\w+)`: (.+)$", DOCS.read_text(encoding="utf-8"), re.M) == list(FLAGS.items())


def test_filters_name_the_ids_of_their_flags(folder):
    manifest = audited(
        folder,
        Flag("demo/test/dia0", "test", "leakage"),
        Flag("demo/test/dia1/utt2", "test", "silent", "a, b.mp4", 'said "x"\nhere'),
        Flag("demo/test/dia1/utt4", "test", "rotated"),
        Flag("", "test", "clip_without_row", "z.mp4"),
    )
    assert left_out(folder, ["no_leakage", "no_silent"], manifest) == {"demo/test/dia0", "demo/test/dia1/utt2"}
    assert left_out(folder, ["no_clip_without_row"], manifest) == frozenset()
    assert (find_audit(folder, "c"), find_audit(folder, "other")) == ("h", "")


def test_a_filter_that_cannot_act_is_refused(folder):
    manifest = audited(folder, Flag("demo/test/dia0", "test", "leakage"))
    for name in ("no_leak", "leakage", "no_"):
        with pytest.raises(MsencError, match=rf"no filter '{name}'\. Expected one of: no_clip_missing, .*no_leakage"):
            left_out(folder, [name], manifest)
    without = DatasetManifest("demo", {}, {})
    with pytest.raises(MsencError, match=r"data\.filter=no_leakage needs an audit.*stage=audit"):
        left_out(folder, ["no_leakage"], without)
    with pytest.raises(MsencError, match=r"audit\.csv: not the audit that dataset\.json records"):
        left_out(folder, ["no_leakage"], replace(manifest, audit_hash="other"))
    with (folder / AUDIT / "audit.csv").open("a") as file:
        file.write("demo/test/dia1,test,leakage,,\n")
    with pytest.raises(MsencError, match=r"audit\.csv: not the audit that dataset\.json records"):
        left_out(folder, ["no_leakage"], manifest)
    (folder / AUDIT / "audit.csv").unlink()
    with pytest.raises(MsencError, match=r"audit\.csv: missing\. Audit again"):
        left_out(folder, ["no_leakage"], manifest)


def test_a_filtered_reader_has_never_seen_what_is_left_out(folder):
    turns, audio = ShardReader(folder / "turns", "test"), ShardReader(folder / "audio-x", "test")
    ids = frozenset({"demo/test/dia0", "demo/test/dia1/utt2"})
    filtered = FilteredReader(turns, turns, ids)
    assert filtered.ids == ["demo/test/dia1"]
    assert [u["id"] for u in filtered.read("demo/test/dia1")["turns.json"]["utterances"]] == ["0", "4"]
    assert filtered.lengths == [[6, 6]]
    stream = FilteredReader(audio, turns, ids)
    assert stream.lengths == [[1, 2]]
    members = stream.read("demo/test/dia1")
    np.testing.assert_array_equal(members["features.npy"], audio.read("demo/test/dia1")["features.npy"])
    assert members["offsets.npy"].tolist() == [0, 1, 3]
    # the first turn gone instead: its frames go too
    members = FilteredReader(audio, turns, frozenset({"demo/test/dia1/utt0"})).read("demo/test/dia1")
    np.testing.assert_array_equal(members["features.npy"], [[2, 3], [4, 5]])
    assert members["offsets.npy"].tolist() == [0, 0, 2]
    assert len({audio.hash, stream.hash, FilteredReader(audio, turns, frozenset({"demo/test/dia1"})).hash}) == 3


def test_the_data_module_reads_what_the_filter_keeps(folder):
    audited(folder, Flag("demo/test/dia0", "test", "leakage"), Flag("demo/test/dia1/utt2", "test", "silent"))
    DatasetManifest("demo", {}, {}, audit_hash="h").write(folder)
    streams = {"audio": StreamSpec("x", 2, 1)}

    def dataset(*filters):
        return DialogueDataModule(folder, streams, None, batch_size=1, filters=filters).dataset("test")

    assert dataset().ids == ["demo/test/dia0", "demo/test/dia1"]
    assert dataset("no_leakage").ids == ["demo/test/dia1"]
    assert [u.id for u in dataset("no_silent").dialogue(1).utterances] == ["0", "4"]
    with pytest.raises(MsencError, match=r"no filter 'no_such'"):
        dataset("no_such")


def test_a_split_that_a_filter_empties_is_refused(folder):
    audited(folder, *(Flag(f"demo/test/dia{d}", "test", "leakage") for d in range(2)))
    DatasetManifest("demo", {}, {}, audit_hash="h").write(folder)
    with pytest.raises(MsencError, match=r"no dialogue of two or more turns that data\.filter keeps"):
        DialogueDataModule(folder, {}, None, batch_size=1, filters=["no_leakage"]).dataset("test")
