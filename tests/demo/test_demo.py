import csv
import hashlib
import json
import math
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from msenc.demo import frame
from msenc.demo import world as demo
from msenc.demo.face import Look, draw_face
from msenc.demo.world import DemoTurn, draw_dialogues, state_words, transcripts, write_demo
from msenc.files.marks import parse_marks
from msenc.speech.synthesizers.libespeak import VoiceSettings, speak, speak_in_turn
from msenc.types import Dialogue, MsencError

SIZES = {"train": 40, "val": 1, "test": 24}
STATE_WORDS = {"voice": ("calm", "excited"), "face": ("sad", "happy"), "match": ("differ", "agree")}


def deciding_words(asker: DemoTurn) -> tuple[str, str]:
    """What the answer to a turn must say, written out: its word in the text, its word in the description."""
    agree = asker.is_excited == asker.is_happy
    said = {
        "voice": "excited" if asker.is_excited else "calm",
        "face": "happy" if asker.is_happy else "sad",
        "match": "agree" if agree else "differ",
        "place": "inside" if asker.is_inside else "outside",
    }
    lively = {"voice": asker.is_happy, "face": asker.is_excited, "match": agree, "place": asker.is_inside}
    return said[asker.question], "expressive" if lively[asker.question] else "flat"


def targets(demos):
    """(asking turn, answering turn, answering utterance) of every target."""
    for one in demos:
        yield from zip(one.turns, one.turns[1:], one.dialogue.utterances[1:], strict=False)


def within_chance(hits: int, total: int, sigmas: float = 3.29) -> bool:
    """Whether a fair coin gives so many hits with 99.9 %: half the total, give or take 3.29 sqrt(total) / 2."""
    return abs(hits - total / 2) <= sigmas * math.sqrt(total) / 2


# ---- the words ----


def test_marks_are_the_deciding_words_and_agree_with_the_hidden_truth():
    kinds = {
        "voice": [("audio", "text"), ("video", "description")],
        "face": [("video", "text"), ("audio", "description")],
        "match": [("both", "text")],
        "place": [("text", "text")],
    }
    seen = Counter()
    for asker, _, reply in targets(draw_dialogues("train", 300, seed=5)):
        words = dict(zip(("text", "description"), deciding_words(asker), strict=True))
        assert [(m.kind, m.field) for m in reply.marks] == kinds[asker.question]
        for mark in reply.marks:
            assert getattr(reply, mark.field)[mark.start : mark.end] == words[mark.field]
            assert mark.bits == 1
        assert words["description"] in reply.description
        seen[asker.question] += 1
    total = sum(seen.values())
    for question, share in {"voice": 0.3, "face": 0.3, "match": 0.25, "place": 0.15}.items():
        assert abs(seen[question] / total - share) < 4 * math.sqrt(share * (1 - share) / total)


def test_a_demo_flawed_on_purpose_says_every_mood_and_is_else_the_same(tmp_path):
    sizes = {"train": 2, "val": 1, "test": 1}
    write_demo(tmp_path / "flawed", sizes, seed=0, num_workers=0, words_tell_mood=True)
    with (tmp_path / "flawed" / frame.CSV_NAMES["train"]).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    turns = [u for one in draw_dialogues("train", 2, seed=0) for u in one.dialogue.utterances]
    for row, turn in zip(rows, turns, strict=True):
        assert row["Utterance"] == f"[{row['Face']} face] [{row['Pitch']} voice] {turn.text}"
        marks = parse_marks(row["Marks"])
        assert [(m.kind, m.field) for m in marks] == [(m.kind, m.field) for m in turn.marks]
        for mark, own in zip(marks, turn.marks, strict=True):
            said = row["Utterance"] if mark.field == "text" else row["Description"]
            assert said[mark.start : mark.end] == getattr(turn, own.field)[own.start : own.end]
    with pytest.raises(MsencError, match="generated data with unknown settings"):
        write_demo(tmp_path / "flawed", sizes, seed=0, num_workers=0)


