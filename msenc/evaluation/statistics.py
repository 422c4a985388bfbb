"""Values per item -> mean, interval and test that account for repeated dialogues and runs.

A sweep's values form a table of runs by dialogues. Both are random: another seed trains another model, another test
split has other dialogues. So the variance of a mean has a part for each, and a residual part (all
estimated from the two-way table, as in studies of many readers and many cases):

    V = Vr + max(Vd - Ve, 0)        Vr: between runs, Vd: between dialogues, Ve: the rest, all of the mean

With three runs, Vr has two degrees of freedom and Vd many. Satterthwaite's degrees of freedom, the usual answer, are
too many there, and a bootstrap over three runs is far too confident (docs/statistics.md has the figures). Cochran's
critical value, the mean of both t quantiles weighted by the two parts, stays at or below the nominal level.

Source: D. D. Dorfman, K. S. Berbaum and C. E. Metz, Investigative Radiology 27 (1992) 723-731, and S. L. Hillis,
Statistics in Medicine 26 (2007) 596-619, for the variance; W. G. Cochran, Biometrics 20 (1964) 191-195, for the
critical value; A. V. Carter, K. T. Schnepel and D. G. Steigerwald, Review of Economics and Statistics 99 (2017)
698-709, for the effective number of dialogues that differ in weight; S. Holm, Scandinavian Journal of Statistics 6
(1979) 65-70; D. J. Schuirmann, Journal of Pharmacokinetics and Biopharmaceutics 15 (1987) 657-680, for equivalence.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from msenc.types import MsencError

SMALLEST_P = 1e-30
"""Lower limit of reported p-values: the tests' assumptions do not hold so far out."""

NEGLIGIBLE = 0.005
"""A negligible rise in nats per token: 0.5 % of perplexity, a quarter of what the demo hides in one stream."""


@dataclass(frozen=True)
class Effect:
    """A mean with its confidence interval and the p-value of "the true mean is 0".

    With fewer than two dialogues, or two items if dialogues are unknown, nothing is known about the spread: the limits
    and the p-value are NaN.

    Args:
        mean: estimated mean, in the unit of the values.
        low: lower limit of the interval.
        high: upper limit.
        p_value: two-sided, not corrected for other comparisons.
        bound: the true mean is no further from 0 than this, with the interval's confidence: so it is equivalent to 0
            within any larger margin, by two one-sided tests. Infinite where nothing is known.
    """

    mean: float
    low: float
    high: float
    p_value: float
    bound: float = math.inf


def paired_effect(
    differences: Sequence[float] | np.ndarray,
    clusters: Sequence | np.ndarray,
    weights: Sequence[float] | np.ndarray | None = None,
    runs: Sequence | np.ndarray | None = None,
    confidence: float = 0.95,
) -> Effect:
    """Mean difference of N pairs; for the interval of a mean, pass values instead of differences.

    Args:
        differences: (N,) of each item, and of each run if there are several; with `weights`, per unit of weight
            (nats per token, with the number of tokens).
        clusters: (N,) the cluster of each item: its dialogue's id.
        weights: (N,) weight of each item; None: equal weights.
        runs: (N,) the run (seed) of each item. None or a single one: the interval only covers items, and says
            nothing about other seeds.
        confidence: of the interval.

    Raises:
        MsencError: lengths differ, all weights are 0, a value is not finite, or a run lacks a cluster of another.

    Example:
        >>> effect = paired_effect([0.9, 1.1, 1.0, 1.2, 0.8, 1.0], ["a", "a", "b", "b", "c", "c"])
        >>> f"{effect.mean:.2f} [{effect.low:.2f}, {effect.high:.2f}]"
        '1.00 [0.75, 1.25]'
    """
    return _effect([run_table(differences, clusters, weights, runs)], confidence)


