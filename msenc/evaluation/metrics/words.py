"""Tokenization of texts in any script, for metrics that only know white space and a to z.

(replies, references) -> the same texts with white space between their words -> a metric of words
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

from msenc.evaluation.metrics.scores import Scorer, Scores
from msenc.types import MsencError, needing

SACREBLEU = ("none", "13a", "intl", "zh", "char", "ja-mecab", "ko-mecab")
"""Tokenizers of sacrebleu that are taken by name."""
TOKENIZERS = ("auto", "default", "words", "characters", *SACREBLEU)

UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
"""Scripts (the first word of their letters' Unicode names) without spaces between words."""


def with_tokenizer(score: Scorer, tokenizer: str, on_words: Scorer | None = None) -> Scorer:
    """A word-based metric whose texts are tokenized first.

    Args:
        score: the metric with its own tokenization: ``default``, which ``auto`` uses for Latin script.
        tokenizer: one of `TOKENIZERS`; ``auto`` decides by the script of most letters of the references: ``default``
            for Latin, ``characters`` for scripts without spaces, ``words`` for all others.
        on_words: the metric for texts split only at white space; `score` if None.

    Returns:
        A scorer whose names end in the tokenizer's (``rouge_l-characters``) unless that is ``default``.

    Raises:
        MsencError: an unknown tokenizer, or a package that it needs is missing.
    """
    if tokenizer not in TOKENIZERS:
        raise MsencError(f"metric_settings: no tokenizer {tokenizer!r}. Expected one of {', '.join(TOKENIZERS)}.")
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
    """The tokenizer that ``auto`` selects for these texts.

    Example:
        >>> tokenizer_of(["Oh, naïve!"]), tokenizer_of(["今天天气很好"]), tokenizer_of(["Доброе утро", "нет"])
        ('default', 'characters', 'words')
    """
    scripts = Counter(_script(c) for text in texts for c in text if c.isalpha())
    most = scripts.most_common(1)[0][0] if scripts else "LATIN"
    return "default" if most == "LATIN" else "characters" if most in UNSPACED else "words"


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
        >>> characters("我用 iPhone。")
        ['我', '用', 'iphone', '。']
    """
    found = []
    for word in words(text):
        found += re.findall(r"[\x00-\u024f]+|.[\u0300-\u036f\u0e31-\u0e3a\u0e47-\u0e4e\u0eb1-\u0ebc]*", word)
    return found


def _cutter(name: str) -> Callable[[str], list[str]]:
    if name in ("default", "words", "characters"):
        return {"characters": characters}.get(name, words)
    with needing(f"the tokenizer {name}", "metrics"):
        from sacrebleu.metrics import BLEU

        try:
            tokenizer = BLEU(tokenize=name).tokenizer
        except RuntimeError as error:  # MeCab is a separate package
            raise ImportError(str(error).strip().splitlines()[0], name="mecab") from error
    return lambda text: tokenizer(text).split()
