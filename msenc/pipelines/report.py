"""report.py: runs -> tables and a page."""

from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from msenc.config.schema import plain
from msenc.config.values import check_values
from msenc.files import inside, write_text
from msenc.types import MsencError
from msenc.work.console import console


def report(cfg: DictConfig) -> None:
    """Print the tables of all runs in one or more folders, and write them with the page."""
    from msenc.report.collect import collect_runs
    from msenc.report.page import render_page
    from msenc.report.table import print_table, summarise, write_table

    config = plain(cfg)
    given = config["sweep_dir"]
    if given in (None, "???", []):
        raise MsencError("sweep_dir: no value. Give it: sweep_dir=FOLDER, or sweep_dir=[FOLDER,FOLDER].")
    check_values(config)
    folders = [Path(name) for name in (given if isinstance(given, list) else [given])]
    runs = [(folder, run) for folder in folders for run in collect_runs(folder)]
    if len(folders) > 1:  # jobs of two sweeps may have the same numbers
        runs = [(f, run if run.folder == f else replace(run, name=f"{f.name}/{run.name}")) for f, run in runs]
    table = summarise([run for _, run in runs], split=config["split"], settings=config["settings"])
    print_table(table)
    target = inside(folders[0], "report")
    paths = write_table(table, target)
    page = target / "report.html"
    write_text(page, render_page(table, f"Report on {', '.join(f.resolve().name for f in folders)}", folders))
    console.print(f"Written: {', '.join(map(str, [*paths, page]))}", soft_wrap=True)