def unpaired_effect(
    treated: Sequence[float] | np.ndarray,
    baseline: Sequence[float] | np.ndarray,
    clusters: tuple[Sequence | np.ndarray, Sequence | np.ndarray],
    weights: tuple[Sequence[float] | np.ndarray | None, Sequence[float] | np.ndarray | None] = (None, None),
    runs: tuple[Sequence | np.ndarray | None, Sequence | np.ndarray | None] = (None, None),
    confidence: float = 0.95,
) -> Effect:
    """Mean of `treated` minus that of `baseline`, with the same items but unpaired runs.

    Dialogues are paired. Runs are two independent samples (Welch): sharing a seed does not make runs of different
    models a pair, and with three runs each, the interval is a third narrower than that of three pairs. If
    equal seeds do make runs similar, it is wider than necessary, never too narrow.

    Args:
        treated: (N,) values of one configuration.
        baseline: (M,) values of the other.
        clusters: (N,) and (M,), with the same names.
        weights: (N,) and (M,) as in `paired_effect`.
        runs: (N,) and (M,) as in `paired_effect`; a single run on one side has no spread, so the other side's
            is used for both.
        confidence: of the interval.

    Raises:
        MsencError: as `paired_effect`, or the two sides have different clusters.

    Example:
        >>> sides = [[1.0, 1.2, 0.8, 2.0, 2.2, 1.8], [0.0, 0.3, -0.3, 1.0, 0.8, 1.2]]
        >>> dialogues, seeds = ["a", "b", "c"] * 2, [1, 1, 1, 2, 2, 2]
        >>> effect = unpaired_effect(*sides, clusters=(dialogues, dialogues), runs=(seeds, seeds))
        >>> f"{effect.mean:.1f}, p = {effect.p_value:.2f}"
        '1.0, p = 0.29'
    """
    sides = zip((treated, baseline), clusters, weights, runs, strict=True)
    first, second = (run_table(*side) for side in sides)
    refuse_other_clusters(first.names, second.names, "one side", "the other")
    return _effect([first, second], confidence)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: adjusted p-values, in the order given; NaN (not tested) is excluded from the family.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, 1979.

    Example:
        >>> holm([0.01, 0.04, 0.03, float("nan")])
        [0.03, 0.06, 0.06, nan]
    """
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    adjusted, highest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def verdict(effect: Effect) -> str:
    """A control's verdict on the stream it replaced, from the rise of the loss in nats per token.

    ``used`` if the interval is above 0, ``not used`` if it ends below `NEGLIGIBLE`, else
    ``cannot tell``.

    Example:
        >>> verdict(Effect(0.1, 0.05, 0.15, 0.001)), verdict(Effect(0.0, -0.001, 0.001, 0.9))
        ('used', 'not used')
        >>> verdict(Effect(0.1, -0.05, 0.25, 0.2))
        'cannot tell'
    """
    if effect.low > 0:
        return "used"
    return "not used" if effect.high < NEGLIGIBLE else "cannot tell"


@dataclass(frozen=True)
class RunTable:
    """Values as (R, C): the contributions of each run's dialogues to its mean. A row's mean is the run's mean.

    `effective` is the number of equally weighted dialogues with an equally well known spread.
    """

    values: np.ndarray
    names: np.ndarray
    effective: float


def run_table(values, clusters, weights, runs) -> RunTable:
    """Values per item, as `paired_effect` takes them, as a table; refuses what it refuses."""
    values = np.asarray(values, dtype=float)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    runs = np.zeros(len(values), dtype=int) if runs is None else np.asarray(runs)
    clusters = np.asarray(clusters)
    sizes = {len(values), len(clusters), len(weights), len(runs)}
    if len(sizes) > 1:
        raise MsencError(f"Values, clusters, weights and runs have {sorted(sizes)} entries, expected equally many.")
    if not (np.isfinite(values).all() and np.isfinite(weights).all() and (weights >= 0).all()):
        raise MsencError("A value or weight is not finite, or a weight is below 0. Exclude such items on both sides.")
    names, columns = np.unique(clusters, return_inverse=True)
    run_names, rows = np.unique(runs, return_inverse=True)
    shape = (len(run_names), len(names))
    cells = rows * len(names) + columns

    def sums(of: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(cells, of, minlength=shape[0] * shape[1]).reshape(shape)

    lacking = np.argwhere(sums() == 0)
    if len(lacking):
        run, cluster = (names_of[i] for names_of, i in zip((run_names, names), lacking[0], strict=True))
        raise MsencError(f"Run {run} has no item of {cluster}, which other runs have; all runs need the same items.")
    total = sums(weights).sum(axis=1, keepdims=True)  # (R, 1)
    if not len(values) or (total == 0).any():
        raise MsencError("There is nothing to average: no item has a weight above 0.")
    means = sums(weights * values).sum(axis=1, keepdims=True) / total
    # The variance of a ratio of sums is approximated by that of its linearization (Taylor).
    parts = len(names) / total * (sums(weights * values) - means * sums(weights))
    shares = (sums(weights) / total).mean(axis=0)
    return RunTable(means + parts, names, float((shares**2).sum() ** 2 / (shares**4).sum()))


def refuse_other_clusters(first: np.ndarray, second: np.ndarray, name: str, other: str) -> None:
    """Refuse two sides that have other dialogues."""
    if not np.array_equal(first, second):
        odd = sorted(set(first.tolist()) ^ set(second.tolist()))[:3]
        raise MsencError(f"{name} and {other} do not have the same items; for example, only one has {odd}.")


def _effect(tables: Sequence[RunTable], confidence: float) -> Effect:
    """Effect of the first table, minus the second's if there are two."""
    mean = float(tables[0].values.mean() - sum(table.values.mean() for table in tables[1:]))
    clusters = len(tables[0].names)
    if clusters < 2:
        return Effect(mean, math.nan, math.nan, math.nan)
    by_cluster = tables[0].values.mean(axis=0) - sum(table.values.mean(axis=0) for table in tables[1:])  # (C,)
    rest = sum(residual(table.values) / len(table.values) for table in tables if len(table.values) > 1)
    of_dialogues = max(float(by_cluster.var(ddof=1)) / clusters - rest, 0.0)
    of_runs, run_freedom = _variance_of_runs([table.values.mean(axis=1) for table in tables])
    variance = of_runs + of_dialogues
    if variance == 0:
        return Effect(mean, mean, mean, 1.0 if mean == 0 else 0.0, abs(mean))
    share = of_runs / variance
    freedoms = (run_freedom, max(tables[0].effective - 1, 1.0))
    deviation = math.sqrt(variance)
    width = float(critical(1 - confidence, share, freedoms)) * deviation
    one_sided = float(critical(2 * (1 - confidence), share, freedoms)) * deviation
    p_value = _p_value(abs(mean) / deviation, share, freedoms)
    return Effect(mean, mean - width, mean + width, p_value, abs(mean) + one_sided)