def test_what_stands_before_a_mark_is_the_same_for_both_words():
    prefixes: dict[tuple, dict[str, set[str]]] = {}
    for asker, _, reply in targets(draw_dialogues("train", 600, seed=6)):
        for mark in reply.marks:
            value = getattr(reply, mark.field)
            sides = prefixes.setdefault((asker.question, mark.kind, mark.field), {})
            sides.setdefault(value[mark.start : mark.end], set()).add(value[: mark.start])
    assert len(prefixes) == 6
    for sides in prefixes.values():
        first, second = sides.values()
        assert first == second


def test_text_states_no_bit_that_was_not_asked():
    for one in draw_dialogues("test", 300, seed=2):
        for index, utterance in enumerate(one.dialogue.utterances):
            asked = one.turns[index - 1].question if index else None
            answer = utterance.text.split(".")[0]
            for question, words in STATE_WORDS.items():
                for word in words:
                    assert (re.search(rf"\b{word}\b", answer) is not None) == (
                        asked == question and deciding_words(one.turns[index - 1])[0] == word
                    )
                    # The question may say "agree"; no other state word stands outside of the answer.
                    assert word == "agree" or not re.search(rf"\b{word}\b", utterance.text[len(answer) :])


def test_bits_are_balanced_and_independent_of_each_other_and_of_the_text():
    demos = draw_dialogues("train", 600, seed=1)
    turns = [turn for one in demos for turn in one.turns]
    for state in ("is_excited", "is_happy", "is_inside", "is_expressive"):
        assert within_chance(sum(getattr(turn, state) for turn in turns), len(turns))
    assert within_chance(sum(turn.is_excited == turn.is_happy for turn in turns), len(turns))
    pairs = [pair for one in demos for pair in zip(one.turns, one.turns[1:], strict=False)]
    for state in ("is_excited", "is_happy"):
        for before in ("is_excited", "is_happy", "is_expressive", "is_inside"):
            assert within_chance(sum(getattr(a, before) == getattr(b, state) for a, b in pairs), len(pairs))
        # The turn's own range, which its voice description tells, says nothing of its fresh states.
        assert within_chance(sum(t.is_expressive == getattr(t, state) for t in turns), len(turns))

    # No word of a turn's own text, nor its speaker, tells the turn's fresh states.
    for state in ("is_excited", "is_happy"):
        by_word: dict[str, Counter] = {}
        for one in demos:
            for utterance, turn in zip(one.dialogue.utterances, one.turns, strict=True):
                for word in {utterance.speaker, *re.findall(r"\w+", utterance.text)}:
                    by_word.setdefault(word, Counter())[getattr(turn, state)] += 1
        assert len(by_word) > 60
        for word, counts in by_word.items():
            # About 80 words: 4 sigma each is 99.5 % for all of them.
            assert within_chance(counts[True], counts.total(), sigmas=4), (state, word, counts)


def test_dialogues_have_two_alternating_speakers_and_3_to_6_turns():
    lengths = Counter()
    for one in draw_dialogues("val", 100, seed=0):
        speakers = [utterance.speaker for utterance in one.dialogue.utterances]
        assert len(set(speakers)) == 2
        assert all(a != b for a, b in pairwise(speakers))
        assert one.turns[-1].question is None
        assert not one.dialogue.utterances[0].marks
        for utterance in one.dialogue.utterances:
            person = demo.SPEAKERS[utterance.speaker].person
            assert re.fullmatch(rf"{person} speaks with (flat|expressive) intonation", utterance.description)
        lengths[len(speakers)] += 1
    assert set(lengths) == {3, 4, 5, 6}


