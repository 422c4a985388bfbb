"""What every metric of texts returns, and the refusal for a package that is not there."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Scores(NamedTuple):
    """Scores of N (reply, reference) pairs.

    Args:
        corpus: name -> score of all pairs.
        items: name -> N scores, one per pair; a corpus score that is no mean of such scores has none.
    """

    corpus: dict[str, float]
    items: dict[str, list[float]]


Scorer = Callable[[Sequence[str], Sequence[str]], Scores]
"""(replies, references), N each -> Scores."""


def mean_scores(name: str, items: list[float]) -> Scores:
    """The items and their mean, which does not depend on their order to the last bit.

    Example:
        >>> mean_scores("rouge_l", [0.5, 1.0])
        Scores(corpus={'rouge_l': 0.75}, items={'rouge_l': [0.5, 1.0]})
    """
    return Scores({name: math.fsum(items) / len(items)}, {name: items})
