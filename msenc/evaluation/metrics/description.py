"""What a reply's voice description says, against what was measured: attributes -> accuracy and macro F1.

Beside each stands what three rules reach that look neither at words nor at sound: a model has learned something only
where it is above them.
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
    """A target whose voice is known.

    Args:
        wanted: how it is spoken.
        written: what the reply's description says.
        previous: how the turn before it is spoken.
        speaker: who speaks.
    """

    wanted: VoiceAttributes
    written: VoiceAttributes
    previous: VoiceAttributes
    speaker: str


def voice_of(utterance: Utterance) -> VoiceAttributes:
    """How a turn is spoken: its attributes, or else what its description says.

    Example:
        >>> voice_of(Utterance("0", "Ana", "Hi!", "a woman speaks fast")).rate
        'fast'
    """
    return utterance.attributes or parse(utterance.description or "")


def score_descriptions(targets: Sequence[DescribedTarget], train: Iterable[Utterance]) -> Scores:
    """Accuracy and macro F1 per attribute, and how many descriptions say nothing that can be read.

    Targets whose attribute is unknown are left out of it; what a reply leaves open counts as wrong. Macro F1 is the
    mean over the words that occur among the targets. Each is given for the replies, and ``_majority`` (the commonest
    word of the train split), ``_previous`` (as the turn before) and ``_speaker`` (the commonest word of the speaker in
    the train split, and of all for a speaker that it does not have). Shares, higher is better, but for
    ``description/parse_failure_rate``, the share of replies of which no attribute can be read.

    Args:
        targets: what is scored.
        train: turns that two of the rules are fitted on; none leaves those out.

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
    """Mean F1 of the words that are wanted. Equals scikit-learn's ``f1_score(average="macro")`` with these as labels.

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
    """The commonest known word of each attribute; of equally common ones the first of the vocabulary."""
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
