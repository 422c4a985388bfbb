"""The raw demo: demo conversations as long videos, several per file, with the ground truth.

Everything that segmentation has to find is known here: where dialogues, scenes and utterances start and end, who
speaks, and what is said. A woman and a man take turns; each keeps voice and mood, and the video cuts to the
speaker. Between dialogues there is silence and an empty frame.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from msenc.demo.clip_writer import write_clip
from msenc.demo.face import SIZE, draw_face
from msenc.demo.frame import FPS, SAMPLE_RATE, DrawnDialogue
from msenc.demo.world import SPEAKERS, check_packages, steady_dialogue
from msenc.raw.timestamps import FILE_NAME
from msenc.speech.synthesizers.libespeak import VoiceSettings, speak
from msenc.types import MsencError
from msenc.work.progress import progress_bar
from msenc.work.write_once import write_once

TRUTH_FILE = "truth.json"
_VERSION = 1  # of the generator: raised whenever equal settings give other data
_TURNS = (6, 13)  # fewest, and one more than the most
_PAUSE_S = (0.35, 1.0)  # between two turns
_GAP_S = (2.0, 4.0)  # before, between and behind dialogues
_RATE_WPM = 150
# The clearest of eSpeak's voices: of the demo's, some are not understood by a small recogniser in a third of the words.
_VOICES = {"a woman": ("en-us+steph", "en-us+f1"), "a man": ("en-us+m3", "en-us+m2")}
_PITCH = (35, 65)  # calm, excited
_SPEECH_LEVEL, _NOISE_LEVEL = 0.08, 0.0005  # root mean square
_EMPTY_GREY = 40
_SOUND, _PICTURE = 2, 3


@dataclass(frozen=True)
class TrueUtterance:
    """One turn in a long video: its times in seconds, speaker, and words."""

    start_s: float
    end_s: float
    speaker: str
    text: str


@dataclass(frozen=True)
class TrueDialogue:
    """One dialogue of a long video."""

    video: str
    start_s: float
    end_s: float
    utterances: tuple[TrueUtterance, ...]


def write_raw_demo(root: Path, num_videos: int, dialogues_per_video: int, seed: int, num_workers: int = 0) -> None:
    """Write long videos, ``timestamp.json`` with their dialogues, and ``truth.json``.

    Args:
        root: the folder; it appears only when complete, and is reused if it has equal settings.
        num_videos: files ``video0.mp4`` and so on.
        dialogues_per_video: dialogues in each.
        seed: not negative.
        num_workers: for compatibility with other generators; this one works in one process.

    Raises:
        MsencError: if `root` holds something else, a number is none, a package is missing, or writing fails.
    """
    if min(num_videos, dialogues_per_video) < 1:
        raise MsencError(
            f"Found {num_videos} videos of {dialogues_per_video} dialogues; expected at least one of each. "
            "Set data.generate.num_videos and data.generate.dialogues_per_video."
        )
    settings = {
        "version": _VERSION,
        "num_videos": num_videos,
        "dialogues_per_video": dialogues_per_video,
        "seed": seed,
    }
    write_once(
        root, "raw_demo.json", settings, check_packages, partial(_write_videos, num_videos, dialogues_per_video, seed)
    )


def read_truth(root: Path) -> list[TrueDialogue]:
    """The truth of a raw demo, in the order of its ``timestamp.json``."""
    return [
        TrueDialogue(**{**d, "utterances": tuple(TrueUtterance(**u) for u in d["utterances"])})
        for d in json.loads((Path(root) / TRUTH_FILE).read_text(encoding="utf-8"))
    ]


def _write_videos(num_videos: int, dialogues_per_video: int, seed: int, root: Path) -> None:
    truth: list[TrueDialogue] = []
    with progress_bar("dialogues") as progress:
        bar = progress.add_task("raw demo: rendering videos", total=num_videos * dialogues_per_video)
        numbers = _two_voiced(seed)
        for video in range(num_videos):
            name = f"video{video}.mp4"
            pieces: list[_Piece] = []
            for _ in range(dialogues_per_video):
                number, demo = next(numbers)
                start_s = _length_s(pieces)
                dialogue_pieces = list(_render_dialogue(number, demo, seed))
                truth.append(_placed(name, start_s, dialogue_pieces))
                pieces += dialogue_pieces
                progress.advance(bar)
            pieces.append(_empty(np.random.default_rng([seed, video])))
            write_clip(
                root / name,
                np.concatenate([p.frames for p in pieces]),
                np.concatenate([p.samples for p in pieces]),
                FPS,
                SAMPLE_RATE,
            )
    spans: dict[str, list[list[float]]] = {}
    for dialogue in truth:
        spans.setdefault(dialogue.video, []).append([dialogue.start_s, dialogue.end_s])
    (root / FILE_NAME).write_text(json.dumps(spans, indent=1) + "\n", encoding="utf-8")
    (root / TRUTH_FILE).write_text(json.dumps([asdict(d) for d in truth], indent=1) + "\n", encoding="utf-8")


def _two_voiced(seed: int) -> Iterator[tuple[int, DrawnDialogue]]:
    """Dialogues of a woman and a man, with their numbers."""
    number = 0
    while True:
        demo = steady_dialogue(number, seed, _TURNS)
        if len({SPEAKERS[u.speaker].person for u in demo.dialogue.utterances}) == 2:
            yield number, demo
        number += 1


@dataclass(frozen=True)
class _Piece:
    """Frames (T, h, w, 3) and audio of the same length; for a turn, also its words and their times."""

    frames: np.ndarray
    samples: np.ndarray
    said: TrueUtterance | None = None

    @property
    def length_s(self) -> float:
        return len(self.frames) / FPS


def _render_dialogue(number: int, demo: DrawnDialogue, seed: int) -> Iterator[_Piece]:
    """An empty piece, then one piece per turn, each with half of the pause before and half of the pause behind it."""
    rng = np.random.default_rng([seed, number])
    yield _empty(rng)
    for index, (utterance, turn) in enumerate(zip(demo.dialogue.utterances, demo.turns, strict=True)):
        speaker = SPEAKERS[utterance.speaker]
        voice = _VOICES[speaker.person][list(SPEAKERS).index(utterance.speaker) // 2 % 2]
        speech = _say(utterance.text, VoiceSettings(voice, _PITCH[turn.is_excited], rate_wpm=_RATE_WPM))
        before, behind = (round(rng.uniform(*_PAUSE_S) / 2 * SAMPLE_RATE) for _ in range(2))
        num_frames = math.ceil((before + len(speech) + behind) * FPS / SAMPLE_RATE)
        samples = _noise(num_frames, np.random.default_rng([seed, number, index, _SOUND]))
        samples[before : before + len(speech)] += speech
        frames = draw_face(
            speaker.look, turn.is_happy, num_frames, FPS, np.random.default_rng([seed, number, index, _PICTURE])
        )
        start_s, end_s = before / SAMPLE_RATE, (before + len(speech)) / SAMPLE_RATE
        yield _Piece(frames, samples, TrueUtterance(start_s, end_s, utterance.speaker, utterance.text))


def _placed(video: str, start_s: float, pieces: list[_Piece]) -> TrueDialogue:
    """The dialogue on the video's timeline, from the first piece with speech to the last."""
    utterances = []
    at_s = start_s
    for piece in pieces:
        if piece.said is not None:
            said = piece.said
            times = (round(at_s + t, 3) for t in (said.start_s, said.end_s))
            utterances.append(TrueUtterance(*times, said.speaker, said.text))
        at_s += piece.length_s
    return TrueDialogue(video, round(start_s + pieces[0].length_s, 3), round(at_s, 3), tuple(utterances))