def test_streams_of_chance_are_independent_and_sizes_nest():
    train = draw_dialogues("train", 12, seed=3)
    assert train == draw_dialogues("train", 12, seed=3)
    assert train[:5] == draw_dialogues("train", 5, seed=3)
    texts = [
        [u.text for one in demos for u in one.dialogue.utterances]
        for demos in (train, draw_dialogues("val", 12, 3), draw_dialogues("train", 12, 4), transcripts(12, 3))
    ]
    assert all(texts[0] != other for other in texts[1:])
    assert transcripts(1, 3)[0].dialogue.id == "demo/transcripts/dia0"
    assert transcripts(1, 3)[0].dialogue.utterances[0].clip is None


def test_the_words_of_a_seed_are_the_ones_they_have_always_been():
    drawn = [*draw_dialogues("train", 40, seed=1), *transcripts(40, seed=1)]
    words = json.dumps([(one.dialogue.to_json(), [vars(turn) for turn in one.turns]) for one in drawn])
    # Of the generator's version 2; another digest takes another VERSION.
    assert (demo.VERSION, hashlib.sha256(words.encode()).hexdigest()[:16]) == (2, "1493ae0e2d24bfa4")


def test_state_words_name_the_fresh_states():
    turn = DemoTurn(is_excited=False, is_happy=True, is_expressive=True, is_inside=True, question="voice")
    assert state_words(turn) == {"audio": "calm voice", "video": "happy face"}
    assert state_words(replace(turn, is_expressive=False, is_inside=False)) == state_words(turn)


@pytest.mark.parametrize(("split", "seed", "found"), [("dev", 0, "'dev'"), ("train", -1, "-1")])
def test_a_wrong_split_or_seed_is_refused(split, seed, found):
    with pytest.raises(MsencError, match=f"{found}.*expected"):
        draw_dialogues(split, 1, seed)


# ---- voice and face, exactly: what a state must not change ----


def test_the_same_words_sound_the_same_whatever_was_spoken_before():
    settings = VoiceSettings("en-us+m1", pitch=20, pitch_range=30)
    first, rate = speak("How do I look?", settings)
    speak("Something else, and longer.", VoiceSettings("en-us+f4", pitch=80))
    speak("More.", settings)
    assert rate == 22_050
    assert np.array_equal(first, speak("How do I look?", settings)[0])


def test_an_unknown_voice_is_refused():
    with pytest.raises(MsencError, match="no voice 'xx-yy'"):
        speak("Hello.", VoiceSettings("xx-yy"))


def test_the_first_of_several_voices_sounds_as_it_does_alone():
    voices = [VoiceSettings("en-us+f1"), VoiceSettings("en-us+f1", pitch=90, pitch_range=80)]
    (first, second), rate = speak_in_turn("You look sad.", voices)
    alone, its_rate = speak("You look sad.", voices[0])
    assert rate == its_rate
    assert np.array_equal(first, alone)
    assert len(second) == pytest.approx(len(speak("You look sad.", voices[1])[0]), rel=0.01)
    assert not np.array_equal(second[:1000], first[:1000])


def test_length_and_loudness_of_speech_do_not_depend_on_the_states():
    turn = DemoTurn(is_excited=False, is_happy=False, is_expressive=False, is_inside=True, question=None)
    for name in ("Anna", "Felix", "Leo"):
        sounds = [
            demo._say(
                "You look sad. This is the museum. How is my voice?",
                demo.SPEAKERS[name],
                replace(turn, is_excited=excited, is_expressive=expressive, is_happy=happy),
                np.random.default_rng(seed),
            )
            for seed, (excited, expressive, happy) in enumerate(
                [(False, False, False), (True, False, False), (False, True, True), (True, True, True)]
            )
        ]
        spoken = [np.flatnonzero(np.abs(sound) > 1e-3)[[0, -1]] for sound in sounds]
        assert len({len(sound) for sound in sounds}) == 1
        assert np.ptp(spoken, axis=0).max() < 0.02 * frame.SAMPLE_RATE  # begins and ends at the same time
        ends = [np.flatnonzero(sound)[-1] for sound in sounds]
        assert np.ptp(ends) == 0  # to the sample: what eSpeak keeps of the voice before would tell of it
        assert np.ptp([10 * np.log10(np.mean(sound**2)) for sound in sounds]) < 0.01  # dB
        assert not np.allclose(sounds[0], sounds[1], atol=0.01)


