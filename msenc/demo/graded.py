"""The graded world: a note and a place on a line, which tell their bits only as well as the level of the turn allows.

Each stream shows a number x, cleanly; how far x is to be trusted is drawn for each turn and hidden. Bits are not fair,
and audio and video bit go together. docs/worlds.md derives what each modality can know.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from msenc.demo.figures import SHAPES, SIZE, draw_figure
from msenc.demo.frame import FPS, World
from msenc.demo.ideal import Belief, Cue
from msenc.demo.script import Question, Script, at_level, make_world, seconds_of

VERSION = 1  # of the generator: raised whenever equal settings give other data
_MOST = 6.0  # |x| beyond it, once in 30,000 turns of the highest level, is shown as if it were this

SCRIPT = Script(
    name="graded",
    people=(
        ("Olga", "a woman, flat"),
        ("Ralf", "a man, flat"),
        ("Mary", "a woman, expressive"),
        ("Hans", "a man, expressive"),
        ("Lucy", "a woman, flat"),
        ("Adam", "a man, flat"),
        ("Jane", "a woman, expressive"),
        ("Fred", "a man, expressive"),
    ),
    openings=("Now we play.", "Your turn.", "Here we go."),
    statements=("I bought a {}.", "Take this {}.", "Look, a {}."),
    objects=(("hammer", "shovel", "ladder", "wrench"), ("plum", "pear", "melon", "cherry")),
    questions={
        "audio": Question(
            0.3,
            ("Which note did I mean?", "What was my note?"),
            ("You meant {}.", "The note was {}.", "I guess {}."),
            ("low", "high"),
        ),
        "video": Question(
            0.3,
            ("Which side did I choose?", "What was my side?"),
            ("You chose {}.", "The side was {}.", "I believe {}."),
            ("left", "right"),
        ),
        "both": Question(
            0.25,
            ("Did I win this round?", "How did the round end?"),
            ("You have {}.", "This time you {}."),
            ("lost", "won"),
        ),
        "text": Question(
            0.15,
            ("What kind of thing is it?", "Name the kind of thing."),
            ("It is a {}.", "You hold a {}."),
            ("tool", "fruit"),
        ),
    },
    # The note is high in 70 of 100 turns, and the side is the note's in 75. High and right together win.
    belief=Belief(
        prior=((0.3 * 0.75, 0.3 * 0.25), (0.7 * 0.25, 0.7 * 0.75)),
        both=((0, 0), (0, 1)),
        levels=(0.0, 1.0, 2.0, 3.0, 4.0),
    ),
)


@dataclass(frozen=True)
class Look:
    """How x is shown.

    Args:
        middle_hz: note of x = 0.
        octaves: per unit of x.
        pixels: per unit of x.
    """

    middle_hz: float
    octaves: float
    pixels: float

    @classmethod
    def draw(cls, variant: int) -> "Look":
        """The values of a variant of this world."""
        rng = np.random.default_rng([variant, 2])
        return cls(rng.uniform(550, 750), rng.uniform(0.22, 0.27), rng.uniform(3.6, 4.1))


def make_graded(variant: int) -> World:
    """This world with the cue values of a variant."""
    look = Look.draw(variant)
    return make_world(SCRIPT, partial(_say, look), partial(_show, look))


def _say(look: Look, speaker: int, cue: Cue, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """A trembling note whose height is x; float32, (N,)."""
    seconds = seconds_of(num_frames)
    pitch = look.middle_hz * 2 ** (look.octaves * float(np.clip(cue.x, -_MOST, _MOST)))
    tremor = 1 + 0.5 * np.sin(2 * np.pi * (rng.uniform(3, 7) * seconds + rng.uniform()))
    phases = 2 * np.pi * rng.uniform(size=2)
    octave = 0.1 + 0.05 * speaker  # the speaker's timbre
    tone = np.sin(2 * np.pi * pitch * seconds + phases[0])
    tone += octave * np.sin(4 * np.pi * pitch * seconds + phases[1])
    return at_level(tone * tremor, rng)


def _show(look: Look, speaker: int, cue: Cue, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """A figure that floats up or down at the distance x from the middle; uint8, (T, 64, 64, 3)."""
    across = (SIZE - 1) / 2 + look.pixels * float(np.clip(cue.x, -_MOST, _MOST))
    drift = rng.uniform(20, 44) + rng.uniform(-6, 6) * np.arange(num_frames) / FPS
    centres = np.stack([np.full(num_frames, across), drift], axis=1)
    return draw_figure(SHAPES[speaker % 3], 4.5 + 0.2 * speaker, centres, rng)
