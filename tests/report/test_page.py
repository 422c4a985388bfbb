import json
import re

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from clips import write_media
from omegaconf import OmegaConf
from sweeps import write_run, write_sweep

from msenc.pipelines.report import report
from msenc.report.collect import collect_runs
from msenc.report.page import render_page
from msenc.report.table import summarise
from msenc.runs.sweep import note_run
from msenc.runs.sweep import write_sweep as write_sweep_record
from msenc.speech.wav import to_wav
from msenc.store.shards import write_stream
from msenc.types import Dialogue, MsencError, Utterance

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def sweep(tmp_path):
    """Two modalities, three seeds, controls; dialogues whose clips are there."""
    folder = write_sweep(tmp_path / "sweep")
    write_run(folder / "13", [], 3, 0.0, control="shuffle_audio")
    write_run(folder / "99", ["modality=text_video"], 1, 0.0, status="failed", error=f"MsencError: {HOSTILE}")
    return folder


def add_data(sweep, tmp_path, clip=True):
    """Prepared turns, and where `clip` raw material, to which the runs' configs point."""
    raw = tmp_path / "raw"
    raw.mkdir()
    if clip:
        write_media(raw / "a.mp4")
    turns = tuple(Utterance(str(u), "Ana", f"{HOSTILE} {u}", clip="a.mp4") for u in range(3))
    dialogues = [Dialogue(f"demo/test/dia{n}", "test", turns) for n in range(12)]
    samples = [(d.id, d.split, {"turns.json": d.to_json()}) for d in dialogues]
    write_stream(tmp_path / "data" / "turns", samples, {})
    config = OmegaConf.create({"data": {"dir": str(tmp_path / "data"), "root": str(raw)}})
    for run in sweep.iterdir():
        (run / ".hydra").mkdir()
        OmegaConf.save(config, run / ".hydra" / "config.yaml")


def rendered(sweep):
    return render_page(summarise(collect_runs(sweep)), "Report", [sweep])


def test_the_page_holds_all_it_shows_and_runs_nothing(sweep, tmp_path):
    add_data(sweep, tmp_path)
    page = rendered(sweep)
    assert HOSTILE not in page
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert addresses
    assert all(address.startswith("data:") for address in addresses)
    kinds = {address.partition(";")[0] for address in addresses}
    assert kinds == {"data:image/svg+xml", "data:audio/wav", "data:image/jpeg"}
    assert "@import" not in page
    assert "url(" not in page
    for shown in ("text_audio", "shuffle_audio", "used", "Voice descriptions", "python report.py", "90.0 ±"):
        assert shown in page.replace("<wbr>", "")


def test_a_long_name_leaves_room_for_the_plots(tmp_path):
    for number, llm in enumerate("ab"):
        write_run(tmp_path / llm, [f"prompt.instruction=/{'long/' * 30}{llm}"], 1, number / 2)
    assert "data:image/svg" in rendered(
        tmp_path
    )  # matplotlib warns where an axis has collapsed, and a warning is an error


def test_the_title_says_what_is_compared_and_metrics_are_grouped(sweep):
    page = render_page(summarise(collect_runs(sweep)), None, [sweep])
    assert "<h1>Comparison of text and text_audio (modality) on demo (test split, 3 seeds each)</h1>" in page
    groups = re.findall(r'<tr class="part"><th colspan="3">([^<]*)</th>', page)
    assert groups == ["Loss of the reference", "Words of the replies", "Planted words"]
    assert "Any &lt;title&gt;" in render_page(summarise(collect_runs(sweep)), "Any <title>", [sweep])


def test_jobs_that_are_not_done_are_listed_with_how_far_they_are(sweep):
    write_run(sweep / "97", ["modality=text_video"], 2, 0.0, status="running")
    write_run(sweep / "98", ["modality=text_video"], 3, 0.0, status="interrupted")
    write_sweep_record(sweep, ["modality=text_video"], [["modality=text_video", f"seed={n}"] for n in range(4)])
    for number, run in enumerate(("99", "11", "97")):
        note_run(sweep, number, sweep / run, ["modality=text_video", f"seed={number}"])
    page = rendered(sweep).split("Still running")[1].split("<h2>")[0]
    assert "97 (modality=text_video, seed=2): still running: 3 epochs done, last written 20" in page
    assert "job 3 (modality=text_video, seed=3): has not begun" in page


def test_failed_jobs_are_named_in_the_page(sweep):
    assert "99: failed: MsencError: &lt;script&gt;" in rendered(sweep)


def test_the_same_runs_give_the_same_page(sweep):
    assert rendered(sweep) == rendered(sweep)


def test_absent_media_are_said_to_be_absent(sweep, tmp_path):
    assert "The prepared data are not found, so the previous turns are not shown" in rendered(sweep)
    add_data(sweep, tmp_path, clip=False)
    page = rendered(sweep)
    assert "(clip missing)" in page
    assert "<audio" not in page


def test_several_folders_make_one_report(tmp_path, capsys):
    first, second = (
        write_sweep(tmp_path / name, known=[known], seeds=(1, 2))
        for name, known in (("a", ("text", 0.0)), ("b", ("text_audio", 0.9)))
    )
    report(OmegaConf.create({"sweep_dir": [str(first), str(second)], "split": "test", "settings": None}))
    written = (first / "report" / "report.html").read_text()
    assert "text_audio is better than text" in written
    assert f"sweep_dir=[{first},{second}]" in written
    assert "report.html" in capsys.readouterr().out
    assert not (second / "report").exists()


