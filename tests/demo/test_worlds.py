"""What the generated worlds write and hide; the demo, which is one of them, has tests of its own."""

import csv
import json
import math
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from msenc.demo import beats, frame, graded
from msenc.demo.frame import draw_split, draw_transcripts
from msenc.demo.ideal import Cue, said_bit
from msenc.demo.script import read_cues
from msenc.demo.table import find_world, write_world
from msenc.files.marks import parse_marks
from msenc.models.encoders import LogMel, Pixels
from msenc.raw.annotations import read_meld
from msenc.raw.media import read_audio, read_frames
from msenc.types import MsencError

SCRIPTS = {"beats": beats.SCRIPT, "graded": graded.SCRIPT}
SIZES = {"train": 60, "val": 1, "test": 30}


def targets(drawn):
    """(asking turn, its utterance, answering utterance) of every target."""
    for one in drawn:
        yield from zip(one.turns, one.dialogue.utterances, one.dialogue.utterances[1:], strict=False)


def is_near(hits: int, total: int, share: float, sigmas: float = 4) -> bool:
    return abs(hits - total * share) <= sigmas * math.sqrt(total * share * (1 - share))


# ---- the words ----


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_planted_word_states_the_bit_that_was_asked_for(name):
    script, seen = SCRIPTS[name], Counter()
    for asker, question, reply in targets(draw_split(find_world(name), "train", 400, seed=3)):
        (mark,) = reply.marks
        asked = script.questions[asker.question]
        assert question.text.endswith(asked.wordings)
        bit = {
            "audio": asker.audio.bit,
            "video": asker.video.bit,
            "both": asker.audio.bit and asker.video.bit,
            "text": any(thing in question.text for thing in script.objects[1]),
        }[asker.question]
        assert (mark.kind, mark.field) == (asker.question, "text")
        assert reply.text[mark.start : mark.end] == asked.words[bit]
        assert mark.bits == pytest.approx(script.belief.bits(mark.kind), abs=1e-6)
        seen[asker.question] += 1
    for kind, question in script.questions.items():
        assert is_near(seen[kind], seen.total(), question.share)


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_stands_before_a_mark_is_the_same_for_both_words(name):
    before: dict[str, dict[str, Counter]] = {}
    for _, _, reply in targets(draw_split(find_world(name), "train", 1500, seed=4)):
        (mark,) = reply.marks
        sides = before.setdefault(mark.kind, {})
        sides.setdefault(reply.text[mark.start : mark.end], Counter())[reply.text[: mark.start]] += 1
    assert set(before) == {"text", "audio", "video", "both"}
    for sides in before.values():
        first, second = sides.values()
        assert set(first) == set(second)
        for start in first:
            assert is_near(first[start], first[start] + second[start], first.total() / (first + second).total())


@pytest.mark.parametrize("name", SCRIPTS)
def test_bits_follow_the_belief_and_depend_on_no_word_and_no_other_turn(name):
    script = SCRIPTS[name]
    drawn = draw_split(find_world(name), "train", 1200, seed=1)
    turns = [turn for one in drawn for turn in one.turns]
    for audio in (False, True):
        for video in (False, True):
            hits = sum((t.audio.bit, t.video.bit) == (audio, video) for t in turns)
            assert is_near(hits, len(turns), script.belief.prior[audio][video])
    if script.belief.levels:
        for stream in ("audio", "video"):
            cues = [getattr(t, stream) for t in turns]
            assert all(is_near(n, len(turns), 1 / 5) for n in Counter(c.level for c in cues).values())
            rest = np.array([c.x - (c.level / 2 if c.bit else -c.level / 2) for c in cues])
            assert abs(rest.mean()) < 4 / math.sqrt(len(rest))
            assert abs(rest.std() - 1) < 4 / math.sqrt(2 * len(rest))
        both = np.array([[t.audio.level, t.video.level, t.audio.bit, t.video.bit] for t in turns]).T
        correlation = np.corrcoef(both)
        assert np.abs(correlation[0, 1:]).max() < 4 / math.sqrt(len(turns))
        assert np.abs(correlation[1, 2:]).max() < 4 / math.sqrt(len(turns))
    for stream in ("audio", "video"):
        share = sum(getattr(t, stream).bit for t in turns) / len(turns)
        by_word: dict[str, Counter] = {}
        for one in drawn:
            pairs = list(zip(one.dialogue.utterances, one.turns, strict=True))
            for utterance, turn in pairs:
                for word in {utterance.speaker, *re.findall(r"\w+", utterance.text)}:
                    by_word.setdefault(word, Counter())[getattr(turn, stream).bit] += 1
            for (_, a), (_, b) in pairwise(pairs):
                by_word.setdefault(f"after {getattr(a, stream).bit}", Counter())[getattr(b, stream).bit] += 1
        assert len(by_word) > 60
        for word, counts in by_word.items():
            assert is_near(counts[True], counts.total(), share, sigmas=4.5), (stream, word, counts)


