"""The return type of all text metrics, and the error for missing packages."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Scores(NamedTuple):
    """Scores of N (reply, reference) pairs.

    Args:
        corpus: name -> score of all pairs.
        items: name -> N scores, one per pair; absent for corpus scores that are not means of such scores.
    """

    corpus: dict[str, float]
    items: dict[str, list[float]]


Scorer = Callable[[Sequence[str], Sequence[str]], Scores]
"""(replies, references), N each -> Scores."""


def mean_scores(name: str, items: list[float]) -> Scores:
    """The items and their mean, which is independent of their order to the last bit.

    Example:
        >>> mean_scores("rouge_l", [0.5, 1.0])
        Scores(corpus={'rouge_l': 0.75}, items={'rouge_l': [0.5, 1.0]})
    """
    return Scores({name: math.fsum(items) / len(items)}, {name: items})
