from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from msenc.raw.media import read_audio
from msenc.speech.wav import to_wav
from msenc.talk.examples import find_examples
from msenc.talk.listening import SAMPLE_RATE, WINDOW, WINDOW_S, Listener, Listeners, Take
from msenc.talk.page import Host
from msenc.talk.visitors import Visitors
from msenc.types import MsencError


def seconds_of(level, seconds):
    return np.full(round(seconds / WINDOW_S) * WINDOW, level, np.float32)


def heard(*parts, max_s=60.0, part_s=0.1):
    """What a listener makes of sound whose level is its probability of speech: turns and drops, in order."""
    found = []

    def keep(sound):
        found.append(("kept", round(len(sound) / SAMPLE_RATE, 1)))
        return Take(Path("x"), None, 0.0)

    listener = Listener(lambda window: float(window[0]), keep, lambda _: found.append("dropped"), max_s)
    sound = np.concatenate(parts)
    for at in range(0, len(sound), round(part_s * SAMPLE_RATE)):
        found += ["turn" for _ in listener(sound[at : at + round(part_s * SAMPLE_RATE)])]
    return found


@pytest.mark.parametrize("part_s", [0.01, 0.1, 3.0])
def test_a_turn_ends_in_a_pause_that_lasts_and_its_words_are_sought_before(part_s):
    speech, short, long = seconds_of(0.9, 1.0), seconds_of(0.0, 0.4), seconds_of(0.0, 2.0)
    assert heard(long, speech, long, speech, long, part_s=part_s).count("turn") == 2
    # in the short pause the words so far are recognised, and thrown away when it goes on
    assert heard(long, speech, short, speech, long, part_s=part_s) == [
        ("kept", 1.5),
        "dropped",
        ("kept", 2.9),
        "turn",
    ]


def test_a_cough_is_no_turn_and_a_long_one_ends():
    assert heard(seconds_of(0.0, 1.0), seconds_of(0.9, 0.16), seconds_of(0.0, 2.0)) == []
    assert heard(seconds_of(0.9, 5.0), max_s=2.0)[:2] == [("kept", 2.0), "turn"]


@pytest.fixture
def listeners(tmp_path):
    found = Listeners(Visitors(tmp_path, 10 << 20), lambda path: f"{path.stat().st_size} bytes", 60.0)
    yield found
    found.close()


def test_speech_of_the_demo_is_found_by_silero_and_cuts_the_reply(listeners, demo_home):
    pytest.importorskip("silero_vad")
    clip = sorted((demo_home / "data" / "demo-raw").rglob("*.mp4"))[0]
    speech = read_audio(clip, SAMPLE_RATE)
    quiet = np.random.default_rng(0).normal(0, 1e-3, SAMPLE_RATE).astype(np.float32)
    samples = to_wav(np.concatenate([quiet, speech, quiet]), SAMPLE_RATE)[44:]
    listeners.visitors.moment("anna")
    is_cut, turns = listeners.visitors.watch_cuts("anna", "reply"), []
    for at in range(0, len(samples), 3072):
        answer = listeners.hear("anna", samples[at : at + 3072])
        turns += answer["turns"]
        assert is_cut() or not answer["speaking"]
    assert is_cut()
    (path,) = map(Path, turns)
    assert listeners.visitors.is_upload(path)
    assert abs(len(read_audio(path, SAMPLE_RATE)) - len(speech)) < SAMPLE_RATE
    assert listeners.words(path) == f"{path.stat().st_size} bytes"
    assert listeners.waited_s(path) >= 0
    assert len([*listeners.visitors.uploads.iterdir()]) == 1  # the pauses in between left nothing


def test_only_so_many_microphones_are_open_at_a_time(listeners, monkeypatch):
    monkeypatch.setattr("msenc.talk.listening.load_detector", lambda: lambda window: 0.0)
    for number in range(8):
        assert listeners.hear(str(number), bytes(3072)) == {"speaking": False, "turns": []}
    with pytest.raises(MsencError, match="8 microphones are open"):
        listeners.hear("one more", bytes(3072))
    monkeypatch.setattr("msenc.talk.listening.IDLE_S", 0.0)
    assert listeners.hear("one more", bytes(3072)) == {"speaking": False, "turns": []}


def test_examples_come_from_the_runs_data_and_from_nowhere_else(short_run, demo_home, tmp_path):
    examples = find_examples(short_run, None)
    assert len(examples) == 3
    assert all(example.text and example.clip.is_relative_to(demo_home / "data") for example in examples)
    assert find_examples(short_run, str(tmp_path)) == []
    assert find_examples(tmp_path, None) == []


def test_the_recogniser_is_loaded_by_a_sound_that_it_takes(tmp_path):
    heard = []

    def recognise(path):
        heard.append(read_audio(path, SAMPLE_RATE))  # which refuses silence
        return ""

    config = {"max_total_mb": 10, "max_clip_s": 60.0}
    host = Host(lambda run: SimpleNamespace(recognise=recognise), None, config, tmp_path)
    host.listen("run")
    assert 0 < np.abs(heard[0]).max() < 0.01
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
