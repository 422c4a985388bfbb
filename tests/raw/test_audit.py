import csv
import json
import os
import resource
import shutil
import struct
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest

from msenc.data.datamodule import DialogueDataModule
from msenc.data.dataset import StreamSpec
from msenc.models.encoders import LogMel, Pixels
from msenc.prepare.dataset import prepare_dataset
from msenc.prepare.features import StreamRecipe
from msenc.prompt import DialogueTokenizer, Prompt
from msenc.raw.annotations import MELD_FILES, read_meld, read_table
from msenc.raw.audit import audit_dataset
from msenc.store.manifest import DatasetManifest, read_rejections
from msenc.types import MsencError

COLUMNS = ("Utterance", "Speaker", "Dialogue_ID", "Utterance_ID", "Season", "Episode", "StartTime", "EndTime")
LOGMEL = {"sample_rate": 16000, "n_fft": 512, "hop_s": 0.05, "num_mels": 8}
PIXELS = {"fps": 2, "size": 4}
STREAMS = [
    StreamRecipe("audio", "logmel", 8, partial(LogMel, **LOGMEL), LOGMEL),
    StreamRecipe("video", "pixels", 16, partial(Pixels, **PIXELS), PIXELS),
]


def clock(seconds: float) -> str:
    return f"0:{int(seconds) // 60:02}:{seconds % 60:06.3f}"


def row(dia: int, utt: int, start: float, end: float, text: str = "", episode: int = 1) -> tuple:
    return (text or f"words {dia} {utt} {episode}", "Ana", dia, utt, 1, episode, clock(start), clock(end))


def write_root(root: Path, **splits: list[tuple]) -> Path:
    for number, (split, (name, clips)) in enumerate(MELD_FILES.items()):
        (root / clips).mkdir(parents=True)
        with (root / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(
                splits.get(split, [row(9, 0, 0, 1, f"{split} a", 7 + number), row(9, 1, 1, 2, "", 7 + number)])
            )
    return root


def write_clip(path: Path, seconds: float, sound: float | None = 0.3, picture: bool = True) -> None:
    """An MP4 with a tone of amplitude `sound`, or none, and a grey picture at 5 a second, or none."""
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=5, options={"preset": "ultrafast"}) if picture else None
        audio = container.add_stream("aac", rate=8000, layout="mono") if sound is not None else None
        if video:
            video.width = video.height = 16
            video.pix_fmt = "yuv420p"
            for i in range(max(int(5 * seconds), 1)):
                frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), i % 200, np.uint8), format="rgb24")
                container.mux(video.encode(frame))
        if audio:
            tone = (sound * np.sin(np.arange(int(8000 * seconds)) / 3)).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, 0
            container.mux(audio.encode(frame))
        for stream in filter(None, (video, audio)):
            container.mux(stream.encode(None))


def audit(root: Path, folder: Path, num_workers: int = 0):
    return audit_dataset("meld", read_meld(root), root, folder, num_workers)


def flagged(audit, *names: str) -> set[tuple[str, str]]:
    return {(f.id.removeprefix("meld/"), f.flag) for f in audit.flags if not names or f.flag in names}


# ------------------------------------------------------------------------------------------------ rows


def test_odd_rows_and_dialogues_are_flagged(tmp_path):
    train = [
        row(0, 0, 10, 12), row(0, 1, 11.5, 13), row(0, 4, 11, 14), row(0, 5, 80, 81),
        row(1, 0, 5, 5.2, "Hi"), row(1, 1, 6, 6), row(1, 2, 6, 67),
        row(1, 3, 70, 70.5, "too many words for such a short time"),
        (*row(2, 0, 0, 1, "It\x92s")[:6], "soon", "0:00:01"),
        row(3, 0, 200, 201, "Same"), row(3, 1, 201, 202, "words"),
        row(4, 0, 300, 301, "same"), row(4, 1, 301, 302, "Words"),
    ]  # fmt: skip
    found = flagged(audit(write_root(tmp_path / "raw", train=train), tmp_path / "out"))
    assert {f for f in found if f[0].startswith("train") and f[1] != "clip_missing"} == {
        ("train/dia0/utt1", "row_overlap"),
        ("train/dia0/utt4", "row_overlap"),
        ("train/dia0/utt4", "backward_time"),
        ("train/dia0/utt5", "long_gap"),
        ("train/dia0", "missing_ids"),
        ("train/dia1/utt0", "short"),
        ("train/dia1/utt1", "no_length"),
        ("train/dia1/utt2", "long"),
        ("train/dia1/utt3", "fast_text"),
        ("train/dia2/utt0", "repaired_text"),
        ("train/dia2/utt0", "unreadable_time"),
        ("train/dia2", "single_turn"),
        ("train/dia4", "duplicate_dialogue"),
    }