def _empty(rng: np.random.Generator) -> _Piece:
    num_frames = round(rng.uniform(*_GAP_S) * FPS)
    return _Piece(np.full((num_frames, SIZE, SIZE, 3), _EMPTY_GREY, np.uint8), _noise(num_frames, rng))


def _noise(num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """Faint noise for a number of frames, as in any real recording."""
    return rng.normal(0, _NOISE_LEVEL, _num_samples(num_frames)).astype(np.float32)


def _num_samples(num_frames: int) -> int:
    return round(num_frames * SAMPLE_RATE / FPS)


def _say(text: str, voice: VoiceSettings) -> np.ndarray:
    """Speech at the demo's rate and one level, without silence at its ends: float32 (N,)."""
    import soxr

    speech, rate = speak(text, voice)
    speech = soxr.resample(speech, rate, SAMPLE_RATE)
    loud = np.flatnonzero(np.abs(speech) > 0.02 * np.abs(speech).max())
    speech = speech[loud[0] : loud[-1] + 1]
    return np.clip(speech * (_SPEECH_LEVEL / np.sqrt(np.mean(speech.astype(np.float64) ** 2))), -1, 1).astype(
        np.float32
    )


def _length_s(pieces: list[_Piece]) -> float:
    return sum(piece.length_s for piece in pieces)
