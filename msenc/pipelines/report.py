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
    """Print the tables of all runs in one or more folders, and write them with the page.

    Of a search, the trials and the best of them; its runs are compared further if they were evaluated.
    """
    from msenc.report.collect import collect_runs
    from msenc.report.page import render_page
    from msenc.report.table import csv_of, print_grid, print_table, summarise, write_table
    from msenc.report.trials import best_line, read_trials, trial_grid, trial_rows

    config = plain(cfg)
    given = config["sweep_dir"]
    if given in (None, "???", []):
        raise MsencError("sweep_dir: no value. Give it: sweep_dir=FOLDER, or sweep_dir=[FOLDER,FOLDER].")
    check_values(config)
    folders = [Path(name) for name in (given if isinstance(given, list) else [given])]
    searches = {folder: trials for folder in folders if (trials := read_trials(folder)) is not None}
    for folder, trials in searches.items():
        console.print("Trials of the search, the best first", style="bold")
        print_grid(trial_grid(trials), console)
        console.print(best_line(trials), soft_wrap=True)
        write_text(path := inside(folder, "report", "trials.csv"), csv_of(trial_rows(trials)))
        console.print(f"Written: {path}", soft_wrap=True)
    runs = [(folder, run) for folder in folders for run in collect_runs(folder)]
    if len(folders) > 1:  # jobs of two sweeps may have the same numbers
        runs = [(f, run if run.folder == f else replace(run, name=f"{f.name}/{run.name}")) for f, run in runs]
    if searches and not any(run.evaluations for _, run in runs):
        return
    table = summarise([run for _, run in runs], split=config["split"], settings=config["settings"])
    print_table(table)
    target = inside(folders[0], "report")
    paths = write_table(table, target)
    page = target / "report.html"
    title = f"Report on {', '.join(f.resolve().name for f in folders)}"
    write_text(page, render_page(table, title, folders, list(searches.values())))
    console.print(f"Written: {', '.join(map(str, [*paths, page]))}", soft_wrap=True)
