"""`prepare.py data=folder`: a table of clips, and recordings without one, to shards that a run trains on."""

import csv
import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import raw

from msenc.demo.clip_writer import write_clip
from msenc.demo.raw_demo import read_truth, write_raw_demo
from msenc.files import read_json
from msenc.speech.wav import write_wav
from msenc.store.shards import ShardReader
from msenc.types import SPLITS, MsencError

RATE = 16_000
TURNS = 6
TINY = ["model/llm=tiny", "prompt=default", "align=none"]
"""In place of what own recordings train on by default, which a test cannot fetch."""


@pytest.fixture
def prepare(compose, tmp_path):
    """``prepare(root, *overrides)``: what `prepare.py data=folder` does with a folder."""
    from msenc.pipelines.prepare import prepare

    def call(root, *overrides):
        chosen = [] if any(o.startswith("data=") for o in overrides) else ["data=folder"]
        return prepare(compose([*chosen, f"data.root={root}", *places(tmp_path), *overrides], "prepare"))

    return call


def places(tmp_path):
    return [f"data.dir={tmp_path / 'mine'}", "data.name=mine", "prepare_workers=0"]


def write_table(root, is_cut):
    """A table of one dialogue per split, and its sound: one recording of which turns are parts, or a file per turn."""
    sound = np.random.default_rng(1).normal(0, 0.1, (len(SPLITS), TURNS, RATE // 2)).astype(np.float32)
    root.mkdir()
    write_wav(root / "long.wav", sound.ravel(), RATE)
    with (root / "utterances.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clip", "dialogue", "speaker", "text", "start", "end", "split"])
        for number, split in enumerate(SPLITS):
            for turn in range(TURNS):
                clip, span = "long.wav", [start := (number * TURNS + turn) / 2, start + 0.5]
                if is_cut:
                    clip, span = f"{number}-{turn}.wav", ["", ""]
                    write_wav(root / clip, sound[number, turn], RATE)
                writer.writerow([clip, f"{split}-talk", "AB"[turn % 2], f"Turn {turn}.", *span, split])
    return root


def test_parts_of_a_recording_are_worth_their_own_files(prepare, tmp_path):
    streams = {}
    for is_cut in (False, True):
        manifest = prepare(write_table(tmp_path / f"raw{is_cut}", is_cut), "modality=text_audio")
        assert {s: (c.dialogues, c.utterances) for s, c in manifest.splits.items()} == dict.fromkeys(SPLITS, (1, TURNS))
        assert manifest.rejected == {}
        reader = ShardReader(tmp_path / "mine" / "audio-logmel", "val")
        streams[is_cut] = [reader[0][name] for name in ("features.npy", "offsets.npy")]
        shutil.rmtree(tmp_path / "mine")
    for parts, files in zip(*streams.values(), strict=True):
        np.testing.assert_array_equal(parts, files)
    assert streams[False][1].tolist() == [n * streams[False][1][1] for n in range(TURNS + 1)]


def write_two_files(root, columns):
    """Turns whose pictures and audio lie in two files each; of these, the table names those of some columns."""
    noise = np.random.default_rng(1)
    rows = [["dialogue", "text", "split", *columns]]
    for number, split in enumerate(SPLITS * 2):
        (root / "seen").mkdir(parents=True, exist_ok=True)
        frames = noise.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
        write_clip(root / "seen" / f"{number}.mp4", frames, np.sin(np.arange(RATE) / 20, dtype=np.float32), 6, RATE)
        write_wav(root / f"{number}.wav", noise.normal(0, 0.1, RATE).astype(np.float32), RATE)
        names = {"clip": f"seen/{number}.mp4", "audio": f"{number}.wav", "heard": f"{number}.wav"}
        rows.append([f"talk-{split}", "Well.", split, *(names[column] for column in columns.values())])
    with (root / "utterances.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root


def test_a_turns_audio_may_be_a_file_of_its_own(prepare, tmp_path):
    found = {}
    for name, columns in {
        "both": {"clip": "clip", "audio": "audio"},
        "wav": {"clip": "heard"},
        "mp4": {"clip": "clip"},
    }.items():
        root = write_two_files(tmp_path / name, columns)
        kind = {"wav": "text_audio", "mp4": "text_video"}.get(name, "text_audio_video")
        prepare(root, f"modality={kind}", *(["align=none"] if name != "both" else []))  # which has no voices
        for stream in ("audio-logmel", "video-pixels"):
            if (tmp_path / "mine" / stream).exists():
                found[name, stream] = ShardReader(tmp_path / "mine" / stream, "train")[0]["features.npy"]
        if name == "both":
            reader = ShardReader(tmp_path / "mine" / "turns", "train")
            turn = reader[0]["turns.json"]["utterances"][0]
            assert (turn["clip"], turn["audio"]) == ("seen/0.mp4", "0.wav")
            known = read_json(tmp_path / "mine" / "clip-hashes.json")
            assert len(known) == 12
            cached = (tmp_path / "mine" / "voice-cache.jsonl").read_text().splitlines()
            assert {json.loads(line)["sha256"] for line in cached} == {v[2] for k, v in known.items() if "wav" in k}
            audit = prepare(root, "stage=audit")
            assert audit.rejected_by_split() == {}
            assert "clip_without_row" not in audit.flagged_by_split()
        shutil.rmtree(tmp_path / "mine")
    np.testing.assert_array_equal(found["both", "audio-logmel"], found["wav", "audio-logmel"])
    np.testing.assert_array_equal(found["both", "video-pixels"], found["mp4", "video-pixels"])

    (root := tmp_path / "both" / "0.wav").unlink()
    manifest = prepare(root.parent, "modality=text_audio_video", "align=none")
    assert manifest.rejected == {"audio: clip missing": 1}  # the video's own audio stands in for nothing
    table = tmp_path / "both" / "utterances.csv"
    table.write_text(table.read_text().replace("1.wav", "../1.wav"))
    with pytest.raises(MsencError, match=r"row 3: audio is '\.\./1\.wav'; expected a path below"):
        prepare(table.parent)


def test_a_table_is_audited_described_and_trained_on(prepare, train, demo_home, tmp_path, capsys):
    root = write_table(tmp_path / "raw", is_cut=False)
    path = root / "utterances.csv"
    path.write_text(
        path.read_text().replace("long.wav,test-talk,B,Turn 5.,8.5,9.0", "long.wav,test-talk,B,Turn 5.,90,91")
    )
    (root / "other.wav").touch()
    audit = prepare(root, "stage=audit")
    assert audit.rejected_by_split() == {
        "audio: no sound": {"test": 1},
        "video: no picture": dict.fromkeys(SPLITS, TURNS),
    }
    assert audit.flagged_by_split()["clip_without_row"] == {"test": 1}
    assert "row_overlap" not in audit.flagged_by_split()
    assert audit.flagged_by_split()["leakage"] == {"val": 1, "test": 1}  # the same recording, seconds apart
    capsys.readouterr()
    manifest = prepare(root)
    assert "No clip has a measurable voice" in capsys.readouterr().out  # it is noise, and nobody asked for voices
    assert manifest.audit_hash == audit.hash
    assert manifest.rejected == {"audio: no sound": 1, "video: no picture": 3 * TURNS}
    assert manifest.streams["audio-logmel"].utterances == {"train": TURNS, "val": TURNS, "test": TURNS - 1}
    run = train(
        [
            "data=folder",
            *TINY,
            *places(tmp_path)[:2],
            "modality=text_audio",
            "prompt.target=text",
            "trainer.max_steps=1",
            "evaluate=null",
        ]
    )
    record = read_json(run.folder / "run.json")
    assert record["status"] == "finished"
    assert "spells the words of mine" in record["warnings"][0]
    assert "model/llm=smollm2" in record["warnings"][0]
    assert "in full" not in record["warnings"][0]  # it trains in full


@pytest.mark.parametrize("llm", ["model/llm=smollm2", "model/llm=tiny"])
@pytest.mark.parametrize("command", ["train", "plan"])
def test_missing_data_are_said_before_an_llm_is_loaded_or_made(command, llm, train, tmp_path, monkeypatch):
    from msenc.pipelines import prepare
    from msenc.training import assembly

    for module, name in ((assembly, "load_tokenizer"), (prepare, "_pretrain")):
        monkeypatch.setattr(module, name, lambda *a: pytest.fail("the LLM came first"))
    given = ["data=folder", llm, "align=none", *places(tmp_path)[:2], "data.root=nowhere"]
    with pytest.raises(MsencError, match=r"mine/dataset\.json.*python prepare\.py data=folder") as refused:
        train([*given, "plan=true"] if command == "plan" else given)
    assert "data.root=nowhere" in str(refused.value)


def test_a_table_elsewhere_is_taken_by_its_name(prepare, tmp_path):
    root = write_table(tmp_path / "raw", is_cut=False)
    (root / "utterances.csv").rename(tmp_path / "mine.csv")
    manifest = prepare(root, f"data.table={tmp_path / 'mine.csv'}", "modality=text")
    assert manifest.splits["val"].utterances == TURNS
    with pytest.raises(MsencError, match=r"data\.table=.*only data=folder takes"):
        prepare(root, "data=demo", f"data.table={tmp_path / 'mine.csv'}")


# ------------------------------------------------------------------------------------------------ recordings


class Words:
    """Says how long it hears each sound."""

    loaded = None

    def __init__(self, name_or_path, language, device, dtype):
        type(self).loaded = name_or_path

    def texts(self, sounds):
        return [f"{len(sound) / RATE:.1f} seconds" for sound in sounds]


class Pitch:
    """Tells the demo's women from its men by where their sound's energy lies."""

    def __init__(self, device):
        pass

    def __call__(self, sound):
        power = np.abs(np.fft.rfft(sound, RATE))[60:400] ** 2
        is_high = (power * np.arange(60, 400)).sum() / power.sum() > 165
        return np.eye(2, dtype=np.float32)[int(is_high)]


@pytest.fixture(scope="module")
def raw_demo(tmp_path_factory):
    root = tmp_path_factory.mktemp("own") / "demo"
    write_raw_demo(root, num_videos=1, dialogues_per_video=3, seed=3)
    return root


@pytest.fixture
def listening(monkeypatch):
    for package in ("silero_vad", "scenedetect"):
        pytest.importorskip(package)
    monkeypatch.setattr("msenc.models.recognition.Recogniser", Words)
    monkeypatch.setattr("msenc.raw.speakers.Resemblyzer", Pitch)


SPLIT = "data.recordings.split.fractions={train:0.34,val:0.33,test:0.33}"


def test_recordings_become_shards_by_way_of_a_table(prepare, raw_demo, listening, tmp_path, capsys):
    capsys.readouterr()
    assert prepare(raw_demo, SPLIT, "stage=segment") is None
    assert "Done up to the stage segment" in capsys.readouterr().out
    assert not (tmp_path / "mine" / "utterances.csv").exists()
    assert prepare(raw_demo, SPLIT, "part=1/2", "modality=text") is None
    assert "transcribe: 1 of 3 items remain, of the parts 2/2" in " ".join(capsys.readouterr().out.split())
    manifest = prepare(raw_demo, SPLIT, "describe=true")
    said = " ".join(capsys.readouterr().out.split())
    truth = read_truth(raw_demo)
    num_turns = sum(len(d.utterances) for d in truth)
    assert f"{num_turns} utterances in 3 dialogues; 0 have an unknown speaker" in said
    assert sum(c.utterances for c in manifest.splits.values()) == num_turns
    assert manifest.streams["video-pixels"].utterances == {s: c.utterances for s, c in manifest.splits.items()}
    turns = ShardReader(tmp_path / "mine" / "turns", "train")[0]["turns.json"]["utterances"]
    assert all(u["description"] for u in turns)
    # a corrected copy beside the recordings is read instead of listening, one that is edited here is kept
    made = tmp_path / "mine" / "utterances.csv"
    made.write_text(made.read_text().replace("seconds", "minutes"))
    with pytest.raises(MsencError, match=r"this file was edited.*Move it to the folder of the recordings"):
        prepare(raw_demo, SPLIT)
    root = tmp_path / "corrected"
    shutil.copytree(raw_demo, root)
    made.rename(root / made.name)
    prepare(root, SPLIT, "modality=text")
    turns = ShardReader(tmp_path / "mine" / "turns", "train")[0]["turns.json"]["utterances"]
    assert "minutes" in turns[0]["text"]


def test_a_table_in_which_nobody_answers_is_said_by_audit_and_prepare(prepare, tmp_path, capsys):
    path = write_table(tmp_path / "raw", is_cut=False) / "utterances.csv"
    rows = [f",lone{n},A,Words.,,,{split}" for n, split in enumerate(SPLITS)]
    path.write_text("\n".join(["clip,dialogue,speaker,text,start,end,split", *rows]))
    for stage in ("stage=audit", "stage=null"):
        prepare(path.parent, "modality=text", stage)
        assert "Without a target (a dialogue of two turns): all splits" in capsys.readouterr().out


def test_one_key_names_the_whisper_of_recordings_and_of_talk(prepare, raw_demo, listening):
    prepare(raw_demo, SPLIT, "stage=transcribe", "recogniser=my-whisper")
    assert Words.loaded == "my-whisper"


def test_what_recordings_lack_is_in_the_audit(prepare, raw_demo, listening, tmp_path, capsys):
    root = tmp_path / "raw"
    shutil.copytree(raw_demo, root)
    spans = json.loads((root / "timestamp.json").read_text())
    spans["video0.mp4"].append([5, 4])
    spans["gone.mp4"] = [[0, 1]]
    (root / "timestamp.json").write_text(json.dumps(spans))
    found = prepare(root, "stage=audit", "data.recordings.split.rule=official").rejected_by_split()
    assert found["dialogue: recording missing"] == {"train": 1}
    assert found["dialogue: span inverted"] == {"unknown": 1}
    assert "unknown" in capsys.readouterr().out


def test_an_unknown_stage_is_refused(prepare, raw_demo):
    with pytest.raises(MsencError, match=r"stage=cut: no such stage\. Expected segment, transcribe, speakers, audit"):
        prepare(raw_demo, "stage=cut")
    with pytest.raises(MsencError, match=r"stage=segment: no such stage\. Expected audit, or null"):
        prepare(raw_demo, "data=demo", "stage=segment")


def test_channels_are_mixed_or_speakers(prepare, raw_demo, listening, tmp_path):
    with pytest.raises(MsencError, match=r"data\.recordings\.channels: found .stereo., expected one of mix, speakers"):
        prepare(raw_demo, SPLIT, "data.recordings.channels=stereo")
    with pytest.raises(MsencError, match=r"no utterance was found in 3 dialogues. 3 x one channel"):
        prepare(raw_demo, SPLIT, "data.recordings.channels=speakers")


@pytest.mark.real
def test_the_raw_demo_is_found_out_by_real_models(home, tmp_path):
    whisper = Path(os.environ.get("MSENC_MODELS", "")) / "whisper-base"
    if "MSENC_MODELS" not in os.environ or not whisper.is_dir():
        pytest.skip("MSENC_MODELS names no folder with whisper-base")
    for package in ("silero_vad", "scenedetect", "resemblyzer"):
        if find_spec(package) is None:
            pytest.skip(f"needs {package} (extra raw)")
    figures = raw.measure(str(whisper), tmp_path, num_videos=1, dialogues_per_video=3)
    assert figures["dialogues"] == figures["of them with utterances"] == 3
    assert figures["boundaries F1 at 0.25 s"] >= 0.9
    assert figures["word error rate"] <= 0.25
    assert figures["speakers right"] >= 0.9


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda line: not line.rstrip().endswith("val"), "the split val has no dialogues"),
        (
            lambda line: not line.rstrip().endswith("val") or "Turn 0." in line,
            "no dialogue of the split val has a target",
        ),
    ],
)
def test_a_split_without_a_target_is_said_by_audit_and_prepare_and_by_training(
    prepare, train, tmp_path, capsys, change, found
):
    path = write_table(tmp_path / "raw", is_cut=False) / "utterances.csv"
    path.write_text("".join(filter(change, path.read_text().splitlines(keepends=True))))
    for stage in ("stage=audit", "stage=null"):
        prepare(path.parent, "modality=text", stage)
        assert "Without a target (a dialogue of two turns): val." in " ".join(capsys.readouterr().out.split())
    with pytest.raises(MsencError, match=rf"{found}.*targets found: train: 5,.*split=val.*prepare again"):
        train(["data=folder", "modality=text", "prompt.target=text", *TINY, *places(tmp_path)[:2]])


