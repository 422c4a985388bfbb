"""Whether the report's power and equivalence are what simulated sweeps show.

    python benchmarks/power.py [--quick] [--sweeps N] [--json FILE]

A sweep has two configurations with the same items in dialogues, and items differ in weight. Each row is a true
difference, a standard deviation between seeds, one between dialogues (of the difference), a number of dialogues and one
of seeds. Printed, in percent:

- ``significant``: share of the simulated sweeps in which the difference is called significant, ± one standard error.
- ``predicted``: the power that is predicted from many seeds and dialogues (`FIRST`) of the same kind.
- ``from first runs``: the power that is predicted from as few seeds as the sweep has: median, and where 8 of 10 lie.
- ``at detectable``: the true power of the difference that such few seeds call detectable with 80 %: median, 8 of 10.
- ``false equivalence``: share of the sweeps that call the difference smaller than it is. At most 5 %.
- ``equivalent``: share that call no difference smaller than the row's difference: what equivalence can find.
"""

from typing import Any

import numpy as np
from measure import parser, print_table, write_json

from msenc.evaluation.power import Spread, spread_of
from msenc.evaluation.statistics import unpaired_effect

ALPHA = 0.05
FIRST = (400, 1000)
"""Seeds and dialogues that leave little doubt about the variances."""

CONDITIONS = {
    # difference; standard deviations of seeds and of dialogues' differences; dialogues; seeds
    "seeds alone": (0.60, 0.25, 0.0, 40, 3),
    "dialogues alone": (0.45, 0.0, 1.0, 60, 3),
    "a small difference": (0.20, 0.10, 0.5, 60, 3),
    "a middling difference": (0.40, 0.10, 0.5, 60, 3),
    "a large difference": (0.60, 0.10, 0.5, 60, 3),
    "seeds differ more": (0.60, 0.30, 0.5, 60, 3),
    "dialogues differ more": (0.60, 0.10, 1.5, 60, 3),
    "few dialogues": (0.60, 0.10, 0.5, 20, 3),
    "many dialogues": (0.30, 0.10, 0.5, 300, 3),
    "two seeds": (0.80, 0.10, 0.5, 60, 2),
    "five seeds": (0.40, 0.20, 0.5, 60, 5),
    "ten seeds": (0.30, 0.20, 0.5, 60, 10),
}


def simulate(
    condition: str, seeds: int, dialogues: int, difference: float, rng: np.random.Generator
) -> tuple[Any, ...]:
    """One sweep, as the arguments of `unpaired_effect`."""
    _, of_seeds, of_dialogues, _, _ = CONDITIONS[condition]
    sizes = rng.integers(2, 7, dialogues)
    dialogue = np.repeat(np.arange(dialogues), sizes)
    items = len(dialogue)
    values = 2.0 * rng.standard_normal((1, 1, dialogues))[..., dialogue] + rng.standard_normal((2, seeds, items))
    values = values + of_dialogues / np.sqrt(2) * rng.standard_normal((2, 1, dialogues))[..., dialogue]
    values = values + of_seeds * rng.standard_normal((2, seeds, 1))
    weight = np.tile(rng.integers(5, 30, items).astype(float), seeds)
    names, run = np.tile(dialogue, seeds), np.repeat(np.arange(seeds), items)
    return values[0].ravel() + difference, values[1].ravel(), (names, names), (weight, weight), (run, run)


def measure(condition: str, sweeps: int, first: tuple[int, int] = FIRST) -> dict[str, Any]:
    """Shares of one condition, between 0 and 1."""
    rng = np.random.default_rng(list(CONDITIONS).index(condition))
    difference, _, _, dialogues, seeds = CONDITIONS[condition]
    truth = _spread(simulate(condition, *first, 0.0, rng)).planned(seeds, dialogues)
    significant, false, none, predicted, at = [], [], [], [], []
    for number in range(sweeps):
        sweep = simulate(condition, seeds, dialogues, difference, rng)
        effect = unpaired_effect(*sweep)
        significant.append(effect.p_value < ALPHA)
        false.append(effect.bound < difference)
        none.append(unpaired_effect(*simulate(condition, seeds, dialogues, 0.0, rng)).bound < difference)
        if number < sweeps // 4:
            found = _spread(sweep)
            predicted.append(found.power(difference))
            at.append(truth.power(found.detectable()))
    return {
        "significant": float(np.mean(significant)),
        "predicted": truth.power(difference),
        "from first runs": np.quantile(predicted, [0.5, 0.1, 0.9]).tolist(),
        "at detectable": np.quantile(at, [0.5, 0.1, 0.9]).tolist(),
        "false equivalence": float(np.mean(false)),
        "equivalent": float(np.mean(none)),
    }


def _spread(sweep: tuple[Any, ...]) -> Spread:
    found = spread_of(*sweep)
    assert found is not None
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--sweeps", type=int, default=2000, metavar="N", help="per row; default: %(default)s")
    given = arguments.parse_args()
    sweeps = 40 if given.quick else given.sweeps
    results = {condition: measure(condition, sweeps) for condition in CONDITIONS}
    rows = []
    for condition, (difference, of_seeds, of_dialogues, dialogues, seeds) in CONDITIONS.items():
        cells = [f"{difference:g}", f"{of_seeds:g}", f"{of_dialogues:g}", str(dialogues), str(seeds)]
        for name, value in results[condition].items():
            if isinstance(value, list):
                middle, low, high = (100 * v for v in value)
                cells.append(f"{middle:.0f} ({low:.0f} to {high:.0f})")
            elif name == "predicted":
                cells.append(f"{100 * value:.1f}")
            else:
                cells.append(f"{100 * value:.1f} ± {100 * np.sqrt(value * (1 - value) / sweeps):.1f}")
        rows.append([condition, *cells])
    columns = ["difference", "SD of seeds", "SD of dialogues", "dialogues", "seeds", *next(iter(results.values()))]
    print_table(f"{sweeps} sweeps per row: shares in %", ["condition", *columns], rows)
    write_json(given.json, {"sweeps": sweeps, "shares": results})


if __name__ == "__main__":
    main()
