"""Words and a voice description -> sound: the protocol of all synthesizers, and what they share.

A synthesizer takes everything in the call and keeps nothing between two calls, so that one may stand in another
process or on another machine.
"""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Protocol, TypeVar

import numpy as np

from msenc.speech.acting import act
from msenc.speech.description import check_words, parse
from msenc.types import UNKNOWN, MsencError, VoiceAttributes

MAX_CHARACTERS = 220
"""Longest piece that is spoken at once: synthesizers lose their way in more, and the first sound would be late."""

_SHORTENED = frozenset(["Mr", "Mrs", "Ms", "Dr", "Prof", "St", "vs", "etc", "e.g", "i.e", "Jr", "Sr", "No"])
_SMALL_WORDS = re.compile(
    "and|but|or|so|because|that|which|who|when|where|while|if|than|with|without|in|on|at|to|from|for|of|about|as|until",
    re.IGNORECASE,
)

T = TypeVar("T")


class Synthesizer(Protocol):
    """Speaks a text in a voice."""

    def __call__(self, text: str, voice: VoiceAttributes | str, speaker: str | None = None) -> tuple[np.ndarray, int]:
        """Speak.

        Args:
            text: what is said.
            voice: how it is said: a voice description, or its attributes. What it leaves open is spoken neutrally.
            speaker: who says it; one name has one voice for each gender.

        Returns:
            float32 (T,), one channel in [-1, 1], and the sample rate in Hz.

        Raises:
            MsencError: there is nothing to speak, or the synthesizer cannot; it is named.
        """
        ...


class SentenceSynthesizer(ABC):
    """A synthesizer that speaks sentence by sentence; what it cannot do itself is done to the sound afterwards."""

    def __call__(self, text: str, voice: VoiceAttributes | str, speaker: str | None = None) -> tuple[np.ndarray, int]:
        """See `Synthesizer`."""
        pieces = list(self.stream(text, voice, speaker))
        return np.concatenate([samples for samples, _ in pieces]), pieces[0][1]

    def stream(
        self, text: str, voice: VoiceAttributes | str, speaker: str | None = None
    ) -> Iterator[tuple[np.ndarray, int]]:
        """The same sound in pieces, each as soon as its sentence is spoken."""
        attributes = read_voice(voice)
        for sentence in sentences_of(text):
            yield self.speak_sentence(sentence, attributes, speaker)

    def speak_sentence(self, sentence: str, voice: VoiceAttributes, speaker: str | None) -> tuple[np.ndarray, int]:
        """One piece of a text; see `Synthesizer`."""
        spoken = [self.synthesize(phrase, voice, speaker) for phrase in split_phrases(sentence, voice.pauses)]
        sample_rate = spoken[0][1]
        return act([samples for samples, _ in spoken], sample_rate, voice), sample_rate

    @abstractmethod
    def synthesize(self, phrase: str, voice: VoiceAttributes, speaker: str | None) -> tuple[np.ndarray, int]:
        """One phrase, in any loudness and with any silence at its ends; see `Synthesizer`."""


def read_voice(voice: VoiceAttributes | str) -> VoiceAttributes:
    """The attributes that a description states, or the given ones, checked."""
    if isinstance(voice, str):
        return parse(voice)
    check_words(voice)
    return voice


def sentences_of(text: str) -> list[str]:
    """What is to be spoken of a text.

    Raises:
        MsencError: nothing.
    """
    if sentences := split_sentences(text):
        return sentences
    raise MsencError(f"speech: found {text!r}, expected words to speak.")