def test_worlds_share_no_answer_and_no_question():
    from msenc.demo.world import ANSWERS, QUESTIONS

    words = [{w for q in s.questions.values() for w in q.words} for s in SCRIPTS.values()]
    words.append({w for a in ANSWERS.values() for w in a.words})
    asked = [{w for q in s.questions.values() for w in q.wordings} for s in SCRIPTS.values()]
    asked.append({w for wordings in QUESTIONS.values() for w in wordings})
    for sets in (words, asked):
        assert sum(map(len, sets)) == len(set.union(*sets))


@pytest.mark.parametrize("name", SCRIPTS)
def test_streams_of_chance_are_independent_sizes_nest_and_transcripts_tell_no_cue(name):
    world = find_world(name)
    train = draw_split(world, "train", 12, seed=3)
    assert train == draw_split(world, "train", 12, seed=3) == draw_split(find_world(name, variant=5), "train", 12, 3)
    assert train[:5] == draw_split(world, "train", 5, seed=3)
    read = draw_transcripts(world, 12, 3)
    texts = [
        [u.text for one in drawn for u in one.dialogue.utterances]
        for drawn in (train, draw_split(world, "val", 12, 3), draw_split(world, "train", 12, 4), read)
    ]
    assert all(texts[0] != other for other in texts[1:])
    assert read[0].dialogue.id == f"{name}/transcripts/dia0"
    assert read[0].dialogue.utterances[0].clip is None
    assert not any(turn.told for one in read for turn in one.turns)


# ---- sound and picture, exactly ----


def shown(name: str, variant: int, audio: Cue, video: Cue, seed: int = 0):
    world = find_world(name, variant)
    one = draw_split(world, "train", 1, seed)[0]
    turn = type(one.turns[0])(audio, video, False, None)
    return world.render(one.dialogue.utterances[0], turn, *(np.random.default_rng([seed, i]) for i in (1, 2)))


def cue(bit: bool, x: float | None = None) -> Cue:
    return Cue(bit, (1.0 if bit else -1.0) if x is None else x, 2.0)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_stream_knows_nothing_of_the_others_cue_and_length_and_loudness_tell_none(name):
    pictures, sounds = zip(
        *(shown(name, 1, cue(audio), cue(video)) for audio in (False, True) for video in (False, True)), strict=True
    )
    assert np.array_equal(sounds[0], sounds[1])
    assert np.array_equal(pictures[0], pictures[2])
    assert not np.allclose(sounds[0], sounds[2], atol=0.01)
    assert not np.array_equal(pictures[0], pictures[1])
    assert len({len(s) for s in sounds}) == len({len(p) for p in pictures}) == 1
    assert np.ptp([10 * np.log10(np.mean(s**2)) for s in sounds]) < 0.1  # dB; peaks are cut at 1
    assert len(sounds[0]) == math.ceil(len(pictures[0]) * frame.SAMPLE_RATE / frame.FPS)
    # Size and colours of the figure: as many bright pixels, as bright, for both.
    for one, other in ((pictures[0], pictures[1]), (pictures[2], pictures[3])):
        assert abs(one.mean() - other.mean()) < 0.02 * one.mean()


