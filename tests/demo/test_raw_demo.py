import json
from itertools import pairwise

import numpy as np
import pytest

from msenc.demo.frame import FPS, SAMPLE_RATE
from msenc.demo.raw_demo import read_truth, write_raw_demo
from msenc.demo.world import SPEAKERS
from msenc.raw.media import read_audio, read_frames
from msenc.raw.timestamps import read_timestamps
from msenc.types import MsencError


@pytest.fixture(scope="module")
def raw_demo(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw") / "demo"
    write_raw_demo(root, num_videos=2, dialogues_per_video=2, seed=3)
    return root


def test_timestamps_are_those_of_the_truth(raw_demo):
    truth = read_truth(raw_demo)
    spans = read_timestamps(raw_demo / "timestamp.json").spans
    assert [(s.video, s.start_s, s.end_s) for s in spans] == [(d.video, d.start_s, d.end_s) for d in truth]
    assert [d.video for d in truth] == ["video0.mp4"] * 2 + ["video1.mp4"] * 2


def test_utterances_are_heard_where_the_truth_has_them(raw_demo):
    for dialogue in read_truth(raw_demo):
        sound = read_audio(raw_demo / dialogue.video, SAMPLE_RATE, (dialogue.start_s, dialogue.end_s))
        loud = np.zeros(len(sound), bool)
        for u in dialogue.utterances:
            first, last = (round((t - dialogue.start_s) * SAMPLE_RATE) for t in (u.start_s, u.end_s))
            loud[first:last] = True
            assert np.sqrt(np.mean(sound[first:last] ** 2)) > 0.05
        assert np.sqrt(np.mean(sound[~loud] ** 2)) < 0.005


def test_a_woman_and_a_man_take_turns_and_the_picture_cuts_between_them(raw_demo):
    for dialogue in read_truth(raw_demo):
        names = [u.speaker for u in dialogue.utterances]
        assert len(set(names)) == 2
        assert all(a != b for a, b in pairwise(names))
        assert {SPEAKERS[name].person for name in names} == {"a woman", "a man"}
        frames = read_frames(raw_demo / dialogue.video, FPS, (dialogue.start_s, dialogue.end_s)).astype(int)
        changes = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
        assert (changes > 15).sum() >= len(names) - 1  # speech moves a mouth, a cut moves all


def test_equal_settings_give_equal_files(raw_demo, tmp_path):
    write_raw_demo(tmp_path / "again", num_videos=2, dialogues_per_video=2, seed=3)
    for path in raw_demo.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    before = (raw_demo / "video0.mp4").stat().st_mtime_ns
    write_raw_demo(raw_demo, num_videos=2, dialogues_per_video=2, seed=3)
    assert (raw_demo / "video0.mp4").stat().st_mtime_ns == before


def test_other_settings_and_numbers_are_refused(raw_demo, tmp_path):
    with pytest.raises(MsencError, match="has generated data with seed 3"):
        write_raw_demo(raw_demo, num_videos=2, dialogues_per_video=2, seed=4)
    with pytest.raises(MsencError, match="expected at least one of each"):
        write_raw_demo(tmp_path / "a", num_videos=0, dialogues_per_video=2, seed=4)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "other.txt").write_text(json.dumps({}))
    with pytest.raises(MsencError, match="is not generated data"):
        write_raw_demo(tmp_path / "b", num_videos=1, dialogues_per_video=1, seed=4)
