"""Metrics of generated replies against references, by name. Text and voice description are scored separately."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from msenc.evaluation.metrics.embeddings import BertScore, EmbeddingSimilarity
from msenc.evaluation.metrics.ngrams import (
    bleu,
    cider,
    distinct,
    length_ratio,
    make_meteor,
    make_sacrebleu,
    repetition,
    rouge_l,
    rouge_l_of_words,
)
from msenc.evaluation.metrics.scores import Scorer
from msenc.evaluation.metrics.words import with_tokenizer
from msenc.types import MsencError, Reply

CUT_INTO_WORDS = ("bleu", "sacrebleu", "rouge_l", "cider")
"""Metrics that take a tokenizer."""

TEXT_METRICS: dict[str, Callable[..., Scorer]] = {
    "bleu": lambda tokenizer="auto": with_tokenizer(bleu, tokenizer),
    "sacrebleu": lambda tokenizer="auto": with_tokenizer(make_sacrebleu(), tokenizer, make_sacrebleu("none")),
    "rouge_l": lambda tokenizer="auto": with_tokenizer(rouge_l, tokenizer, rouge_l_of_words),
    "meteor": partial(make_meteor, with_wordnet=True),
    "meteor_no_wordnet": partial(make_meteor, with_wordnet=False),
    "cider": lambda tokenizer="auto": with_tokenizer(cider, tokenizer),
    "embedding_similarity": EmbeddingSimilarity,
    "bertscore": BertScore,
    "distinct": lambda: distinct,
    "repetition": lambda: repetition,
    "length_ratio": lambda: length_ratio,
}
"""Name -> what makes the scorer of its settings; it loads what the metric needs, or refuses."""

JUDGE = "judge"
"""The metric that reads dialogues, too (`evaluation.judge`), and so is none of `TEXT_METRICS`."""

OF_REPLIES_ALONE = {"distinct", "repetition"}
"""Metrics that do not use references."""

DEFAULT_METRICS = ("bleu", "rouge_l", "distinct", "repetition", "length_ratio")
"""Metrics that cost almost nothing and need no extra."""


def build_text_metrics(
    names: Sequence[str], settings: Mapping[str, Any] | None = None, device: str = "cpu"
) -> dict[str, Scorer]:
    """Load whatever metrics need, so that missing parts are refused before anything is measured.

    Args:
        names: of `TEXT_METRICS`.
        settings: see `settings_of`; those of metrics that are not requested are ignored.
        device: where metrics with a model compute, unless their settings name another.

    Raises:
        MsencError: an unknown metric, a missing or unknown setting, or a missing package or model.
    """
    scorers = {}
    for name in names:
        if name not in TEXT_METRICS:
            raise MsencError(f"metrics: found {name!r}, expected names among {', '.join([*TEXT_METRICS, JUDGE])}.")
    for name in settings or {}:
        if name not in (*TEXT_METRICS, "tokenizer"):
            raise MsencError(
                f"metric_settings.{name}: no such metric. Expected tokenizer, or one of "
                f"{', '.join([*TEXT_METRICS, JUDGE])}."
            )
    for name in names:
        given = settings_of(name, settings or {}) or {}
        make = TEXT_METRICS[name]
        place = {"device": device} if "device" in inspect.signature(make).parameters else {}
        try:
            scorers[name] = make(**(place | given))
        except TypeError as error:
            raise MsencError(f"metric_settings.{name}: found {given}, but {error}.") from error
    return scorers


def settings_of(name: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """A metric's own settings, and the tokenizer of all metrics if it has none of its own.

    Args:
        name: of the metric.
        settings: name -> the metric's settings; ``tokenizer`` -> that of all `CUT_INTO_WORDS`.

    Example:
        >>> settings_of("cider", {"tokenizer": "zh"}), settings_of("distinct", {"tokenizer": "zh"})
        ({'tokenizer': 'zh'}, None)
    """
    own, tokenizer = settings.get(name), settings.get("tokenizer")
    if own is not None and not isinstance(own, Mapping):
        raise MsencError(f"metric_settings.{name}: found {own!r}, expected its settings, such as tokenizer: zh.")
    if tokenizer is None or name not in CUT_INTO_WORDS:
        return None if own is None else dict(own)
    return {"tokenizer": tokenizer, **(own or {})}


def score_replies(
    replies: Sequence[Reply], references: Sequence[Reply], metrics: Mapping[str, Scorer]
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Score generated texts, and descriptions (``description/...``) if the reference has one.

    A reference of only white space is excluded from metrics that compare with it, and counted
    (``references_empty``). A reply without a description counts as an empty one. ``description/exact`` is the share of
    descriptions that equal the reference.

    Args:
        replies: N, what was generated.
        references: N, what was said.
        metrics: from `build_text_metrics`.

    Returns:
        Scores of all pairs by name; and N times those of each pair, where it has any.

    Example:
        >>> all_pairs, each = score_replies([Reply("Yes.")], [Reply("Yes.")], {"rouge_l": rouge_l})
        >>> all_pairs, each
        ({'references_empty': 0, 'rouge_l': 1.0}, [{'rouge_l': 1.0}])
    """
    items: list[dict[str, float]] = [{} for _ in replies]
    texts = {i: (a.text, b.text) for i, (a, b) in enumerate(zip(replies, references, strict=True))}
    corpus = _score(texts, metrics, "", items)
    described = {
        i: (replies[i].description or "", reference.description)
        for i, reference in enumerate(references)
        if reference.description is not None
    }
    if described:
        corpus |= _score(described, metrics, "description/", items)
        corpus["description/exact"] = sum(a == b for a, b in described.values()) / len(described)
    return corpus, items


def _score(
    pairs: Mapping[int, tuple[str, str]], metrics: Mapping[str, Scorer], prefix: str, items: list[dict[str, float]]
) -> dict[str, Any]:
    """Corpus scores of the pairs; each pair's own go into `items`, at its index."""
    comparable = {i: pair for i, pair in pairs.items() if pair[1].strip()}
    corpus: dict[str, Any] = {f"{prefix}references_empty": len(pairs) - len(comparable)}
    for name, scorer in metrics.items():
        chosen = pairs if name in OF_REPLIES_ALONE else comparable
        if not chosen:
            continue
        scores = scorer(*map(list, zip(*chosen.values(), strict=True)))
        corpus |= {prefix + key: value for key, value in scores.corpus.items()}
        for key, values in scores.items.items():
            for i, value in zip(chosen, values, strict=True):
                items[i][prefix + key] = value
    return corpus
