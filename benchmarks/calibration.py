"""How often the report's statistics are wrong, on simulated sweeps whose truth is known.

    python benchmarks/calibration.py [--quick] [--sweeps N] [--json FILE]

A sweep has four configurations, each trained with 3 or 5 seeds and scored on the same items; the first is the
baseline of the other three. An item's number is a sum of the configuration's true mean and of what the dialogue, the
item, the seed and all of their crossings add; items differ in weight, as replies do in tokens. The mixes say which
part of the spread is large. Printed, each with its standard error over sweeps:

- ``called significant``: share of comparisons with p < 0.05 where all configurations are alike. At most 5 %.
- ``any in a sweep``: share of such sweeps in which any comparison is significant after Holm's correction. At most 5 %.
- ``covered``: share of intervals that hold the truth, where the configurations do differ. At least 95 %.
- ``covered, mean``: the same for the interval of a configuration's own mean.
- ``bootstrap``: what the percentile bootstrap over seeds and dialogues would call significant. For comparison.
- ``t on items``: what a paired t test over all items of all seeds would. For comparison.

``pairs`` compares the same trained weights under two conditions (a control): there, seeds are pairs.
"""

from typing import Any

import numpy as np
from measure import parser, print_table, write_json
from scipy import stats

from msenc.evaluation.statistics import Effect, holm, paired_effect, unpaired_effect

CONFIGURATIONS = 4
DIALOGUES = 40
EFFECT = 0.3
ALPHA = 0.05
RESAMPLES = 200

MIXES = {
    # standard deviations of: seed, dialogue, item, seed x dialogue, rest
    "nothing repeats": (0.0, 0.0, 0.5, 0.0, 1.0),
    "dialogues differ": (0.0, 1.0, 0.5, 0.0, 0.5),
    "seeds differ": (0.5, 0.0, 0.2, 0.0, 0.2),
    "both differ": (0.15, 1.0, 0.5, 0.3, 1.0),
    "seeds, then dialogues": (0.3, 1.0, 0.5, 0.3, 1.0),
    "seeds differ by dialogue": (0.05, 0.3, 0.5, 1.0, 1.0),
    "both differ, skewed": (0.15, 1.0, 0.5, 0.3, 1.0),
}


def simulate(mix: str, seeds: int, effects: np.ndarray, is_paired: bool, rng: np.random.Generator) -> dict[str, Any]:
    """One sweep: values (configuration, seed, item), and each item's dialogue and weight."""
    sizes = rng.integers(2, 7, DIALOGUES)
    dialogue = np.repeat(np.arange(DIALOGUES), sizes)
    items = len(dialogue)
    seed, by_dialogue, by_item, crossed, rest = MIXES[mix]

    def draw(scale: float, *shape: int) -> np.ndarray:
        if mix.endswith("skewed"):
            return scale * (rng.standard_exponential(shape) - 1)
        return scale * rng.standard_normal(shape)

    def shared(*shape: int) -> np.ndarray:
        """What a dialogue or an item adds: in all configurations alike, and in each its own."""
        return draw(2.0, 1, *shape) + draw(1.0, CONFIGURATIONS, *shape)

    values = effects[:, None, None] + by_item * shared(1, items) + draw(rest, CONFIGURATIONS, seeds, items)
    values = values + by_dialogue * shared(1, DIALOGUES)[..., dialogue]
    values = values + draw(crossed, CONFIGURATIONS, seeds, DIALOGUES)[..., dialogue]
    # The same weights under two conditions share what their seed adds, but for a part.
    of_seed = draw(seed, CONFIGURATIONS, seeds, 1)
    values = values + (draw(3 * seed, 1, seeds, 1) + of_seed if is_paired else of_seed)
    return {"values": values, "dialogue": dialogue, "weight": rng.integers(5, 30, items).astype(float)}


def compare(sweep: dict[str, Any], is_paired: bool) -> list[Effect]:
    """Each configuration against the first."""
    values, seeds = sweep["values"], sweep["values"].shape[1]
    dialogue, weight = np.tile(sweep["dialogue"], seeds), np.tile(sweep["weight"], seeds)
    run = np.repeat(np.arange(seeds), len(sweep["dialogue"]))
    base, *others = values.reshape(CONFIGURATIONS, -1)
    if is_paired:
        return [paired_effect(other - base, dialogue, weight, run) for other in others]
    pairs = {"clusters": (dialogue, dialogue), "weights": (weight, weight), "runs": (run, run)}
    return [unpaired_effect(other, base, **pairs) for other in others]