def test_in_the_graded_world_the_bit_shows_in_x_alone():
    for x in (-1.5, 0.0, 2.0):
        ones, zeros = (shown("graded", 1, cue(bit, x), cue(bit, x)) for bit in (True, False))
        assert all(np.array_equal(a, b) for a, b in zip(ones, zeros, strict=True))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_variant_shows_the_same_cues_otherwise(name):
    (picture, sound), (other_picture, other_sound) = (shown(name, v, cue(True), cue(True)) for v in (1, 2))
    assert picture.shape == other_picture.shape
    assert not np.array_equal(picture, other_picture)
    assert not np.allclose(sound, other_sound, atol=0.01)


# ---- the folder ----


@pytest.fixture(scope="module", params=[(name, variant) for name in SCRIPTS for variant in (1, 2)], ids=str)
def rendered(request, tmp_path_factory):
    name, variant = request.param
    root = tmp_path_factory.mktemp(name) / "raw"
    write_world(root, name, SIZES, seed=0, variant=variant, num_workers=0)
    return name, root


def rows_of(root, split):
    with (root / frame.CSV_NAMES[split]).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_folder_has_melds_shape_and_the_hidden_truth(rendered):
    name, root = rendered
    world, script = find_world(name), SCRIPTS[name]
    read = {d.id: d for d in read_meld(root, name).dialogues}
    for split, size in SIZES.items():
        drawn = draw_split(world, split, size, seed=0)
        rows = rows_of(root, split)
        assert tuple(rows[0])[:11] == frame.MELD_COLUMNS
        turns = [(one, u, t) for one in drawn for u, t in zip(one.dialogue.utterances, one.turns, strict=True)]
        for row, (one, utterance, turn) in zip(rows, turns, strict=True):
            assert one.dialogue.id.endswith(f"/dia{row['Dialogue_ID']}")
            assert (row["Utterance"], row["Speaker"]) == (utterance.text, utterance.speaker)
            assert parse_marks(row["Marks"]) == utterance.marks
            assert read_cues(world, row) == (turn.audio, turn.video)
            assert row["Emotion"] == script.questions["video"].words[turn.video.bit]
            assert (root / utterance.clip).is_file()
        assert [u.marks for one in drawn for u in one.dialogue.utterances] == [
            u.marks for one in drawn for u in read[one.dialogue.id].utterances
        ]
    assert json.loads((root / "world.json").read_text())["world"] == name


def features(root, split):
    """Mean and deviation over time of what the default encoders give, the picture's contrast set aside."""
    audio, video, length = [], [], []
    for row in rows_of(root, split):
        clip = root / frame.CLIP_FOLDERS[split] / f"dia{row['Dialogue_ID']}_utt{row['Utterance_ID']}.mp4"
        samples, frames = read_audio(clip, 16_000, None), read_frames(clip, 3.0, None)
        pixels = Pixels().encode([frames])[0]
        pixels = (pixels - pixels.mean()) / pixels.std()
        for found, values in ((audio, LogMel().encode([samples])[0]), (video, pixels)):
            found.append(np.concatenate([values.mean(0), values.std(0)]))
        length.append((len(samples), np.log(np.mean(samples**2)), frames.mean(), frames.max()))
    return {"audio": np.array(audio), "video": np.array(video), "length, loudness, light": np.array(length)}


@pytest.fixture(scope="module")
def probe_data(rendered):
    name, root = rendered
    world = find_world(name)
    cues = {split: [read_cues(world, row) for row in rows_of(root, split)] for split in ("train", "test")}
    return name, {split: (features(root, split), cues[split]) for split in cues}


