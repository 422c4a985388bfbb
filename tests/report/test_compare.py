import json

import pytest
from sweeps import write_run, write_sweep

from msenc.report.collect import collect_runs
from msenc.report.compare import configure, pairs_to_compare
from msenc.report.table import summarise
from msenc.types import MsencError


def only(table, metric):
    (found,) = [c for c in table.comparisons if c.metric == metric]
    return found


def names(runs_dir, keys):
    runs = collect_runs(runs_dir)
    chosen = {run.name: run.evaluations[0] for run in runs}
    return [(key, a.name, b.name) for key, a, b in pairs_to_compare(configure(runs, chosen, keys))]


def test_planted_bits_are_recovered_with_their_interval(tmp_path):
    table = summarise(collect_runs(write_sweep(tmp_path)))
    text, text_audio = table.configurations
    assert text.scores["planted/audio/recovered %"].mean == pytest.approx(0.0, abs=1e-6)
    assert text_audio.scores["planted/audio/recovered %"].mean == pytest.approx(90.0)
    found = only(table, "planted/audio/recovered %")
    assert found.effect.mean == pytest.approx(90.0)
    assert found.mark == "better"


def test_a_difference_of_the_loss_is_that_of_the_metrics_and_covers_the_truth(tmp_path):
    table = summarise(collect_runs(write_sweep(tmp_path)))
    found = only(table, "nll")
    text, text_audio = table.configurations
    assert found.effect.mean == pytest.approx(text_audio.scores["nll"].mean - text.scores["nll"].mean)
    assert text.scores["nll"].mean == pytest.approx(sum(e.metrics["nll"] for e in text.evaluations) / 3)
    assert found.effect.low < -0.9 * 0.6931 / 4 < found.effect.high  # one token in four is planted
    assert found.mark == "better"  # less loss


def test_noise_is_no_effect(tmp_path):
    for number, modality in enumerate(("text", "text_audio")):
        for seed in (1, 2, 3):
            write_run(tmp_path / f"{number}{seed}", [f"modality={modality}"], 10 * number + seed, 0.0)
    table = summarise(collect_runs(tmp_path))
    assert {c.mark for c in table.comparisons if c.metric in ("nll", "rouge_l")} == {"not shown"}


def test_scores_without_items_are_shown_but_not_tested(tmp_path):
    table = summarise(collect_runs(write_sweep(tmp_path)))
    assert only(table, "bleu_1").mark == "not tested"
    assert table.configurations[0].over_seeds == {"bleu_1"}
    assert "perplexity" not in {c.metric for c in table.comparisons}


def test_each_modality_is_compared_with_what_lacks_one_stream(tmp_path):
    modalities = ["text", "text_audio", "text_video", "text_audio_video"]
    write_sweep(tmp_path, [(m, 0.0) for m in modalities], seeds=(1,))
    assert names(tmp_path, ["modality"]) == [
        ("modality", "text_audio", "text"),
        ("modality", "text_video", "text"),
        ("modality", "text_audio_video", "text_audio"),
        ("modality", "text_audio_video", "text_video"),
    ]


def test_other_keys_are_compared_with_their_default_where_all_else_is_equal(tmp_path):
    rows = [["modality=text", "lr=1"], ["modality=text"], ["modality=text_audio", "lr=1"], ["modality=text_audio"]]
    for number, overrides in enumerate(rows):
        write_run(tmp_path / str(number), overrides, 1, 0.0)
    assert names(tmp_path, ["modality", "lr"]) == [
        ("modality", "text_audio, 1", "text, 1"),
        ("modality", "text_audio, lr=(default)", "text, lr=(default)"),
        ("lr", "text, 1", "text, lr=(default)"),
        ("lr", "text_audio, 1", "text_audio, lr=(default)"),
    ]


def test_holm_is_over_the_comparisons_of_a_metric(tmp_path):
    write_sweep(tmp_path, [("text", 0.0), ("text_audio", 0.9), ("text_video", 0.1)])
    found = [c for c in summarise(collect_runs(tmp_path)).comparisons if c.metric == "nll"]
    assert len(found) == 2
    least = min(found, key=lambda c: c.effect.p_value)
    assert least.adjusted == pytest.approx(2 * least.effect.p_value)


def test_runs_scored_on_other_items_are_refused(tmp_path):
    write_run(tmp_path / "0", ["modality=text"], 1, 0.0)
    write_run(tmp_path / "1", ["modality=text_audio"], 1, 0.0, dialogues=11)
    with pytest.raises(MsencError, match=r"0 and 1 were not scored on the same items: 24 and 22 .*dia11 turn 1"):
        summarise(collect_runs(tmp_path))


def test_other_tokenizers_are_not_compared_by_the_loss_per_token(tmp_path):
    write_sweep(tmp_path, seeds=(1,))
    path = tmp_path / "11" / "evaluation" / "demo-test-ab12" / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row |= {key: [*row[key], row[key][0]] for key in ("nll", "kinds", "correct")}
    path.write_text("\n".join(map(json.dumps, rows)))
    table = summarise(collect_runs(tmp_path))
    assert "nll" not in {c.metric for c in table.comparisons}
    assert any("tokenizers split the same words" in note for note in table.notes)


def test_controls_are_judged_over_all_seeds_and_stand_in_no_row(tmp_path):
    write_sweep(tmp_path)
    for seed in (1, 2, 3):
        write_run(tmp_path / f"1{seed}", [], seed, 0.0, control="shuffle_audio")
    table = summarise(collect_runs(tmp_path))
    (verdict,) = table.verdicts
    assert (verdict.configuration, verdict.control, verdict.verdict) == ("text_audio", "shuffle_audio", "used")
    assert verdict.effect.low < 0.9 * 0.6931 / 4 < verdict.effect.high
    assert verdict.per_run == {1: "used", 2: "used", 3: "used"}
    assert len(table.configurations) == 2


def test_a_single_seed_is_said_to_say_nothing_of_others(tmp_path):
    notes = summarise(collect_runs(write_sweep(tmp_path, seeds=(1,)))).notes
    assert any(note.startswith("One seed each") for note in notes)
