import csv
import io
import json
import math
import os

import pytest
from rich.console import Console

from msenc.report.collect import collect_runs
from msenc.report.layouts import print_table, write_table
from msenc.report.table import costs, summarise
from msenc.types import MsencError


def write_run(folder, overrides, seed=0, metrics=None, split="test", evaluation="ab12", settings="greedy", **changes):
    """A run folder as training leaves it; metrics None: not evaluated."""
    run = {
        "status": "finished",
        "error": None,
        "task_hash": "t1",
        "seed": seed,
        "overrides": [*overrides, f"seed={seed}"],
        "streams": {"text": "s0"},
        "trainable_parameters": {"llm": 1000, "connector.audio": 234},
        "seconds": 60.0,
    }
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(run | changes))
    if metrics is not None:
        write_evaluation(folder, metrics, split, evaluation, settings)
    return folder


def write_evaluation(folder, metrics, split="test", evaluation="ab12", settings="greedy"):
    path = folder / "evaluation" / f"demo-{split}-{evaluation}" / "metrics.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"split": split, "data": "demo", "settings": settings, **metrics}))
    return path


@pytest.fixture
def sweep(tmp_path):
    """Two modalities over three seeds; one run failed, one is unfinished."""
    data = "data=demo"
    nll = {("text", 0): 1.0, ("text", 1): 2.0, ("text", 2): 6.0, ("text_audio", 0): 0.5, ("text_audio", 1): 0.7}
    for job, ((modality, seed), value) in enumerate(nll.items()):
        metrics = {"nll": value, "bleu_1": 0.25, "planted/both/recovered": 0.0, "planted/audio/recovered": value / 10}
        write_run(tmp_path / str(job), [data, f"modality={modality}"], seed, metrics | {"planted/audio/bits": 2.0})
    error = "MsencError: no shard\n  of audio"
    write_run(tmp_path / "10", [data, "modality=text_audio"], 2, status="failed", error=error)
    write_run(tmp_path / "11", [data, "modality=text_video"], 0, status="running")
    return tmp_path


def means(table, metric="nll"):
    return [c.scores[metric].mean for c in table.configurations]


def printed(table, width):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_table(table, console)
    return console.file.getvalue()


def refusal(folder, **arguments):
    with pytest.raises(MsencError) as caught:
        summarise(collect_runs(folder), **arguments)
    return str(caught.value)


def test_rows_hold_mean_and_interval_over_seeds(sweep):
    table = summarise(collect_runs(sweep))
    assert table.keys == ["modality"]  # data is equal in all runs, the seed is what is averaged over
    assert table.metrics == ["nll", "bleu_1", "planted/audio/recovered %", "planted/both/recovered %"]
    text, text_audio = table.configurations
    assert (text.name, [run.seed for run in text.runs]) == ("text", [0, 1, 2])
    # 1, 2, 6: mean 3, deviation 7 ** 0.5, the t quantile of two degrees of freedom 4.3027.
    assert text.scores["nll"].mean == pytest.approx(3.0)
    assert text.scores["nll"].high == pytest.approx(3.0 + 4.30265 * (7 / 3) ** 0.5, rel=1e-4)
    assert text.over_seeds >= {"nll"}  # there are no predictions
    assert text.scores["planted/audio/recovered %"].mean == pytest.approx(30.0)
    assert costs(text) == {"trainable parameters": 1234, "seconds": 60.0, "peak memory MiB": 0.0}
    assert len(text_audio.runs) == 2


def test_failed_and_unfinished_runs_are_listed_with_their_error(sweep):
    table = summarise(collect_runs(sweep))
    assert table.left_out == ["10: failed: MsencError: no shard of audio"]
    (running,) = table.running
    assert running.startswith(
        "11 (data=demo, modality=text_video, seed=0): still running: 0 epochs done, last written "
    )
    shown = printed(table, 200)
    assert shown.index("Excluded: 10: failed: MsencError: no shard of audio") > shown.index("text_audio")
    assert f"Not done: {running}" in shown


