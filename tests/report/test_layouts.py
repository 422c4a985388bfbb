"""A report's tables as a paper needs them."""

import csv
import re
import shutil
import subprocess

import pytest
from omegaconf import OmegaConf
from sweeps import write_run, write_sweep

from msenc.pipelines.report import report
from msenc.report.collect import collect_runs
from msenc.report.layouts import grid, print_table, write_table
from msenc.report.style import Style
from msenc.report.table import summarise
from msenc.types import MsencError

MODALITIES = [("text", 0.0), ("text_audio", 0.02), ("text_video", 0.6), ("text_audio_video", 0.9)]
ODD = r"50 % of {a_b} & #1 ~ ^ \ $ |é|"

PAGE = r"""\documentclass[10pt,twocolumn]{article}
\usepackage[textwidth=455pt,columnsep=17pt,a4paper]{geometry}
\usepackage{booktabs}
\begin{document}
Words.
\input{table.tex}
\end{document}
"""
"""Of two columns as narrow as ACL's."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return collect_runs(write_sweep(tmp_path_factory.mktemp("sweep"), MODALITIES))


def table_of(runs, **options):
    style = Style(**{k: options.pop(k) for k in ("names", "decimals", "percent", "spread") if k in options})
    return summarise(runs, style=style, **options)


def latex(table, folder):
    return next(p for p in write_table(table, folder) if p.suffix == ".tex").read_text()


def printed(capsys, table, layout):
    print_table(table, layout=layout)
    return capsys.readouterr().out


def test_metrics_names_decimals_and_percent_are_as_asked(runs, capsys):
    names = {"text_audio": "T+A", "rouge_l": "ROUGE-L", "modality": "Input"}
    table = table_of(runs, metrics=["rouge_l", "nll"], names=names, decimals={"nll": 1}, percent=["rouge_l"])
    head, _, row, *_ = grid(table)
    assert head == ["Input", "seeds", "ROUGE-L ↑", "nll ↓"]
    assert row[0] == "T+A"
    assert re.fullmatch(r"\d\d\.\d ± \d\.\d", row[2])
    assert re.fullmatch(r"0\.\d ± 0\.\d", row[3])
    read = list(csv.DictReader(printed(capsys, table, "csv").splitlines()))
    assert read[1]["Input"] == "T+A"
    mean = table.configurations[1].scores["rouge_l"].mean
    assert float(read[1]["ROUGE-L"]) == pytest.approx(100 * mean)
    assert read[1]["nll"] == f"{table.configurations[1].scores['nll'].mean:.1f}"


def test_all_layouts_have_the_same_cells(runs, capsys, tmp_path):
    table = table_of(runs, metrics=["nll", "rouge_l"], decimals=2)
    cells = [cell for row in grid(table)[1:] for cell in row[2:]]
    markdown = printed(capsys, table, "markdown").replace("**", "")
    tex = re.sub(r"\\textbf\{([^}]*)\}", r"\1", printed(capsys, table, "booktabs")).replace(r"$\pm$", "±")
    for cell in cells:
        assert f"| {cell} " in markdown
        assert re.search(rf"& {re.escape(cell)} (&|\\\\)", tex)
    assert tex.count("±") == len(cells) + 1  # and once in the caption


def test_the_spread_is_that_of_seeds_where_it_is_asked_for(runs, tmp_path):
    table = table_of(runs, metrics=["nll"], spread="sd")
    for configuration, row in zip(table.configurations, grid(table)[1:], strict=True):
        values = [e.metrics["nll"] for e in configuration.evaluations]
        mean = sum(values) / 3
        deviation = (sum((v - mean) ** 2 for v in values) / 2) ** 0.5
        assert row[2] == f"{mean:.3f} ± {deviation:.3f}"
    assert "standard deviation between seeds" in latex(table, tmp_path)


def test_costs_are_apart(runs, tmp_path):
    tex = latex(table_of(runs), tmp_path)
    scores, costs = tex.split(r"\label{tab:scores}")
    assert "seconds" not in scores
    assert "trainable parameters & seconds & peak memory MiB" in costs


def test_bold_is_what_is_significantly_better_than_the_next(tmp_path, runs):
    table = table_of(runs)
    assert {m: c.name for m, c in table.leaders.items()} == dict.fromkeys(
        ["nll", "perplexity", "rouge_l", "planted/audio/recovered %"], "text_audio_video"
    )
    tex = latex(table, tmp_path / "a")
    assert tex.count(r"\textbf{") == 4
    bold = [line for line in tex.splitlines() if r"\textbf" in line]
    assert all(line.startswith(r"text\_audio\_video") for line in bold)
    for number, modality in enumerate(("text", "text_audio")):
        for seed in (1, 2, 3):
            write_run(tmp_path / "even" / f"{number}{seed}", [f"modality={modality}"], 10 * number + seed, 0.0)
    even = table_of(collect_runs(tmp_path / "even"), metrics=["nll", "rouge_l"])
    assert len({c.scores["nll"].mean for c in even.configurations}) == 2  # one is better, not significantly
    assert not even.leaders
    assert r"\textbf" not in latex(even, tmp_path / "b")


def test_a_pair_that_the_report_does_not_compare_is_tested_for_bold(tmp_path):
    known = [("text_audio", 0.9), ("text_video", 0.3)]  # neither lacks one of the other's streams
    table = table_of(collect_runs(write_sweep(tmp_path, known)))
    assert not table.comparisons
    assert table.leaders["nll"].name == "text_audio"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"metrics": ["nul"]}, "metrics: the reported runs have no nul. Did you mean 'nll'"),
        ({"names": {"text_audoi": "T+A"}}, "names: the reported runs have no text_audoi. Did you mean 'text_audio'"),
        ({"margins": {"rogue_l": 1.0}}, "margins: the reported runs have no rogue_l. Did you mean 'rouge_l'"),
        ({"decimals": {"nul": 1}}, "decimals: the reported runs have no nul"),
        ({"percent": ["planted/audio/recovered %"]}, "percent: the reported runs have no planted/audio/recovered %"),
    ],
)
def test_unknown_names_are_refused(runs, options, expected):
    with pytest.raises(MsencError, match=expected):
        table_of(runs, **options)


def test_a_layout_is_all_that_is_printed(tmp_path, capsys):
    folder = write_sweep(tmp_path)
    cfg = {"sweep_dir": str(folder), "layout": "booktabs", "metrics": ["nll"], "names": {"nll": "Loss"}, "decimals": 2}
    report(OmegaConf.create(cfg))
    said = capsys.readouterr().out
    assert said == (folder / "report" / "table.tex").read_text()
    page = (folder / "report" / "report.html").read_text()
    assert "Loss ↓" in page
    assert "rouge_l" not in page.split("To repeat it")[0].split("All replies")[0]
    assert "metrics=[" in page.split("To repeat it")[1]
    figures = sorted(path.name for path in (folder / "report" / "figures").iterdir())
    assert figures == ["effect-nll.pdf", "learning-curves.pdf"]
    assert all(path.read_bytes().startswith(b"%PDF") for path in (folder / "report" / "figures").iterdir())


def test_any_names_are_written_as_they_are(runs, tmp_path):
    tex = latex(table_of(runs, names={"text": ODD, "nll": ODD}), tmp_path)
    escaped = r"50 \% of \{a\_b\} \& \#1 \textasciitilde{} \textasciicircum{} \textbackslash{} \$ \textbar{}é\textbar{}"
    assert tex.count(escaped) == 4  # rows of three tables, and a column


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on this machine")
@pytest.mark.parametrize("metrics", [["bleu_1"], ["nll", "rouge_l"], []])
def test_the_table_compiles_and_fits_a_page_of_two_columns(runs, tmp_path, metrics):
    names = {
        "text": "words" if metrics == ["bleu_1"] else ODD,
        "planted/audio/recovered %": "bits of the voice that are found again (%)",
    }
    table = table_of(runs, metrics=metrics, names=names)
    tex = latex(table, tmp_path)
    assert (r"\begin{table}[t]" in tex.split(r"\label{tab:scores}")[0]) == (metrics == ["bleu_1"])
    (tmp_path / "page.tex").write_text(PAGE)
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout
