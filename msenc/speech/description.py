"""Words <-> attributes of a voice: preparation, synthesis and metrics share this one mapping.

`describe` writes a sentence by templates, `parse` reads one. Its own sentences it reads back exactly; of other text it
returns what is said without doubt, and ``unknown`` for the rest.
"""

import re
from dataclasses import replace
from random import Random

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

_LEVELS = {"low": "(?:low|deep)", "medium": "(?:medium|moderate|average|normal)", "high": "high"}
_DEGREE = "(?:very |quite |rather |really |extremely )?"

# What free text may say, beside the phrases above. Words that could mean two attributes ("a low voice": deep, or
# quiet?) stand in none.
_FREE: dict[str, dict[str, tuple[str, ...]]] = {
    "gender": {
        "woman": (r"wom[ae]n(?:'s)?", "female", "she", "her", "lady", "girl"),
        "man": (r"m[ae]n(?:'s)?", "male", "he", "his", "gentleman", "guy", "boy"),
    },
    "pitch": {
        level: (
            f"{_DEGREE}{words}[ -]pitch(?:ed)?",
            f"pitch (?:is |was |of (?:his |her |the )?voice is )?{_DEGREE}{words}",
            *(("deep (?:voice|tone)",) if level == "low" else ()),
        )
        for level, words in _LEVELS.items()
    },
    "range": {
        "flat": (
            "flat (?:intonation|voice|tone|delivery)",
            r"monoton(?:e|ous|ously|ic)",
            "monotone (?:voice|delivery)",
        ),
        "moderate": (
            "moderate(?:ly expressive)? (?:intonation|expression|expressivity)",
            "moderately expressive(?:ly)?",
        ),
        "expressive": (
            f"{_DEGREE}expressive(?:ly)?(?: intonation| voice| tone| delivery)?",
            "(?:lively|animated) (?:intonation|voice|tone|delivery|melody)",
        ),
    },
    "rate": {
        "slow": (
            f"{_DEGREE}slow(?:ly)?(?: (?:pace|speed|rate|speech|speaking rate))?",
            f"(?:pace|speed|rate) is {_DEGREE}slow",
        ),
        "moderate": ("(?:moderate|normal|average|medium) (?:pace|speed|rate|speaking rate)",),
        "fast": (
            f"{_DEGREE}(?:fast|quick(?:ly)?|rapid(?:ly)?)(?: (?:pace|speed|rate|speech|speaking rate))?",
            f"(?:pace|speed|rate) is {_DEGREE}fast",
        ),
    },
    "loudness": {
        "quiet": (f"{_DEGREE}(?:quiet(?:ly)?|soft(?:ly))(?: voice| volume)?", "soft voice", "low volume"),
        "moderate": ("(?:moderate|normal|average|medium) (?:volume|loudness)", "moderately loud(?:ly)?"),
        "loud": (f"{_DEGREE}loud(?:ly)?(?: voice| volume)?", "high volume"),
    },
    "pauses": {
        "few": ("(?:few|hardly any|almost no|no) pauses", "without (?:any )?pauses"),
        "some": ("(?:some|occasional) pauses",),
        "many": ("(?:many|frequent|a lot of) pauses",),
    },
    "noise": {
        "clean": (
            "(?:clean|clear) (?:recording|audio)",
            "(?:no|without) (?:any )?(?:background )?noise",
        ),
        "slight": ("(?:slight|some|a little) (?:background )?noise", "slightly noisy(?: recording)?"),
        "noisy": (
            f"{_DEGREE}noisy(?: recording| background| audio)?",
            "(?:strong|much|a lot of|loud) (?:background )?noise",
        ),
    },
}

# A statement near one of these words may be another one, or none: "not fast", "less expressive", "fast or slow".
_DOUBT_BEFORE = re.compile(
    r"\b(?:not|never|no|neither|nor|without|hardly|barely|less|too|slightly|somewhat|fairly|almost|"
    r"a (?:bit|little)|\w+n't|than|if|or)(?: \w+){0,2} ?$"
)
_DOUBT_AFTER = re.compile(r" or\b")


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
    """The attributes that a sentence states; ``unknown`` where it states none, or two that differ, or with a doubt.

    Args:
        sentence: one of `describe`, or any text (a model's reply, a data set's own description).

    Example:
        >>> parse("Anna is a woman who talks quickly, but not loudly.")
        VoiceAttributes(gender='woman', pitch='unknown', range='unknown', rate='fast', loudness='unknown', \
pauses='unknown', noise='unknown')
    """
    text = re.sub(r"\s+", " ", sentence.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    found = [
        (match.start(), match.end(), name, word)
        for name, word, pattern in _PATTERNS
        for match in pattern.finditer(text)
    ]
    # "slightly noisy recording" is not a "noisy recording": the longer statement holds
    whole = [f for f in found if not any(o[0] <= f[0] and f[1] <= o[1] and o[1] - o[0] > f[1] - f[0] for o in found)]
    rest = list(text)  # without the statements: "without pauses and fast" leaves no doubt about "fast"
    for start, end, *_ in whole:
        rest[start:end] = ";" * (end - start)
    stated: dict[str, set[str]] = {}
    for start, end, name, word in whole:
        before, after = "".join(rest[:start]), "".join(rest[end:])
        in_doubt = name != "gender" and (_DOUBT_BEFORE.search(before) or _DOUBT_AFTER.match(after))
        stated.setdefault(name, set()).add(UNKNOWN if in_doubt else word)
    return replace(VoiceAttributes(), **{name: words.pop() for name, words in stated.items() if len(words) == 1})


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


def _compile() -> list[tuple[str, str, re.Pattern[str]]]:
    patterns = []
    for name, words in VOCABULARY.items():
        for word in words:
            own = [re.escape(phrase) for phrase in PHRASES.get(name, {}).get(word, ())]
            for pattern in (*own, *_FREE[name][word]):
                patterns.append((name, word, re.compile(rf"(?<![\w'-]){pattern}(?![\w-])")))
    return patterns


_PATTERNS = _compile()