def test_single_run_has_no_deviation(tmp_path):
    write_run(tmp_path / "a", ["modality=text"], metrics={"nll": 1.5})
    table = summarise(collect_runs(tmp_path))
    assert table.keys == []
    assert [c.name for c in table.configurations] == ["all runs"]
    assert math.isnan(table.configurations[0].scores["nll"].low)
    shown = printed(table, 200)
    assert "1.500" in shown
    assert "1.500 ±" not in shown
    assert "nan" not in shown


def test_a_run_folder_itself_can_be_reported(tmp_path):
    write_run(tmp_path / "alone", [], metrics={"nll": 1.5})
    assert [run.name for run in collect_runs(tmp_path / "alone")] == ["alone"]


def test_jobs_are_in_natural_order(tmp_path):
    for job in ("10", "9", "x1"):
        write_run(tmp_path / job, [f"modality={job}"], metrics={"nll": 1.0})
    assert [run.name for run in collect_runs(tmp_path)] == ["9", "10", "x1"]


def test_keys_that_only_some_runs_override_read_default(tmp_path):
    write_run(tmp_path / "0", ["modality=text"], metrics={"nll": 1.0})
    write_run(tmp_path / "1", ["modality=text", "model.llm.freeze=true", "layers=[red]"], metrics={"nll": 2.0})
    table = summarise(collect_runs(tmp_path))
    assert [c.levels["model.llm.freeze"] for c in table.configurations] == ["(default)", "true"]
    assert "[red]" in printed(table, 200)  # not read as markup


def test_written_files_hold_the_table_and_replace_earlier_ones(sweep):
    table = summarise(collect_runs(sweep))
    write_table(table, sweep / "report")
    markdown, latex, values, comparisons = write_table(table, sweep / "report")
    names = ["comparisons.csv", "table.csv", "table.md", "table.tex"]
    assert sorted(path.name for path in (sweep / "report").iterdir()) == names
    lines = markdown.read_text().splitlines()
    assert "| text | 3 | 3.000 ± 6.572† | 0.250 ± 0.000† | 30.0 ± 65.7† | 0.0 ± 0.0† |" in lines
    assert "| text | 1,234 | 60 | 0 |" in lines
    assert "- Excluded: 10: failed: MsencError: no shard of audio" in lines
    rows = list(csv.DictReader(values.read_text().splitlines()))
    assert rows[0]["modality"] == "text"
    assert float(rows[0]["nll high"]) == pytest.approx(9.572, abs=1e-3)
    compared = list(csv.DictReader(comparisons.read_text().splitlines()))
    assert {(row["treated"], row["baseline"]) for row in compared} == {("text_audio", "text")}
    assert r"text\_audio & 2 & 0.600 $\pm$ 1.271$^\dagger$" in latex.read_text()


def test_costs_are_the_last_columns(sweep):
    path = write_table(summarise(collect_runs(sweep)), sweep / "report")[2]
    assert path.read_text().splitlines()[0].endswith(",trainable parameters,seconds,peak memory MiB")


def test_bars_in_values_do_not_break_the_markdown(tmp_path):
    for job in ("a|b", "c"):
        write_run(tmp_path / job[0], [f"prompt={job}"], metrics={"nll": 1.0})
    assert "| a\\|b | 1 |" in write_table(summarise(collect_runs(tmp_path)), tmp_path / "report")[0].read_text()


def test_a_narrow_console_loses_nothing(sweep):
    table = summarise(collect_runs(sweep))
    narrow = printed(table, 80)
    for text in ("text_audio", "3.000 ± 6.572†", "planted/audio/recovered %", "1,234"):
        assert text in narrow
    assert len(narrow.splitlines()) > len(printed(table, 200).splitlines())