def test_a_split_to_validate_on_is_drawn_from_train_when_preparing(prepare, train, tmp_path):
    path = write_table(tmp_path / "raw", is_cut=False) / "utterances.csv"
    with pytest.raises(MsencError, match=r"data\.val=0\.4: the annotations have a split val already"):
        prepare(path.parent, "modality=text", "data.val=0.4")
    rows = [x for x in path.read_text().splitlines(keepends=True) if not x.rstrip().endswith("val")]
    more = [x.replace("train-talk", f"train-{n}") for n in range(3) for x in rows if "train" in x]
    path.write_text("".join(rows + more))
    before = prepare(path.parent, "modality=text")
    manifest = prepare(path.parent, "modality=text", "data.val=0.4")
    assert manifest.settings["val"] == 0.4
    assert "val" not in before.settings
    assert sorted(before.splits) == ["test", "train"]
    assert manifest.splits["val"].samples > 0
    assert manifest.splits["train"].samples + manifest.splits["val"].samples == before.splits["train"].samples
    given = ["data=folder", "modality=text", "prompt.target=text", *TINY, "align=none", *places(tmp_path)[:2]]
    with pytest.raises(MsencError, match=r"data\.val=0\.2: the data was prepared with another share \(.*: 0\.4\)"):
        train([*given, "data.val=0.2"], tmp_path / "refused")
    run = train([*given, "data.val=0.4", "trainer.max_epochs=1", "evaluate=val", "decoding.max_new_tokens=2"])
    assert read_json(run.folder / "run.json")["best_loss"] is not None


