import math

import numpy as np
import pytest
from scipy import stats

from msenc.evaluation.statistics import holm, paired_effect, unpaired_effect
from msenc.types import MsencError


def table(seed, runs, dialogues, of_runs=0.0, of_dialogues=0.0, rest=0.0, mean=0.0):
    """(runs, dialogues) values, flat, with their dialogues and runs."""
    rng = np.random.default_rng(seed)
    values = mean + of_runs * rng.normal(size=(runs, 1)) + of_dialogues * rng.normal(size=(1, dialogues))
    values = values + rest * rng.normal(size=(runs, dialogues))
    return values.ravel(), np.tile(np.arange(dialogues), runs), np.repeat(np.arange(runs), dialogues)


def test_one_run_of_independent_items_is_the_t_test():
    values, dialogues, _ = table(0, 1, 30, of_dialogues=1.0, mean=0.5)
    effect, expected = paired_effect(values, dialogues), stats.ttest_1samp(values, 0)
    assert effect.p_value == pytest.approx(expected.pvalue, rel=1e-6)
    assert (effect.low, effect.high) == pytest.approx(tuple(expected.confidence_interval()))


def test_repeating_the_items_of_a_dialogue_tells_nothing_new():
    values, dialogues, _ = table(0, 1, 30, of_dialogues=1.0, mean=0.5)
    once, often = paired_effect(values, dialogues), paired_effect(np.repeat(values, 7), np.repeat(dialogues, 7))
    assert (often.low, often.high, often.p_value) == pytest.approx((once.low, once.high, once.p_value))


def test_more_items_do_not_hide_that_seeds_differ():
    values, dialogues, runs = table(1, 3, 500, of_runs=1.0, mean=3.0)
    effect = paired_effect(values, dialogues, runs=runs)
    expected = stats.ttest_1samp(values.reshape(3, 500).mean(axis=1), 0)
    assert effect.p_value == pytest.approx(expected.pvalue, rel=1e-4)
    assert (effect.low, effect.high) == pytest.approx(tuple(expected.confidence_interval()))


def test_runs_that_are_no_pairs_are_compared_as_by_welch():
    (first, dialogues, runs), (second, others, other_runs) = table(2, 3, 9, of_runs=1.0), table(3, 5, 9, of_runs=0.3)
    effect = unpaired_effect(first, second, (dialogues, others), runs=(runs, other_runs))
    means = first.reshape(3, 9).mean(axis=1), second.reshape(5, 9).mean(axis=1)
    expected = stats.ttest_ind(*means, equal_var=False)
    assert effect.p_value == pytest.approx(expected.pvalue, rel=1e-6)
    assert effect.mean == pytest.approx(means[0].mean() - means[1].mean())


def test_what_all_runs_share_cancels_between_configurations():
    shared, dialogues, runs = table(4, 3, 40, of_dialogues=10.0)
    noise, more = (table(seed, 3, 40, rest=0.1)[0] for seed in (5, 6))
    effect = unpaired_effect(shared + noise + 1.0, shared + more, (dialogues, dialogues), runs=(runs, runs))
    assert effect.low > 0.9
    assert effect.high < 1.1


def test_dialogues_and_runs_in_another_order_change_nothing():
    values, dialogues, runs = table(7, 3, 20, 0.2, 0.5, 0.3, mean=0.3)
    order = np.random.default_rng(0).permutation(len(values))
    effect = paired_effect(values, dialogues, runs=runs)
    shuffled = paired_effect(values[order], dialogues[order].astype(str), runs=runs[order].astype(str))
    assert (shuffled.low, shuffled.p_value) == pytest.approx((effect.low, effect.p_value))


def test_both_spreads_widen_the_interval():
    def width(**scales):
        effect = paired_effect(*(table(8, 4, 30, **scales)[i] for i in (0, 1)), runs=table(8, 4, 30)[2])
        return effect.high - effect.low

    assert width(of_runs=1.0, of_dialogues=3.0) > max(width(of_runs=1.0), width(of_dialogues=3.0))


def test_weights_make_the_mean_a_ratio_of_sums():
    effect = paired_effect([1.0, 3.0, 5.0], ["a", "b", "c"], [10.0, 10.0, 0.0])
    assert effect.mean == pytest.approx(2.0)
    assert effect.low < 2.0 < effect.high


def test_a_heavy_dialogue_leaves_fewer_degrees_of_freedom():
    rng = np.random.default_rng(9)
    values, dialogues = rng.normal(size=30), np.arange(30)
    heavy = paired_effect(values, dialogues, np.where(dialogues == 0, 20.0, 1.0))
    spread = (heavy.high - heavy.low) / 2
    # Nearly all weight is one dialogue's: about one effective dialogue, so the quantile of few degrees of freedom.
    contributions = np.where(dialogues == 0, 20.0, 1.0) / 49 * (values - heavy.mean) * 30
    assert spread / (contributions.std(ddof=1) / 30**0.5) > 10


def test_a_single_run_borrows_the_spread_of_the_other_side():
    (first, dialogues, runs), (second, others, _) = table(2, 3, 9, of_runs=1.0), table(3, 1, 9, rest=0.1)
    effect = unpaired_effect(first, second, (dialogues, others), runs=(runs, None))
    spread = first.reshape(3, 9).mean(axis=1).var(ddof=1) * (1 + 1 / 3)
    assert (effect.high - effect.low) / 2 >= stats.t.ppf(0.975, 2) * spread**0.5 * 0.95


def test_equal_numbers_are_no_difference_and_one_dialogue_tells_nothing():
    assert paired_effect([0.0, 0.0], ["a", "b"]).p_value == 1.0
    alone = paired_effect([0.5, 0.7], ["a", "a"])
    assert alone.mean == pytest.approx(0.6)
    assert math.isnan(alone.p_value)
    assert math.isnan(alone.low)


def test_holm_is_monotone_and_at_least_the_raw_value():
    p_values = [0.2, 0.001, 0.02, 0.021]
    adjusted = holm(p_values)
    assert adjusted == pytest.approx([0.2, 0.004, 0.06, 0.06])
    assert holm([0.8, 0.9]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (([1.0], ["a", "b"]), r"have \[1, 2\] entries"),
        (([1.0, float("nan")], ["a", "b"]), "not finite"),
        (([1.0, 2.0], ["a", "b"], [0.0, 0.0]), "no item has a weight above 0"),
        (([], []), "nothing to average"),
        (([1.0, 2.0, 3.0], ["a", "b", "a"], None, [1, 1, 2]), "Run 2 has no item of b"),
    ],
)
def test_bad_input_is_refused(arguments, expected):
    with pytest.raises(MsencError, match=expected):
        paired_effect(*arguments)


def test_other_items_are_refused():
    with pytest.raises(MsencError, match=r"only one has \['b', 'c'\]"):
        unpaired_effect([1.0, 2.0], [1.0, 2.0], (["a", "b"], ["a", "c"]))