def test_what_stands_in_train_too_is_flagged(tmp_path):
    train = [row(0, 0, 100, 110, "I see."), row(0, 1, 110, 120)]
    test = [
        row(0, 0, 149, 155), row(0, 1, 155, 160, "I  SEE."),  # 29 s behind
        row(1, 0, 151, 155), row(1, 1, 155, 160),  # 31 s behind
        row(2, 0, 90, 130), row(2, 1, 130, 135),  # around it
        row(3, 0, 100, 110, episode=2), row(3, 1, 110, 111, episode=2),
        row(4, 0, 60, 71), row(4, 1, 69, 70),  # 29 s before
    ]  # fmt: skip
    root = write_root(tmp_path / "raw", train=train, test=test)
    result = audit(root, tmp_path / "out")
    assert flagged(result, "leakage", "text_in_train") == {
        ("test/dia0", "leakage"),
        ("test/dia2", "leakage"),
        ("test/dia4", "leakage"),
        ("test/dia0/utt1", "text_in_train"),
    }
    assert result.facts["test"]["leaking dialogues"] == 3
    assert result.facts["test"]["texts that occur in train (%)"] == 10.0
    # without a recording nobody can say
    for name, _ in MELD_FILES.values():
        text = (root / name).read_text().replace("Season", "Other")
        (root / name).write_text(text)
    result = audit(root, tmp_path / "out")
    assert flagged(result, "leakage") == set()
    assert result.facts["test"]["leaking dialogues"] == "not known: the annotations name no recording"


def test_a_clip_of_train_in_another_split_is_flagged_under_any_name(tmp_path):
    for number, name in enumerate(("a.mp4", "b.mp4", "c.mp4")):
        write_clip(tmp_path / name, 1.0 + number)
    shutil.copy(tmp_path / "a.mp4", tmp_path / "copy.mp4")
    clips = ["train,a.mp4", "train,gone.mp4", "val,b.mp4", "test,c.mp4", "test,gone.mp4", "test,copy.mp4", "test,a.mp4"]
    rows = [f"{clip},d{n},words {n} {turn}" for n, clip in enumerate(clips) for turn in range(2)]
    (tmp_path / "t.csv").write_text("split,clip,dialogue,text\n" + "\n".join(rows))
    result = audit_dataset(
        "own", read_table(tmp_path / "t.csv", "own", {"rule": "random"}), tmp_path, tmp_path / "out", 0
    )
    found = {(f.id, f.file, f.found) for f in result.flags if f.flag == "leakage"}
    assert found == {("own/test/d5", "copy.mp4", "own/train/d0"), ("own/test/d6", "a.mp4", "own/train/d0")}
    assert result.facts["test"]["leaking dialogues"] == 2


def own(root: Path, header: str, *rows: str):
    """The audit of a table."""
    (root / "t.csv").write_text("\n".join([f"dialogue,{header}", *rows]), encoding="utf-8")
    annotations = read_table(root / "t.csv", "own", {"rule": "random", "fractions": {"train": 1.0}, "seed": 1})
    return audit_dataset("own", annotations.stored_in(root), root, root / "out", 0)


def found_in(audit, *names: str) -> dict[str, tuple[str, str]]:
    return {f.id.removeprefix("own/train/"): (f.flag, f.found) for f in audit.flags if f.flag in names}


def test_who_speaks_while_another_speaker_does_is_flagged(tmp_path):
    rows = [
        "d,A,a.wav,0,4", "d,B,a.wav,3,6",  # 1 s of 4, and 1 of 3, which is a third
        "e,A,a.wav,0,4", "e,B,a.wav,2,6", "e,B,a.wav,2.5,3",
        "f,A,a.wav,0,4", "f,A,a.wav,1,3",
        "g,A,a.wav,0,4", "g,B,b.wav,0,4",
        "h,A,a.wav#channel=1,0,4", "h,B,a.wav#channel=2,1,2", "h,C,a.wav,3.5,4",
        "i,A,,,", "i,B,a.wav,0,4",
    ]  # fmt: skip
    result = own(tmp_path, "speaker,clip,start,end,text", *(f"{row},words {n}" for n, row in enumerate(rows)))
    assert found_in(result, "overlapping_speech") == {
        "e/utt0": ("overlapping_speech", "2.00 of 4.00 s"),
        "e/utt1": ("overlapping_speech", "2.00 of 4.00 s"),
        "e/utt2": ("overlapping_speech", "0.50 of 0.50 s"),
        "h/utt0": ("overlapping_speech", "1.50 of 4.00 s"),
        "h/utt1": ("overlapping_speech", "1.00 of 1.00 s"),
        "h/utt2": ("overlapping_speech", "0.50 of 0.50 s"),
    }


