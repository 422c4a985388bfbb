"""Runs that are there -> what as many, or more, runs of the same kind would show.

The variances of a difference (`statistics`) are estimated from first runs. For given numbers of runs and dialogues,
the test's own estimates of these variances are drawn many times, each with its critical value; given those, a true
difference is called significant with a normal probability, and the mean over all draws is the power.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from msenc.evaluation.statistics import combined_runs, critical, refuse_other_clusters, residual, run_table

ALPHA = 0.05
POWER = 0.8
DRAWS = 4000
"""Of the test's estimates: a power is then known to half a point."""

MOST_SEEDS = 1000
"""More runs than anybody trains."""


@dataclass(frozen=True)
class Spread:
    """Variances of a difference between two configurations (or of one mean), and how many runs and dialogues.

    Args:
        runs: of each configuration, between its runs: of the means over all possible dialogues.
        dialogues: between dialogues: of the difference of all possible runs.
        rest: of each configuration, what is left of a dialogue in one run.
        seeds: runs of each configuration.
        num_dialogues: that are scored.
        effective: as many dialogues of equal weight are known as well.

    Example:
        >>> spread = Spread((0.01, 0.01), 0.04, (0.02, 0.02), seeds=(3, 3), num_dialogues=100, effective=100.0)
        >>> f"{spread.power(0.3):.2f}, with six seeds {spread.planned(6).power(0.3):.2f}"
        '0.67, with six seeds 0.99'
        >>> f"{spread.detectable():.2f}; {spread.seeds_needed(0.2)} seeds for 0.2"
        '0.36; 6 seeds for 0.2'
    """

    runs: tuple[float, ...]
    dialogues: float
    rest: tuple[float, ...]
    seeds: tuple[int, ...]
    num_dialogues: int
    effective: float

    def planned(self, seeds: int | Sequence[int], num_dialogues: int | None = None) -> "Spread":
        """The same variances with other numbers of runs (of each configuration) and of dialogues."""
        each = (seeds,) * len(self.seeds) if isinstance(seeds, int) else tuple(seeds)
        dialogues = num_dialogues or self.num_dialogues
        effective = self.effective * dialogues / self.num_dialogues
        return replace(self, seeds=each, num_dialogues=dialogues, effective=effective)

    def power(self, difference: float, alpha: float = ALPHA) -> float:
        """Chance that a true difference is called significant."""
        return self._chance(abs(difference), self._thresholds(alpha))

    def detectable(self, power: float = POWER, alpha: float = ALPHA) -> float:
        """The smallest difference that is called significant with this chance; 0 where nothing spreads."""
        from scipy.optimize import brentq

        if self._deviation == 0:
            return 0.0
        thresholds = self._thresholds(alpha)
        most = 2 * float(thresholds.max()) + 10 * self._deviation
        return float(brentq(lambda d: self._chance(d, thresholds) - power, 0.0, most))

    def seeds_needed(self, difference: float, power: float = POWER, alpha: float = ALPHA) -> int | None:
        """Runs of each configuration that detect a difference with this chance, at least 2.

        None: no number does, because dialogues differ too much.
        """

        def is_enough(seeds: int) -> bool:
            return self.planned(seeds).power(difference, alpha) >= power

        enough = 2
        while not is_enough(enough):
            enough *= 2
            if enough > MOST_SEEDS:
                return None
        low = enough // 2
        while enough - low > 1:
            middle = (low + enough) // 2
            low, enough = (low, middle) if is_enough(middle) else (middle, enough)
        return max(enough, 2)

    @property
    def _rest_of_means(self) -> list[float]:
        """Of each configuration, the variance of a run's mean that is the rest's."""
        return [rest / self.num_dialogues for rest in self.rest]

    @property
    def _deviation(self) -> float:
        """True standard deviation of the difference of the means."""
        of_runs = [r + rest for r, rest in zip(self.runs, self._rest_of_means, strict=True)]
        of_means = sum(v / n for v, n in zip(of_runs, self.seeds, strict=True))
        return math.sqrt(of_means + self.dialogues / self.num_dialogues)

    def _chance(self, difference: float, thresholds: np.ndarray) -> float:
        from scipy.special import ndtr

        if self._deviation == 0:
            return float(difference > 0)
        above, below = ((sign * difference - thresholds) / self._deviation for sign in (1, -1))
        return float((ndtr(above) + ndtr(below)).mean())

    def _thresholds(self, alpha: float) -> np.ndarray:
        """(DRAWS,) what an estimated difference must exceed, in draws of the estimated variances."""
        rng = np.random.default_rng(0)

        def estimates(variance: float, freedom: float) -> np.ndarray:
            freedom = max(freedom, 1.0)
            return variance * rng.chisquare(freedom, DRAWS) / freedom

        freedom = max(self.effective - 1, 1.0)
        rests = self._rest_of_means
        spreads = [estimates(r + rest, seeds - 1) for r, rest, seeds in zip(self.runs, rests, self.seeds, strict=True)]
        of_runs, run_freedom = combined_runs(spreads, self.seeds)
        mean_rest = sum(rest / seeds for rest, seeds in zip(rests, self.seeds, strict=True))
        by_dialogue = estimates(self.dialogues / self.num_dialogues + mean_rest, freedom)
        found_rest = sum(
            estimates(rest / seeds, (seeds - 1) * freedom)
            for rest, seeds in zip(rests, self.seeds, strict=True)
            if seeds > 1
        )
        variance = of_runs + np.maximum(by_dialogue - found_rest, 0.0)
        share = np.divide(of_runs, variance, out=np.zeros(DRAWS), where=variance > 0)
        return critical(alpha, share, (run_freedom, freedom)) * np.sqrt(variance)


def spread_of(
    treated: Any, baseline: Any, clusters: tuple[Any, Any], weights: tuple[Any, Any], runs: tuple[Any, Any]
) -> Spread | None:
    """Variances of the difference that `unpaired_effect` tests; arguments are the same.

    A configuration with a single run is taken to spread as the other does. Where both have one, other seeds are left
    out of account. None with fewer than two dialogues.
    """
    sides = zip((treated, baseline), clusters, weights, runs, strict=True)
    tables = [run_table(*side) for side in sides]
    refuse_other_clusters(tables[0].names, tables[1].names, "one side", "the other")
    num = len(tables[0].names)
    if num < 2:
        return None
    several = [table for table in tables if len(table.values) > 1]
    rests = [residual(table.values) * num if len(table.values) > 1 else math.nan for table in tables]
    means = [table.values.mean(axis=1).var(ddof=1) if len(table.values) > 1 else math.nan for table in tables]
    if several:
        known = next(i for i, table in enumerate(tables) if len(table.values) > 1)
        rests = [rests[known] if math.isnan(rest) else rest for rest in rests]
        means = [means[known] if math.isnan(mean) else mean for mean in means]
    else:
        rests = means = [0.0] * len(tables)
    by_dialogue = tables[0].values.mean(axis=0) - tables[1].values.mean(axis=0)
    mean_rest = sum(rest / len(table.values) for rest, table in zip(rests, tables, strict=True))
    return Spread(
        runs=tuple(max(float(mean - rest / num), 0.0) for mean, rest in zip(means, rests, strict=True)),
        dialogues=max(float(by_dialogue.var(ddof=1)) - mean_rest, 0.0),
        rest=tuple(map(float, rests)),
        seeds=tuple(len(table.values) for table in tables),
        num_dialogues=num,
        effective=tables[0].effective,
    )
