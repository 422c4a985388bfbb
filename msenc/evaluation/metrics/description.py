"""A reply's voice description against the measured voice: attributes -> accuracy and macro F1.

Each is compared with three baselines that ignore the input: a model has learned something only
if it exceeds them.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from msenc.evaluation.metrics.scores import Scores
from msenc.speech.description import VOCABULARY, parse
from msenc.types import UNKNOWN, Utterance, VoiceAttributes

_Voice = Mapping[str, str]


class DescribedTarget(NamedTuple):
    """A target with a known voice.

    Args:
        wanted: how it is spoken.
        written: attributes in the reply's description.
        previous: how the previous turn is spoken.
        speaker: who speaks.
    """

    wanted: VoiceAttributes
    written: VoiceAttributes
    previous: VoiceAttributes
    speaker: str


def voice_of(utterance: Utterance) -> VoiceAttributes:
    """How a turn is spoken: its attributes, or else those in its description.

    Example:
        >>> voice_of(Utterance("0", "Ana", "Hi!", "a woman speaks fast")).rate
        'fast'
    """
    return utterance.attributes or parse(utterance.description or "")


def score_descriptions(targets: Sequence[DescribedTarget], train: Iterable[Utterance]) -> Scores:
    """Accuracy and macro F1 per attribute, and the share of descriptions that cannot be parsed.

    Targets whose attribute is unknown are excluded; an attribute that the reply does not state counts as wrong. Macro
    F1 is the mean over the words that occur among the targets. Each is given for the replies, and ``_majority`` (the
    most frequent word of the train split), ``_previous`` (as in the previous turn) and ``_speaker`` (the speaker's most
    frequent word in the train split, or the overall one for unknown speakers). Shares, higher is better, except
    ``description/parse_failure_rate``, the share of replies from which no attribute can be parsed.

    Args:
        targets: what is scored.
        train: turns on which two of the baselines are fitted; if empty, these are omitted.

    Returns:
        ``description/<attribute>/accuracy``, ``.../macro_f1``, ``.../targets``; their means over attributes without
        the middle part; and per target the share of its known attributes that are right.

    Example:
        >>> fast, slow = VoiceAttributes(rate="fast"), VoiceAttributes(rate="slow")
        >>> scores = score_descriptions([DescribedTarget(fast, fast, slow, "Ana")], [])
        >>> scores.corpus["description/rate/accuracy"], scores.corpus["description/rate/accuracy_previous"]
        (1.0, 0.0)
    """
    guesses: dict[str, list[_Voice]] = {
        "": [vars(t.written) for t in targets],
        "_previous": [vars(t.previous) for t in targets],
    }
    heard = [(turn.speaker, vars(voice_of(turn))) for turn in train]
    if heard:
        everyone, by_speaker = _commonest(voice for _, voice in heard), _commonest_by_speaker(heard)
        guesses["_majority"] = [everyone] * len(targets)
        guesses["_speaker"] = [{**everyone, **by_speaker.get(t.speaker, {})} for t in targets]
    wanted = [vars(t.wanted) for t in targets]
    corpus: dict[str, float] = {}
    means: dict[str, list[float]] = defaultdict(list)
    for attribute in VOCABULARY:
        known = [i for i, voice in enumerate(wanted) if voice[attribute] != UNKNOWN]
        if not known:
            continue
        corpus[f"description/{attribute}/targets"] = len(known)
        for rule, voices in guesses.items():
            pairs = [(wanted[i][attribute], voices[i].get(attribute, UNKNOWN)) for i in known]
            for name, value in (("accuracy", _accuracy(pairs)), ("macro_f1", macro_f1(pairs))):
                corpus[f"description/{attribute}/{name}{rule}"] = value
                means[f"description/{name}{rule}"].append(value)
    corpus |= {name: math.fsum(values) / len(values) for name, values in means.items()}
    corpus["description/parse_failure_rate"] = sum(t.written == VoiceAttributes() for t in targets) / len(targets)
    items = [
        _accuracy([(word, written[name]) for name, word in voice.items() if word != UNKNOWN])
        for voice, written in zip(wanted, guesses[""], strict=True)
    ]
    return Scores(corpus, {"description/accuracy": items})


def macro_f1(pairs: Sequence[tuple[str, str]]) -> float:
    """Mean F1 over the target words. Equals scikit-learn's ``f1_score(average="macro")`` with these as labels.

    Args:
        pairs: (wanted, found).

    Example:
        >>> round(macro_f1([("fast", "fast"), ("slow", "fast"), ("slow", "slow")]), 4)
        0.6667
    """
    wanted, found = (Counter(words) for words in zip(*pairs, strict=True))
    right = Counter(a for a, b in pairs if a == b)
    return math.fsum(2 * right[word] / (wanted[word] + found[word]) for word in wanted) / len(wanted)


def _accuracy(pairs: Sequence[tuple[str, str]]) -> float:
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else 0.0


def _commonest(voices: Iterable[_Voice]) -> dict[str, str]:
    """The most frequent known word of each attribute; ties go to the first in the vocabulary."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for voice in voices:
        for attribute, word in voice.items():
            counts[attribute][word] += word != UNKNOWN
    commonest = {}
    for attribute, words in VOCABULARY.items():
        if any(counts[attribute].values()):
            commonest[attribute] = max(words, key=counts[attribute].__getitem__)
    return commonest


def _commonest_by_speaker(heard: Iterable[tuple[str, _Voice]]) -> dict[str, dict[str, str]]:
    voices: dict[str, list[_Voice]] = defaultdict(list)
    for speaker, voice in heard:
        voices[speaker].append(voice)
    return {speaker: _commonest(own) for speaker, own in voices.items()}
