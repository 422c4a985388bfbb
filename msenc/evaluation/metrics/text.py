"""Metrics of generated replies against references, by name. Text and voice description are scored separately."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

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
)
from msenc.evaluation.metrics.scores import Scorer
from msenc.types import MsencError, Reply


@dataclass(frozen=True)
class TextMetricKind:
    """What a name stands for.

    Args:
        make: settings as keywords -> the scorer; it loads what the metric needs, or refuses.
        higher_is_better: the direction; None where neither is.
        has_reference: whether references play a part.
    """

    make: Callable[..., Scorer]
    higher_is_better: bool | None = True
    has_reference: bool = True


TEXT_METRICS: dict[str, TextMetricKind] = {
    "bleu": TextMetricKind(lambda: bleu),
    "sacrebleu": TextMetricKind(make_sacrebleu),
    "rouge_l": TextMetricKind(lambda: rouge_l),
    "meteor": TextMetricKind(partial(make_meteor, with_wordnet=True)),
    "meteor_no_wordnet": TextMetricKind(partial(make_meteor, with_wordnet=False)),
    "cider": TextMetricKind(lambda: cider),
    "embedding_similarity": TextMetricKind(EmbeddingSimilarity),
    "bertscore": TextMetricKind(BertScore),
    "distinct": TextMetricKind(lambda: distinct, has_reference=False),
    "repetition": TextMetricKind(lambda: repetition, higher_is_better=False, has_reference=False),
    "length_ratio": TextMetricKind(lambda: length_ratio, higher_is_better=None),
}

DEFAULT_METRICS = ("bleu", "rouge_l", "distinct", "repetition", "length_ratio")
"""What costs next to nothing and needs no extra."""


class TextMetric(Metric):
    """One of `TEXT_METRICS` over all processes: each hands in its pairs, all get the score of all pairs.

    Pairs are scored in sorted order, so the value does not depend on how they were spread, to the last bit.

    (replies, references) ... -> name -> score; empty without any pair

    Args:
        name: of `TEXT_METRICS`.
        **settings: see the metric (an encoder's ``name_or_path`` ...).

    Example:
        >>> metric = TextMetric("bleu")
        >>> metric.update(["You look happy.", "Oh no!"], ["You look sad.", "Oh no!"])
        >>> round(metric.compute()["bleu_1"], 4)
        0.8
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__()
        self.name = name
        self.scorer = build_text_metrics([name], {name: settings})[name]
        self.add_state("bytes", [], dist_reduce_fx="cat")
        self.add_state("lengths", [], dist_reduce_fx="cat")
        self.reset()

    @property
    def higher_is_better(self) -> bool | None:
        """The direction; None where neither is."""
        return TEXT_METRICS[self.name].higher_is_better

    def reset(self) -> None:
        """Forget all pairs."""
        super().reset()
        # a process without any pair has to take part in the gathering, with the right type
        self.bytes.append(torch.zeros(0, dtype=torch.uint8))
        self.lengths.append(torch.zeros(0, dtype=torch.int64))

    def update(self, replies: Sequence[str], references: Sequence[str]) -> None:
        """Add pairs."""
        encoded = [text.encode() for pair in zip(replies, references, strict=True) for text in pair]
        self.bytes.append(torch.tensor(list(b"".join(encoded)), dtype=torch.uint8))
        self.lengths.append(torch.tensor([len(text) for text in encoded], dtype=torch.int64))

    def compute(self) -> dict[str, float]:
        """The score of all pairs."""
        content, texts, start = bytes(dim_zero_cat(self.bytes).tolist()), [], 0
        for length in dim_zero_cat(self.lengths).tolist():
            texts.append(content[start : start + length].decode())
            start += length
        pairs = sorted(zip(texts[::2], texts[1::2], strict=True))
        return self.scorer(*map(list, zip(*pairs, strict=True))).corpus if pairs else {}


def build_text_metrics(
    names: Sequence[str], settings: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Scorer]:
    """Load what metrics need; so what is missing is refused before anything is measured.

    Args:
        names: of `TEXT_METRICS`.
        settings: name -> the metric's settings; those of metrics that are not asked for are ignored.

    Raises:
        MsencError: an unknown metric, a setting that is missing or unknown, a package or a model that is not there.
    """
    scorers = {}
    for name in names:
        if name not in TEXT_METRICS:
            raise MsencError(f"metrics: found {name!r}, expected names among {', '.join(TEXT_METRICS)}.")
        given = dict((settings or {}).get(name, {}))
        try:
            scorers[name] = TEXT_METRICS[name].make(**given)
        except TypeError as error:
            raise MsencError(f"metric_settings.{name}: found {given}, but {error}.") from error
    return scorers


def score_replies(
    replies: Sequence[Reply], references: Sequence[Reply], metrics: Mapping[str, Scorer]
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Score what was generated: texts, and descriptions (``description/...``) where the reference has one.

    A reference of nothing but white space is left out of the metrics that compare with it, and counted
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
        chosen = comparable if TEXT_METRICS[name].has_reference else pairs
        if not chosen:
            continue
        scores = scorer(*map(list, zip(*chosen.values(), strict=True)))
        corpus |= {prefix + key: value for key, value in scores.corpus.items()}
        for key, values in scores.items.items():
            for i, value in zip(chosen, values, strict=True):
                items[i][prefix + key] = value
    return corpus