def test_names_of_one_speaker_in_several_spellings_are_flagged(tmp_path):
    speakers = {"d": ("Ana", "ANA", "ana:", "Ben"), "e": ("Ana", "Anna"), "f": ("ANA", "-1", "1"), "g": ("?", "!", "?")}
    rows = [f"{dialogue},,{name},words" for dialogue, names in speakers.items() for name in names]
    result = own(tmp_path, "clip,speaker,text", *rows)
    assert found_in(result, "speaker_spelling") == {"d": ("speaker_spelling", "Ana, ANA, ana:")}


def test_what_of_a_text_was_lost_or_is_no_speech_is_flagged(tmp_path):
    texts = {
        **dict.fromkeys(["Caf\ufffd", "??? ??", "#NAME?", "#REF!", "#N/A"], "lost_text"),
        **dict.fromkeys(["<i>Oh</i>", "Oh<br/>no", r"{\an8}Oh", '<font color="red">Oh'], "markup"),
        **dict.fromkeys(["Café", "What??", "?? ok", "#blessed", "2 < 3 > 1", "<3", "{laughs}", "N/A"], None),
    }
    result = own(tmp_path, "clip,text", *(f'd,,"{text.replace(chr(34), 2 * chr(34))}"' for text in texts))
    flags = {id: flag for id, (flag, _) in found_in(result, "lost_text", "markup").items()}
    assert flags == {f"d/utt{n}": flag for n, flag in enumerate(texts.values()) if flag}


# ------------------------------------------------------------------------------------------------ clips


@pytest.fixture
def clips(tmp_path) -> Path:
    """A train dialogue whose clips are: good, missing, text, mute, without sound, without picture, too long, a copy."""
    root = write_root(tmp_path / "raw", train=[row(0, u, 2 * u, 2 * u + 1) for u in range(8)])
    folder = root / "train_splits"
    write_clip(folder / "dia0_utt0.mp4", 1.0)
    (folder / "dia0_utt2.mp4").write_text("not a clip " * 99)
    write_clip(folder / "dia0_utt3.mp4", 1.0, sound=0.0)
    write_clip(folder / "dia0_utt4.mp4", 1.2, sound=None)
    write_clip(folder / "dia0_utt5.mp4", 1.0, picture=False)
    write_clip(folder / "dia0_utt6.mp4", 3.0)
    shutil.copy(folder / "dia0_utt0.mp4", folder / "dia0_utt7.mp4")
    write_clip(folder / "dia0_utt99.mp4", 1.0)
    return root


def test_odd_clips_are_flagged_and_rejected_in_the_words_of_preparation(clips, tmp_path):
    result = audit(clips, tmp_path / "out")
    assert flagged(result) - {(f"{s}/dia9/utt{u}", "clip_missing") for s in ("val", "test") for u in range(2)} == {
        ("train/dia0/utt1", "clip_missing"),
        ("train/dia0/utt2", "clip_corrupt"),
        ("train/dia0/utt3", "silent"),
        ("train/dia0/utt4", "sound_missing"),
        ("train/dia0/utt5", "picture_missing"),
        ("train/dia0/utt6", "length_deviation"),
        ("train/dia0/utt7", "duplicate_clip"),
        ("", "clip_without_row"),
        *((f"train/dia0/utt{u}", "low_sample_rate") for u in (0, 3, 5, 6, 7)),
    }
    assert [f.file for f in result.flags if f.flag == "clip_without_row"] == ["train_splits/dia0_utt99.mp4"]
    prepare_dataset("meld", read_meld(clips), clips, tmp_path / "out", STREAMS, num_workers=0)
    rejected = read_rejections(tmp_path / "out" / "audit" / "rejected.csv")
    assert set(rejected) == set(read_rejections(tmp_path / "out" / "rejected.csv"))
    assert set(rejected) == set(result.rejections)
    assert ("audio", "silent") in {(r.what, r.reason) for r in rejected}


