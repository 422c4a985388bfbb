"""report.py: runs -> tables and a page."""

from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from msenc.config.schema import ReportConfig, plain
from msenc.config.values import check_values
from msenc.files import inside, write_text
from msenc.runs.overrides import quoted_value
from msenc.types import MsencError
from msenc.work.console import console, shown

if TYPE_CHECKING:
    from msenc.report.table import Table


def report(cfg: DictConfig) -> None:
    """Print the tables of all runs in one or more folders, and write them with the page.

    Of a search, the trials and the best of them; its runs are compared further if they were evaluated.
    """
    from msenc.report.collect import collect_runs
    from msenc.report.layouts import csv_of, print_grid, print_table, write_table
    from msenc.report.listening.answers import read_answers
    from msenc.report.listening.heard import heard_rows, judge
    from msenc.report.listening.study import read_studies
    from msenc.report.page import render_page
    from msenc.report.panels.trials import best_line, read_trials, trial_grid, trial_rows
    from msenc.report.plots import write_figures
    from msenc.report.style import Style
    from msenc.report.table import summarise

    config = asdict(ReportConfig()) | plain(cfg)
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
        console.print(f"Written: {shown(path)}", soft_wrap=True)
    runs = [(folder, run) for folder in folders for run in collect_runs(folder)]
    if len(folders) > 1:  # jobs of two sweeps may have the same numbers
        runs = [(f, run if run.folder == f else replace(run, name=f"{f.name}/{run.name}")) for f, run in runs]
    if searches and not any(run.evaluations for _, run in runs):
        return
    noise = config["noise_floor"]
    table = summarise(
        [run for _, run in runs],
        split=config["split"],
        settings=config["settings"],
        metrics=config["metrics"],
        style=Style(config["names"], config["decimals"], config["percent"], config["spread"]),
        margins=config["margins"],
        noise=(noise, collect_runs(Path(noise))) if noise else None,
    )
    target = inside(folders[0], "report")
    listening = inside(folders[0], "report", "listening")
    if config["answers"] is not None:
        study, listeners, problems = read_answers(Path(config["answers"]), read_studies(listening))
        table = replace(table, heard=judge(study, listeners, problems))
    print_table(table, layout=config["layout"])
    figures = write_figures(table.comparisons, table.configurations, table.style, target / "figures")
    paths = [*write_table(table, target), *figures]
    if table.heard is not None:
        write_text(path := target / "listening.csv", csv_of(heard_rows(table.heard)))
        paths.append(path)
    page = target / "report.html"
    write_text(page, render_page(table, config["title"], folders, _options(config), list(searches.values())))
    if config["layout"] is None:
        console.print(f"Written: {shown(page)}, and beside it {_names(paths, target)}", soft_wrap=True)
    if config["listen"]:
        _listening_page(table, config, folders, listening)


def _names(paths: list[Path], folder: Path) -> str:
    """What lies in the report's folder; of a folder in it, the number of its files."""
    files = [path.name for path in paths if path.parent == folder]
    inner = Counter(path.parent.name for path in paths if path.parent != folder)
    return ", ".join([*files, *(f"{name}/ ({count})" for name, count in inner.items())])


def _listening_page(table: "Table", config: dict[str, Any], folders: list[Path], target: Path) -> None:
    """Write a page for listeners, and say what to do with it."""
    from msenc.report.listening.page import write_page
    from msenc.report.listening.study import KEY

    page, notes = write_page(
        table,
        folders,
        target,
        kind="ab" if config["listen"] is True else config["listen"],
        num_trials=config["listen_trials"],
        seed=config["listen_seed"],
        consent=config["listen_consent"],
    )
    if config["layout"] is not None:
        return
    for note in notes:
        console.print(f"Listening page: {note}", soft_wrap=True)
    console.print(
        f"Listening page: {shown(page)}\nGive its folder to listeners, and keep {shown(page.parents[1] / KEY)}. "
        "Their files go into the report with answers=FOLDER.",
        soft_wrap=True,
    )


def _options(config: dict[str, Any]) -> list[str]:
    """What was asked for beside folders and split, as a command line has it."""

    def written(value: Any) -> str:
        if isinstance(value, dict):
            return f"{{{', '.join(f'{k}: {written(v)}' for k, v in value.items())}}}"
        if isinstance(value, list):
            return f"[{','.join(map(written, value))}]"
        return quoted_value(value) if isinstance(value, str) else str(value)

    usual = asdict(ReportConfig())
    keys = [key for key in usual if key not in ("sweep_dir", "split", "layout") and config[key] != usual[key]]
    return [f"{key}={written(config[key])}" for key in keys]