@pytest.mark.parametrize(
    ("given", "expected"), [("???", "no value"), (None, "no value"), (3, "sweep_dir: found 3, expected")]
)
def test_no_folder_is_refused(given, expected):
    with pytest.raises(MsencError, match=expected):
        report(OmegaConf.create({"sweep_dir": given, "split": "test", "settings": None}))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_and_plays_it_at_any_width(sweep, tmp_path):
    add_data(sweep, tmp_path)
    file = tmp_path / "report.html"
    file.write_text(rendered(sweep))
    with Browser(tmp_path / "profile") as browser:
        for width in (390, 1280):
            browser.open(file.as_uri(), width)
            browser.wait("[...document.querySelectorAll('audio')].every(a => a.duration > 0)")
            assert browser.evaluate("document.querySelectorAll('audio').length") > 0
            assert browser.evaluate("[...document.images].every(i => i.naturalWidth > 0)")
            assert browser.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
            narrowest = "Math.min(...[...document.querySelectorAll('td:first-child')].map(e => e.clientWidth))"
            assert browser.evaluate(narrowest) > 100  # words, not a column of letters
        assert [r for r in browser.requests if not r.startswith("data:")] == [file.as_uri()] * 2
        assert browser.problems == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_all_replies_can_be_browsed_and_filtered(sweep, tmp_path):
    add_data(sweep, tmp_path)
    (spoken := sweep / "01" / "evaluation" / "demo-test-ab12" / "speech").mkdir()
    (spoken / "a.wav").write_bytes(to_wav(np.zeros(1600, np.float32), 16000))
    change_rows(sweep, lambda run, row: row | ({"speech": "speech/a.wav"} if run == "01" and row["turn"] == 1 else {}))
    change_rows(sweep, lambda run, row: {**row, "reply": said(run, row)})
    file = sweep / "report" / "report.html"
    file.parent.mkdir()
    file.write_text(rendered(sweep))
    shown = "[...document.querySelectorAll('#all section')].map(e => e.innerText)"
    with Browser(tmp_path / "profile") as browser:
        browser.open(file.as_uri(), 1280)
        first = browser.evaluate(shown)
        assert len(first) == 10
        assert browser.evaluate("form.elements.where.value") == "1 to 10 of 24"
        assert f"{HOSTILE} 0" in first[0]  # the turn before, as text
        browser.click("button[name=on]")
        browser.click("button[name=on]")
        last = browser.evaluate(shown)
        assert len(last) == 4
        assert browser.evaluate("form.elements.on.disabled")
        assert not set(first) & set(last)
        browser.click("input[name=differs]")
        assert browser.evaluate("form.elements.where.value") == "1 to 10 of 12"
        browser.type("input[name=words]", "DIA11 turn")
        assert [text.split("\n")[0] for text in browser.evaluate(shown)] == [
            "demo/test/dia11, turn 2; planted here: audio"
        ]
        browser.type("input[name=words]", "nobody says this")
        assert browser.evaluate("form.elements.where.value") == "none fits"
        browser.click("input[name=differs]")
        browser.type("input[name=words]", "dia3")
        requests = len(browser.requests)
        browser.click("#all .replies button")  # the reply's; that before is the turn's
        browser.wait("document.querySelector('#all audio').duration > 0")
        assert len(browser.requests) == requests + 1
        assert browser.requests[-1] == (spoken / "a.wav").as_uri()
        assert browser.problems == []


def said(run, row):
    return {"text": f"{HOSTILE} {run[0] if row['turn'] == 2 else ''}", "description": "a woman speaks"}


def change_rows(sweep, change):
    for path in sweep.glob("*/evaluation/demo-test-ab12/predictions.jsonl"):
        rows = [change(path.parents[2].name, json.loads(line)) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_trace(folder, lost_at):
    def effect(mean):
        return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "p_value": 0.01}

    names = ("encoder", "connector", "slots 0", "slots 1", "slots 2", "reply 1", "reply 2")
    stations = [{"station": name, **effect(0.5), "permuted": 0.01} for name in names]
    label = {"entropy": 1.0, "examples": 100, "unseen": "speakers", "stations": stations, "used": effect(0.0)}
    label |= {"lost_at": lost_at, "verdict": f"audio, {HOSTILE}: the {lost_at} lost it"}
    unknown = {**label, "stations": [], "lost_at": "unknown", "verdict": "audio, few: cannot tell"}
    trace = {"streams": {"audio": {"labels": {HOSTILE: label, "few": unknown}}}}
    (folder / "trace.json").write_text(json.dumps(trace))


def test_the_page_says_where_each_label_is_lost(sweep):
    assert "Where is it lost" not in rendered(sweep)
    for seed, lost_at in ((1, "connector"), (2, "connector"), (3, "llm")):
        write_trace(sweep / f"1{seed}" / "evaluation" / "demo-test-ab12", lost_at)
    page = rendered(sweep)
    assert HOSTILE not in page
    assert "Where is it lost" in page
    for seed, lost_at in ((1, "connector"), (2, "connector"), (3, "llm")):
        assert re.search(rf"seed {seed}: audio, [^:]+: the {lost_at} lost it", page)
    assert "audio, few: cannot tell (seed 1; 2 more at the same place)" in page
    (sweep / "11" / "evaluation" / "demo-test-ab12" / "trace.json").write_text("{}")
    with pytest.raises(MsencError, match=r"trace\.json"):
        rendered(sweep)
