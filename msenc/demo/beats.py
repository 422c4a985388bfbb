"""The world of beats: bright or dull strokes, and a figure that moves sideways or upright; all shown outright.

Rhythm, tempo, loudness, length, pitch and timbre of the speaker, and place, size, shape and colour of the figure are
drawn apart from the bits. docs/worlds.md derives what each modality can know.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from msenc.demo.figures import SHAPES, draw_figure
from msenc.demo.frame import FPS, SAMPLE_RATE, World
from msenc.demo.ideal import Belief, Cue
from msenc.demo.script import Question, Script, at_level, make_world, seconds_of

VERSION = 1  # of the generator: raised whenever equal settings give other data
_PARTIALS = 12

SCRIPT = Script(
    name="beats",
    people=(
        ("Vera", "a woman, flat"),
        ("Paul", "a man, flat"),
        ("Rosa", "a woman, expressive"),
        ("Karl", "a man, expressive"),
        ("Emma", "a woman, flat"),
        ("Noel", "a man, flat"),
        ("Judy", "a woman, expressive"),
        ("Tom", "a man, expressive"),
    ),
    openings=("Good morning.", "Good evening.", "Let us begin."),
    statements=("It came from the {}.", "I stand at the {}.", "We met at the {}."),
    objects=(("hill", "street", "market", "farm"), ("river", "harbor", "lake", "beach")),
    questions={
        "audio": Question(
            0.3,
            ("How did it ring?", "What was the stroke like?", "Describe the beat."),
            ("It rang {}.", "The stroke was {}.", "That beat is {}."),
            ("dull", "bright"),
        ),
        "video": Question(
            0.3,
            ("Which way did it move?", "How did the shape travel?", "Where did it go?"),
            ("It went {}.", "The shape moved {}.", "That was {}."),
            ("upright", "sideways"),
        ),
        "both": Question(
            0.25,
            ("Was that the signal?", "Is this our sign?"),
            ("We should {}.", "This means {}."),
            ("wait", "start"),
        ),
        "text": Question(
            0.15,
            ("Is there water nearby?", "Will my feet get wet?"),
            ("Your feet stay {}.", "That place is {}."),
            ("dry", "wet"),
        ),
    },
    # A bright stroke with a sideways figure is the signal.
    belief=Belief(prior=((0.25, 0.25), (0.25, 0.25)), both=((0, 0), (0, 1))),
)


@dataclass(frozen=True)
class Look:
    """The values that the cues take, and what they are hidden among.

    Args:
        slopes: the partial k of a stroke has the amplitude k ** -slope: of a dull stroke, and of a bright one.
        pitch_hz: of the first speaker's strokes.
        tilt: angle in radians between sideways and the picture's rows, and between upright and its columns.
        travel: how far a figure moves to either side, in pixels.
    """

    slopes: tuple[float, float]
    pitch_hz: float
    tilt: float
    travel: float

    @classmethod
    def draw(cls, variant: int) -> "Look":
        """The values of a variant of this world."""
        rng = np.random.default_rng([variant, 1])
        slopes = (rng.uniform(1.7, 2.3), rng.uniform(0.3, 0.7))
        return cls(slopes, rng.uniform(150, 260), rng.uniform(-0.3, 0.3), rng.uniform(13, 17))


def make_beats(variant: int) -> World:
    """This world with the cue values of a variant."""
    look = Look.draw(variant)
    return make_world(SCRIPT, partial(_say, look), partial(_show, look))


def _say(look: Look, speaker: int, cue: Cue, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """A train of strokes, even or swinging, whose partials tell the bit; float32, (N,)."""
    seconds = seconds_of(num_frames)
    pitch = look.pitch_hz * 2 ** (speaker / 8 + rng.uniform(-0.03, 0.03))
    decay_s, gap_s, swing = rng.uniform(0.05, 0.12), rng.uniform(0.16, 0.3), rng.choice([0.0, 0.3])
    k = np.arange(1, _PARTIALS + 1)
    amplitudes = k ** -look.slopes[cue.bit] * (k * pitch < 7000)
    amplitudes[1::2] *= 0.5 + speaker % 4 / 6  # the speaker's timbre
    phases = rng.uniform(0, 2 * np.pi, (_PARTIALS, 1))
    tone = amplitudes @ np.sin((2 * np.pi * pitch * np.outer(k, seconds) + phases).astype(np.float32))
    since = seconds[: round(8 * decay_s * SAMPLE_RATE)]
    stroke = np.minimum(since / 0.004, 1) * np.exp(-since / decay_s)
    envelope = np.zeros(len(seconds))
    for number in range(int(seconds[-1] / gap_s)):
        begin = round((0.02 + gap_s * (number + swing * (number % 2))) * SAMPLE_RATE)
        part = envelope[begin : begin + len(stroke)]
        part += stroke[: len(part)]
    return at_level(tone * envelope, rng)


def _show(look: Look, speaker: int, cue: Cue, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """A figure that swings along a line whose direction tells the bit; uint8, (T, 64, 64, 3)."""
    angle = look.tilt + (0 if cue.bit else np.pi / 2)
    # Slow enough for encoders that take three pictures a second: three places or more of each swing are seen.
    turns = np.arange(num_frames) / FPS / rng.uniform(0.9, 1.3) + rng.uniform()
    along = look.travel * rng.uniform(0.9, 1.1) * np.sin(2 * np.pi * turns)
    middle = 31.5 + rng.uniform(-3, 3, size=2)
    centres = middle + along[:, None] * np.array([np.cos(angle), np.sin(angle)])
    return draw_figure(SHAPES[speaker % 3], 5.5 + 0.3 * speaker, centres, rng)