def test_clips_of_other_capitals_and_clips_that_several_rows_name_are_flagged(tmp_path):
    write_clip(tmp_path / "a.mp4", 1.0)
    rows = ["d,A.MP4,one", "d,a.mp4,two", "d,a.mp4#channel=1,three", "d,gone.mp4,four", "e,gone.mp4,five"]
    result = own(tmp_path, "clip,text", *rows)
    assert found_in(result, "other_case", "shared_clip", "clip_without_row") == {
        "d/utt0": ("other_case", "A.MP4"),
        "d/utt1": ("shared_clip", "own/train/d/utt0"),
    }
    result = own(tmp_path, "clip,text,start,end", "d,a.mp4,one,0,0.5", "d,a.mp4,two,0.5,1", "d,a.mp4,three,0,0.5")
    assert found_in(result, "shared_clip") == {"d/utt2": ("shared_clip", "own/train/d/utt0")}


def test_a_file_whose_name_is_no_utf8_is_listed_by_its_bytes(tmp_path):
    write_clip(tmp_path / "a.mp4", 1.0)
    Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.mp4")).touch()
    result = own(tmp_path, "clip,text", "d,a.mp4,one", "d,café.mp4,two")
    assert [f.file for f in result.flags if f.flag == "clip_without_row"] == [r"caf\xe9.mp4"]
    assert {r.file for r in result.rejections} == {"café.mp4"}


def test_processes_and_the_cache_change_nothing(clips, tmp_path, monkeypatch):
    first = audit(clips, tmp_path / "a")
    assert audit(clips, tmp_path / "b", num_workers=2) == first
    names = ("audit.csv", "rejected.csv", "audit.json", "audit.html")
    before = {name: (tmp_path / "a" / "audit" / name).read_bytes() for name in names}
    monkeypatch.setattr("msenc.raw.probe.progress_bar", None)  # which every probing begins with
    assert audit(clips, tmp_path / "a") == first
    assert {name: (tmp_path / "a" / "audit" / name).read_bytes() for name in names} == before
    with pytest.raises(TypeError):
        audit(clips, tmp_path / "c")


# ------------------------------------------------------------------------------------------------ what records it


def test_dataset_records_the_audit_of_its_own_turns(clips, tmp_path):
    out = tmp_path / "out"
    assert prepare_dataset("meld", read_meld(clips), clips, out, [], num_workers=0).audit_hash == ""
    first = audit(clips, out)
    assert DatasetManifest.read(out).audit_hash == first.hash
    assert prepare_dataset("meld", read_meld(clips), clips, out, [], num_workers=0).audit_hash == first.hash
    write_clip(clips / "train_splits" / "dia0_utt1.mp4", 1.0)
    second = audit(clips, out)
    assert second.hash != first.hash
    assert DatasetManifest.read(out).audit_hash == second.hash
    path = clips / MELD_FILES["train"][0]
    path.write_text(path.read_text().replace("words 0 0", "other words"))
    assert (
        prepare_dataset("meld", read_meld(clips), clips, out, [], num_workers=0).audit_hash == ""
    )  # an audit of other turns


def test_runs_record_the_audit_and_what_a_filter_left_out(demo_home, call_script, train, capsys, tmp_path):
    for name in ("demo", "demo-raw"):
        shutil.copytree(demo_home / "data" / name, tmp_path / name)
    data, raw = tmp_path / "demo", tmp_path / "demo-raw"
    for clip in ("dia0_utt1.mp4", "dia3_utt0.mp4"):
        (raw / "train_splits" / clip).unlink()
    where = [f"data.dir={data}", f"data.root={raw}", "data.generate=null"]
    call_script("prepare.py", "stage=audit", "prepare_workers=0", *where)
    printed = capsys.readouterr().out
    assert "demo, audited" in printed
    assert "audio: clip missing" in printed
    hash = DatasetManifest.read(data).audit_hash
    assert hash == json.loads((data / "audit" / "audit.json").read_text())["hash"]
    small = ["modality=text", "trainer.max_steps=1", "evaluate=null", "data.batch_size=4", *where[:1]]
    plain, filtered = train(small), train([*small, "data.filter=no_clip_missing"], "filtered")
    facts = [json.loads((run.folder / "run.json").read_text()) for run in (plain, filtered)]
    assert [f["audit_hash"] for f in facts] == [hash, hash]
    assert [f["left_out"] for f in facts] == [{}, {"train": {"dialogues": 0, "utterances": 2}}]
    assert facts[0]["history"]["targets"] == facts[1]["history"]["targets"] + 2
    assert facts[0]["task_hash"] != facts[1]["task_hash"]
    assert "excluded from train  │ 0 dialogues, 2 utterances" in capsys.readouterr().out