def _variance_of_runs(sides: Sequence[np.ndarray]) -> tuple[float, float]:
    """Means of each side's runs -> variance of the (difference of the) sides' means, and its degrees of freedom."""
    spreads = [float(means.var(ddof=1)) if len(means) > 1 else math.nan for means in sides]
    variance, freedom = combined_runs(spreads, [len(means) for means in sides])
    return float(variance), float(freedom)


def combined_runs(spreads: Sequence[Any], counts: Sequence[int]) -> tuple[Any, Any]:
    """Variance of the (difference of the) sides' means that comes from runs, and its degrees of freedom (Welch).

    Args:
        spreads: variance between the runs of each side, numbers or arrays of one shape; of a single run not used.
        counts: runs of each side.
    """
    several = [i for i, count in enumerate(counts) if count > 1]
    if not several:
        return 0.0, 1.0
    if len(several) < len(counts):  # a single run has no spread: use the other side's for both
        return spreads[several[0]] * sum(1 / count for count in counts), max(counts) - 1.0
    parts = [spread / count for spread, count in zip(spreads, counts, strict=True)]
    weight = sum(part**2 / (count - 1) for part, count in zip(parts, counts, strict=True))
    total = sum(parts)
    return total, np.where(weight > 0, total**2 / np.where(weight > 0, weight, 1.0), 1.0)  # of one side: R - 1


def residual(values: np.ndarray) -> float:
    """The residual's part of the variance of one run's mean."""
    runs, clusters = values.shape
    rest = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    return float((rest**2).sum() / ((runs - 1) * (clusters - 1)) / clusters)


def critical(alpha: float, share: Any, freedoms: tuple[Any, Any]) -> Any:
    """Cochran's critical value: the two t quantiles, weighted by the runs' `share` of the variance."""
    from scipy.special import stdtrit  # imported late, so that --help does not wait for scipy

    of_runs, of_dialogues = (-stdtrit(freedom, alpha / 2) for freedom in freedoms)
    return share * of_runs + (1 - share) * of_dialogues


def _p_value(z: float, share: float, freedoms: tuple[float, float]) -> float:
    """The alpha at which `z` is just critical."""
    from scipy.optimize import brentq

    def excess(log_alpha: float) -> float:
        return float(critical(math.exp(log_alpha), share, freedoms)) - z

    if excess(0.0) >= 0:  # z is 0
        return 1.0
    lowest = math.log(SMALLEST_P)
    return SMALLEST_P if excess(lowest) < 0 else math.exp(brentq(excess, lowest, 0.0, xtol=1e-10))
