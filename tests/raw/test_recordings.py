import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from clips import write_media

from msenc.demo.raw_demo import read_truth, write_raw_demo
from msenc.raw.recordings import Recipe, transcribe_recordings
from msenc.raw.segment import SegmentSettings
from msenc.types import MsencError
from msenc.work.items import Part

for package in ("silero_vad", "scenedetect"):
    pytest.importorskip(package)

SPLIT = {"rule": "random", "fractions": {"train": 0.5, "test": 0.5}, "seed": 1}
ALONE = {**SPLIT, "fractions": {"train": 1.0}}


class LengthRecogniser:
    """Says how long it hears each sound."""

    calls = 0

    def texts(self, sounds):
        type(self).calls += 1
        return [f"{len(sound) / 16000:.1f} seconds" for sound in sounds]


def pitch_encoder():
    """Tells the demo's women from its men by where their sound's energy lies."""

    def encode(sound):
        power = np.abs(np.fft.rfft(sound, 16000))[60:400] ** 2
        is_high = (power * np.arange(60, 400)).sum() / power.sum() > 165
        return np.eye(2, dtype=np.float32)[int(is_high)]

    return encode


def _recipe(**changes):
    parts = {
        "segment": SegmentSettings(),
        "make_recogniser": LengthRecogniser,
        "make_encoder": pitch_encoder,
        "settings": {"recogniser": "length", "speaker_encoder": "pitch"},
        "split": SPLIT,
    }
    return Recipe(**{**parts, **changes})


def _rows(transcript):
    with transcript.file.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def raw_demo(tmp_path_factory):
    root = tmp_path_factory.mktemp("recordings") / "demo"
    write_raw_demo(root, num_videos=1, dialogues_per_video=2, seed=3)
    return root


def test_every_utterance_stands_in_the_table_once(raw_demo, tmp_path):
    transcript = transcribe_recordings("own", raw_demo, tmp_path / "data", _recipe(), 0)
    truth = read_truth(raw_demo)
    rows = _rows(transcript)
    assert [row["dialogue"] for row in rows] == [f"dia{n}" for n, d in enumerate(truth) for _ in d.utterances]
    for row, said in zip(rows, (u for d in truth for u in d.utterances), strict=True):
        assert float(row["start"]) == pytest.approx(said.start_s, abs=0.25)
        assert float(row["end"]) == pytest.approx(said.end_s, abs=0.25)
        assert row["clip"] == "video0.mp4"
    assert {row["split"] for row in rows} == {"train", "test"}
    assert transcript.rejections == []


def test_what_is_done_is_not_done_again(raw_demo, tmp_path):
    first = transcribe_recordings("own", raw_demo, tmp_path / "data", _recipe(), 0).file.read_bytes()
    before = LengthRecogniser.calls
    assert transcribe_recordings("own", raw_demo, tmp_path / "data", _recipe(), 0).file.read_bytes() == first
    assert LengthRecogniser.calls == before
    other = _recipe(settings={"recogniser": "another", "speaker_encoder": "pitch"})
    transcribe_recordings("own", raw_demo, tmp_path / "data", other, 0)
    assert LengthRecogniser.calls == before + 2


def test_parts_leave_what_is_not_theirs(raw_demo, tmp_path):
    remaining = transcribe_recordings("own", raw_demo, tmp_path / "data", _recipe(), 0, part=Part(1, 2))
    assert remaining == ["segment: 1 of 2 items remain, of the parts 2/2"]
    assert not (tmp_path / "data" / "utterances.csv").exists()


def test_bad_recordings_are_listed_and_the_others_used(raw_demo, tmp_path):
    root = tmp_path / "raw"
    root.mkdir()
    shutil.copy(raw_demo / "video0.mp4", root / "good.mp4")
    write_media(root / "no_sound.mp4", with_sound=False)
    write_media(root / "no_speech.mp4", rate=8000, channels="5.1", rotation=90, ticks=(0, 1, 5))
    (root / "text.mp4").write_text("no video")
    (root / "empty.mp4").touch()
    end = read_truth(raw_demo)[-1].end_s + 1
    names = {"good.mp4": [[0, end], [900, 901], [2, 1]], "gone.mp4": [[0, 1]]}
    names |= {f"{name}.mp4": [[0, 0.5]] for name in ("no_sound", "no_speech", "text", "empty")}
    (root / "timestamp.json").write_text(json.dumps(names))
    transcript = transcribe_recordings("own", root, tmp_path / "data", _recipe(), 0)
    assert {row["dialogue"] for row in _rows(transcript)} == {"dia0"}
    assert sorted((r.file, r.reason) for r in transcript.rejections) == [
        ("empty.mp4", "clip corrupt"),
        ("gone.mp4", "recording missing"),
        ("good.mp4", "no sound"),  # behind its end
        ("no_sound.mp4", "no sound"),
        ("no_speech.mp4", "no speech"),
        ("text.mp4", "clip corrupt"),
        ("timestamp.json", "span inverted"),
    ]
    assert (tmp_path / "data" / "utterances-rejected.csv").is_file()