def test_an_unknown_stage_is_refused(compose):
    from msenc.pipelines.prepare import prepare

    with pytest.raises(MsencError, match=r"stage=audti: no such stage\. Expected audit"):
        prepare(compose(["stage=audti"], "prepare"))


def test_a_full_disk_is_named_and_leaves_no_audit(clips, tmp_path):
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))  # as on a disk that is full
    try:
        with pytest.raises(MsencError, match=r"audit/\S+: cannot be written \(File too large\)"):
            audit(clips, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (out / "audit" / "audit.json").exists()
    assert not list(out.glob("**/.*"))
    audit(clips, out)
    assert (out / "audit" / "audit.json").exists()


# ------------------------------------------------------------------------------------------------ MELD


@pytest.fixture(scope="module")
def meld(tmp_path_factory) -> Path:
    """MELD's own tables, and rendered clips for the dialogues that its known bad clips are in."""
    shared = os.environ.get("MSENC_SHARED", "")
    source = Path(shared) / "data" / "meld"
    if not shared or not source.is_dir():
        pytest.skip("MSENC_SHARED names no folder with MELD's annotations")
    root = tmp_path_factory.mktemp("meld")
    for name, clips in MELD_FILES.values():
        shutil.copy(source / name, root / name)
        (root / clips).mkdir()
    for dialogue in read_meld(root).dialogues:
        if dialogue.id.removeprefix("meld/") not in RENDERED:
            continue
        for u in dialogue.utterances:
            id = f"{dialogue.id.removeprefix('meld/')}/utt{u.id}"
            if BAD.get(id) == "clip corrupt":
                write_clip(root / u.clip, 2.0)
                (root / u.clip).write_bytes((root / u.clip).read_bytes()[:900])
            elif id not in BAD or BAD[id] == "length":
                write_clip(root / u.clip, min(u.end_s - u.start_s, 3.0))
                with (root / u.clip).open("ab") as file:  # no two clips alike, even where they last as long
                    file.write(struct.pack(">I4s", 8 + len(id), b"free") + id.encode())
            elif BAD[id] == "no sound":
                write_clip(root / u.clip, 1.0, sound=None)
            elif BAD[id] == "no picture":
                write_clip(root / u.clip, 1.0, picture=False)
    write_clip(root / "train_splits" / "dia60_utt0.mp4", 1.0)  # a dialogue that the tables lack
    return root


BAD = {
    "train/dia125/utt3": "clip corrupt",
    "train/dia309/utt0": "clip missing",
    "train/dia793/utt0": "clip missing",
    "val/dia110/utt7": "clip missing",
    "test/dia38/utt4": "length",
    "test/dia220/utt0": "length",
    "test/dia155/utt3": "no sound",
    "test/dia279/utt15": "no picture",
}
RENDERED = {id.rpartition("/")[0] for id in BAD}


def test_melds_tables_have_their_known_facts(meld, tmp_path):
    result = audit(meld, tmp_path / "out")
    splits = ("train", "val", "test")

    def facts(name):
        return tuple(result.facts[s].get(name) for s in splits)

    def flags(name):
        return tuple(result.flagged_by_split().get(name, {}).get(s, 0) for s in splits)

    assert facts("utterances") == (9989, 1109, 2610)
    assert facts("dialogues") == (1038, 114, 280)
    assert facts("longest dialogue") == (24, 23, 33)
    assert facts("samples") == (8951, 995, 2330)
    assert facts("samples with another speaker") == (6942, 783, 1765)
    assert facts("speakers") == (260, 47, 100)
    assert facts("median length (s)") == (2.46, 2.45, 2.46)
    assert [round(s, 1) for s in facts("99th percentile (s)")] == [11.8, 11.9, 11.4]
    assert [round(s, 1) for s in facts("longest (s)")] == [41.0, 28.5, 304.9]
    assert facts("hours, without what is longer than 60 s") == (8.71, 0.96, 2.25)
    assert facts("texts beyond ASCII") == (2740, 308, 757)
    assert facts("texts with a bracket") == (7, 1, 1)
    assert facts("missing utterance ids") == (90, 4, 5)
    assert facts("repaired texts") == (0, 0, 0)
    assert facts("leaking dialogues") == (None, 44, 127)
    assert facts("texts that occur in train (%)") == (None, 12.2, 12.7)
    assert flags("missing_ids") == (65, 2, 2)
    assert flags("single_turn") == (70, 6, 12)
    assert flags("row_overlap") == (651, 66, 105)
    assert flags("long_gap") == (19, 1, 12)
    assert flags("long") == (0, 0, 2)
    assert flags("no_length") == (0, 0, 1)
    assert tuple(map(sum, zip(flags("short"), flags("no_length"), strict=True))) == (151, 18, 54)
    assert flags("leakage") == (0, 44, 127)
    names = {u.speaker for d in read_meld(meld).dialogues for u in d.utterances}
    assert {"All", "Both", "Ross and Joey", "Nurse #1"} <= names
    assert any("\u2019" in name for name in names)


def test_melds_known_bad_clips_are_named_with_their_reasons(meld, tmp_path):
    result = audit(meld, tmp_path / "out")
    named = {}
    for r in result.rejections:
        id = r.id.removeprefix("meld/")
        if id.rpartition("/")[0] in RENDERED:
            named.setdefault(id, set()).add((r.what, r.reason))
    both = {"clip corrupt": {"audio", "video"}, "clip missing": {"audio", "video"}}
    both |= {"no sound": {"audio"}, "no picture": {"video"}}
    expected = {id: {(what, reason) for what in both[reason]} for id, reason in BAD.items() if reason != "length"}
    assert named == expected
    found = flagged(result, "long", "no_length", "length_deviation")
    for id, flag in (("test/dia38/utt4", "long"), ("test/dia220/utt0", "long"), ("test/dia155/utt3", "no_length")):
        assert (id, flag) in found
        assert (id, "length_deviation") in found
    details = {f.id: f.found for f in result.flags if f.flag == "long"}
    assert details == {"meld/test/dia38/utt4": "304.9 s", "meld/test/dia220/utt0": "235.1 s"}
    assert [f.file for f in result.flags if f.flag == "clip_without_row"] == ["train_splits/dia60_utt0.mp4"]
    assert sum(r.reason == "clip missing" and r.what == "audio" for r in result.rejections) > 13_000  # not rendered


def test_utterances_of_melds_bad_clips_are_used_in_their_other_streams(meld, tiny_models, tmp_path):
    from msenc.models.connector import Mlp
    from msenc.models.conversation import ConversationModel
    from msenc.models.llm import load_llm, load_tokenizer

    out = tmp_path / "out"
    prepare_dataset("meld", read_meld(meld), meld, out, STREAMS, num_workers=0)
    specs = {"audio": StreamSpec("logmel", 8, 2, LOGMEL), "video": StreamSpec("pixels", 16, 3, PIXELS)}
    prompt = Prompt(instruction="Talk.\n", turn="{speaker}:{video}{audio} {text}\n", response="{speaker}:")
    tokenizer = DialogueTokenizer(prompt, load_tokenizer(str(tiny_models["llama"])))
    module = DialogueDataModule(out, specs, tokenizer, batch_size=1)
    module.setup()
    llm = load_llm(str(tiny_models["llama"]), freeze=True)
    model = ConversationModel(llm, {name: Mlp(s.dim, 16, s.num_queries, 8) for name, s in specs.items()})
    has = {"clip corrupt": [], "clip missing": [], "no sound": ["video"], "no picture": ["audio"]}
    for id in BAD:
        split, name, utt = id.split("/")
        dataset = module.dataset(split)
        index = dataset.ids.index(f"meld/{split}/{name}")
        turns = [f"utt{u.id}" for u in dataset.dialogue(index).utterances]
        _, features = dataset[index]
        present = [[s for s in specs if features[s][k] is not None] for k in range(len(turns))]
        for turn, streams in zip(turns, present, strict=True):
            bad = BAD.get(f"{split}/{name}/{turn}", "length")
            assert streams == has.get(bad, ["audio", "video"]), (id, turn)
        assert utt in turns
        batch = module.collate_fn()([(*dataset[index], None)])
        assert len(batch.target_ids) == len(turns) - 1
        assert np.isfinite(model(batch).nll.detach().numpy()).all()