def own_mean(sweep: dict[str, Any]) -> Effect:
    """Of the last configuration, with its interval."""
    values, seeds = sweep["values"][-1], sweep["values"].shape[1]
    run = np.repeat(np.arange(seeds), values.shape[1])
    return paired_effect(values.ravel(), np.tile(sweep["dialogue"], seeds), np.tile(sweep["weight"], seeds), run)


def bootstrap(sweep: dict[str, Any], is_paired: bool, rng: np.random.Generator) -> list[bool]:
    """Whether 0 is outside the percentile interval: seeds and dialogues drawn with replacement."""
    values, weight, dialogue = sweep["values"], sweep["weight"], sweep["dialogue"]
    starts = np.flatnonzero(np.diff(dialogue, prepend=-1))
    sums = np.add.reduceat(values * weight, starts, axis=2)  # (configurations, seeds, dialogues)
    weights = np.add.reduceat(weight, starts)
    seeds = values.shape[1]
    times = rng.multinomial(DIALOGUES, np.full(DIALOGUES, 1 / DIALOGUES), RESAMPLES)
    means = np.einsum("ksd,bd->bks", sums, times) / (times @ weights)[:, None, None]
    drawn = rng.integers(0, seeds, (RESAMPLES, 1 if is_paired else CONFIGURATIONS, seeds))
    drawn = np.broadcast_to(drawn, means.shape)
    means = np.take_along_axis(means, drawn, axis=2).mean(axis=2)  # (resamples, configurations)
    low, high = np.quantile(means[:, 1:] - means[:, :1], [ALPHA / 2, 1 - ALPHA / 2], axis=0)
    return ((low > 0) | (high < 0)).tolist()


def t_on_items(sweep: dict[str, Any]) -> list[bool]:
    """Whether a paired t test over all items of all seeds says so."""
    base, *others = sweep["values"].reshape(CONFIGURATIONS, -1)
    return [bool(stats.ttest_rel(other, base).pvalue < ALPHA) for other in others]


def measure_mix(mix: str, seeds: int, is_paired: bool, sweeps: int) -> dict[str, tuple[float, float]]:
    """Shares of one mix, each as (share, standard error over sweeps)."""
    rng = np.random.default_rng([seeds, is_paired, list(MIXES).index(mix)])
    null, truth = np.zeros(CONFIGURATIONS), EFFECT * np.arange(CONFIGURATIONS)
    shares: dict[str, list[float]] = {}

    def note(name: str, hits: Any) -> None:
        shares.setdefault(name, []).append(float(np.mean(hits)))

    for _ in range(sweeps):
        sweep = simulate(mix, seeds, null, is_paired, rng)
        p_values = [effect.p_value for effect in compare(sweep, is_paired)]
        note("called significant", [p < ALPHA for p in p_values])
        note("any in a sweep", min(holm(p_values)) < ALPHA)
        note("bootstrap", bootstrap(sweep, is_paired, rng))
        note("t on items", t_on_items(sweep))
        sweep = simulate(mix, seeds, truth, is_paired, rng)
        effects = compare(sweep, is_paired)
        note("covered", [e.low <= t <= e.high for e, t in zip(effects, truth[1:], strict=True)])
        mean = own_mean(sweep)
        note("covered, mean", mean.low <= truth[-1] <= mean.high)
    return {name: (float(np.mean(v)), float(np.std(v, ddof=1) / np.sqrt(sweeps))) for name, v in shares.items()}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--sweeps", type=int, default=500, metavar="N", help="per row; default: %(default)s")
    given = arguments.parse_args()
    sweeps = 20 if given.quick else given.sweeps
    rows, results = [], {}
    columns = ["called significant", "any in a sweep", "covered", "covered, mean", "bootstrap", "t on items"]
    for is_paired in (False, True):
        for seeds in (3, 5):
            for mix in MIXES:
                shares = measure_mix(mix, seeds, is_paired, sweeps)
                name = f"{mix}, {seeds} seeds" + (", pairs" if is_paired else "")
                results[name] = shares
                rows.append([name, *(f"{100 * shares[c][0]:.1f} ± {100 * shares[c][1]:.1f}" for c in columns)])
    print_table(f"{sweeps} sweeps per row: shares in %, ± one standard error", ["mix", *columns], rows)
    write_json(given.json, {"sweeps": sweeps, "shares": results})


if __name__ == "__main__":
    main()
