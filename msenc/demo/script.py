"""Worlds as data: speakers, questions, and words that state the hidden bits -> dialogues.

A turn in such a world has an answer to the previous turn, a statement whose object reveals the text bit, and a
question. One word of an answer is planted. The meaning of the cues is never spelled out, not even in the transcripts.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from msenc.demo.frame import (
    DRAW,
    FPS,
    SAMPLE_RATE,
    DrawnDialogue,
    World,
    chance,
    clip_path,
    pick,
)
from msenc.demo.ideal import Belief, Cue, said_bit
from msenc.raw.container import load_av
from msenc.types import SPLITS, Dialogue, Mark, Utterance

COLUMNS = ("Audio", "Video", "AudioX", "VideoX", "AudioLevel", "VideoLevel")
"""The hidden truth: both bits in the world's words, what each stream shows, and the levels."""

_DESCRIPTION = "{} speaks with {} intonation"
_TURNS = (3, 7)  # fewest, and one more than the most
_FRAMES = (12, 19)  # of a clip; the same

Render = Callable[[int, Cue, int, np.random.Generator], np.ndarray]
"""Number of the speaker, its stream's cue, number of frames T, chance -> samples, or frames (T, height, width, 3)."""


@dataclass(frozen=True)
class Question:
    """A kind of question, and how it is answered.

    Args:
        share: of the questions.
        wordings: of the question.
        frames: of the answer, with ``{}`` for the word; each fits both words.
        words: that decide, for bit 0 and for bit 1.
    """

    share: float
    wordings: tuple[str, ...]
    frames: tuple[str, ...]
    words: tuple[str, str]


@dataclass(frozen=True)
class Script:
    """The words of a world.

    Args:
        name: of the world.
        people: name of a speaker -> gender and intonation; the speaker's index is passed to the renderer.
        openings: answers of the first turn.
        statements: with ``{}`` for an object.
        objects: that reveal text bit 0, and 1.
        questions: by what reveals the answer: ``audio``, ``video``, ``both``, ``text``.
        belief: how the bits are drawn and revealed.
    """

    name: str
    people: tuple[tuple[str, str], ...]
    openings: tuple[str, ...]
    statements: tuple[str, ...]
    objects: tuple[tuple[str, ...], tuple[str, ...]]
    questions: Mapping[str, Question]
    belief: Belief


@dataclass(frozen=True)
class ScriptTurn:
    """The hidden states of one turn.

    Args:
        audio: the audio's bit and cue.
        video: the video's.
        object: the text bit.
        question: what reveals the answer to the turn's question; None in the last turn.
    """

    audio: Cue
    video: Cue
    object: bool
    question: str | None

    @property
    def told(self) -> dict[str, str]:
        """Empty: a transcript never spells out a cue."""
        return {}


def make_world(script: Script, say: Render, show: Render) -> World:
    """A world from a script and two functions that each render one stream, independently of the other's cue."""
    return World(
        name=script.name,
        columns=COLUMNS,
        draw=partial(_draw_dialogue, script),
        render=partial(_render, tuple(name for name, _ in script.people), say, show),
        annotate=partial(_annotate, script.questions["video"].words),
        hidden=partial(_hidden, script),
        read_bits=partial(_read_bits, script),
        belief=script.belief,
        check=load_av,
    )


def read_cues(world: World, row: Mapping[str, Any]) -> tuple[Cue, Cue]:
    """Audio and video cue of a row of a world's CSV file.

    The demo, whose bits are shown outright, has none of the columns for x and levels.
    """
    bits = world.read_bits(row)
    return tuple(
        Cue(bit, float(row.get(f"{stream}X", 1 if bit else -1)), float(row.get(f"{stream}Level", math.inf)))
        for stream, bit in zip(("Audio", "Video"), bits, strict=True)
    )


def _draw_dialogue(script: Script, stream: str, number: int, seed: int) -> DrawnDialogue:
    rng = chance(seed, stream, number, 0, DRAW)
    cast = [script.people[i] for i in rng.choice(len(script.people), size=2, replace=False)]
    num_turns = int(rng.integers(*_TURNS))
    kinds = list(script.questions)
    shares = [question.share for question in script.questions.values()]
    utterances: list[Utterance] = []
    turns: list[ScriptTurn] = []
    for index in range(num_turns):
        speaker, manner = cast[index % 2]
        audio, video = script.belief.draw(rng)
        is_one = bool(rng.integers(2))
        statement = pick(rng, script.statements).format(pick(rng, script.objects[is_one]))
        kind = str(rng.choice(kinds, p=shares))
        asked = pick(rng, script.questions[kind].wordings)
        answer, marks = _answer(script, turns[-1], rng) if turns else (pick(rng, script.openings), ())
        is_last = index == num_turns - 1
        utterances.append(
            Utterance(
                id=str(index),
                speaker=speaker,
                text=" ".join((answer, statement) if is_last else (answer, statement, asked)),
                description=_DESCRIPTION.format(*manner.split(", ")),
                clip=clip_path(stream, number, index),
                marks=marks,
            )
        )
        turns.append(ScriptTurn(audio, video, is_one, None if is_last else kind))
    split = stream if stream in SPLITS else "train"
    return DrawnDialogue(Dialogue(f"{script.name}/{stream}/dia{number}", split, tuple(utterances)), tuple(turns))


def _answer(script: Script, asker: ScriptTurn, rng: np.random.Generator) -> tuple[str, tuple[Mark, ...]]:
    kind = asker.question
    question = script.questions[kind]
    is_one = asker.object if kind == "text" else said_bit(script.belief, kind, asker.audio.bit, asker.video.bit)
    frame, word = pick(rng, question.frames), question.words[is_one]
    start = frame.index("{}")
    mark = Mark(kind, "text", start, start + len(word), bits=round(script.belief.bits(kind), 6))
    return frame.format(word), (mark,)


def _render(
    names: tuple[str, ...],
    say: Render,
    show: Render,
    utterance: Utterance,
    turn: ScriptTurn,
    sound: np.random.Generator,
    picture: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    speaker = names.index(utterance.speaker)
    num_frames = int(sound.integers(*_FRAMES))  # before either cue is used
    return show(speaker, turn.video, num_frames, picture), say(speaker, turn.audio, num_frames, sound)


def _annotate(words: tuple[str, str], turn: ScriptTurn) -> tuple[str, str]:
    return words[turn.video.bit], ("negative", "positive")[turn.video.bit]


def _hidden(script: Script, turn: ScriptTurn) -> tuple[str, ...]:
    audio, video = script.questions["audio"].words, script.questions["video"].words
    numbers = (turn.audio.x, turn.video.x, turn.audio.level, turn.video.level)
    return audio[turn.audio.bit], video[turn.video.bit], *map(repr, numbers)


def _read_bits(script: Script, row: Mapping[str, str]) -> tuple[bool, bool]:
    return tuple(row[name] == script.questions[name.lower()].words[1] for name in ("Audio", "Video"))


def seconds_of(num_frames: int) -> np.ndarray:
    """Times of the samples of a clip of so many frames, in seconds, shape (N,)."""
    return np.arange(math.ceil(num_frames * SAMPLE_RATE / FPS)) / SAMPLE_RATE


def at_level(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A float32 waveform at a random, uninformative loudness: -27 dB ± 3 dB."""
    level = 0.045 * 10 ** (rng.uniform(-3, 3) / 20)
    return np.clip(samples * level / np.sqrt(np.mean(samples**2)), -1, 1).astype(np.float32)
