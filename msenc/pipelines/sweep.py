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
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from msenc.config.schema import ReportConfig
from msenc.pipelines.cluster import in_slurm, take_over
from msenc.pipelines.dry_run import compose_job, finished_run, list_jobs
from msenc.pipelines.plan import num_processes, plan_run
from msenc.pipelines.report import report
from msenc.pipelines.search import Space, continue_search, is_optuna, known_jobs, space_of
from msenc.runs.overrides import key_of, quoted_value, task_overrides
from msenc.runs.record import is_finished, read_facts
from msenc.runs.sweep import is_stopping, read_search, read_sweep, stop_jobs, sweep_name, write_sweep
from msenc.store.location import local_folder
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
    overrides = _overrides(config)
    axes = _axes(config, overrides)
    is_table = config.hydra.sweeper._target_.endswith(f".{BasicSweeper.__name__}")
    space = space_of(overrides)
    jobs = BasicSweeper.split_arguments(overrides, None)[0] if is_table else None
    if jobs is None and config.detach:
        raise MsencError(
            "detach=true: a search chooses its next job when earlier ones have ended, so its process has to wait for "
            "them. Run it without, in a session that lasts."
        )
    if config.detach and not config.hydra.launcher._target_.endswith(".SlurmLauncher"):
        raise MsencError("detach=true: jobs go on by themselves on Slurm alone. Use hydra/launcher=slurm.")
    local_folder(config.paths.runs_dir, "paths.runs_dir")  # in which the sweep's folder is, unless it is chosen
    local_folder(config.hydra.sweep.dir, "hydra.sweep.dir")
    if not config.dry_run:
        _check_jobs(config, space.examples() if jobs is None else jobs, is_search=jobs is None)
    given = {key_of(o) for o in config.hydra.overrides.hydra}
    if "hydra.sweep.dir" not in given:
        searched = [] if is_table else [o.input_line or "" for o in space.axes.values()]
        name = sweep_name(config.hydra.runtime.choices.get("sweep"), [*command, *searched], axes, is_table)
        _set(config, "hydra.sweep.dir", str(Path(config.hydra.sweep.dir).absolute() / name))
    folder = Path(config.hydra.sweep.dir)
    known = known_jobs(folder, space) if is_optuna(config) else None
    if config.dry_run:
        if jobs is None:
            console.print(
                f"A search of {config.hydra.sweeper.get('n_trials', 'some')} jobs over {', '.join(axes)}, each chosen "
                f"when earlier ones have ended. {f'{len(known)} are known' if known else 'At the ends of its ranges'}:",
                soft_wrap=True,
            )
        list_jobs(config, jobs or known or space.examples(), axes)
        sys.exit(0)
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
    if known is not None:
        continue_search(config, known, space)
    there = in_slurm(folder) if config.hydra.launcher._target_.endswith(".SlurmLauncher") else {}
    write_sweep(folder, command, jobs or known, None if is_table else _searched(config, space), there)
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


def plan_search(config: DictConfig) -> None:
    """Print what a job of a search would take (``plan=true``): its sweeper would wait for results."""
    if not config.hydra.sweeper._target_.endswith(f".{BasicSweeper.__name__}"):
        cfg, _, command = compose_job(config, space_of(_overrides(config)).examples()[-1], here=True)
        plan_run(cfg, command)
        sys.exit(0)


def _overrides(config: DictConfig) -> list[Override]:
    """Those of the sweeper's config, and those of the command."""
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    return parser.parse_overrides([*params, *task_overrides(config.hydra)])


def _searched(config: DictConfig, space: Space) -> dict[str, Any]:
    direction = config.hydra.sweeper.get("direction", "minimize")
    return {"axes": list(space.axes), "direction": getattr(direction, "name", direction)}


def _axes(config: DictConfig, overrides: Sequence[Override]) -> list[str]:
    """The varied keys."""
    params = map(key_of, config.hydra.sweeper.get("params") or {})
    return list(
        dict.fromkeys([*params, *(o.get_key_element().lstrip("+~") for o in overrides if o.is_sweep_override())])
    )


def _check_jobs(config: DictConfig, jobs: Sequence[Sequence[str]], is_search: bool) -> None:
    """Refuse a sweep of which a job would be refused, before any of it begins."""
    here = config.hydra.launcher._target_.endswith(".BasicLauncher")
    for number, job in enumerate(jobs):
        try:
            _, checked, _ = compose_job(config, job, here)
        except MsencError as error:
            raise MsencError(f"{error} (job {number} of the sweep: {' '.join(job)})") from error
        if is_search and (checked["data"]["val"] is None or checked["stage"] is not None):
            raise MsencError(
                "A search compares the best val/loss of its runs, and data.val=null and stage=align leave none. Give "
                "the data a val split, or list values instead of ranges, without hydra/sweeper."
            )
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
    if not has_report or read_search(folder):
        try:
            margins = dict(config.margins)
            report(OmegaConf.structured(ReportConfig(str(folder), split=config.evaluate or "test", margins=margins)))
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
