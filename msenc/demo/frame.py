"""Generates worlds: draws words and hidden states, renders them, and writes them in MELD's format.

    seed -> DrawnDialogue (words, states, marks) -> frames and waveforms -> three CSV files and a clip per turn

A `World` defines the words, the hidden states, and how they are rendered; the demo is one of them.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from msenc.demo.clip_writer import write_clip
from msenc.demo.ideal import Belief
from msenc.files.marks import format_marks
from msenc.types import SPLITS, Dialogue, MsencError, Utterance
from msenc.work.pool import map_in_order
from msenc.work.write_once import write_once

FPS = 12
SAMPLE_RATE = 16_000

CSV_NAMES = {"train": "train_sent_emo.csv", "val": "dev_sent_emo.csv", "test": "test_sent_emo.csv"}
CLIP_FOLDERS = {"train": "train_splits", "val": "dev_splits_complete", "test": "output_repeated_splits_test"}
MELD_COLUMNS = (
    "Sr No.",
    "Utterance",
    "Speaker",
    "Emotion",
    "Sentiment",
    "Dialogue_ID",
    "Utterance_ID",
    "Season",
    "Episode",
    "StartTime",
    "EndTime",
)
TARGET_COLUMNS = ("Description", "Marks")

# A seed gives several independent random streams. Their order in this list affects the data: append only.
_STREAMS = (*SPLITS, "transcripts", "raw")
_GAP_MS = 250
DRAW, SOUND, PICTURE = 1, 2, 3
"""The purpose of a random stream: the last argument of `chance`."""


@dataclass(frozen=True)
class DrawnDialogue:
    """A dialogue and, for each of its utterances, the world's hidden states.

    Each turn has ``told``: text that replaces each stream in transcripts; empty if a world never
    spells out its cues.
    """

    dialogue: Dialogue
    turns: tuple[Any, ...]


@dataclass(frozen=True)
class World:
    """A generated world.

    Args:
        name: prefix of every dialogue's id.
        columns: of the CSV files, with the hidden truth, behind MELD's and `TARGET_COLUMNS`.
        draw: ``(stream, number, seed)`` -> one dialogue; depends on nothing else.
        render: ``(utterance, turn, sound, picture)`` -> frames, uint8, (T, height, width, 3), and samples, float32,
            (N,); `sound` and `picture` are one random generator per stream.
        annotate: turn -> its emotion and sentiment, as annotated from the video.
        hidden: turn -> the values of `columns`.
        read_bits: ``columns`` of a row -> the audio bit and the video bit.
        belief: the probabilities of the bits, and how the streams reveal them.
        check: raises if a package is missing.
    """

    name: str
    columns: tuple[str, ...]
    draw: Callable[[str, int, int], DrawnDialogue]
    render: Callable[[Utterance, Any, np.random.Generator, np.random.Generator], tuple[np.ndarray, np.ndarray]]
    annotate: Callable[[Any], tuple[str, str]]
    hidden: Callable[[Any], Sequence[str]]
    read_bits: Callable[[Mapping[str, str]], tuple[bool, bool]]
    belief: Belief
    check: Callable[[], object]


def chance(seed: int, stream: str, dialogue: int, turn: int, purpose: int) -> np.random.Generator:
    """A random generator that depends only on its arguments.

    Raises:
        MsencError: for a negative seed.
    """
    if seed < 0:
        raise MsencError(f"Found the seed {seed}; expected a non-negative integer.")
    return np.random.default_rng([seed, _STREAMS.index(stream), dialogue, turn, purpose])


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """One of the options, with equal probability."""
    return options[int(rng.integers(len(options)))]


def clip_path(stream: str, number: int, turn: int) -> str | None:
    """The path of a turn's clip below the root; None for streams without clips."""
    return f"{CLIP_FOLDERS[stream]}/dia{number}_utt{turn}.mp4" if stream in CLIP_FOLDERS else None


def draw_split(world: World, split: str, num: int, seed: int) -> list[DrawnDialogue]:
    """Words and hidden states of a split's first `num` dialogues; no media.

    A dialogue depends only on seed, split and number, so a smaller split is a prefix of a larger one.

    Raises:
        MsencError: for another split, or a negative seed.
    """
    if split not in SPLITS:
        raise MsencError(f"Found the split {split!r}; expected one of {', '.join(SPLITS)}.")
    return [world.draw(split, number, seed) for number in range(num)]