def test_a_face_shows_the_expression_and_sound_does_not_know_it():
    look = Look((236, 196, 170), (60, 40, 30), long_hair=True, width=19)
    happy, sad = (draw_face(look, is_happy, 24, frame.FPS, np.random.default_rng(4)) for is_happy in (True, False))
    assert happy.shape == (24, 64, 64, 3)
    changed = np.abs(happy.astype(int) - sad).max(axis=(0, 3)) > 0
    assert changed.any()
    assert not changed[:14].any()  # brows and mouth alone: hair, background and place are the same
    assert not changed[32:38].any()
    turn = DemoTurn(is_excited=True, is_happy=True, is_expressive=True, is_inside=True, question=None)
    sounds = [
        demo._say("Hello.", demo.SPEAKERS["Ida"], replace(turn, is_happy=state), np.random.default_rng(0))
        for state in (True, False)
    ]
    assert np.array_equal(*sounds)


def test_the_mouth_opens_alike_for_both_faces():
    look = Look((236, 196, 170), (60, 40, 30), long_hair=False, width=19)
    for seed in range(6):
        dark = []  # pixels of the open mouth, per frame
        for is_happy in (True, False):
            frames = draw_face(look, is_happy, 24, frame.FPS, np.random.default_rng(seed))
            dark.append((frames[:, 36:60, 20:44].max(-1) < 100).sum((1, 2)))
        assert dark[0].max() > 40
        # A few pixels by rasterisation, either way.
        assert np.abs(dark[0] - dark[1]).max() <= 8
        assert abs(dark[0].mean() - dark[1].mean()) <= 1


# ---- the folder ----


