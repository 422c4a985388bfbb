import json
import os
import signal
from dataclasses import asdict
from pathlib import Path

import pytest
from clips import write_media

from msenc.raw.probe import ClipFacts, probe_clip, probe_clips
from msenc.types import MsencError

NAMES = [f"clip{i}.mp4" for i in range(12)]


def look(path: Path) -> ClipFacts:
    """Facts that differ from clip to clip; a clip that says so kills its process."""
    text = path.read_text()
    if text == "deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    return ClipFacts(None, None, float(len(text)), (("rotated", text[:3]),), text)


class Counting:
    """`look`, and how often it looked at which clip."""

    def __init__(self):
        self.seen = []

    def __call__(self, path):
        self.seen.append(path.name)
        return look(path)


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "raw"
    root.mkdir()
    for i, name in enumerate(NAMES):
        (root / name).write_text("x" * (i + 1))
    return root


def test_a_clip_that_kills_its_process_is_an_entry_and_the_rest_is_probed(root, tmp_path):
    for name in (NAMES[0], NAMES[7]):
        (root / name).write_text("deadly")
    cache = tmp_path / "clips.jsonl"
    facts = probe_clips(root, NAMES, 2, cache, look)
    assert list(facts) == NAMES
    assert {n for n in NAMES if facts[n].audio == facts[n].video == "decoder died"} == {NAMES[0], NAMES[7]}
    assert all(facts[n] == look(root / n) for n in NAMES if n not in (NAMES[0], NAMES[7]))

    # the cause may have been memory: these two are tried again, and nothing else
    again = []

    def survive(path):
        again.append(path.name)
        return ClipFacts(None, None, sha256="better")

    facts = probe_clips(root, NAMES, 0, cache, survive)
    assert again == [NAMES[0], NAMES[7]]
    assert facts[NAMES[7]].sha256 == "better"


def test_what_is_known_is_not_probed_again(root, tmp_path):
    cache, first, second, third = tmp_path / "clips.jsonl", Counting(), Counting(), Counting()
    facts = probe_clips(root, NAMES, 0, cache, first)
    assert first.seen == NAMES
    assert probe_clips(root, NAMES, 0, cache, second) == facts
    assert second.seen == []
    (root / NAMES[3]).write_text("another")
    os.utime(root / NAMES[4], ns=(1, 1))
    (root / NAMES[5]).unlink()
    (root / "new.mp4").write_text("new")
    facts = probe_clips(root, [*NAMES, "new.mp4"], 0, cache, third)
    assert third.seen == [NAMES[3], NAMES[4], "new.mp4"]
    assert facts[NAMES[3]].sha256 == "another"
    assert facts[NAMES[5]].audio == "clip missing"


def test_an_end_in_the_middle_loses_the_clip_in_hand_alone(root, tmp_path):
    class Ended(BaseException):
        pass

    class Ending(Counting):
        def __call__(self, path):
            if len(self.seen) == 5:
                raise Ended
            return super().__call__(path)

    cache, rest = tmp_path / "clips.jsonl", Counting()
    with pytest.raises(Ended):
        probe_clips(root, NAMES, 0, cache, Ending())
    with cache.open("a") as file:  # a line that the kill cut off, and one of another version
        file.write('{"version": 1, "clip": "clip9.m\n')
        facts = asdict(ClipFacts(None, None))
        file.write(json.dumps({"version": 0, "clip": NAMES[9], "stamp": [10, 1], "facts": facts}) + "\n")
    probe_clips(root, NAMES, 0, cache, rest)
    assert rest.seen == NAMES[5:]


def test_a_cache_that_cannot_be_written_is_refused(root, tmp_path):
    with pytest.raises(MsencError, match=r"clips\.jsonl: cannot be written \(No such file"):
        probe_clips(root, NAMES, 0, tmp_path / "none" / "clips.jsonl", look)


@pytest.mark.parametrize(
    ("name", "kind", "note"),
    [
        ("a.mp4", {"channels": "5.1"}, ("surround_sound", "6 channels")),
        ("a.mp4", {"rate": 8000}, ("low_sample_rate", "8000 Hz")),
        ("a.mp4", {"rotation": 90}, ("rotated", "-90 degrees")),
        ("a.mp4", {"ticks": (0, 1, 2, 5, 6)}, ("variable_frame_rate", "")),
        ("a.mp4", {"container": "matroska"}, ("wrong_extension", "matroska")),
        ("a.mkv", {}, ("wrong_extension", "mov")),
        ("a.mkv", {"container": "matroska"}, None),
        ("A.MOV", {}, None),
    ],
)
def test_odd_clips_are_usable_and_noted(tmp_path, name, kind, note):
    facts = probe_clip(write_media(tmp_path / name, **kind))
    assert (facts.audio, facts.video) == (None, None)
    assert facts.notes == ((note,) if note else ())
    assert facts.duration_s == pytest.approx(0.5, abs=0.1)


def test_a_pipe_or_device_in_a_clips_place_is_a_clip_that_is_missing_and_nothing_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "endless.wav").symlink_to("/dev/zero")
    names = ["pipe.wav", "endless.wav"]
    facts = probe_clips(tmp_path, names, 0, tmp_path / "clips.jsonl")
    assert [(f.audio, f.video, f.sha256) for f in facts.values()] == [("clip missing", "clip missing", "")] * 2
