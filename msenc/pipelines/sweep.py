"""Before and after the jobs of a sweep: its folder, or their list in a dry run; then the report."""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from msenc.config.schema import ReportConfig
from msenc.pipelines.cluster import take_over
from msenc.pipelines.dry_run import compose_job, finished_run, list_jobs
from msenc.pipelines.plan import num_processes
from msenc.pipelines.report import report
from msenc.runs.overrides import key_of, quoted_value, task_overrides
from msenc.runs.record import is_finished, read_facts
from msenc.runs.sweep import is_stopping, read_sweep, stop_jobs, sweep_name, write_sweep
from msenc.types import MsencError
from msenc.work.console import console, shown
from msenc.work.signals import HEARD, STOPPED, requeue_slurm_job

_held: list[FileLock] = []
"""State of the sweep that this process runs; Hydra's callback cannot hold it, as it is sent to other processes."""

_stopped_by: list[signal.Signals] = []
"""The signal that ended this process's sweep, if one has."""


def begin_sweep(config: DictConfig) -> None:
    """Give a multirun the folder that the same command used before, and record its jobs there.

    Args:
        config: common to all jobs; values set in it reach them.

    Raises:
        MsencError: a job's config is refused, or another process runs the sweep.
    """
    command = task_overrides(config.hydra)
    jobs, axes = _jobs(config)
    if config.dry_run:
        if jobs is None:
            raise MsencError(
                "dry_run=true: this hydra/sweeper chooses its jobs as it runs. Only those of basic can be listed."
            )
        list_jobs(config, jobs, axes)
        sys.exit(0)
    if config.detach and not config.hydra.launcher._target_.endswith(".SlurmLauncher"):
        raise MsencError("detach=true: jobs go on by themselves on Slurm alone. Use hydra/launcher=slurm.")
    if jobs is not None:
        _check_jobs(config, jobs)
    given = {key_of(o) for o in config.hydra.overrides.hydra}
    if "hydra.sweep.dir" not in given:
        name = sweep_name(config.hydra.runtime.choices.get("sweep"), command, axes)
        _set(config, "hydra.sweep.dir", str(Path(config.hydra.sweep.dir).absolute() / name))
    folder = Path(config.hydra.sweep.dir)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as e:
        raise MsencError(
            f"{folder}: another process runs this sweep. Wait for it, or give this one a folder of its own: "
            "hydra.sweep.dir=FOLDER"
        ) from e
    _held.append(lock)
    write_sweep(folder, command, jobs)
    if "submitit" in config.hydra.launcher._target_:
        split = None if config.trainer.get("fast_dev_run") else config.evaluate
        take_over(folder, finished_run(config), config.detach, split)

    def stop(number: int, frame: FrameType | None) -> None:
        _stopped_by.append(signal.Signals(number))
        if not stop_jobs(folder):  # no job runs, or they run elsewhere
            _requeue()
            sys.exit(STOPPED)

    for number in HEARD:
        signal.signal(number, stop)  # a job in this process replaces the handlers while it runs


def _jobs(config: DictConfig) -> tuple[list[list[str]] | None, list[str]]:
    """The overrides of each job, as by Hydra's basic sweeper (None for other sweepers), and the varied keys."""
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    overrides = parser.parse_overrides([*params, *task_overrides(config.hydra)])
    axes = [key_of(p) for p in params] + [o.get_key_element().lstrip("+~") for o in overrides if o.is_sweep_override()]
    if not config.hydra.sweeper._target_.endswith(f".{BasicSweeper.__name__}"):
        return None, axes
    (jobs,) = BasicSweeper.split_arguments(overrides, None)
    return jobs, list(dict.fromkeys(axes))


def _check_jobs(config: DictConfig, jobs: Sequence[Sequence[str]]) -> None:
    """Refuse a sweep of which a job would be refused, before any of it begins."""
    here = config.hydra.launcher._target_.endswith(".BasicLauncher")
    for number, job in enumerate(jobs):
        try:
            _, checked, _ = compose_job(config, job, here)
        except MsencError as error:
            raise MsencError(f"{error} (job {number} of the sweep: {' '.join(job)})") from error
        if here and num_processes(checked["trainer"]) > 1:
            raise MsencError(
                f"trainer.devices={checked['trainer'].get('devices')}: the jobs of a sweep take one device each here. "
                "Leave out -m for a run on several, or let a launcher start the jobs (docs/sweeps.md)."
            )


def _set(config: DictConfig, key: str, value: str) -> None:
    """Set a value here, and in the configs of the jobs, which are composed from overrides."""
    config.hydra.overrides.hydra.append(f"{key}={quoted_value(value)}")
    OmegaConf.update(config, key, value)


def end_sweep(config: DictConfig) -> None:
    """Report on a multirun, name failed jobs, and exit with status 1 if there are any."""
    folder = Path(config.hydra.sweep.dir)
    for number in HEARD:
        signal.signal(number, signal.SIG_DFL)
    if is_stopping(folder):
        by = _stopped_by[0].name if _stopped_by else "a signal"
        console.print(
            f"Stopped by {by}; run the same command to continue. Sweep folder: {shown(folder)}", soft_wrap=True
        )
        _let_go()
        _requeue()
        sys.exit(STOPPED)
    jobs = read_sweep(folder) or []
    has_report = config.evaluate is None or bool(config.trainer.get("fast_dev_run"))
    if not has_report:
        try:
            margins = dict(config.margins)
            report(OmegaConf.structured(ReportConfig(str(folder), split=config.evaluate, margins=margins)))
            has_report = True
        except MsencError as e:
            console.print(f"No report: {e}", soft_wrap=True)
    console.print(f"Sweep folder: {shown(folder)}", soft_wrap=True)
    failed = {job: how for job in jobs if (how := _failure(job.run_dir))}
    if failed:
        console.print(f"{len(failed)} of {len(jobs)} jobs did not finish:", style="red")
        for job, how in failed.items():
            console.print(f"  job {job.number} ({' '.join(job.overrides)}): {how}", soft_wrap=True)
        console.print("Run the same command to retry them; it skips the others.")
    _let_go()
    if failed or not has_report:
        sys.exit(1)


def _requeue() -> None:
    if _stopped_by and _stopped_by[0] != signal.SIGTERM:
        requeue_slurm_job()


def _let_go() -> None:
    while _held:
        _held.pop().release()


def _failure(run_dir: Path | None) -> str | None:
    """Why a job's run has no result; None if it has one."""
    if run_dir is None:
        return "it did not start"
    if not (run_dir / "run.json").is_file():
        return f"{run_dir}: its folder is gone"
    facts: dict[str, Any] = read_facts(run_dir / "run.json")
    return None if is_finished(facts) else f"{facts['status']}: {facts.get('error') or 'its process was killed'}"
