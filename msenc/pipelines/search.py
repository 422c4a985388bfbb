"""Searches: sweeps whose sweeper, Optuna's, chooses a job by the results of earlier ones.

The sweep's folder says which jobs earlier starts have chosen. They are the first to be chosen again: what is finished
is skipped as in any sweep, and its result is known before a new job is chosen.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict

from msenc.runs.overrides import key_of
from msenc.runs.sweep import is_a_place, read_sweep
from msenc.types import MsencError

STUDY = "search"


@dataclass(frozen=True)
class Space:
    """What the jobs of a search have in common, and what is searched.

    Args:
        fixed: overrides of all jobs.
        axes: key -> its override, which says what values it may take.
    """

    fixed: list[str]
    axes: Mapping[str, Override]

    def examples(self) -> list[list[str]]:
        """Jobs that together have the ends of every interval, and every choice."""
        values = {key: _ends(override) for key, override in self.axes.items()}
        number = max((len(ends) for ends in values.values()), default=1)
        return [[*self.fixed, *(f"{k}={v[n % len(v)]}" for k, v in values.items())] for n in range(number)]


def space_of(overrides: Iterable[Override]) -> Space:
    """The space of a search's overrides; a key that is given one value is not searched, wherever it is given."""
    axes = {o.get_key_element(): o for o in overrides if o.is_sweep_override()}
    fixed = {o.get_key_element(): o.get_value_element_as_str() for o in overrides if not o.is_sweep_override()}
    return Space([f"{k}={v}" for k, v in fixed.items()], {k: o for k, o in axes.items() if k not in fixed})


def _ends(override: Override) -> list[str]:
    if override.is_interval_sweep():
        interval: Any = override.value()
        return [str(interval.start), str(interval.end)]
    return list(override.sweep_string_iterator())


def known_jobs(folder: Path, space: Space) -> list[list[str]]:
    """Overrides of the jobs of a search that earlier starts of it have chosen, in their order."""

    def common(overrides: Iterable[str]) -> set[str]:
        return {o for o in overrides if key_of(o) not in axes and not is_a_place(key_of(o))}

    axes = {key_of(key) for key in space.axes}
    jobs = [job.overrides for job in read_sweep(folder) or []]
    return [list(job) for job in jobs if axes <= set(map(key_of, job)) and common(job) == common(space.fixed)]


def is_optuna(config: DictConfig) -> bool:
    """Whether the sweeper is Optuna's, which `continue_search` knows."""
    return config.hydra.sweeper._target_.endswith(".OptunaSweeper")


def continue_search(config: DictConfig, known: Sequence[Sequence[str]], space: Space) -> None:
    """Let Optuna begin with the jobs that are known; it goes on to as many as the command asks for.

    Raises:
        MsencError: the command asks for what no search of runs has, as a storage of its own, or no job at all.
    """
    from hydra_plugins.hydra_optuna_sweeper._impl import create_optuna_distribution_from_override as distribution_of

    sweeper = config.hydra.sweeper
    if sweeper.storage is not None:
        raise MsencError(
            "hydra.sweeper.storage: found a value, expected none: the sweep's folder holds what a search knows, and "
            "the same command goes on with it. Leave it out."
        )
    for key in ("search_space", "custom_search_space"):
        if sweeper.get(key) is not None:
            raise MsencError(
                f"hydra.sweeper.{key}: found a value, expected none: ranges are given as overrides, or in "
                "hydra.sweeper.params, where the sweep's folder can record them."
            )
    for key in ("n_trials", "n_jobs"):
        if sweeper[key] < 1:
            raise MsencError(f"hydra.sweeper.{key}: found {sweeper[key]}, expected 1 or more.")
    if OmegaConf.is_list(sweeper.direction):
        raise MsencError("hydra.sweeper.direction: found several, expected one: a run's result is its best val/loss.")
    trials = []
    for job in known:
        given = dict(o.partition("=")[::2] for o in job)
        values = {key: _value(distribution_of(override), given[key]) for key, override in space.axes.items()}
        if None not in values.values():  # of another range
            trials.append(values)
    direction = sweeper.direction if isinstance(sweeper.direction, str) else sweeper.direction.name
    with open_dict(config):
        sweeper.n_trials = max(sweeper.n_trials, len(trials))
        if sweeper.sampler.get("seed") is not None:
            sweeper.sampler.seed += len(trials)  # else it would draw what it has drawn before
        sweeper.study_name = STUDY
        sweeper.storage = {
            "_target_": f"{__name__}.{queue.__name__}",
            "_convert_": "all",
            "trials": [[list(trial), list(trial.values())] for trial in trials],
            "direction": direction,
        }


def _value(distribution: Any, text: str) -> Any:
    """A value as an override has it -> as the distribution has it; None if it has no such value."""
    if hasattr(distribution, "choices"):
        return next((choice for choice in distribution.choices if str(choice) == text), None)
    try:
        value = int(text) if isinstance(distribution.low, int) else float(text)
    except ValueError:
        return None
    return value if distribution.low <= value <= distribution.high else None


def queue(trials: Sequence[tuple[Sequence[str], Sequence[Any]]], direction: str) -> Any:
    """A storage of Optuna's, with a study whose first trials are given. Hydra calls it for the sweeper.

    Args:
        trials: keys and values of each.
        direction: ``minimize`` or ``maximize``.
    """
    import optuna

    class Storage(optuna.storages.InMemoryStorage):  # type: ignore[misc]
        def get_best_trial(self, study_id: int) -> Any:
            """As Optuna's; where none has a result, one without, as the sweep's end says what has failed."""
            try:
                return super().get_best_trial(study_id)
            except ValueError:
                return self.get_all_trials(study_id)[0]

    storage = Storage()
    study = optuna.create_study(study_name=STUDY, storage=storage, direction=direction)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        for keys, values in trials:
            study.enqueue_trial(dict(zip(keys, values, strict=True)))
    return storage
