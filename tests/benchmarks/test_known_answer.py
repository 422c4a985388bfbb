"""The verdicts on runs whose knowledge of a world is known."""

import json
import math
import shutil

import known_answer
import numpy as np
import pytest

from msenc.demo.frame import CSV_NAMES, draw_split, write_table
from msenc.demo.ideal import ideal_loss
from msenc.demo.table import find_world
from msenc.evaluation.losses import write_evaluation
from msenc.report.collect import collect_runs
from msenc.types import MsencError

DIALOGUES = 120


def write_run(folder, name, modality, seed=1, known=1.0, listens=None, unsure=0.0):
    """A finished run and its world's table.

    Args:
        folder: of the run; the table goes to ``data`` beside it.
        name: of the world.
        modality: of the run.
        seed: of the run.
        known: weight of the ideal listener's loss; the rest is that of one who reads the text alone.
        listens: streams of the ideal listener; None: those of the modality.
        unsure: added to each loss, with a bit of chance.
    """
    world, rng = find_world(name), np.random.default_rng(seed)
    drawn = draw_split(world, "test", DIALOGUES, seed=1)
    root = folder.parent / "data" / f"{name}-raw"
    root.mkdir(parents=True, exist_ok=True)
    write_table(world, root / CSV_NAMES["test"], drawn, [[12] * len(one.turns) for one in drawn])
    rows = []
    for one in drawn:
        for turn, utterance in enumerate(one.dialogue.utterances[1:], start=1):
            cues = known_answer.read_cues(
                world, dict(zip(world.columns, world.hidden(one.turns[turn - 1]), strict=True))
            )
            nll, kinds, bits = [0.5], ["reply"], {}
            for mark in utterance.marks:
                streams = known_answer.streams_of(modality) if listens is None else listens
                seen, blind = (ideal_loss(world.belief, mark.kind, s, *cues) for s in (streams, ()))
                nll += [known * seen + (1 - known) * blind + unsure * rng.uniform(0.9, 1.1), 0.0]
                kinds += 2 * [f"planted_{mark.kind}"]
                bits[f"planted_{mark.kind}"] = mark.bits
            common = {"dialogue": one.dialogue.id, "turn": turn, "utterance": str(turn), "speaker": ""}
            rows.append({**common, "nll": nll, "kinds": kinds, "correct": [1] * len(nll), "bits": bits})
    write_evaluation(folder / "evaluation" / f"{name}-test-ab", {"split": "test", "data": name, "settings": ""}, rows)
    control = {"split": "test", "data": name, "settings": "", "control": "shuffle"}
    write_evaluation(folder / "evaluation" / f"{name}-test-cd", control, [])
    facts = {"status": "finished", "task_hash": "t", "seed": seed, "overrides": [], "data": name}
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / ".hydra").mkdir()
    generate = f"{{world: {name}}}" if name != "demo" else "{sizes: {}}"
    (folder / ".hydra" / "config.yaml").write_text(
        f"modality: {modality}\npaths: {{data_dir: elsewhere}}\n"
        f"data: {{name: {name}, root: '${{paths.data_dir}}/{name}-raw', generate: {generate}}}\n"
    )


def cells_of(folder):
    scored = [known_answer.score_run(run, "test", folder / "data") for run in collect_runs(folder)]
    return {(c.world, c.modality, c.kind, c.level): c for c in known_answer.judge(scored)}


@pytest.mark.parametrize("name", ["demo", "beats", "graded"])
def test_an_ideal_listener_passes_everywhere(name, tmp_path):
    for modality in ("text", "text_audio", "text_video", "text_audio_video"):
        write_run(tmp_path / modality, name, modality)
    cells = cells_of(tmp_path)
    assert len(cells) == 16 + (20 if name == "graded" else 0)
    for cell in cells.values():
        assert cell.passes
        assert cell.mean == pytest.approx(cell.ideal, abs=1e-6)
    assert cells[name, "text_audio_video", "text", None].ideal == 1
    if name != "graded":
        cell = cells[name, "text_audio", "audio", None]
        assert (cell.ideal, cell.expected) == (1, pytest.approx(1))
    else:
        assert 0.2 < cells[name, "text_audio", "audio", None].ideal < 0.5
        assert abs(cells[name, "text", "video", None].ideal) < 0.1
        assert cells[name, "text_audio", "audio", 4.0].ideal > cells[name, "text_audio", "audio", 1.0].ideal


def test_mean_and_spread_are_those_of_the_runs(tmp_path):
    for seed, known in ((1, 1.0), (2, 0.9)):
        write_run(tmp_path / str(seed), "beats", "text_audio", seed, known)
    cell = cells_of(tmp_path)["beats", "text_audio", "audio", None]
    assert (cell.runs, cell.mean) == (2, pytest.approx(0.95, abs=1e-4))
    assert cell.spread == pytest.approx(0.1 / math.sqrt(2), abs=1e-4)