def probe(data, stream, value):
    """Guesses of a ridge regression on unseen turns, and the true values; `value` of the pair of cues."""
    (train, train_cues), (test, test_cues) = data["train"], data["test"]
    mean, scale = train[stream].mean(0), train[stream].std(0)
    scale = scale + 0.1 * scale.mean()  # cells that hardly any turn of the training split reaches
    x, unseen = ((part[stream] - mean) / scale for part in (train, test))
    y, wanted = (np.array([float(value(*cues)) for cues in part]) for part in (train_cues, test_cues))
    weight = np.linalg.solve(x.T @ x + 10 * np.eye(x.shape[1]), x.T @ (y - y.mean()))
    return unseen @ weight + y.mean(), wanted


STREAMS = ("audio", "video")


@pytest.mark.parametrize("own", [0, 1], ids=STREAMS)
def test_a_stream_tells_its_own_cue(probe_data, own):
    name, data = probe_data
    if name == "beats":
        guessed, wanted = probe(data, STREAMS[own], lambda *cues: cues[own].bit)
        assert ((guessed > 0.5) == wanted).mean() >= 0.95
    else:
        guessed, wanted = probe(data, STREAMS[own], lambda *cues: cues[own].x)
        assert np.corrcoef(guessed, wanted)[0, 1] > 0.97
        # The bit itself is told no better than x tells it.
        bits = np.array([cues[own].bit for cues in data["test"][1]])
        assert ((guessed > 0) == bits).mean() < 0.85


@pytest.mark.parametrize("own", [0, 1], ids=STREAMS)
def test_nothing_else_tells_a_cue(probe_data, own):
    name, data = probe_data
    for stream in (STREAMS[1 - own], "length, loudness, light"):
        if name == "beats":
            guessed, wanted = probe(data, stream, lambda *cues: cues[own].bit)
            assert is_near(int(((guessed > 0.5) == wanted).sum()), len(wanted), 0.5, sigmas=3.29)
        else:  # beyond the bit, which goes together with the other stream's, x is chance
            mean = {bit: np.mean([c[own].x for c in data["train"][1] if c[own].bit == bit]) for bit in (False, True)}
            guessed, wanted = probe(data, stream, lambda *cues: cues[own].x - mean[cues[own].bit])  # noqa: B023
            assert abs(np.corrcoef(guessed, wanted)[0, 1]) < 3.29 / math.sqrt(len(wanted))
        assert len(wanted) >= 110


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_same_seed_gives_the_same_bytes_for_any_number_of_processes(name, tmp_path):
    for folder, workers in (("alone", 0), ("two", 2)):
        write_world(tmp_path / folder, name, {"train": 2, "val": 1, "test": 1}, seed=9, variant=1, num_workers=workers)
    files = [path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("*") if path.is_file()]
    assert sum(path.suffix == ".mp4" for path in files) >= 12
    for path in files:
        assert (tmp_path / "alone" / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path


def test_what_is_not_there_or_another_is_refused(tmp_path):
    sizes = {"train": 1, "val": 1, "test": 1}
    with pytest.raises(MsencError, match=r"'beat'; expected one of demo, beats, graded"):
        find_world("beat")
    with pytest.raises(MsencError, match=r"'demo' in data\.generate; expected one of beats, graded"):
        write_world(tmp_path / "a", "demo", sizes, 1, 1, 0)
    with pytest.raises(MsencError, match=r"variant -1; expected"):
        write_world(tmp_path / "a", "beats", sizes, 1, -1, 0)
    with pytest.raises(MsencError, match=r"sizes .* of beats; expected a whole number above 0"):
        write_world(tmp_path / "a", "beats", {**sizes, "val": 0}, 1, 1, 0)
    write_world(tmp_path / "a", "beats", sizes, 1, 1, 0)
    with pytest.raises(MsencError, match=r"variant 1 \(wanted: 2\)\. Remove it, or choose another root"):
        write_world(tmp_path / "a", "beats", sizes, 1, 2, 0)


def test_said_bits():
    assert [said_bit(find_world("demo").belief, "both", a, v) for a in (0, 1) for v in (0, 1)] == [1, 0, 0, 1]
    assert [said_bit(find_world("graded").belief, "both", a, v) for a in (0, 1) for v in (0, 1)] == [0, 0, 0, 1]
