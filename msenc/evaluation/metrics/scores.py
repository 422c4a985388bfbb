"""What every metric of texts returns, and the refusal for a package that is not there."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from msenc.types import MsencError


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


@contextmanager
def needing(metric: str, extra: str) -> Iterator[None]:
    """Turn a missing package into a refusal that names it and the extra of msenc that brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise MsencError(
            f"metric {metric}: the package {package} is missing. It comes with an extra: pip install -e '.[{extra}]'"
        ) from error
