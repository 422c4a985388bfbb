"""Sweeps whose jobs submitit hands to Slurm: what is finished is not submitted, what runs already is waited for."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus

from msenc.runs.overrides import quoted_value
from msenc.runs.record import is_finished, read_facts
from msenc.runs.sweep import note_run, read_submitted, read_sweep, same_job, write_submitted
from msenc.types import MsencError
from msenc.work.console import console, shown

ASK_EVERY = 10.0
"""Seconds between two looks at Slurm's queue."""


def in_slurm(folder: Path) -> dict[tuple[str, ...], str]:
    """The jobs of a sweep, by their overrides, that Slurm still has: they wait or run there."""
    known = {same_job(overrides): job for overrides, job in read_submitted(folder)}
    queued = _queue() if known else set()
    return {overrides: job for overrides, job in known.items() if job in queued}


def take_over(folder: Path, finished: Callable[[Sequence[str]], Path | None], detach: bool, split: str | None) -> None:
    """Have submitit's launchers of this process submit only what is left to do of a sweep.

    Hydra takes no launcher from outside its plugins, so the plugin's own is given another `launch`.

    Args:
        folder: of the sweep.
        finished: overrides of a job -> its finished run, if there is one.
        detach: end when everything is submitted; a last Slurm job, after all others, writes the report.
        split: that the report is about; None where there is none.
    """
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher

    def launch(launcher: Any, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        is_slurm = launcher._EXECUTOR == "slurm"
        there = in_slurm(folder) if is_slurm else {}
        left, running = [], {}
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            if (run := finished(overrides)) is not None:
                console.print(f"job {number}: finished already, in {shown(run)}", soft_wrap=True)
                note_run(folder, number, run, overrides)
            elif (job := there.get(same_job(overrides))) is not None:
                console.print(f"job {number}: Slurm has it already, as {job}")
                running[number] = job
            else:
                left.append((number, list(overrides)))
        jobs = _submit(launcher, left) if left else []
        if is_slurm:
            submitted = {same_job(o): job.job_id for (_, o), job in zip(left, jobs, strict=True)}
            write_submitted(folder, {**there, **submitted})
            for (number, _), job in zip(left, jobs, strict=True):
                console.print(f"job {number}: submitted to Slurm as {job.job_id}")
        if detach:
            _detach(launcher, folder, [*running.values(), *(job.job_id for job in jobs)], split)
        for (number, _), job in zip(left, jobs, strict=True):
            try:
                job.results()
            except Exception as e:  # of submitit: what became of the run says its run.json, and the sweep's end
                console.print(f"job {number}: {str(e).strip().splitlines()[0]}", soft_wrap=True)
        while not set(running.values()).isdisjoint(there.values()):
            time.sleep(ASK_EVERY)
            there = in_slurm(folder)
        results = _results(folder)
        return [
            JobReturn(overrides=list(o), _return_value=results.get(number), status=JobStatus.COMPLETED)
            for number, o in enumerate(job_overrides, start=initial_job_idx)
        ]

    BaseSubmititLauncher.launch = launch


def _results(folder: Path) -> dict[int, float | None]:
    """Best validation loss of each job of a sweep that is finished."""
    runs = {job.number: job.run_dir / "run.json" for job in read_sweep(folder) or [] if job.run_dir}
    facts = {number: read_facts(path) for number, path in runs.items() if path.is_file()}
    return {number: found.get("best_loss") for number, found in facts.items() if is_finished(found)}


def _executor(launcher: Any, **changed: Any) -> Any:
    """The executor of submitit with the launcher's parameters, as the plugin makes it."""
    import submitit
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

    name, given = launcher._EXECUTOR, {**launcher.params, **changed}
    timeouts = {f"{name}_max_num_timeout": given["max_num_timeout"]} if "max_num_timeout" in given else {}
    executor = submitit.AutoExecutor(cluster=name, folder=given["submitit_folder"], **timeouts)
    common = BaseQueueConf.__dataclass_fields__.keys()
    executor.update_parameters(
        **{
            key if key in common else f"{name}_{key}": value
            for key, value in given.items()
            if key not in ("submitit_folder", "max_num_timeout")
        }
    )
    return executor


def _submit(launcher: Any, left: Sequence[tuple[int, list[str]]]) -> list[Any]:
    from hydra.core.singleton import Singleton

    calls = [
        (overrides, "hydra.sweep.dir", number, f"job_id_for_{number}", Singleton.get_state())
        for number, overrides in left
    ]
    return _executor(launcher).map_array(launcher, *zip(*calls, strict=True))


def _detach(launcher: Any, folder: Path, jobs: Sequence[str], split: str | None) -> None:
    """Submit the report, and end this process."""
    import submitit

    others = launcher.params.get("additional_parameters") or {}
    if jobs and split is not None:
        script = str(Path(sys.argv[0]).absolute().with_name("report.py"))
        report = submitit.helpers.CommandFunction(
            [sys.executable, script, f"sweep_dir={quoted_value(str(folder))}", f"split={split}"]
        )
        after = {**others, "dependency": f"afterany:{':'.join(jobs)}"}
        small = {"gpus_per_node": None, "nodes": 1, "tasks_per_node": 1, "max_num_timeout": 0}
        job = _executor(launcher, additional_parameters=after, name="report", **small).submit(report)
        console.print(f"Slurm goes on by itself; job {job.job_id} writes the report when the others have ended.")
    console.print(
        f"Progress: squeue --me, or this command with dry_run=true; without detach it waits. Folder: {shown(folder)}",
        soft_wrap=True,
    )
    sys.exit(0)


def _queue() -> set[str]:
    """The Slurm jobs of this user that wait or run, tasks of arrays one by one."""
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
    try:
        return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    except (OSError, subprocess.CalledProcessError) as e:
        reason = getattr(e, "stderr", None) or e
        raise MsencError(f"squeue does not answer ({str(reason).strip()}), which says what runs. Is Slurm here?") from e