def test_a_console_narrower_than_a_turned_table_gets_it_in_parts(tmp_path):
    names = [f"a_configuration_of_{n}_words" for n in ("two", "three", "four")]
    for number, name in enumerate(names):
        metrics = dict.fromkeys(("rouge_l", "bleu_1", "token_accuracy"), 0.5) | {"nll": 1.0 + number}
        write_run(tmp_path / str(number), [f"model={name}"], metrics=metrics)
    lines = printed(summarise(collect_runs(tmp_path)), 70).splitlines()
    heads = [line.split() for line in lines if line.split()[:1] == ["model"]]
    assert heads[:3] == [["model", *names[:1]], ["model", *names[1:2]], ["model", *names[2:]]]
    values = [line.split()[2:] for line in lines if line.split()[:1] == ["nll"]]
    assert values[:3] == [["1.000"], ["2.000"], ["3.000"]]


def test_different_features_of_a_stream_are_named(tmp_path):
    write_run(tmp_path / "0", ["model/audio=logmel"], metrics={"nll": 1.0}, streams={"text": "s0", "audio": "a1"})
    write_run(tmp_path / "1", ["model/audio=wavlm"], metrics={"nll": 1.0}, streams={"text": "s0", "audio": "a2"})
    write_run(tmp_path / "2", ["modality=text"], metrics={"nll": 1.0}, streams={"text": "s0"})
    assert "The runs read different audio features: a1 (0), a2 (1)." in summarise(collect_runs(tmp_path)).notes


def test_a_metric_that_some_runs_lack_is_named(tmp_path):
    write_run(tmp_path / "0", ["modality=text"], metrics={"nll": 1.0, "rouge_l": None})
    write_run(tmp_path / "1", ["modality=text_audio"], metrics={"nll": 1.0, "rouge_l": 0.5})
    table = summarise(collect_runs(tmp_path))
    assert "rouge_l is missing in 0." in table.notes
    assert "nan" not in printed(table, 200)


def test_of_equal_settings_the_newest_evaluation_counts(tmp_path):
    run = write_run(tmp_path / "0", [], metrics={"nll": 1.0}, evaluation="new")
    old = write_evaluation(run, {"nll": 9.0}, evaluation="old")
    os.utime(old, (1, 1))
    assert means(summarise(collect_runs(tmp_path))) == [1.0]


def test_evaluations_of_different_settings_are_refused_until_one_is_named(tmp_path):
    run = write_run(tmp_path / "0", [], metrics={"nll": 1.0})
    write_evaluation(run, {"nll": 9.0}, evaluation="cd34", settings="beam 4")
    message = refusal(tmp_path)
    for text in ("settings=greedy hash=ab12 (0)", "settings=beam 4 hash=cd34 (0)", "settings="):
        assert text in message
    for settings in ("beam 4", "cd34"):
        assert means(summarise(collect_runs(tmp_path), settings=settings)) == [9.0]
    assert "No evaluation of test has settings=top_p" in refusal(tmp_path, settings="top_p")


def test_settings_that_differ_between_runs_are_refused(tmp_path):
    write_run(tmp_path / "0", ["modality=text"], metrics={"nll": 1.0})
    write_run(tmp_path / "1", ["modality=audio"], metrics={"nll": 1.0}, evaluation="cd34", settings="beam 4")
    assert "differ in data or settings" in refusal(tmp_path)
    table = summarise(collect_runs(tmp_path), settings="greedy")
    assert table.left_out == ["1: finished, but no fitting evaluation of test"]


def test_runs_of_different_splits_are_refused(tmp_path):
    write_run(tmp_path / "0", ["modality=text"], metrics={"nll": 1.0})
    write_run(tmp_path / "1", ["modality=text_audio"], metrics={"nll": 1.0}, split="val")
    message = refusal(tmp_path)
    for text in ("Not all runs were evaluated on test", "split test (0), split val (1)", "split=test"):
        assert text in message


def test_what_was_not_varied_and_unequal_seeds_are_said(sweep):
    notes = summarise(collect_runs(sweep)).notes
    assert "The configurations have different seeds (text: 0, 1, 2; text_audio: 0, 1)." in notes
    assert "Not varied: data=demo." in notes


