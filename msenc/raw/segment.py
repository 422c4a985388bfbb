"""A dialogue's sound and pictures -> its utterances: stretches of speech between pauses and cuts.

An utterance ends where the speaker changes, at a long pause, at a shorter one in which the picture cuts, and, where it
would grow too long for the recogniser, at its longest pause. So no cut falls into a word that one speaker says between
pauses.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from msenc.raw.container import MediaError, Span
from msenc.raw.media import iterate_frames
from msenc.types import MsencError, needing

VERSION = 2  # raised whenever equal input and settings give other utterances
SAMPLE_RATE = 16_000

Spans = list[tuple[float, float]]
Stretch = tuple[float, float, str]
"""Start and end of speech in seconds, and who speaks."""

_SCENE_WIDTH = 256  # pixels; PySceneDetect makes pictures so small, too
_MIN_SCENE_S = 0.5
_CUT_TOLERANCE_S = 0.1  # sound and picture are seldom cut at the very same moment
_QUIET_S = 0.03


@dataclass(frozen=True)
class SegmentSettings:
    """When an utterance ends.

    Args:
        scene_threshold: change of content, 0 to 255, from which on PySceneDetect calls it a cut.
        speech_threshold: probability from which on Silero VAD calls it speech.
        min_pause_s: a pause of this length always ends an utterance.
        max_utterance_s: a longer one is divided; Whisper listens to 30 s at once.
    """

    scene_threshold: float = 27.0
    speech_threshold: float = 0.5
    min_pause_s: float = 0.5
    max_utterance_s: float = 25.0

    def __post_init__(self) -> None:
        if not 0.5 <= self.max_utterance_s <= 30:
            raise MsencError(
                f"max_utterance_s={self.max_utterance_s}: expected 0.5 to 30 s, which Whisper hears at once."
            )


def load_silero(what: str, extra: str) -> Any:
    """The model of Silero VAD, whose weights come with its package.

    Args:
        what: it is needed for, and
        extra: that has it, if the package is missing.

    Raises:
        MsencError: if the package is missing.
    """
    import torch

    threads = torch.get_num_threads()
    with needing(what, extra):
        import silero_vad
    torch.set_num_threads(threads)  # its import sets one thread for the whole process
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.load.*", category=DeprecationWarning)
        return silero_vad.load_silero_vad()


def load_speech_detector() -> Callable[[np.ndarray, float], Spans]:
    """Silero VAD, whose weights come with its package.

    Returns:
        A function of sound, float32 (S,) at 16 kHz, and the threshold, that gives the stretches of speech in seconds.

    Raises:
        MsencError: if the package is missing.
    """
    import torch

    model = load_silero("finding speech", "raw")
    import silero_vad

    def detect(sound: np.ndarray, threshold: float) -> Spans:
        with torch.inference_mode():
            found = silero_vad.get_speech_timestamps(torch.from_numpy(sound), model, threshold=threshold)
        return [(s["start"] / SAMPLE_RATE, s["end"] / SAMPLE_RATE) for s in found]

    return detect


def find_cuts(path: Path, span: Span, threshold: float) -> list[float]:
    """Hard cuts of the picture, by PySceneDetect's content detector.

    Returns:
        Seconds from the span's start; empty where there is no picture.

    Raises:
        MsencError: if the package is missing.
        MediaError: if the file cannot be decoded.
    """
    with needing("finding scenes", "raw"):
        from scenedetect import ContentDetector, FrameTimecode
        from scenedetect.common import Timecode
    clock = Fraction(1, 1_000_000)
    detector = ContentDetector(threshold=threshold, min_scene_len=_MIN_SCENE_S)
    cuts: list[FrameTimecode] = []
    try:
        for seconds, picture in iterate_frames(path, span, _SCENE_WIDTH):
            # the rate says nothing of these times, which are exact; the detector wants one
            time = FrameTimecode(Timecode(round(seconds / clock), clock), fps=25.0)
            cuts += detector.process_frame(time, picture)
    except MediaError as error:
        if error.reason != "no picture":
            raise
    return sorted(cut.seconds for cut in cuts)


def cut_utterances(
    speech: Sequence[Stretch],
    cuts: Sequence[float],
    settings: SegmentSettings,
    quietest: Callable[[float, float], float],
) -> list[Stretch]:
    """Stretches of speech -> utterances.

    Args:
        speech: of one speaker each, in order.
        cuts: of the picture, in seconds.
        settings: when an utterance ends.
        quietest: the moment between two times that is the best to cut at where there is no pause.

    Returns:
        Start and end of each utterance, in seconds, in order, and its speaker.

    Example:
        >>> cut_utterances([(0, 1, "0"), (1.2, 2, "0"), (2, 3, "1")], [], SegmentSettings(), max)
        [(0, 2, '0'), (2, 3, '1')]
        >>> cut_utterances([(0, 1, "0"), (1.2, 2, "0")], [1.1], SegmentSettings(), max)
        [(0, 1, '0'), (1.2, 2, '0')]
    """
    groups: list[list[Stretch]] = []
    for stretch in speech:
        if groups and not _is_boundary(groups[-1][-1], stretch, cuts, settings):
            groups[-1].append(stretch)
        else:
            groups.append([stretch])
    return [u for group in groups for u in _divide(group, settings.max_utterance_s, quietest)]


def quietest_moment(sound: np.ndarray) -> Callable[[float, float], float]:
    """Of a sound, float32 (S,) at 16 kHz: where it is quietest between two times, in seconds."""
    step = round(_QUIET_S * SAMPLE_RATE)

    def find(start_s: float, end_s: float) -> float:
        first, last = round(start_s * SAMPLE_RATE), round(end_s * SAMPLE_RATE)
        frames = sound[first:last]
        frames = frames[: len(frames) // step * step].reshape(-1, step)
        if len(frames) == 0:
            return (start_s + end_s) / 2
        return start_s + (int(np.argmin((frames**2).sum(axis=1))) + 0.5) * _QUIET_S

    return find


def _is_boundary(last: Stretch, stretch: Stretch, cuts: Sequence[float], settings: SegmentSettings) -> bool:
    start_s, end_s = last[1], stretch[0]
    if stretch[2] != last[2] or end_s - start_s >= settings.min_pause_s:
        return True
    return any(start_s - _CUT_TOLERANCE_S <= cut <= end_s + _CUT_TOLERANCE_S for cut in cuts)


def _divide(group: Sequence[Stretch], max_s: float, quietest: Callable[[float, float], float]) -> list[Stretch]:
    """One utterance, or several of at most `max_s`, parted at the longest pauses."""
    start_s, end_s, speaker = group[0][0], group[-1][1], group[0][2]
    if end_s - start_s <= max_s:
        return [(start_s, end_s, speaker)]
    if len(group) == 1:
        num = math.ceil((end_s - start_s) / (0.8 * max_s))
        length_s = (end_s - start_s) / num
        edges = [quietest(*(start_s + (k + d) * length_s for d in (-0.1, 0.1))) for k in range(1, num)]
        return [(a, b, speaker) for a, b in pairwise([start_s, *edges, end_s])]
    longest = max(range(1, len(group)), key=lambda k: group[k][0] - group[k - 1][1])
    return [*_divide(group[:longest], max_s, quietest), *_divide(group[longest:], max_s, quietest)]