def test_a_run_that_knows_nine_tenths_of_its_own_bits_fails_and_a_leak_does(tmp_path):
    write_run(tmp_path / "a", "beats", "text_audio", known=0.9)
    cells = cells_of(tmp_path)
    assert not cells["beats", "text_audio", "audio", None].passes
    assert cells["beats", "text_audio", "video", None].passes
    assert cells["beats", "text_audio", "both", None].passes  # not its own: less than the ideal is no fault
    write_run(tmp_path / "b", "beats", "text_video", known=0.1, listens=("audio", "video"))
    cells = cells_of(tmp_path)
    assert cells["beats", "text_video", "audio", None].mean == pytest.approx(0.1, abs=1e-6)
    assert not cells["beats", "text_video", "audio", None].passes
    write_run(tmp_path / "c", "graded", "text_video", listens=("audio", "video"))
    assert not cells_of(tmp_path)["graded", "text_video", "video", None].passes  # better than ideal, by the sound


def test_of_a_graded_run_each_level_is_judged(tmp_path):
    write_run(tmp_path / "a", "graded", "text_audio", known=0.5)
    cells = cells_of(tmp_path)
    assert {key[3] for key in cells if key[2] == "audio"} == {None, 0.0, 1.0, 2.0, 3.0, 4.0}
    assert {key[3] for key in cells if key[2] != "audio"} == {None}
    assert not cells["graded", "text_audio", "audio", 4.0].passes
    near = [cells["graded", "text_audio", "audio", level] for level in (0.0, 1.0)]
    assert all(cell.passes == (abs(cell.mean - cell.ideal) <= 0.1) for cell in near)
    assert any(cell.passes for cell in near)


def test_the_script_prints_and_writes_the_cells(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a", "graded", "text_audio")
    arguments = [str(tmp_path), "--data", str(tmp_path / "data"), "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr("sys.argv", ["known_answer.py", *arguments])
    known_answer.main()
    out = capsys.readouterr().out
    assert "Planted bits by level" in out
    assert "FAIL" not in out
    cells = json.loads((tmp_path / "out.json").read_text())["cells"]
    assert len(cells) == 9


def test_evaluations_on_other_data_are_judged_by_its_truth_alone(tmp_path):
    write_run(tmp_path / "a", "graded", "text_audio")
    (own,) = (tmp_path / "a" / "evaluation").glob("*-ab")
    shutil.copytree(own, tmp_path / "a" / "evaluation" / "graded-test-ef")
    metrics = tmp_path / "a" / "evaluation" / "graded-test-ef" / "metrics.json"
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"settings": "on_data=graded-12"}))
    (run,) = collect_runs(tmp_path / "a")
    assert len(known_answer.score_run(run, "test", tmp_path / "data").items) > DIALOGUES
    metrics.with_name("predictions.jsonl").unlink()
    known_answer.score_run(run, "test", tmp_path / "data")  # never the other's
    shutil.copy(own / "predictions.jsonl", metrics.parent)
    other = tmp_path / "other-raw"
    other.mkdir()
    with pytest.raises(MsencError, match=r"other-raw/test_sent_emo\.csv: missing"):
        known_answer.score_run(run, "test", None, tmp_path / "other")
    table = (tmp_path / "data" / "graded-raw" / "test_sent_emo.csv").read_text().splitlines(keepends=True)
    (other / "test_sent_emo.csv").write_text("".join(table[:3]))
    with pytest.raises(MsencError, match=r"dia\d+, turn \d+: not in the hidden truth"):
        known_answer.score_run(run, "test", None, tmp_path / "other")
    (other / "test_sent_emo.csv").write_text("".join(table))
    assert known_answer.judge([known_answer.score_run(run, "test", None, tmp_path / "other")])


def test_what_cannot_be_judged_is_refused(tmp_path):
    write_run(tmp_path / "a", "beats", "text")
    (run,) = collect_runs(tmp_path / "a")
    with pytest.raises(MsencError, match=r"no evaluation of val on its own data\. First: python evaluate\.py"):
        known_answer.score_run(run, "val", tmp_path / "data")
    with pytest.raises(MsencError, match=r"test_sent_emo\.csv: missing; expected the hidden truth of beats"):
        known_answer.score_run(run, "test", tmp_path)
    config = tmp_path / "a" / ".hydra" / "config.yaml"
    config.write_text("modality: text\npaths: {data_dir: x}\ndata: {name: meld, generate: null}\n")
    with pytest.raises(MsencError, match="trained on meld, which is no generated world"):
        known_answer.score_run(run, "test", tmp_path / "data")
