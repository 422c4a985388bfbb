"""A reply that is interrupted -> what was heard of it: its words, and its sound."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from msenc.speech.wav import from_wav, write_wav

END_S = 0.1
"""Of a reply's end, that nobody misses: sound is silent there, and browsers round."""


@dataclass(frozen=True)
class Said:
    """A spoken reply of a talk, as far as it takes to cut it.

    Args:
        turn: its place in the talk.
        sentences: that were spoken, and how many seconds each takes.
    """

    turn: int
    sentences: tuple[tuple[str, float], ...]

    @property
    def seconds(self) -> float:
        """How long all of it takes."""
        return sum(length_s for _, length_s in self.sentences)


def words_heard(text: str, sentences: Sequence[tuple[str, float]], heard_s: float) -> str:
    """A reply's words up to a moment of its sound: of the sentence that ended there, its share of whole words.

    Args:
        text: of the reply.
        sentences: of it that were spoken, and how many seconds each takes.
        heard_s: of their sound.

    Example:
        >>> words_heard("One is here. Two is there.", [("One is here.", 1.0), ("Two is there.", 1.0)], 1.5)
        'One is here. Two is'
    """
    text, end = " ".join(text.split()), 0
    for sentence, length_s in sentences:
        start = text.find(sentence, end)
        if start < 0:
            break  # the talk keeps less than was said
        if heard_s < length_s - END_S:
            part = sentence[: int(len(sentence) * heard_s / length_s) + 1].rpartition(" ")[0]
            return text[: start + len(part) if part else end].strip()
        end, heard_s = start + len(sentence), max(heard_s - length_s, 0.0)
    return text[:end]


def cut_sound(path: Path, heard_s: float) -> Path | None:
    """A sound file that ends at a moment, in the place of one that goes on; None where nothing was heard."""
    cut = path.with_stem(f"{path.stem}-heard")
    if path.exists():  # else it was cut before
        samples, sample_rate = from_wav(path.read_bytes())
        heard = samples[: round(heard_s * sample_rate)]
        if len(heard):
            write_wav(cut, heard, sample_rate)
        path.unlink()
    return cut if cut.exists() else None