def draw_transcripts(world: World, num: int, seed: int) -> list[DrawnDialogue]:
    """Dialogues from a separate random stream, for pre-training an LLM on text.

    They share no dialogue with any split, carry the ids ``<world>/transcripts/dia<N>``, and have no clips.
    """
    return [world.draw("transcripts", number, seed) for number in range(num)]


def write_folder(
    world: World, root: Path, marker: str, settings: Mapping[str, Any], sizes: Mapping[str, int], num_workers: int
) -> None:
    """Write a world as a folder in MELD's format: three CSV files and a clip per utterance.

    The folder appears at `root` only when complete. An existing one with equal settings is reused.

    Args:
        world: what to write.
        root: the folder to write.
        marker: name of the JSON file in it with the settings.
        settings: everything that determines the folder, including ``seed``; `sizes` is added.
        sizes: dialogues per split: ``{"train": 600, "val": 60, "test": 150}``.
        num_workers: rendering processes; 0 renders in this one. The data does not depend on it.

    Raises:
        MsencError: `root` has other content, the sizes are wrong, a package is missing, or writing failed.
    """
    if set(sizes) != set(SPLITS) or not all(isinstance(size, int) and size > 0 for size in sizes.values()):
        raise MsencError(
            f"Found the sizes {dict(sizes)} of {world.name}; expected a whole number above 0 for each of "
            f"{', '.join(SPLITS)}."
        )
    settings = {**settings, "sizes": {split: sizes[split] for split in SPLITS}}
    write_once(root, marker, settings, world.check, partial(_fill, world, settings=settings, num_workers=num_workers))


def _fill(world: World, root: Path, settings: Mapping[str, Any], num_workers: int) -> None:
    from rich.progress import track

    for folder in CLIP_FOLDERS.values():
        (root / folder).mkdir(parents=True)
    seed, sizes = settings["seed"], settings["sizes"]
    jobs = [(split, number) for split in SPLITS for number in range(sizes[split])]
    with ExitStack() as stack:
        render = partial(partial, _render_dialogue, world, root, seed)
        advice = "Set fewer (prepare_workers=1)."
        rendered = map_in_order(render, jobs, max(num_workers, 0), f"writing {world.name}", advice)
        stack.callback(rendered.close)
        durations = dict(
            zip(jobs, track(rendered, f"{world.name}: rendering clips", total=len(jobs)), strict=True),
        )
    for split in SPLITS:
        drawn = draw_split(world, split, sizes[split], seed)
        write_table(world, root / CSV_NAMES[split], drawn, [durations[split, number] for number in range(sizes[split])])


def _render_dialogue(world: World, root: Path, seed: int, job: tuple[str, int]) -> list[int]:
    split, number = job
    drawn = world.draw(split, number, seed)
    num_frames = []
    for index, (utterance, turn) in enumerate(zip(drawn.dialogue.utterances, drawn.turns, strict=True)):
        sound, picture = (chance(seed, split, number, index, purpose) for purpose in (SOUND, PICTURE))
        frames, samples = world.render(utterance, turn, sound, picture)
        num_frames.append(len(frames))
        write_clip(root / utterance.clip, frames, samples, FPS, SAMPLE_RATE)
    return num_frames


def write_table(world: World, path: Path, drawn: list[DrawnDialogue], num_frames: list[list[int]]) -> None:
    """Write a split's CSV file.

    Args:
        world: whose columns it has.
        path: the file.
        drawn: the split's dialogues.
        num_frames: of each clip, by dialogue.
    """
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*MELD_COLUMNS, *TARGET_COLUMNS, *world.columns))
        line = 0
        for number, (one, frames) in enumerate(zip(drawn, num_frames, strict=True)):
            start_ms = 0
            for index, (utterance, turn) in enumerate(zip(one.dialogue.utterances, one.turns, strict=True)):
                end_ms = start_ms + round(frames[index] * 1000 / FPS)
                line += 1
                writer.writerow(
                    (
                        line,
                        utterance.text,
                        utterance.speaker,
                        *world.annotate(turn),
                        number,
                        index,
                        1 + SPLITS.index(one.dialogue.split),
                        number + 1,
                        _clock(start_ms),
                        _clock(end_ms),
                        utterance.description,
                        format_marks(utterance.marks),
                        *world.hidden(turn),
                    )
                )
                start_ms = end_ms + _GAP_MS


def _clock(milliseconds: int) -> str:
    """A time in MELD's format.

    Example:
        >>> _clock(976_059)
        '00:16:16,059'
    """
    seconds, rest = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02},{rest:03}"
