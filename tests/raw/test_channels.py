"""One speaker per channel: each is heard alone, both at once too, and what a microphone has of the other is not."""

import csv

import numpy as np
import pytest
from media import Track, write
from test_recordings import _recipe

from msenc.demo.raw_demo import read_truth, write_raw_demo
from msenc.raw.channels import read_channels, without_echoes
from msenc.raw.container import MediaError
from msenc.raw.media import read_audio
from msenc.raw.recordings import transcribe_recordings

RATE = 16_000


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Utterances of two voices, (S,) each, and whose they are."""
    pytest.importorskip("silero_vad")
    root = tmp_path_factory.mktemp("channels") / "demo"
    write_raw_demo(root, num_videos=1, dialogues_per_video=2, seed=3)
    sound = read_audio(root / "video0.mp4", RATE)
    turns = [u for d in read_truth(root) for u in d.utterances]
    names = sorted({u.speaker for u in turns})
    return [(sound[round(RATE * u.start_s) : round(RATE * u.end_s)], names.index(u.speaker) % 2) for u in turns]


def call(spoken, gap_s, echo_db, seed=0):
    """Both sides of a call (2, S) with echoes of each other, and [start, end, side] of its utterances.

    Utterances begin `gap_s` after the one before ends, below 0 before it does.
    """
    rng = np.random.default_rng(seed)
    sides = np.zeros((2, RATE * 120), np.float32)
    times, at = [], 1.0
    for sound, side in spoken:
        first = round(at * RATE)
        sides[side, first : first + len(sound)] += sound
        times.append([at, at + len(sound) / RATE, side])
        at += len(sound) / RATE + gap_s
    sides = sides[:, : round((at + 2) * RATE)]
    room = np.concatenate([[1.0], 0.3 * rng.normal(size=400) * np.exp(-np.arange(400) / 100)])  # of 25 ms
    room /= np.linalg.norm(room)
    echoes = [np.convolve(np.roll(side, 80), room)[: sides.shape[1]] for side in sides[::-1]]
    noise = rng.normal(0, 2e-4, sides.shape)
    return (sides + 10 ** (echo_db / 20) * np.stack(echoes) + noise).astype(np.float32), times


def write_call(path, sides):
    write(path, Track([(0.0, sides)], "pcm_s16le", RATE))


@pytest.mark.parametrize("echo_db", [-60, -24, -15, -10])
@pytest.mark.parametrize("gap_s", [0.6, -0.4], ids=["by turns", "at once"])
def test_each_channel_is_its_speaker_and_echoes_are_nobody(spoken, tmp_path, gap_s, echo_db):
    root = tmp_path / "raw"
    root.mkdir()
    by_turns = [part for n in range(6) for part in [p for p in spoken if p[1] == n % 2][n // 2 : n // 2 + 1]]
    sides, times = call(by_turns, gap_s, echo_db)
    write_call(root / "call.wav", sides)
    recipe = _recipe(per_channel=True, split={"rule": "random", "fractions": {"train": 1.0}, "seed": 1})
    made = transcribe_recordings("own", root, tmp_path / "data", recipe, 0)
    with made.file.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["speaker"], row["clip"]) for row in rows] == [(str(s), f"call.wav#channel={s + 1}") for *_, s in times]
    for row, (start_s, end_s, _) in zip(rows, times, strict=True):
        assert float(row["start"]) == pytest.approx(start_s, abs=0.3)
        assert float(row["end"]) == pytest.approx(end_s, abs=0.3)
        assert float(row["text"].split()[0]) == pytest.approx(end_s - start_s, abs=0.5)


def test_without_echoes_speech_stays_as_it_is(spoken):
    (sides, _) = call([p for p in spoken if p[1] == 0][:2] + [p for p in spoken if p[1] == 1][:2], -0.5, -200)
    kept = without_echoes(list(sides), RATE)
    for own, side in zip(kept, sides, strict=True):
        assert np.square(own).sum() > 0.99 * np.square(side).sum()


def test_an_offset_makes_channels_neither_alike_nor_echoes(spoken):
    (sides, _) = call([p for p in spoken if p[1] == 0][:2] + [p for p in spoken if p[1] == 1][:2], -0.5, -20)
    for own, lifted in zip(without_echoes(list(sides), RATE), without_echoes(list(sides + 0.2), RATE), strict=True):
        np.testing.assert_allclose(np.where(own == 0, 0, own + 0.2), lifted, atol=1e-6)


def test_what_has_no_speaker_per_channel_is_listed(spoken, tmp_path):
    sound = np.concatenate([sound for sound, _ in spoken[:3]])
    files = {"mono.wav": [sound], "twice.wav": [sound, 0.8 * sound], "one side.wav": [sound, 0 * sound]}
    for name, sides in files.items():
        write_call(tmp_path / name, np.stack(sides))
    for name, reason in {"mono.wav": "one channel", "twice.wav": "channels alike"}.items():
        with pytest.raises(MediaError, match=reason):
            read_channels(tmp_path / name, RATE, (0.0, None))
    own, silent = read_channels(tmp_path / "one side.wav", RATE, (0.0, None))
    np.testing.assert_array_equal(own, read_audio(tmp_path / "one side.wav#channel=1", RATE))
    assert not silent.any()
    part = read_channels(tmp_path / "one side.wav", RATE, (1.0, 2.0))
    np.testing.assert_array_equal(part[0], own[RATE : 2 * RATE])
