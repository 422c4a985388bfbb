import json
import re

from test_report import printed, write_run

from msenc.report.collect import collect_runs
from msenc.report.layouts import write_table
from msenc.report.page import render_page
from msenc.report.table import summarise

ROW = {"stream": "audio", "label": "planted", "compared": "planted word", "turn": 1, "same_speaker": True}


def write_items(run, nats):
    """One item per dialogue."""
    (folder,) = (run / "evaluation").iterdir()
    lines = [json.dumps({**ROW, "dialogue": f"demo/test/dia{n}", "nats": value}) for n, value in enumerate(nats)]
    (folder / "conflict.jsonl").write_text("\n".join(lines))


def test_a_report_says_what_each_configuration_follows(tmp_path):
    for seed in (1, 2):
        for modality, nats in (("text", 1.0), ("text_audio", -1.0)):
            run = write_run(tmp_path / f"{modality}-{seed}", [f"modality={modality}"], seed, {"nll": 1.0})
            write_items(run, [nats] * 40)
    table = summarise(collect_runs(tmp_path))
    rows = [(one["configuration"], one["follows_stream"], one["verdict"]) for one in table.followed]
    assert rows == [("text", 0.0, "the words"), ("text_audio", 1.0, "the voice")]
    assert not any("what it follows" in note for note in table.notes)
    assert re.search(
        r"text_audio +voice +planted word +40 +100\.0 \[91\.2, 100\.0\] +0\.0 +the voice", printed(table, 160)
    )
    write_table(table, tmp_path / "report")
    assert "| text | voice | planted word | 40 | 0.0 [0.0, 8.8] | 100.0 | the words |" in (
        tmp_path / "report" / "table.md"
    ).read_text(encoding="utf-8")
    page = render_page(table, "Report", [tmp_path])
    assert "Does it listen, or read?" in page
    assert page.count("100.0 [91.2, 100.0]") == 1


def test_runs_without_items_are_left_out_and_named(tmp_path):
    runs = [write_run(tmp_path / str(seed), ["modality=text_audio"], seed, {"nll": 1.0}) for seed in (1, 2, 3)]
    assert summarise(collect_runs(tmp_path)).followed == []
    assert "listen, or read" not in render_page(summarise(collect_runs(tmp_path)), "Report", [tmp_path])
    write_items(runs[0], [-1.0, -1.0])
    write_items(runs[1], [-1.0, -1.0, 1.0])
    table = summarise(collect_runs(tmp_path))
    assert [one["items"] for one in table.followed] == [2]
    assert "all runs: what it follows is that of the seeds 1; others lack these items." in table.notes
