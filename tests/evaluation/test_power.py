import math

import numpy as np
import pytest
from scipy import stats

from msenc.evaluation.power import Spread, spread_of
from msenc.evaluation.statistics import paired_effect, unpaired_effect


def t_power(difference, deviation, freedom, alpha=0.05):
    """Of a t test, by the noncentral t distribution; `deviation` is that of the estimate."""
    limit = stats.t.ppf(1 - alpha / 2, freedom)
    return stats.nct.sf(limit, freedom, difference / deviation) + stats.nct.cdf(-limit, freedom, difference / deviation)


def sweep(seed, seeds, dialogues, of_runs=0.0, of_dialogues=0.0, rest=0.0, difference=0.0):
    """The arguments of `unpaired_effect`; dialogues of the first side's have their own share of `of_dialogues`."""
    rng = np.random.default_rng(seed)
    sides, names, runs = [], [], []
    shared = 5 * rng.normal(size=dialogues)
    for side, count in enumerate(seeds):
        own = of_dialogues * rng.normal(size=dialogues) if side == 0 else 0.0
        values = shared + own + of_runs * rng.normal(size=(count, 1)) + rest * rng.normal(size=(count, dialogues))
        sides.append(values.ravel() + (difference if side == 0 else 0.0))
        names.append(np.tile(np.arange(dialogues), count))
        runs.append(np.repeat(np.arange(count), dialogues))
    return *sides, tuple(names), (None, None), tuple(runs)


@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_with_dialogues_alone_it_is_the_t_tests(alpha):
    spread = Spread((0.0, 0.0), 1.0, (0.0, 0.0), (1, 1), 20, 20.0)
    for difference in (0.0, 0.3, 0.7, 1.0):
        expected = t_power(difference, 20**-0.5, 19, alpha)
        assert spread.power(difference, alpha) == pytest.approx(expected, abs=0.01)
        assert spread.power(-difference, alpha) == spread.power(difference, alpha)


def test_with_paired_seeds_alone_it_is_the_t_tests():
    spread = Spread((1.0,), 0.0, (0.0,), (4,), 100, 100.0)
    for difference in (0.5, 1.5, 3.0):
        assert spread.power(difference) == pytest.approx(t_power(difference, 0.5, 3), abs=0.015)


def test_what_is_detectable_has_the_power_that_was_asked_for():
    spread = Spread((0.01, 0.02), 0.04, (0.02, 0.02), (3, 3), 100, 90.0)
    for power in (0.5, 0.8, 0.95):
        assert spread.power(spread.detectable(power)) == pytest.approx(power, abs=1e-6)
    assert spread.detectable(alpha=0.01) > spread.detectable()


def test_the_seeds_needed_are_the_fewest():
    spread = Spread((0.01, 0.01), 0.04, (0.02, 0.02), (3, 3), 100, 100.0)
    for difference in (0.1, 0.2, 1.0):
        needed = spread.seeds_needed(difference)
        assert spread.planned(needed).power(difference) >= 0.8
        assert needed == 2 or spread.planned(needed - 1).power(difference) < 0.8
    assert spread.seeds_needed(3.0) == 2
    assert spread.seeds_needed(0.05) is None  # dialogues alone have a standard error of 0.02
    assert spread.planned(3, 1000).seeds_needed(0.05) is not None


def test_nothing_that_spreads_detects_anything():
    spread = Spread((0.0, 0.0), 0.0, (0.0, 0.0), (3, 3), 10, 10.0)
    assert (spread.detectable(), spread.power(1e-9), spread.power(0.0), spread.seeds_needed(0.1)) == (0.0, 1.0, 0.0, 2)


def test_the_variances_of_a_sweep_are_found():
    spread = spread_of(*sweep(0, (300, 400), 500, of_runs=0.5, of_dialogues=0.7, rest=2.0))
    assert spread.runs == pytest.approx((0.25, 0.25), rel=0.2)
    assert spread.dialogues == pytest.approx(0.49, rel=0.2)
    assert spread.rest == pytest.approx((4.0, 4.0), rel=0.05)
    assert (spread.seeds, spread.num_dialogues, spread.effective) == ((300, 400), 500, pytest.approx(500))


def test_a_single_run_is_taken_to_spread_as_the_others_do():
    spread = spread_of(*sweep(1, (5, 1), 200, of_runs=1.0, rest=0.3))
    assert spread.runs[0] == spread.runs[1] > 0.1
    assert spread.detectable() > spread.planned(5).detectable()
    alone = spread_of(*sweep(1, (1, 1), 200, of_runs=1.0, of_dialogues=0.5))
    assert alone.runs == alone.rest == (0.0, 0.0)
    assert alone.dialogues == pytest.approx(0.25, rel=0.3)


def test_one_dialogue_has_no_spread():
    assert spread_of(*sweep(1, (3, 3), 1)) is None


def test_the_bound_is_that_of_two_one_sided_t_tests():
    values = np.random.default_rng(0).normal(0.2, 1.0, 30)
    effect = paired_effect(values, np.arange(30))
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.90)
    assert effect.bound == pytest.approx(max(abs(low), abs(high)))
    one_sided = stats.ttest_1samp(values, effect.bound, alternative="less").pvalue
    assert one_sided == pytest.approx(0.05, rel=1e-4)
    mirrored = paired_effect(-values, np.arange(30))
    assert mirrored.bound == pytest.approx(effect.bound)


def test_the_bound_lies_within_the_interval_and_needs_two_dialogues():
    effect = unpaired_effect(*sweep(3, (3, 3), 40, of_runs=0.2, rest=0.5, difference=0.1))
    assert abs(effect.mean) < effect.bound < max(abs(effect.low), abs(effect.high))
    assert paired_effect([0.5, 0.7], ["a", "a"]).bound == math.inf
    assert paired_effect([0.5, 0.5], ["a", "b"]).bound == 0.5
