"""Words <-> attributes of a voice: preparation, synthesis and metrics share this one mapping.

`describe` writes a sentence by templates, `parse` reads one. Its own sentences it reads back exactly; of other text it
returns what is said without doubt, by the words of `msenc.speech.lexicon`, and ``unknown`` for the rest; `read` also
says which words it did not understand.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from random import Random
from typing import NamedTuple

from msenc.speech.lexicon import HEADS, NEUTRAL, entries
from msenc.types import UNKNOWN, MsencError, VoiceAttributes

VOCABULARY: dict[str, tuple[str, ...]] = {
    "gender": ("woman", "man"),
    "pitch": ("low", "medium", "high"),
    "range": ("flat", "moderate", "expressive"),
    "rate": ("slow", "moderate", "fast"),
    "loudness": ("quiet", "moderate", "loud"),
    "pauses": ("few", "some", "many"),
    "noise": ("noisy", "slight", "clean"),
}
"""The words of each attribute; of all but the gender in rising order of what is measured (of noise: the SNR)."""

_SUBJECTS = {
    "woman": ("a woman", "a female speaker"),
    "man": ("a man", "a male speaker"),
    UNKNOWN: ("someone", "a speaker"),
}

# Each phrase may follow "a woman speaks", in any order. `describe` writes these and no others.
PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "pitch": {
        "low": ("at a low pitch", "in a low-pitched voice"),
        "medium": ("at a medium pitch", "in a medium-pitched voice"),
        "high": ("at a high pitch", "in a high-pitched voice"),
    },
    "range": {
        "flat": ("with flat intonation", "in a monotone", "very evenly"),
        "moderate": ("with moderate intonation", "moderately expressively"),
        "expressive": ("with expressive intonation", "very expressively", "with a lively melody"),
    },
    "rate": {
        "slow": ("slowly", "at a slow pace"),
        "moderate": ("at a moderate pace", "at a moderate speed"),
        "fast": ("fast", "quickly", "at a fast pace"),
    },
    "loudness": {
        "quiet": ("quietly", "softly", "in a quiet voice"),
        "moderate": ("at a moderate volume", "moderately loudly"),
        "loud": ("loudly", "in a loud voice", "at a high volume"),
    },
    "pauses": {
        "few": ("with few pauses", "almost without pauses"),
        "some": ("with some pauses", "pausing now and then"),
        "many": ("with many pauses", "pausing often"),
    },
    "noise": {
        "clean": ("in a clean recording", "without background noise"),
        "slight": ("with slight background noise", "in a slightly noisy recording"),
        "noisy": ("in a noisy recording", "with strong background noise"),
    },
}

# "{how}" is never empty: without a phrase the sentence is the first template's beginning.
TEMPLATES = (
    "{who} speaks {how}",
    "{who} talks {how}",
    "{who} is speaking {how}",
    "the words of {who}, spoken {how}",
    "{who} can be heard speaking {how}",
)

# A statement after one of these is denied, or may be another one, or none: "not fast", "less fast", "fast or slow".
_BETWEEN = r"(?: (?!(?:but|and|yet|who|which|that|while|although|though)\b)[\w'-]+)"
_DENIED = re.compile(
    r"\b(?:not|never|no|neither|nor|without|hardly|barely|scarcely|rarely|seldom|cannot|\w+n't|isnt|wasnt|doesnt|dont|"
    r"didnt|lacks?|lacking|devoid|avoids?|avoiding|refuses?|rather than|instead of|anything but|far from|nothing|"
    rf"unlike|stops?|stopped|fails?|by no means){_BETWEEN}{{0,3}} ?$"
)
_DOUBTED = re.compile(
    r"\b(?:less|slightly|somewhat|fairly|almost|nearly|a (?:bit|little|touch)|kind of|sort of|perhaps|maybe|possibly|"
    rf"might|sometimes|occasionally|than|if|or){_BETWEEN}{{0,2}} ?$|\bto ?$"
)
_OR = re.compile(rf"; or{_BETWEEN}{{0,2}} ?$")
_DOUBT_AFTER = re.compile(r" or\b| than (?!usual|normal|average|most|typical)")
_NOT_GENDER = re.compile(r"\b(?:not|n't|never|rather than|instead of|than)(?: (?:an?|the|really))* ?$")

# An adjective after one of these describes a noun, and only some nouns are about the voice.
_ATTRIBUTIVE = re.compile(
    r"\b(?:a|an|the|this|that|her|his|their|its|my|your|another|some|such|in|with|of|by|at)(?:[; ,]| and| but| yet)*$"
)
_MAX_BEFORE = 100  # characters that decide how a statement stands, on each side
_MAX_TO_HEAD = 6  # words to the noun

_SHARED = re.compile(
    r"\b(low|slow|fast|high|medium|moderate|normal|average) (pitch|volume|pace|speed|rate|tempo|loudness) (?:and|&) "
    r"(pitch|volume|pace|speed|rate|tempo|loudness|intonation)\b(?! (?:is|was|that))"
)


class Reading(NamedTuple):
    """What `read` found in a sentence.

    Args:
        attributes: what it states, and what its moods and ages imply where it states nothing.
        implied: the names of those that are only implied ("angrily": loud).
        unread: its words that were not understood, or not relied on: unknown, in doubt, denied or contradicted.
    """

    attributes: VoiceAttributes
    implied: tuple[str, ...]
    unread: tuple[str, ...]


def describe(attributes: VoiceAttributes, rng: Random) -> str:
    """A sentence that says all known attributes, and nothing of the others; templates, words and order by chance.

    Args:
        attributes: words of `VOCABULARY`, or ``unknown``.
        rng: source of chance; the same state gives the same sentence.

    Returns:
        Lower case, no full stop, no brackets (a target ends in its description in brackets).

    Raises:
        MsencError: a word that the attribute does not have.

    Example:
        >>> describe(VoiceAttributes(gender="woman", pitch="high", rate="fast"), Random(0))
        'the words of a female speaker, spoken in a high-pitched voice, fast'
    """
    check_words(attributes)
    who = rng.choice(_SUBJECTS[attributes.gender])
    phrases = []
    for name, by_word in PHRASES.items():
        word = getattr(attributes, name)
        if word != UNKNOWN:
            phrases.append(rng.choice(by_word[word]))
    if not phrases:
        return f"{who} speaks"
    rng.shuffle(phrases)
    last = rng.choice((" and ", ", ")) if len(phrases) < 3 else rng.choice((" and ", ", and ", ", "))
    how = ", ".join(phrases[:-1]) + last + phrases[-1] if len(phrases) > 1 else phrases[0]
    return rng.choice(TEMPLATES).format(who=who, how=how)


def parse(sentence: str) -> VoiceAttributes:
    """The attributes that a sentence states or implies; ``unknown`` where it does neither, or not without doubt.

    Args:
        sentence: one of `describe`, or any text (a model's reply, a data set's own description).

    Example:
        >>> parse("Anna is a woman who talks quickly, but not loudly.")
        VoiceAttributes(gender='woman', pitch='unknown', range='unknown', rate='fast', loudness='unknown', \
pauses='unknown', noise='unknown')
    """
    return read(sentence).attributes


@lru_cache(maxsize=4096)  # the same few sentences, thousands of times
def read(sentence: str) -> Reading:
    """Read a sentence, and say what of it was not understood.

    What is denied is dropped, unless both ends of a scale are: "neither fast nor slow" is moderate. Of two statements
    that differ none holds, and a statement outweighs what a mood implies: one may whisper angrily.

    Example:
        >>> reading = read("an elderly man mutters slowly, with a Welsh accent")
        >>> {name: word for name, word in vars(reading.attributes).items() if word != UNKNOWN}
        {'gender': 'man', 'rate': 'slow', 'loudness': 'quiet'}
        >>> reading.unread
        ('welsh accent',)
    """
    text = _plain(sentence)
    found = [
        _Found(match.start(), match.end(), *entry)
        for *entry, pattern in _patterns()
        for match in pattern.finditer(text)
        if match.end() > match.start()
    ]
    # "slightly noisy recording" is not a "noisy recording": the longer statement holds; of two that overlap the first
    whole = [f for f in found if not any(_is_within(f, other) for other in found)]
    whole = [f for f in whole if not any(o.start < f.start < o.end < f.end and o.says.keys() & f.says for o in whole)]
    rest = list(text)  # without the statements: "without pauses and fast" leaves no doubt about "fast"
    for one in whole:
        rest[one.start : one.end] = ";" * (one.end - one.start)
    kinds = ("said", "doubted", "denied", "dropped", *_IMPLIED)
    by_standing: dict[str, list[_Found]] = {kind: [] for kind in kinds}
    last = ""
    for one in sorted(whole, key=lambda one: one.start):
        before = "".join(rest[max(0, one.start - _MAX_BEFORE) : one.start])
        standing = _standing(before, text[one.end : one.end + _MAX_BEFORE], one)
        if standing == "doubted" and last == "denied" and _OR.search(before):
            standing = "denied"  # "not loud or fast"
        last = standing
        if one.level:
            standing = _IMPLIED[one.level - 1] if standing == "said" else "dropped"
        by_standing[standing].append(one)
    attributes, implied, used = {}, [], []
    for name, words in VOCABULARY.items():
        own, doubted, denied = (_words(by_standing[kind], name) for kind in ("said", "doubted", "denied"))
        against = doubted | denied
        if not own and not doubted and len(words) == 3 and denied >= {words[0], words[2]}:
            own, against = {words[1]}, set()
            used += [one for one in by_standing["denied"] if name in one.says]
        if not own and not against:
            own = _words(by_standing["mood"], name) or _words(by_standing["age"], name)
            implied += [name] * (len(own) == 1)
        if len(own) == 1 and doubted <= own and not own & (against - doubted):
            (attributes[name],) = own
            used += [one for one in by_standing["said"] if name in one.says]
    # a mood is understood, too, where a statement outweighs what it implies
    used += [one for kind in _IMPLIED for one in by_standing[kind] if attributes.keys() & one.says.keys()]
    return Reading(VoiceAttributes(**attributes), tuple(implied), _unread(text, whole, used))


def _words(found: Sequence["_Found"], name: str) -> set[str]:
    return {one.says[name] for one in found if name in one.says}


_IMPLIED = ("mood", "age")


class _Found(NamedTuple):
    """A statement, and where it stands in the text."""

    start: int
    end: int
    says: Mapping[str, str]
    level: int
    is_adjective: bool


def _plain(sentence: str) -> str:
    """Lower case, one space between words, straight quotes; dashes that are no hyphens part as commas do."""
    text = unicodedata.normalize("NFKC", sentence).lower()
    text = re.sub("[\u2018\u2019\u02bc`\u00b4]", "'", text)
    text = re.sub(r"[\u2010\u2011]|(?<=\w)\u2013(?=\w)", "-", text)
    text = re.sub(r"\s*(?:[\u2012-\u2015]|--+| - )\s*", ", ", text)
    text = re.sub(r"\bnot (?:only|just|merely|simply)\b", "", text)  # no denial
    text = re.sub(r"[\s_*]+", " ", text).strip()
    return _SHARED.sub(r"\1 \2 and \1 \3", text)


def _is_within(one: _Found, other: _Found) -> bool:
    if ("gender" in one.says) != ("gender" in other.says):
        return False  # "raises her voice"
    return other.start <= one.start and one.end <= other.end and other.end - other.start > one.end - one.start


def _standing(before: str, after: str, one: _Found) -> str:
    """Whether a statement is ``said``, ``denied``, ``doubted``, or ``dropped`` as it is of something else."""
    if "gender" in one.says:
        return "denied" if _NOT_GENDER.search(before) else "said"
    if match := _DENIED.search(before):
        is_twice = _DENIED.search(before[: match.start()].rstrip())
        return "doubted" if is_twice else "denied"
    if _DOUBTED.search(before) or _DOUBT_AFTER.match(after):
        return "doubted"
    if one.is_adjective and not one.level and "noise" not in one.says and _ATTRIBUTIVE.search(before):
        clause = re.split(r"[.:!?()]", after)[0]
        if not HEADS & set(re.findall(r"[\w']+", clause)[:_MAX_TO_HEAD]):
            return "dropped"
    return "said"


def _unread(text: str, whole: Sequence[_Found], used: Sequence[_Found]) -> tuple[str, ...]:
    """The words of a text that belong to no statement that was used, and that say something; neighbours together."""
    held = {(one.start, one.end) for one in used}
    dropped = [one for one in whole if (one.start, one.end) not in held]
    spans: list[list[int]] = []
    for match in re.finditer(r"[^\W_][\w'-]*", text):
        start, end = match.span()
        is_held = any(a <= start < b for a, b in held)
        is_dropped = any(one.start <= start < one.end for one in dropped)
        if is_held or not (is_dropped or any(word not in NEUTRAL for word in re.split("-", match.group()))):
            continue
        if spans and not text[spans[-1][1] : start].strip(" -"):
            spans[-1][1] = end
        else:
            spans.append([start, end])
    return tuple(dict.fromkeys(text[start:end] for start, end in spans))


def check_words(attributes: VoiceAttributes) -> None:
    """Refuse attributes with a word that `VOCABULARY` does not have.

    Raises:
        MsencError: names the attribute and its words.
    """
    for name, words in VOCABULARY.items():
        word = getattr(attributes, name)
        if word not in (*words, UNKNOWN):
            raise MsencError(
                f"voice attribute {name}: found {word!r}, expected one of {', '.join(words)}, or {UNKNOWN!r}."
            )


@cache
def _patterns() -> list[tuple[dict[str, str], int, bool, re.Pattern[str]]]:
    """As `entries`, with those of `PHRASES`; compiled when first read with."""
    own = [
        ({name: word}, 0, False, "|".join(map(re.escape, phrases)))
        for name, by_word in PHRASES.items()
        for word, phrases in by_word.items()
    ]
    return [(*entry, re.compile(rf"(?<![\w'-])(?:{pattern})(?![\w-])")) for *entry, pattern in (*own, *entries())]
