"""Published layouts, made up in small: their statements come out as a table's would, and odd folders are refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from msenc.demo.clip_writer import write_clip
from msenc.raw.annotations import Annotations
from msenc.raw.layouts.avamerg import AvaMerg
from msenc.raw.layouts.dailytalk import DailyTalk
from msenc.raw.layouts.hub import HubDataset
from msenc.raw.layouts.iemocap import Iemocap
from msenc.raw.layouts.layout import Layout, read_layout
from msenc.raw.layouts.seamless import Seamless
from msenc.speech.wav import write_wav
from msenc.store.labels import LABELS, read_labels
from msenc.types import MsencError

RATE = 16_000
NOISE = np.random.default_rng(1).normal(0, 0.1, 2 * RATE).astype(np.float32)
FRAMES = np.random.default_rng(1).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)


def write_media(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".wav":
        write_wav(path, NOISE, RATE)
    else:
        write_clip(path.with_suffix(".mp4"), FRAMES, NOISE, 6, RATE)
        path.with_suffix(".mp4").rename(path)


def write(path: Path, text: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def write_dailytalk(root: Path) -> None:
    said = {
        str(dialogue): {
            str(turn): {
                "dialog_idx": dialogue,
                "utterance_idx": turn,
                "speaker": turn % 2,
                "text": f"Turn {turn}.",
                "emotion": "no emotion" if turn else "happiness",
                "act": "inform",
                "topic": "work",
            }
            for turn in (1, 0, 10, 2)
        }
        for dialogue in range(5)
    }
    write(root / "metadata.json", json.dumps(said))
    for dialogue, turns in said.items():
        for turn in turns.values():
            write_media(root / "data" / dialogue / f"{turn['utterance_idx']}_{turn['speaker']}_d{dialogue}.wav")


def write_iemocap(root: Path) -> None:
    for session in range(1, 6):
        name = f"Ses{session:02}F_impro01"
        here = root / f"Session{session}"
        lines = [
            f"{name}_M000 [007.5712-008.4750]: Do you have your forms?",
            f"{name}_F000 [006.2901-007.2357]: Excuse me.",
            f"{name}_FXX0 [009.0000-009.5000]: [LAUGHTER]",
            "M: Yeah.",
        ]
        write(here / "dialog" / "transcriptions" / f"{name}.txt", "\r\n".join(lines))
        write(here / "dialog" / "transcriptions" / f"._{name}.txt", b"\0\5\x16\7")
        felt = [
            "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]",
            f"[6.2901 - 7.2357]\t{name}_F000\tneu\t[2.5000, 2.5000, 2.5000]",
            "C-E2:\tNeutral;\t()",
            f"[7.5712 - 8.4750]\t{name}_M000\txxx\t[2.5000, 2.5000, 2.5000]",
            f"[9.9000 - 9.9500]\t{name}_M001\tfru\t[2.5000, 2.5000, 2.5000]",
        ]
        write(here / "dialog" / "EmoEvaluation" / f"{name}.txt", "\n".join(felt))
        for utterance in ("F000", "M000"):
            write_media(here / "sentences" / "wav" / name / f"{name}_{utterance}.wav")
        write_media(here / "dialog" / "avi" / "DivX" / f"{name}.avi")


def write_avamerg(root: Path) -> None:
    for part in ("train", "test"):
        conversations = []
        for number in range(1, 9 if part == "train" else 3):
            said = [
                {"index": 0, "role": "speaker", "utterance": "I lost my job."},
                {"index": 1, "role": "listener", "utterance": "Oh no."},
                {"index": 2, "role": "speaker", "utterance": "I found another!"},
            ]
            turns = [
                {
                    "turn_id": str(turn),
                    "context": "",
                    "dialogue_history": said[: 2 * turn + 1],
                    "response": ["Oh no.", "Congratulations!"][turn],
                    "chain_of_empathy": {"speaker_emotion": ["sad", "excited"][turn], "event_scenario": "work"},
                }
                for turn in range(2)
            ]
            profile = {"age": "young", "gender": "male", "timbre": "high"}
            conversations.append(
                {
                    "conversation_id": f"{number:05}",
                    "speaker_profile": {**profile, "ID": 28},
                    "listener_profile": {**profile, "ID": 7},
                    "topic": "work",
                    "turns": turns,
                }
            )
            for turn, voice in enumerate((28, 7, 28, 7)):
                name = f"dia{number:05}utt{turn}_{voice}"
                write_media(root / f"{part}_audio" / "audio_v5_0" / f"{name}.wav")
                write_media(root / f"{part}_video" / "video_v5_0" / f"{name}.mp4")
        write(root / f"{part}.json", json.dumps(conversations))


INTERACTIONS = {split: f"V00_S0809_I0000058{number}" for number, split in enumerate(("train", "dev", "test"))}


def write_seamless(root: Path) -> None:
    for split, has_folders in (("train", False), ("dev", True), ("test", False)):
        folder = root / "improvised" / split
        for who, starts in (("P0947", (0.0, 1.0)), ("P0948A", (0.5,))):
            name = f"{INTERACTIONS[split]}_{who}"
            spans = [{"transcript": f"From {s}.", "start": s, "end": s + 0.4, "words": []} for s in starts]
            if has_folders:
                write(folder / "transcript" / f"{name}.jsonl", "".join(json.dumps(span) + "\n" for span in spans))
                write(folder / "vad" / f"{name}.jsonl", '{"start": 0, "end": 1}\n')
                write(folder / "3P-R" / f"{name}.json", "[]")
                media = {"audio": ".wav", "video": ".mp4"}
            else:
                value = {"id": name, "metadata:transcript": spans, "metadata:vad": []}
                write(folder / "0000" / "0005" / f"{name}.json", json.dumps(value))
                media = {"0000/0005": ".wav", "0000/0005/": ".mp4"}
            for place, suffix in media.items():
                write_media(folder / place / f"{name}{suffix}")


LAYOUTS: dict[str, tuple[Callable[[Path], None], Layout]] = {
    "dailytalk": (write_dailytalk, DailyTalk({"train": 0.6, "val": 0.2, "test": 0.2})),
    "iemocap": (write_iemocap, Iemocap([4], [5])),
    "avamerg": (write_avamerg, AvaMerg(0.25)),
    "seamless": (write_seamless, Seamless()),
}


@pytest.fixture(params=LAYOUTS)
def name(request):
    return request.param


def read(root: Path, name: str, encoding: str | None = None) -> Annotations:
    return read_layout(LAYOUTS[name][1], root, name, None, encoding)


def turns_of(found: Annotations, split: str) -> list[tuple]:
    dialogue = next(d for d in found.dialogues if d.split == split)
    return [(u.speaker, u.text, u.clip, u.audio) for u in dialogue.utterances]


def test_dailytalk(tmp_path):
    write_dailytalk(tmp_path)
    found = read(tmp_path, "dailytalk")
    assert [d.split for d in found.dialogues] == ["train"] * 3 + ["val", "test"]
    number = found.dialogues[0].id.rpartition("/")[2]
    turns = turns_of(found, "train")
    assert [text for _, text, _, _ in turns] == ["Turn 0.", "Turn 1.", "Turn 2.", "Turn 10."]  # by numbers, not letters
    assert turns[3] == ("0", "Turn 10.", f"data/{number}/10_0_d{number}.wav", None)
    assert found.labels[f"dailytalk/train/{number}/utt0"] == {"Emotion": "happiness", "Act": "inform"}


def test_iemocap(tmp_path):
    write_iemocap(tmp_path)
    found = read(tmp_path, "iemocap")
    assert [(d.id, d.split) for d in found.dialogues][2:] == [
        ("iemocap/train/Ses03F_impro01", "train"),
        ("iemocap/val/Ses04F_impro01", "val"),
        ("iemocap/test/Ses05F_impro01", "test"),
    ]
    scene, wavs = "Session5/dialog/avi/DivX/Ses05F_impro01.avi", "Session5/sentences/wav/Ses05F_impro01/Ses05F_impro01"
    assert turns_of(found, "test") == [
        ("Ses05F", "Excuse me.", f"{scene}#t=6.290,7.236", f"{wavs}_F000.wav"),
        ("Ses05M", "Do you have your forms?", f"{scene}#t=7.571,8.475", f"{wavs}_M000.wav"),
        ("Ses05F", "[LAUGHTER]", f"{scene}#t=9.000,9.500", f"{wavs}_FXX0.wav"),
    ]
    assert found.labels["iemocap/test/Ses05F_impro01/utt0"] == {"Emotion": "neutral"}
    assert found.labels["iemocap/test/Ses05F_impro01/utt1"] == {}  # nobody agreed
    reasons = [(r.reason, r.found) for r in found.rejections if r.id.startswith("Ses05")]
    assert reasons == [("no utterance", "M: Yeah."), ("emotion without a transcription", "")]
    of_audio = read_layout(Iemocap([], [5], video=False), tmp_path, "iemocap", None, None)
    first = of_audio.dialogues[0].utterances[0]
    assert (first.clip, first.audio) == ("Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav", None)
    assert {d.split for d in of_audio.dialogues} == {"train", "test"}


def test_avamerg(tmp_path):
    write_avamerg(tmp_path)
    found = read(tmp_path, "avamerg")
    assert [d.split for d in found.dialogues] == ["train"] * 6 + ["val"] * 2 + ["test"] * 2
    assert turns_of(found, "test") == [
        (
            who,
            text,
            f"test_video/video_v5_0/dia00001utt{number}_{voice}.mp4",  # train has files of the same names
            f"test_audio/audio_v5_0/dia00001utt{number}_{voice}.wav",
        )
        for number, (who, text, voice) in enumerate(
            [
                ("speaker", "I lost my job.", 28),
                ("listener", "Oh no.", 7),
                ("speaker", "I found another!", 28),
                ("listener", "Congratulations!", 7),
            ]
        )
    ]
    labels = [found.labels[f"avamerg/test/test_00001/utt{n}"] for n in range(4)]
    assert labels == [{"Emotion": "sad"}, {}, {"Emotion": "excited"}, {}]


def test_seamless(tmp_path):
    write_seamless(tmp_path)
    found = read(tmp_path, "seamless")
    for split, stem, seen, heard in (
        ("train", INTERACTIONS["train"], "improvised/train/0000/0005", "improvised/train/0000/0005"),
        ("val", INTERACTIONS["dev"], "improvised/dev/video", "improvised/dev/audio"),
    ):
        assert turns_of(found, split) == [
            (who, f"From {s}.", f"{seen}/{stem}_{who}.mp4#t={t}", f"{heard}/{stem}_{who}.wav#t={t}")
            for who, s, t in (
                ("P0947", 0.0, "0.000,0.400"),
                ("P0948A", 0.5, "0.500,0.900"),
                ("P0947", 1.0, "1.000,1.400"),
            )
        ]
    assert found.labels[f"seamless/val/{INTERACTIONS['dev']}/utt0"] == {"Setting": "improvised"}
    (tmp_path / "improvised/train/0000/0005/V00_S0809_I00000580_P0948A.json").unlink()
    alone = read(tmp_path, "seamless")
    assert [d.split for d in alone.dialogues] == ["val", "test"]
    assert [(r.id, r.reason) for r in alone.rejections] == [
        (INTERACTIONS["train"], "interaction without the other's side")
    ]


def test_a_layout_is_prepared_as_its_config_says(name, compose, tmp_path):
    """Clips are decoded where they lie; what is missing is listed by its name, files that nobody names are flagged."""
    from msenc.pipelines.prepare import prepare

    root = tmp_path / "raw"
    LAYOUTS[name][0](root)
    clips = sorted(path for path in root.rglob("*.wav"))
    clips[0].unlink()
    write_media(clips[0].with_name("nobody_names_me.wav"))

    def run(*more):
        streams = "text_audio" if name == "dailytalk" else "text_audio_video"
        given = [f"data={name}", f"data.root={root}", f"modality={streams}", f"data.dir={tmp_path / 'prepared'}"]
        return prepare(compose([*given, "prepare_workers=0", "align=none", *more], "prepare"))

    manifest = run()
    assert {*manifest.splits} == {"train", "val", "test"}
    missing = {"iemocap": 1 + 5, "seamless": 2}.get(name, 1)  # turns; one recording has two of Seamless
    assert manifest.rejected.get("audio: clip missing", 0) == missing
    assert clips[0].name in (tmp_path / "prepared" / "rejected.csv").read_text()
    prepared = {stream: sum(info.utterances.values()) for stream, info in manifest.streams.items()}
    assert prepared["audio-logmel"] == prepared["turns"] - missing
    if name in ("avamerg", "seamless"):
        assert prepared["video-pixels"] == prepared["turns"]
    audit = run("stage=audit")
    assert sum(audit.flagged_by_split()["clip_without_row"].values()) == 1
    labels = read_labels(tmp_path / "prepared", LABELS, "")
    assert {column for found in labels.values() for column in found} >= {"Setting" if name == "seamless" else "Emotion"}


MULTIDIALOG = HubDataset(
    {"dialogue": "conv_id", "turn": "utterance_id", "speaker": "from", "text": "value", "audio": "audio"},
    {"Emotion": "emotion"},
    {"train": "train", "valid_freq": "val", "test_rare": "test"},
    {"train": 0.5, "val": 0.25, "test": 0.25},
)


def hub_rows(tmp_path: Path, dialogues: int = 1) -> list[dict]:
    write_media(tmp_path / "one.wav")
    sound = (tmp_path / "one.wav").read_bytes()
    return [
        {
            "conv_id": f"t/{dialogue}",
            "utterance_id": turn,
            "from": ("human", "gpt")[turn % 2],
            "value": f"Turn {turn}.",
            "emotion": "Happy",
            "audio": {"bytes": sound if turn else None, "path": f"t_{turn}k.wav" if turn else None},
        }
        for dialogue in range(dialogues)
        for turn in (1, 0, 10, 2)
    ]


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_data_set_of_the_hub(kind, tmp_path):
    rows, root = hub_rows(tmp_path), tmp_path / "raw"
    if kind == "parquet":
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        for split in ("train", "valid_freq", "test_rare"):
            path = root / "data" / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        datasets = pytest.importorskip("datasets")
        made = datasets.Dataset.from_list(rows)
        datasets.DatasetDict(dict.fromkeys(("train", "valid_freq", "test_rare"), made)).save_to_disk(root)
    for _ in range(2):  # the second time, clips lie there
        found = read_layout(MULTIDIALOG, root, "multidialog", None, None)
        assert [d.id for d in found.dialogues] == [
            f"multidialog/{split}-t_0" for split in ("train/train", "val/valid_freq", "test/test_rare")
        ]
        turns = turns_of(found, "val")
        assert [(who, text) for who, text, _, _ in turns] == [
            ("human", "Turn 0."),
            ("gpt", "Turn 1."),
            ("human", "Turn 2."),
            ("human", "Turn 10."),
        ]
        assert [clip for _, _, clip, _ in turns][:2] == [None, "clips/valid_freq-0000001-audio.wav"]
    assert (root / "clips" / "train-0000001-audio.wav").read_bytes() == rows[0]["audio"]["bytes"]
    assert found.labels["multidialog/val/valid_freq-t_0/utt0"] == {"Emotion": "Happy"}


def test_a_data_set_of_one_split_is_split(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (root := tmp_path / "raw").mkdir()
    parquet.write_table(pa.Table.from_pylist(hub_rows(tmp_path, 8)), root / "all.parquet")
    found = read_layout(MULTIDIALOG, root, "mine", None, None)
    assert [d.split for d in found.dialogues] == ["train"] * 4 + ["val"] * 2 + ["test"] * 2


@pytest.mark.parametrize(
    ("change_rows", "name", "refusal"),
    [
        (
            lambda rows: [r.pop("value") for r in rows],
            "train",
            r"no column 'value', which data\.layout\.columns\.text names",
        ),
        (
            lambda rows: [r.update(utterance_id="b") for r in rows],
            "train",
            r"row 1: the turn is 'b'; expected a number",
        ),
        (lambda rows: [r.update(audio=3) for r in rows], "train", r"train-0000001-audio is no clip; expected bytes"),
        (lambda rows: [r.update(audio={"path": "/etc/x.wav"}) for r in rows], "train", r"is /etc/x\.wav, outside of"),
        (
            lambda rows: [r.update(audio={"path": "../x.wav"}) for r in rows],
            "train",
            r"clip is '\.\./x\.wav'; expected a path",
        ),
        (lambda rows: None, "extra", r"splits says nothing of 'extra'\. Give it: data\.layout\.splits\.extra=train"),
    ],
)
def test_another_data_set_of_the_hub_is_refused(change_rows, name, refusal, tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = hub_rows(tmp_path)
    (root := tmp_path / "raw").mkdir()
    parquet.write_table(pa.Table.from_pylist(hub_rows(tmp_path)), root / "valid_freq-0.parquet")
    change_rows(rows)
    parquet.write_table(pa.Table.from_pylist(rows), root / f"{name}-0.parquet")
    with pytest.raises(MsencError, match=refusal):
        read_layout(MULTIDIALOG, root, "mine", None, None)


def test_what_is_no_data_set_of_the_hub_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    with pytest.raises(MsencError, match=r"found no dataset_dict\.json, state\.json or \*\.parquet"):
        read_layout(MULTIDIALOG, tmp_path, "mine", None, None)
    write(tmp_path / "train-0.parquet", b"PAR1 and nothing")
    with pytest.raises(MsencError, match=r"train-0\.parquet: cannot be read \(.*Expected a folder of datasets"):
        read_layout(MULTIDIALOG, tmp_path, "mine", None, None)
    write(tmp_path / "dataset_dict.json", '{"splits": ["../elsewhere"]}')
    with pytest.raises(MsencError, match=r"found the split '\.\./elsewhere', expected the name of a folder"):
        read_layout(MULTIDIALOG, tmp_path, "mine", None, None)
    with pytest.raises(MsencError, match=r"expected dialogue and text, and any of .*not right: dialogue, wrods"):
        HubDataset({"text": "a", "wrods": "b"}, {}, {}, {"train": 1.0})


ODD = {
    "dailytalk": [
        (lambda root: (root / "metadata.json").unlink(), r"metadata\.json: missing\. .*folder dailytalk"),
        (lambda root: write(root / "metadata.json", "[]"), r"metadata\.json.*found a list of 0, expected an object"),
        (lambda root: write(root / "metadata.json", b'{"0": "\xff"}'), r"row 1: not in UTF-8\. .*data\.encoding=NAME"),
        (
            lambda root: change(root / "metadata.json", '"dialog_idx": 3', '"dialog_idx": 4'),
            r"3\.0: found the utterance 0_0_d4, expected one of dialogue 3",
        ),
        (
            lambda root: change(root / "metadata.json", '"speaker": 1', '"speaker": "x"'),
            r"speaker: found 'x', expected",
        ),
    ],
    "iemocap": [
        (lambda root: (root / "Session4").rename(root / "gone"), r"no folder Session4; found Session1, .*val_sessions"),
        (
            lambda root: (root / "Session2/dialog/EmoEvaluation/Ses02F_impro01.txt").unlink(),
            r"EmoEvaluation/Ses02F_impro01\.txt: missing",
        ),
        (
            lambda root: (root / "Session2/dialog/transcriptions/Ses02F_impro01.txt").unlink(),
            r"Session2/dialog/transcriptions: no transcription",
        ),
        (
            lambda root: change(
                root / "Session1/dialog/transcriptions/Ses01F_impro01.txt", "Ses01F_impro01_F", "Ses01F_impro02_F"
            ),
            r"row 2: found an utterance of Ses01F_impro02, expected one of Ses01F_impro01",
        ),
        (
            lambda root: change(root / "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt", "\tneu\t", "\tglad\t"),
            r"row 2: found the emotion 'glad', expected one of ang, hap",
        ),
        (
            lambda root: write(
                root / "Session1/dialog/transcriptions/Ses01F_impro01.txt",
                "Ses01F_impro01_F000 [1.0-2.0]: Привет, как дела?".encode("cp1251"),
            ),
            r"row 1: neither UTF-8 nor text in cp1252.*data\.encoding=cp1251",
        ),
    ],
    "avamerg": [
        (
            lambda root: [(root / f"{part}.json").unlink() for part in ("train", "test")],
            r"train\.json: missing\. .*data\.root",
        ),
        (lambda root: change(root / "train.json", '"00003"', '"00004"'), r"conversation train_00004 is there twice"),
        (
            lambda root: change(root / "test.json", '"role"', '"who"'),
            r"test\.json, \[0\]\.turns\[0\]\.dialogue_history\[0\]",
        ),
    ],
    "seamless": [
        (lambda root: (root / "improvised").rename(root / "other"), r"found no folder improvised/dev"),
        (lambda root: (root / "improvised/dev/transcript").rename(root / "improvised/dev/text"), r"dev: no transcript"),
        (
            lambda root: change(
                root / "improvised/train/0000/0005/V00_S0809_I00000580_P0947.json", '"id": "V00', '"id": "V01'
            ),
            r"found the transcript of V01_S0809_I00000580_P0947, expected that of V00",
        ),
        (
            lambda root: change(
                root / "improvised/dev/transcript/V00_S0809_I00000581_P0947.jsonl", '"start": 1.0', '"at": 1'
            ),
            r"P0947\.jsonl, row 2: found no start",
        ),
    ],
}


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(("name", "spoil", "refusal"), [(n, *case) for n, cases in ODD.items() for case in cases])
def test_another_folder_is_refused_in_one_line(name, spoil, refusal, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "write_media", lambda path: None)
    LAYOUTS[name][0](tmp_path)
    spoil(tmp_path)
    with pytest.raises(MsencError, match=refusal) as refused:
        read(tmp_path, name)
    assert "\n" not in str(refused.value)


def test_what_a_row_cannot_be_is_listed(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "write_media", lambda path: None)
    write_seamless(tmp_path)
    change(tmp_path / "improvised/dev/transcript/V00_S0809_I00000581_P0947.jsonl", '"end": 0.4', '"end": -1')
    change(tmp_path / "improvised/dev/transcript/V00_S0809_I00000581_P0948A.jsonl", "From 0.5.", " ")
    found = read(tmp_path, "seamless")
    assert [(r.what, r.reason, r.row) for r in found.rejections] == [
        ("clip", "no span of time", 1),
        ("row", "empty text", 1),
    ]
    with pytest.raises(MsencError, match=r"no such folder\. Expected the data set as it is published"):
        read(tmp_path / "absent", "seamless")
    with pytest.raises(MsencError, match="session 4 is in val_sessions and in test_sessions"):
        Iemocap([4], [4, 5])