@pytest.fixture(scope="session")
def rendered(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("rendered") / "demo"
    write_demo(root, SIZES, seed=0, num_workers=2)
    return root


def rows_of(root: Path, split: str) -> list[dict[str, str]]:
    with (root / frame.CSV_NAMES[split]).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def decode(root: Path, split: str, row: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Frames (T, 64, 64, 3) in [0, 1] and samples (N,) of a row's clip."""
    path = root / frame.CLIP_FOLDERS[split] / f"dia{row['Dialogue_ID']}_utt{row['Utterance_ID']}.mp4"
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert container.streams.audio[0].codec_context.name == "aac"
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with av.open(str(path)) as container:
        samples = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    return frames.astype(np.float32) / 255, samples


def test_the_folder_has_melds_shape_and_the_drawn_words(rendered):
    for split in SIZES:
        rows = rows_of(rendered, split)
        assert tuple(rows[0])[:11] == frame.MELD_COLUMNS
        assert tuple(rows[0])[11:] == (*frame.TARGET_COLUMNS, *demo.DEMO_COLUMNS)
        drawn = [
            (int(one.dialogue.id.rsplit("dia", 1)[1]), utterance, turn)
            for one in draw_dialogues(split, SIZES[split], seed=0)
            for utterance, turn in zip(one.dialogue.utterances, one.turns, strict=True)
        ]
        assert [int(row["Sr No."]) for row in rows] == list(range(1, len(drawn) + 1))
        for row, (number, utterance, turn) in zip(rows, drawn, strict=True):
            assert (int(row["Dialogue_ID"]), row["Utterance_ID"]) == (number, utterance.id)
            assert (row["Utterance"], row["Speaker"]) == (utterance.text, utterance.speaker)
            assert (row["Description"], parse_marks(row["Marks"])) == (utterance.description, utterance.marks)
            assert f"{row['Pitch']} voice" == state_words(turn)["audio"]
            assert f"{row['Face']} face" == state_words(turn)["video"]
            assert (row["Emotion"] == "joy") == (row["Sentiment"] == "positive") == turn.is_happy
            assert (rendered / utterance.clip).is_file()
        assert len(list((rendered / frame.CLIP_FOLDERS[split]).iterdir())) == len(rows)


def test_times_are_the_lengths_of_the_clips(rendered):
    def seconds(clock: str) -> float:
        hours, minutes, rest = clock.replace(",", ".").split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(rest)

    last_end = {}
    for row in rows_of(rendered, "test")[:20]:
        frames, samples = decode(rendered, "test", row)
        start, end = seconds(row["StartTime"]), seconds(row["EndTime"])
        assert end - start == pytest.approx(len(frames) / frame.FPS, abs=0.002)
        assert len(samples) / frame.SAMPLE_RATE == pytest.approx(end - start, abs=0.08)  # AAC codes blocks of 0.064 s
        assert 1 < end - start < 4
        assert start > last_end.get(row["Dialogue_ID"], -1)
        last_end[row["Dialogue_ID"]] = end


def test_the_same_seed_gives_the_same_bytes_for_any_number_of_processes(tmp_path):
    sizes = {"train": 3, "val": 2, "test": 1}
    for name, workers in (("alone", 0), ("one", 1), ("two", 2)):
        write_demo(tmp_path / name, sizes, seed=9, num_workers=workers)
    files = [path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("*") if path.is_file()]
    assert sum(path.suffix == ".mp4" for path in files) >= 18
    for path in files:
        alone = (tmp_path / "alone" / path).read_bytes()
        assert alone == (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path


def test_an_equal_folder_is_left_alone_and_another_is_refused(rendered, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in rendered.rglob("*")}
    write_demo(rendered, dict(reversed(SIZES.items())), seed=0, num_workers=2)
    assert before == {path: path.stat().st_mtime_ns for path in rendered.rglob("*")}
    with pytest.raises(MsencError, match=r"seed 0 \(wanted: 1\)\. Remove it, or choose another root"):
        write_demo(rendered, SIZES, seed=1, num_workers=2)
    with pytest.raises(MsencError, match=r"sizes .*wanted"):
        write_demo(rendered, {**SIZES, "val": 2}, seed=0, num_workers=2)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.txt").write_text("cat")
    with pytest.raises(MsencError, match=r"photos exists but is not generated data"):
        write_demo(tmp_path / "photos", SIZES, seed=0, num_workers=2)
    (tmp_path / "photos" / "demo.json").write_text("{")
    with pytest.raises(MsencError, match="cannot be read as JSON"):
        write_demo(tmp_path / "photos", SIZES, seed=0, num_workers=2)


@pytest.mark.parametrize("sizes", [{"train": 1, "val": 1}, {"train": 1, "val": 1, "test": 0}])
def test_wrong_sizes_are_refused(sizes, tmp_path):
    with pytest.raises(MsencError, match="expected a whole number above 0 for each of train, val, test"):
        write_demo(tmp_path / "demo", sizes, seed=0, num_workers=0)


def test_a_full_disk_leaves_no_folder(tmp_path, monkeypatch):
    write_clip, written = frame.write_clip, []

    def fill_up(path, *args):
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        write_clip(path, *args)
        written.append(path)

    monkeypatch.setattr(frame, "write_clip", fill_up)
    with pytest.raises(MsencError, match=r"Could not write the data.*No space left"):
        write_demo(tmp_path / "demo", {"train": 2, "val": 1, "test": 1}, seed=0, num_workers=0)
    assert len(written) == 4
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_killed_run_leaves_no_folder_and_the_next_one_succeeds(tmp_path):
    code = (
        "import sys; from pathlib import Path; from msenc.demo.world import write_demo; "
        "write_demo(Path(sys.argv[1]), {'train': 200, 'val': 1, 'test': 1}, seed=0, num_workers=0)"
    )
    root = tmp_path / "demo"
    with subprocess.Popen([sys.executable, "-c", code, str(root)], stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.rglob("*.mp4")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
    assert list(tmp_path.rglob("*.mp4"))
    assert not root.exists()
    write_demo(root, {"train": 1, "val": 1, "test": 1}, seed=0, num_workers=0)
    assert json.loads((root / "demo.json").read_text())["sizes"]["train"] == 1
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [root]


@pytest.mark.parametrize("package", ["espeakng_loader", "av"])
def test_a_missing_package_names_the_extra(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MsencError, match=rf"needs the package {package}, .*-e '\.\[(demo|media)\]'"):
        write_demo(tmp_path / "demo", SIZES, seed=0, num_workers=2)
    assert not list(tmp_path.iterdir())


def test_dialogues_survive_json():
    for one in draw_dialogues("train", 3, seed=0):
        assert Dialogue.from_json(json.loads(json.dumps(one.dialogue.to_json()))) == one.dialogue


# ---- probes: what each stream tells after coding and decoding ----


def log_mel(samples: np.ndarray) -> np.ndarray:
    """Mean and deviation over time of 40 log-mel bands, (80,)."""
    windows = np.lib.stride_tricks.sliding_window_view(samples, 512)[::160] * np.hanning(512)
    power = np.abs(np.fft.rfft(windows)) ** 2
    hertz = np.fft.rfftfreq(512, 1 / frame.SAMPLE_RATE)
    mel = 2595 * np.log10(1 + hertz / 700)
    edges = np.linspace(0, mel[-1], 42)
    bands = np.maximum(0, 1 - np.abs(mel[:, None] - edges[1:-1]) / (edges[1] - edges[0]))
    levels = np.log(power @ bands + 1e-6)
    return np.concatenate([levels.mean(0), levels.std(0)])


@pytest.fixture(scope="session")
def probe_data(rendered):
    """Per split: simple features of each stream, and the states."""
    data = {}
    for split in ("train", "test"):
        rows = rows_of(rendered, split)
        clips = [decode(rendered, split, row) for row in rows]
        data[split] = {
            "audio": np.stack([log_mel(samples) for _, samples in clips]),
            # The mean picture, four pixels by four averaged.
            "video": np.stack([f.mean(0).reshape(16, 4, 16, 4, 3).mean((1, 3)).ravel() for f, _ in clips]),
            "length and loudness": np.stack([(len(f), np.log(np.mean(s**2))) for f, s in clips]),
            "is_excited": np.array([row["Pitch"] == "excited" for row in rows]),
            "is_happy": np.array([row["Face"] == "happy" for row in rows]),
        }
    return data


def probe(data, stream: str, state: str) -> tuple[int, int]:
    """Right answers, and answers, of a logistic regression on the test turns."""
    torch.set_num_threads(1)
    mean, scale = data["train"][stream].mean(0), data["train"][stream].std(0) + 1e-6
    train, test = (torch.tensor((data[split][stream] - mean) / scale).double() for split in ("train", "test"))
    wanted = torch.tensor(data["train"][state]).double()
    weight = torch.zeros(train.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        logits = train @ weight[:-1] + weight[-1]
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted) + 0.01 * weight[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    answers = (test @ weight[:-1] + weight[-1]).detach().numpy() > 0
    return int((answers == data["test"][state]).sum()), len(answers)


@pytest.mark.parametrize(("stream", "state"), [("audio", "is_excited"), ("video", "is_happy")])
def test_a_stream_tells_its_own_state(probe_data, stream, state):
    hits, total = probe(probe_data, stream, state)
    assert hits / total >= 0.95


@pytest.mark.parametrize(
    ("stream", "state"),
    [
        ("audio", "is_happy"),
        ("video", "is_excited"),
        ("length and loudness", "is_excited"),
        ("length and loudness", "is_happy"),
    ],
)
def test_nothing_else_tells_a_state(probe_data, stream, state):
    # About 110 test turns: chance is 50 % give or take 16 points at 99.9 %, so a leak of 16 points shows.
    hits, total = probe(probe_data, stream, state)
    assert within_chance(hits, total)
    assert total >= 90
