"""Runs that are alike but for their seed (and threads) -> the smallest difference worth talking about."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from omegaconf import OmegaConf

from msenc.config.stored import read_config
from msenc.report.collect import Evaluation, Run
from msenc.runs.identity import flat
from msenc.runs.sweep import is_a_place
from msenc.types import MsencError

REPEATED = ("seed", "threads")
"""Keys that change a run's result by chance alone."""

SETTINGS = ("turns_hash", "base_fingerprint", "device")
"""Entries of ``run.json`` that such runs share with the rows that they are named for, beside the config."""


@dataclass(frozen=True)
class Floor:
    """How far apart such runs are.

    Args:
        seeds: number of seeds.
        runs: number of runs.
        deviations: metric -> standard deviation between runs that differ in seed and threads.
        of_threads: metric -> the part of threads: between runs of one seed; empty if their number is always the same.
    """

    seeds: int
    runs: int
    deviations: dict[str, float]
    of_threads: dict[str, float]

    def smallest(self, metric: str, seeds: tuple[int, int] = (1, 1)) -> float:
        """What the means of so many runs of either side differ by, in 95 of 100 cases, where nothing else differs.

        NaN if the runs do not have the metric.
        """
        from scipy.special import stdtrit

        quantile = float(stdtrit(self.seeds - 1, 0.975))
        return quantile * self.deviations.get(metric, math.nan) * math.sqrt(sum(1 / n for n in seeds))


def measure_floor(seeds: Sequence[int], values: Sequence[Mapping[str, float]]) -> Floor | None:
    """The spread of runs that are alike but for seed and threads.

    Args:
        seeds: of the runs.
        values: metric -> value, of each run.

    Returns:
        None with fewer than two seeds.

    Example:
        >>> floor = measure_floor([1, 2, 3], [{"nll": 1.0}, {"nll": 1.1}, {"nll": 1.2}])
        >>> f"{floor.deviations['nll']:.2f}, {floor.smallest('nll'):.2f}, {floor.smallest('nll', (3, 3)):.2f}"
        '0.10, 0.61, 0.35'
    """
    groups: dict[int, list[Mapping[str, float]]] = defaultdict(list)
    for seed, of_run in zip(seeds, values, strict=True):
        groups[seed].append(of_run)
    if len(groups) < 2:
        return None
    deviations, of_threads = {}, {}
    for metric in set.intersection(*(set(of_run) for of_run in values)):
        by_seed = [np.array([of_run[metric] for of_run in group]) for group in groups.values()]
        several = [group for group in by_seed if len(group) > 1]
        within = sum(((group - group.mean()) ** 2).sum() for group in several)
        variance = float(within) / sum(len(group) - 1 for group in several) if several else 0.0
        # A seed's mean over its runs has lost a part of what threads add to each of them.
        lost = variance * float(np.mean([1 - 1 / len(group) for group in by_seed]))
        deviations[metric] = math.sqrt(float(np.var([group.mean() for group in by_seed], ddof=1)) + lost)
        if several:
            of_threads[metric] = math.sqrt(variance)
    return Floor(len(groups), len(values), deviations, of_threads)


def refuse_other_settings(
    repeated: Sequence[tuple[Run, Evaluation]], runs: Sequence[tuple[Run, Evaluation]], folder: object
) -> None:
    """Refuse a noise floor that was not measured as one of the reported rows was.

    Args:
        repeated: the runs of the noise floor.
        runs: the reported ones.
        folder: of the noise floor, for the message.
    """
    (first, evaluation), *_ = repeated
    what = {
        "task_hash": (first.task_hash, {run.task_hash for run, _ in runs}),
        "data": (evaluation.data, {e.data for _, e in runs}),
        "settings of the evaluation": (evaluation.settings, {e.settings for _, e in runs}),
        **{n: (first.facts.get(n), {run.facts.get(n) for run, _ in runs}) for n in SETTINGS},
    }
    for name, (found, expected) in what.items():
        if found not in expected:
            raise MsencError(
                f"noise_floor: {folder} has {name} {found}, the reported runs have {', '.join(map(str, expected))}. "
                "Give the noise floor of one of these rows: python train.py sweep=noise_floor, with its overrides."
            )
    own = _settings(first)
    others = [_settings(run) for run, _ in runs]
    if not own or not all(others):
        return  # runs without a config; the facts agree
    differing = [[key for key in {*own, *other} if own.get(key) != other.get(key)] for other in others]
    fewest = min(differing, key=len)
    if fewest:
        raise MsencError(
            f"noise_floor: {folder} differs from every reported run, from the most similar one in "
            f"{', '.join(sorted(fewest)[:5])}. Give the noise floor of one of these rows: "
            "python train.py sweep=noise_floor, with its overrides."
        )


def _settings(run: Run) -> dict[str, object]:
    """What identifies a run, but for what is repeated and what is evaluated besides; empty without a config."""
    path = run.folder / ".hydra" / "config.yaml"
    if not path.is_file():
        return {}
    settings = flat(OmegaConf.to_container(read_config(path), resolve=False))
    others = (*REPEATED, "control", "controls", "evaluate")
    # What is empty is absent in runs older than the key.
    return {k: v for k, v in settings.items() if k not in others and not is_a_place(k) and v not in (None, [], {})}