def test_videos_are_found_however_their_names_are_composed(raw_demo, tmp_path):
    root = tmp_path / "raw"
    root.mkdir()
    shutil.copy(raw_demo / "video0.mp4", root / "Zoe\u0308.mp4")
    for name in ("e\u0301é.mp4", "ée\u0301.mp4"):
        (root / name).touch()
    end = read_truth(raw_demo)[-1].end_s + 1
    (root / "timestamp.json").write_text(json.dumps({"Zoë.mp4": [[0, end]], "éé.mp4": [[0, 1]]}))
    transcript = transcribe_recordings("own", root, tmp_path / "data", _recipe(), 0)
    assert {row["clip"] for row in _rows(transcript)} == {"Zoe\u0308.mp4"}
    assert [(r.file, r.reason) for r in transcript.rejections] == [("éé.mp4", "recording missing")]
    assert any("Several files are éé.mp4" in note for note in transcript.notes)


def test_a_video_of_other_capitals_is_found_and_told(raw_demo, tmp_path):
    root = tmp_path / "raw"
    root.mkdir()
    shutil.copy(raw_demo / "video0.mp4", root / "video0.mp4")
    end = read_truth(raw_demo)[-1].end_s + 1
    (root / "timestamp.json").write_text(json.dumps({"Video0.MP4": [[0, end]]}))
    transcript = transcribe_recordings("own", root, tmp_path / "data", _recipe(split=ALONE), 0)
    assert {row["clip"] for row in _rows(transcript)} == {"video0.mp4"}
    assert "Found under a name of other capitals: Video0.MP4 as video0.mp4." in transcript.notes


def test_a_recording_whose_name_is_no_utf8_is_listed_and_the_others_used(raw_demo, tmp_path):
    root = tmp_path / "raw"
    root.mkdir()
    (odd := Path(os.fsdecode(bytes(root) + b"/caf\xe9.mp4"))).touch()
    with pytest.raises(MsencError, match=r"found no recording whose name is UTF-8, as caf\\xe9\.mp4\. Rename"):
        transcribe_recordings("own", root, tmp_path / "data", _recipe(split=ALONE), 0)
    shutil.copy(raw_demo / "video0.mp4", root / "video0.mp4")
    transcript = transcribe_recordings("own", root, tmp_path / "data", _recipe(split=ALONE), 0)
    assert {row["clip"] for row in _rows(transcript)} == {"video0.mp4"}
    assert [(r.file, r.reason) for r in transcript.rejections] == [(r"caf\xe9.mp4", "name is not UTF-8")]
    assert odd.exists()


def test_without_timestamps_each_recording_is_a_dialogue(raw_demo, tmp_path):
    root = tmp_path / "raw"
    (root / "more").mkdir(parents=True)
    shutil.copy(raw_demo / "video0.mp4", root / "more" / "b.MP4")
    shutil.copy(raw_demo / "video0.mp4", root / "a.mp4")
    (root / "notes.txt").touch()
    transcript = transcribe_recordings("own", root, tmp_path / "data", _recipe(), 0)
    assert dict.fromkeys((row["clip"], row["dialogue"]) for row in _rows(transcript)) == {
        ("a.mp4", "dia0"): None,
        ("more/b.MP4", "dia1"): None,
    }
    assert "each of the 2 recordings is one dialogue" in transcript.notes[0]
    assert "1 files" in transcript.notes[1]


def test_every_split_gets_recordings_in_which_somebody_answers(raw_demo, tmp_path):
    root = tmp_path / "raw"
    root.mkdir()
    shutil.copy(raw_demo / "video0.mp4", root / "a.mp4")
    first, second = (d.utterances for d in read_truth(raw_demo))
    whole = [[first[0].start_s, first[-1].end_s + 0.2], [second[0].start_s, second[-1].end_s + 0.2]]
    alone = [[u.start_s - 0.1, u.end_s + 0.1] for u in first[:4]]
    (root / "timestamp.json").write_text(json.dumps({"a.mp4": [*alone, *whole]}))
    for seed in range(4):
        recipe = _recipe(split={**SPLIT, "seed": seed})
        rows = _rows(transcribe_recordings("own", root, tmp_path / "data", recipe, 0))
        assert {row["split"] for row in rows if row["dialogue"] in ("dia4", "dia5")} == {"train", "test"}


@pytest.mark.parametrize("files", [[], ["notes.txt"]])
def test_a_folder_without_recordings_is_refused(tmp_path, files):
    root = tmp_path / "raw"
    root.mkdir()
    for name in files:
        (root / name).touch()
    with pytest.raises(MsencError, match="found no recording"):
        transcribe_recordings("own", root, tmp_path / "data", _recipe(), 0)
