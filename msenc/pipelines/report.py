"""What report.py does, and what ends a sweep: runs -> a table."""

import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from msenc.config import plain
from msenc.pipelines.parts import console
from msenc.types import MsencError


def report(cfg: DictConfig) -> None:
    """Print one table of all runs below a folder."""
    from msenc.report.collect import collect_runs
    from msenc.report.table import print_table, summarise, write_table

    plain(cfg)
    table = summarise(collect_runs(Path(cfg.sweep_dir)), split=cfg.split, settings=cfg.settings)
    print_table(table)
    paths = write_table(table, Path(cfg.sweep_dir))
    console.print(f"Written: {', '.join(map(str, paths))}", soft_wrap=True)


def end_sweep(sweep_dir: Path) -> None:
    """What a multirun does last: print the report, name what failed, and exit with status 1 if anything did."""
    from msenc.report.collect import collect_runs

    runs = collect_runs(sweep_dir)
    failed = [run for run in runs if run.status != "finished"]
    try:
        report(OmegaConf.create({"sweep_dir": str(sweep_dir), "split": "test", "settings": None}))
    except MsencError as e:
        console.print(f"No table: {e}", soft_wrap=True)
    if failed:
        console.print(f"[red]{len(failed)} of {len(runs)} jobs did not finish:[/red]")
        for run in failed:
            console.print(f"  {run.name}: {run.status}: {run.error}", soft_wrap=True)
        sys.exit(1)
