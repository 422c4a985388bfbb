"""train.py dry_run=true: lists the jobs of a sweep, their states, and the expected cost of the rest."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, open_dict
from rich.progress import track
from rich.table import Table

from msenc.config.checks import checked
from msenc.data.datamodule import DialogueDataModule
from msenc.files import digest
from msenc.pipelines.plan import memory_of
from msenc.pipelines.prepare import prepare_command
from msenc.report.foresight import foresee
from msenc.report.layouts import print_grid
from msenc.runs.find import find_run, run_records
from msenc.runs.folder import places_of_runs
from msenc.runs.identity import data_hashes, run_identity, run_settings
from msenc.runs.overrides import key_of, task_overrides
from msenc.runs.record import is_finished, machine, read_facts, read_run
from msenc.training.assembly import GIVEN, build_datamodule, find_data
from msenc.training.plan import count_batches
from msenc.types import MsencError
from msenc.work.console import console, quieten


@dataclass
class Expectation:
    """What is known about a job before it runs.

    Args:
        state: ``finished``, ``failed`` ..., from the run that the job would continue; ``new`` without one.
        seconds: expected time; None if unknown.
        source: of that estimate.
        peak_bytes: predicted; None if nothing trains, or unknown.
        problem: why something is unknown.
        folder: of the run that the job would continue, or has finished.
    """

    state: str = "new"
    seconds: float | None = None
    source: str = ""
    peak_bytes: int | None = None
    problem: str = ""
    folder: Path | None = None


def list_jobs(config: DictConfig, jobs: Sequence[Sequence[str]], axes: Sequence[str]) -> list[Expectation]:
    """Print a table of a sweep's jobs, without preparing, training or writing anything.

    Args:
        config: common to all jobs.
        jobs: the overrides of each.
        axes: the varied keys.
    """
    quieten()
    known = _Known(config)
    rows = [known.expect(job) for job in track(jobs, "checking each job", transient=True, console=console)]
    table = Table(title=f"{len(jobs)} jobs; none started")
    for column, justify in (
        ("job", "right"),
        ("varies", "left"),
        ("state", "left"),
        ("time", "right"),
        ("memory", "right"),
    ):
        table.add_column(column, justify=justify)
    for number, (job, row) in enumerate(zip(jobs, rows, strict=True)):
        varied = " ".join(o for o in job if key_of(o) in axes)
        table.add_row(str(number), varied, row.state, _minutes(row), _mib(row))
    console.print(table)
    for what, names in _grouped((row.source, n) for n, row in enumerate(rows)).items():
        console.print(f"Time of {names}: {what}", soft_wrap=True)
    for what, names in _grouped((row.problem, n) for n, row in enumerate(rows)).items():
        console.print(f"Unknown of {names}: {what}", style="yellow", soft_wrap=True)
    if all(row.seconds is not None for row in rows):
        console.print(f"One after another: {sum(row.seconds for row in rows) / 60:.1f} min.")
    peaks = [row.peak_bytes for row in rows if row.peak_bytes]
    if peaks:
        console.print(
            f"Memory: the predicted peak of a training step, at most {max(peaks) / 2**20:,.0f} MiB; Python and its "
            "libraries (0.4 GiB) and memory that the allocator holds come on top (see plan=true).",
            soft_wrap=True,
        )
    _print_power(config, jobs, rows, axes)
    return rows


def _print_power(
    config: DictConfig, jobs: Sequence[Sequence[str]], rows: Sequence[Expectation], axes: Sequence[str]
) -> None:
    """What the sweep will be able to show, by those of its runs that are finished."""
    if config.evaluate is None:
        return
    done = {row.folder: job for job, row in zip(jobs, rows, strict=True) if row.state == "finished" and row.folder}
    try:
        heading, cells = foresee(jobs, done, axes, config.evaluate, config.margins)
    except MsencError as error:
        console.print(f"What differences they will show is unknown: {error}", style="yellow", soft_wrap=True)
        return
    console.print(heading, soft_wrap=True)
    print_grid(cells, console)


def finished_run(config: DictConfig) -> Callable[[Sequence[str]], Path | None]:
    """What tells the finished run of a job, from its overrides; None where it has none, or its data is not there."""

    def find(overrides: Sequence[str]) -> Path | None:
        try:
            cfg, own, command = compose_job(config, overrides, here=False)
            datamodule = build_datamodule(own, command, for_training=True)
            datamodule.setup()
            run = find_run(places_of_runs(config, config.hydra), run_identity(cfg, data_hashes(own, datamodule)))
        except MsencError:
            return None  # the job itself says what is wrong, or prepares what is missing
        return run if run is not None and is_finished(read_facts(run / "run.json")) else None

    return find


def compose_job(config: DictConfig, overrides: Sequence[str], here: bool) -> tuple[DictConfig, dict[str, Any], str]:
    """The config of a sweep's job, as composed and as checked, and the `prepare.py` call that makes what it needs.

    Args:
        config: that all jobs start from.
        overrides: of the job.
        here: whether it runs on this machine.
    """
    cfg = GlobalHydra.instance().config_loader().load_sweep_config(config, list(overrides))
    command = prepare_command(task_overrides(cfg.hydra), cfg.hydra.runtime.choices)
    with open_dict(cfg):
        del cfg.hydra
    return cfg, checked(cfg, GIVEN, here), command


class _Known:
    """Estimates from earlier runs and the configs; whatever jobs share is looked up once."""

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        self.places = places_of_runs(config, config.hydra)
        records = ((path.parent, read_facts(path)) for path in run_records(self.places))
        self.finished = [(folder, facts) for folder, facts in records if is_finished(facts)]
        self._absent: dict[str, str] = {}
        self._peaks: dict[str, int | None] = {}

    def expect(self, overrides: Sequence[str]) -> Expectation:
        cfg, config, command = compose_job(self.config, overrides, here=False)
        row = Expectation()
        llm, recipe = config["model"]["llm"]["name_or_path"], config["model"]["llm_recipe"]
        try:
            if recipe is not None and recipe["folder"] == llm and not Path(llm).is_dir():
                raise MsencError(f"{llm}: this LLM does not exist yet; prepare.py or the first job will create it.")
            if llm in self._absent:
                raise MsencError(self._absent[llm])
            find_data(config, command)
            datamodule = build_datamodule(config, command, for_training=True)
            datamodule.setup()
            data = data_hashes(config, datamodule)
            spent = 0.0
            earlier = find_run(self.places, run_identity(cfg, data))
            if earlier is not None:
                facts = read_facts(earlier / "run.json")
                row.state, spent, row.folder = facts["status"], facts["seconds"], earlier
            if row.state == "finished":
                row.seconds = 0.0
                return row
            row.seconds, row.source = self._seconds(cfg, data, config, datamodule)
            if row.seconds is not None:
                row.seconds = max(row.seconds - spent, 0.0)
            row.peak_bytes = self._peak(cfg, data, config, datamodule)
        except MsencError as e:
            row.problem = str(e)
            if "cannot load" in row.problem:
                self._absent[llm] = row.problem  # waiting for a hub that does not answer takes most of a minute
        return row

    def _seconds(
        self, cfg: DictConfig, data: dict, config: dict, datamodule: DialogueDataModule
    ) -> tuple[float | None, str]:
        """From runs with another seed, or else of another length, on this kind of machine and this data."""
        alike = [
            (folder, facts)
            for folder, facts in self.finished
            if facts.get("machine") == machine() and all(facts.get(key) == value for key, value in data.items())
        ]
        same = [facts for folder, facts in alike if _settings_of(folder) == _without_seed(cfg)]
        if same:
            return mean(f["seconds"] for f in same), f"mean of {len(same)} finished runs that differ only in the seed"
        other = [facts for folder, facts in alike if _settings_of(folder, True) == _without_seed(cfg, True)]
        rates = [facts["seconds"] / facts["steps"] for facts in other if facts.get("steps")]
        steps = count_batches(datamodule, config["trainer"])["steps"]
        if rates and steps:
            return mean(rates) * steps, f"per step, from {len(rates)} finished runs that differ in seed and length"
        return None, "unknown: no finished run with these settings, of any seed and length"

    def _peak(self, cfg: DictConfig, data: dict, config: dict, datamodule: DialogueDataModule) -> int | None:
        key = digest([_without_seed(cfg), data])
        if key not in self._peaks:
            self._peaks[key] = memory_of(config, datamodule).get("peak")
        return self._peaks[key]


def _without_seed(cfg: DictConfig, without_length: bool = False) -> dict[str, Any]:
    settings = run_settings(cfg)
    del settings["seed"]
    for key in ("max_epochs", "max_steps") if without_length else ():
        settings["trainer"].pop(key, None)
    return settings


@cache
def _settings_of(folder: Path, without_length: bool = False) -> dict[str, Any]:
    return _without_seed(read_run(folder)[1], without_length)


def _grouped(pairs) -> dict[str, str]:
    groups = defaultdict(list)
    for text, number in pairs:
        groups[text].append(str(number))
    return {text: f"job{'s' * (len(names) > 1)} {', '.join(names)}" for text, names in groups.items() if text}


def _minutes(row: Expectation) -> str:
    if row.state == "finished":
        return "-"
    return "unknown" if row.seconds is None else f"{row.seconds / 60:.1f} min"


def _mib(row: Expectation) -> str:
    if row.state == "finished" or (row.peak_bytes is None and not row.problem):
        return "-"
    return "unknown" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f} MiB"
