"""Spoken replies: how well a recogniser understands them, and whether the voice is as requested.

A reply without words has no audio, and counts as wrong.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from msenc.evaluation.metrics.scores import Scores
from msenc.speech.attributes import Bin, attributes_of, estimate_gender, measured_values
from msenc.speech.description import VOCABULARY
from msenc.speech.voice import VoiceMeasures
from msenc.types import UNKNOWN, VoiceAttributes, needing


def score_words(understood: Sequence[str], texts: Sequence[str]) -> Scores:
    """Word and character error rate, after Whisper's English normaliser on both sides; 0 is best, above 1 is possible.

    Contractions and numbers are normalised on both sides; British spellings are not. A corpus rate is all errors
    over all words (characters), as jiwer counts them. Texts without words are excluded.

    Args:
        understood: the recogniser's transcripts.
        texts: the intended texts.

    Example:
        >>> score_words(["I am here now"], ["I'm here."]).corpus["speech/wer"]
        0.3333333333333333
    """
    with needing("the metric speech/wer", "metrics"):
        import jiwer
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    normaliser = EnglishTextNormalizer({})

    def normalise(text: str) -> str:
        return normaliser(text) if any(c.isalnum() for c in text) else ""  # of "..." it leaves "."

    pairs = [(normalise(text), normalise(heard)) for text, heard in zip(texts, understood, strict=True)]
    kept = [pair for pair in pairs if pair[0]]
    if not kept:
        return Scores({}, {})
    corpus, items = {}, {}
    for name, rate in {"speech/wer": jiwer.wer, "speech/cer": jiwer.cer}.items():
        corpus[name] = rate([text for text, _ in kept], [heard for _, heard in kept])
        items[name] = [rate(text, heard) if text else math.nan for text, heard in pairs]
    return Scores(corpus, items)


def heard_voice(measures: VoiceMeasures, num_syllables: int, bins: Mapping[str, Bin]) -> VoiceAttributes:
    """The attributes of a measured voice, in the words of a described data set.

    Args:
        measures: of the sound.
        num_syllables: of what is said.
        bins: of the data set, see `prepare.describe.read_bins`.
    """
    return attributes_of(measured_values(measures, num_syllables), estimate_gender([measures]), bins)


def score_voices(heard: Sequence[VoiceAttributes], asked: Sequence[VoiceAttributes], name: str) -> dict[str, Any]:
    """Share of the replies whose audio has the requested value, per attribute; unspecified ones are excluded.

    Args:
        heard: attributes measured in each reply.
        asked: attributes requested for it.
        name: source of the request, appended to the metrics' names.

    Example:
        >>> slow, fast = VoiceAttributes(rate="slow"), VoiceAttributes(rate="fast")
        >>> score_voices([slow, slow], [slow, fast], "as_written")
        {'speech/rate/as_written': 0.5}
    """
    shares = {}
    for attribute in VOCABULARY:
        pairs = [(getattr(h, attribute), getattr(a, attribute)) for h, a in zip(heard, asked, strict=True)]
        known = [(h, a) for h, a in pairs if a != UNKNOWN]
        if known:
            shares[f"speech/{attribute}/{name}"] = sum(h == a for h, a in known) / len(known)
    return shares