def test_runs_that_were_trained_with_weights_are_named(tmp_path):
    weights = {"planted_audio": 8.0, "description": 0.5}
    write_run(tmp_path / "0", ["modality=text"], metrics={"nll": 1.0}, loss_weights=None)
    assert not any("weighted" in note for note in summarise(collect_runs(tmp_path)).notes)
    write_run(tmp_path / "1", ["modality=text_audio"], metrics={"nll": 1.0}, loss_weights=weights)
    note = next(note for note in summarise(collect_runs(tmp_path)).notes if "weighted" in note)
    assert "description 0.5, planted_audio 8 (1)" in note


def test_what_a_run_warned_of_and_a_shared_alignment_are_named(tmp_path):
    aligned = {"audio": {"hash": "abc", "used": True}, "video": {"hash": "def", "used": False}}
    for seed, warnings in ((1, []), (2, ["audio: the connector's output is nearly the same for every utterance"])):
        facts = {"seed": seed, "warnings": warnings, "alignments": aligned}
        write_run(tmp_path / str(seed), [f"seed={seed}"], metrics={"nll": 1.0}, **facts)
    notes = summarise(collect_runs(tmp_path)).notes
    assert [note for note in notes if "nearly the same" in note] == [
        "2: audio: the connector's output is nearly the same for every utterance"
    ]
    assert any("share one alignment (audio)," in note for note in notes)


def test_no_folder_and_no_run_are_refused(tmp_path):
    with pytest.raises(MsencError, match=r"No folder .*absent"):
        collect_runs(tmp_path / "absent")
    with pytest.raises(MsencError, match=r"No run found in .*run\.json"):
        collect_runs(tmp_path)


def test_no_evaluation_of_the_split_is_refused(tmp_path):
    write_run(tmp_path / "0", [], metrics={"nll": 1.0}, split="val")
    write_run(tmp_path / "1", [], status="failed", metrics={"nll": 1.0})
    message = refusal(tmp_path)
    for text in ("No finished run with an evaluation of test", "finished (0), failed (1)", "ones: val", "split=test"):
        assert text in message


def test_different_tasks_are_refused_with_the_keys_that_differ(tmp_path):
    write_run(tmp_path / "0", ["data=demo", "modality=text"], metrics={"nll": 1.0})
    write_run(tmp_path / "1", ["data=demo", "modality=text_audio"], metrics={"nll": 1.0})
    write_run(tmp_path / "2", ["data=meld", "modality=text"], metrics={"nll": 1.0}, task_hash="t2")
    write_run(tmp_path / "3", ["data=meld", "modality=text_audio"], metrics={"nll": 1.0}, task_hash="t2")
    message = refusal(tmp_path)
    assert "task t1 (0, 1), task t2 (2, 3)" in message
    assert "overrides differ in data." in message


def test_different_tasks_of_equal_overrides_are_refused(tmp_path):
    write_run(tmp_path / "0", [], metrics={"nll": 1.0})
    write_run(tmp_path / "1", [], seed=1, metrics={"nll": 1.0}, task_hash="t2", turns_hash="h2")
    message = refusal(tmp_path)
    assert "overrides agree, so the data was prepared again" in message
    assert "turns_hash: None (0), h2 (1)" in message


def test_two_runs_of_one_seed_are_refused(tmp_path):
    write_run(tmp_path / "0", ["modality=text"], seed=3, metrics={"nll": 1.0})
    write_run(tmp_path / "1", ["modality=text"], seed=3, metrics={"nll": 1.0})
    assert "0 and 1 have the same overrides and seed 3" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", r"run\.json: cannot be read as JSON"),
        ("[]", r"run\.json: found a list of 0, expected an object"),
        (
            '{"status": "finished", "seed": 1}',
            r"run\.json: found no task_hash, overrides, expected it beside status, seed",
        ),
    ],
)
def test_unreadable_run_files_are_refused_by_name(tmp_path, text, expected):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(MsencError, match=expected):
        collect_runs(tmp_path)


def test_evaluations_without_their_settings_are_refused_by_name(tmp_path):
    path = write_evaluation(write_run(tmp_path / "0", []), {"nll": 1.0})
    path.write_text('{"split": "test", "nll": 1.0}')
    with pytest.raises(MsencError, match=r"metrics\.json: found no data, settings"):
        collect_runs(tmp_path)