def split_sentences(text: str, max_characters: int = MAX_CHARACTERS) -> list[str]:
    """Sentences of a text; one that is too long is cut at its last comma, or else its last space, before the limit.

    What holds no letter and no digit is left out.

    Example:
        >>> split_sentences("Hi, Dr. May!  It costs 3.50. Really?")
        ['Hi, Dr. May!', 'It costs 3.50.', 'Really?']
    """
    pieces, start = [], 0
    words = " ".join(text.split())
    for end in re.finditer(r"[.!?]+[\"')\]\u201d\u2019]*(?= )|(?<=[;:])(?= )", words):
        before = words[start : end.start()].rpartition(" ")[2]
        is_initial = re.fullmatch(r"[A-Z]", before) and end.group() == "."
        if end.group().startswith(".") and (before in _SHORTENED or is_initial):
            continue
        if not end.group() and end.end() - start < max_characters // 2:
            continue  # a semicolon parts what is long
        pieces.append(words[start : end.end()].strip())
        start = end.end()
    pieces.append(words[start:].strip())
    return [part for piece in pieces for part in _cut(piece, max_characters) if re.search(r"\w", part)]


def _cut(sentence: str, max_characters: int) -> Iterator[str]:
    while len(sentence) > max_characters:
        end = sentence.rfind(", ", 0, max_characters) + 1 or sentence.rfind(" ", 0, max_characters)
        end = end if end > 0 else max_characters
        yield sentence[:end].strip()
        sentence = sentence[end:].strip()
    yield sentence


def split_phrases(sentence: str, pauses: str) -> list[str]:
    """What a voice with so many pauses says in one go.

    Args:
        sentence: one sentence.
        pauses: ``few`` takes its commas out; ``some`` and ``many`` part it at them, and before a small word where there
            is one, in longer or shorter phrases.

    Returns:
        The sentence, or its phrases, all but the last with a comma or such at the end.

    Example:
        >>> split_phrases("The train leaves at seven in the morning, so we get up early.", "many")
        ['The train leaves,', 'at seven,', 'in the morning,', 'so we get up early.']
        >>> split_phrases("The train leaves at seven in the morning, so we get up early.", "some")
        ['The train leaves at seven,', 'in the morning, so we get up early.']
        >>> split_phrases("Well, no, I do not.", "few")
        ['Well no I do not.']
    """
    if pauses == "few":
        return [re.sub(r"[,;:](?= )", "", sentence)]
    words = sentence.split(" ")
    if pauses == UNKNOWN or len(words) < 4:
        return [sentence]
    longest, shortest = (4, 2) if pauses == "many" else (12, 5)
    phrases: list[list[str]] = [[]]
    for index, word in enumerate(words):
        phrase, left = phrases[-1], len(words) - index
        is_end = phrase and (not phrase[-1][-1].isalnum() or _SMALL_WORDS.fullmatch(word) or len(phrase) == longest)
        if is_end and len(phrase) >= shortest and left >= 2:
            phrases.append([])
        phrases[-1].append(word)
    if pauses == "many" and len(phrases) == 1:
        middle = len(words) // 2
        phrases = [words[:middle], words[middle:]]
    return [
        " ".join(phrase) + ("," if phrase[-1][-1].isalnum() and phrase is not phrases[-1] else "") for phrase in phrases
    ]


def choose(options: Sequence[T], speaker: str | None) -> T:
    """One of the options, always the same for a name; the first without one."""
    if speaker is None:
        return options[0]
    return options[int.from_bytes(sha256(speaker.encode()).digest()[:4]) % len(options)]


def settle_gender(voices: Mapping[T, tuple[str, VoiceAttributes]]) -> dict[T, VoiceAttributes]:
    """Give all turns of a speaker the gender that most of them state, so that the voice stays the same.

    Args:
        voices: turn -> speaker (with the dialogue, where names repeat) and attributes.

    Example:
        >>> turns = {0: ("Ana", parse("a woman speaks fast")), 1: ("Ana", parse("someone speaks slowly"))}
        >>> settle_gender(turns)[1].gender
        'woman'
    """
    stated: dict[str, Counter[str]] = {}
    for speaker, voice in voices.values():
        if voice.gender != UNKNOWN:
            stated.setdefault(speaker, Counter())[voice.gender] += 1
    return {
        turn: replace(voice, gender=stated[speaker].most_common(1)[0][0] if speaker in stated else UNKNOWN)
        for turn, (speaker, voice) in voices.items()
    }