def test_without_validation_the_last_checkpoint_is_the_best_and_that_is_said(prepare, train, tmp_path, capsys):
    path = write_table(tmp_path / "raw", is_cut=False) / "utterances.csv"
    path.write_text("".join(x for x in path.read_text().splitlines(keepends=True) if not x.rstrip().endswith("val")))
    prepare(path.parent, "modality=text_audio")
    given = [
        "data=folder",
        "modality=text_audio",
        "prompt.target=text",
        *TINY,
        "align=transcript",
        *places(tmp_path)[:2],
    ]
    with pytest.raises(MsencError, match=r"the split val has no dialogues.*data\.val=null"):
        train(given, tmp_path / "refused")
    with pytest.raises(MsencError, match=r"data\.val: found 'test', expected one of val or a number or null"):
        train([*given, "data.val=test"])
    capsys.readouterr()
    run = train([*given, "data.val=null", "trainer.max_epochs=2", "align.steps=2", "decoding.max_new_tokens=2"])
    said = " ".join(capsys.readouterr().out.split())
    assert "Trained without validation" in said
    assert "loss by kind of token" in said
    assert "planted" not in said  # nothing is planted in one's own data
    record = read_json(run.folder / "run.json")
    assert (record["status"], record["epochs"], record["best_loss"]) == ("finished", 2, None)
    assert "last checkpoint is taken as the best" in record["warnings"][0]
    assert not (run.folder / "checkpoints" / "best.ckpt").exists()
    assert read_json(run.folder / "export" / "export.json")["checkpoint"] == "last"
    assert "nll" in read_json(next(run.folder.glob("evaluation/*/metrics.json")))
