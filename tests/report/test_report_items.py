import json

import numpy as np
import pytest
from sweeps import write_run
from torchmetrics.functional.text import bleu_score

from msenc.evaluation.losses import read_predictions, write_evaluation
from msenc.evaluation.metrics.ngrams import bleu
from msenc.evaluation.statistics import paired_effect
from msenc.report.items import read_items
from msenc.types import MsencError


@pytest.fixture
def path(tmp_path):
    return write_run(tmp_path / "run", [], 1, 0.25) / "evaluation" / "demo-test-ab12" / "predictions.jsonl"


def test_weighted_means_of_items_are_the_metrics(path):
    items = read_items(path)
    metrics = json.loads((path.parent / "metrics.json").read_text())

    def mean(name):
        return (items.values[name] * items.weights[name]).sum() / items.weights[name].sum()

    assert mean("nll") == pytest.approx(metrics["nll"])
    assert mean("rouge_l") == pytest.approx(metrics["rouge_l"])
    assert mean("planted/audio/recovered %") == pytest.approx(100 * metrics["planted/audio/recovered"])


def test_bleu_of_items_is_that_of_all_replies_and_spreads_as_dialogues_do(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    texts = ["I hear you are calm today.", "I hear you now.", "They hear that I am calm, today."]
    for number, row in enumerate(rows):
        row["reply"]["text"], row["reference"]["text"] = texts[number % 3], texts[number // 5 % 3]
    path.write_text("\n".join(map(json.dumps, rows)))
    items = read_items(path)
    expected = bleu([row["reply"]["text"] for row in rows], [row["reference"]["text"] for row in rows]).corpus
    for name, value in expected.items():
        assert np.average(items.values[name], weights=items.weights[name]) == pytest.approx(value, abs=1e-6)
    # The bootstrap over dialogues, done in full.
    dialogues = [rows[i : i + 2] for i in range(0, len(rows), 2)]
    rng = np.random.default_rng(0)
    drawn = [[row for d in rng.integers(0, 12, 12) for row in dialogues[d]] for _ in range(200)]
    pairs = [([r["reply"]["text"] for r in rs], [[r["reference"]["text"]] for r in rs]) for rs in drawn]
    spread = np.std([bleu_score(*pair, n_gram=1).item() for pair in pairs])
    effect = paired_effect(items.values["bleu_1"], items.dialogues, items.weights["bleu_1"])
    assert (effect.high - effect.low) / 2 / 2.2 == pytest.approx(spread, rel=0.25)


def test_items_without_a_score_weigh_nothing(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["scores"]["rouge_l"] = None
    path.write_text("\n".join(map(json.dumps, rows)))
    assert sorted(read_items(path).weights["rouge_l"])[:2] == [0.0, 1.0]


def test_an_end_of_line_among_the_words_ends_no_row(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["reply"]["text"] = rows[0]["reference"]["text"] = "Well,\u2028I\u0085see."
    write_evaluation(path.parent, json.loads((path.parent / "metrics.json").read_text()), rows)
    assert read_predictions(path.parent) == rows
    assert "Well,\u2028I\u0085see." in {row["reply"]["text"] for row in read_items(path).rows}


def test_empty_predictions_are_refused(path):
    path.write_text("\n")
    with pytest.raises(MsencError, match=r"predictions\.jsonl: has no predictions, expected one line per target"):
        read_items(path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda row: "{", r"line 2: cannot be read as JSON"),
        (lambda row: "[]", r"line 2: found a list of 0, expected an object"),
        (lambda row: row | {"nll": None}, r"line 2, nll: found None, expected a list"),
        (
            lambda row: {k: v for k, v in row.items() if k != "turn"},
            r"line 2: found no turn, expected it beside dialogue",
        ),
        (lambda row: row | {"kinds": []}, r"line 2: found 4 nll, 0 kinds, 4 correct"),
        (lambda row: row | {"nll": [1, 2, 3, float("nan")]}, r"line 2: .* \(NaN is no number"),
        (lambda row: row | {"nll": [1, 2, 3, None]}, r"turn 2 of demo/test/dia0: a token's loss is not finite"),
        (lambda row: row | {"speech": "/etc/hosts"}, r"line 2, speech: found '/etc/hosts', expected speech/NAME"),
        (lambda row: row | {"turn": 1}, r"turn 1 of demo/test/dia0 occurs twice"),
    ],
)
def test_malformed_rows_are_refused_by_line(path, change, expected):
    lines = path.read_text().splitlines()
    changed = change(json.loads(lines[1]))
    lines[1] = changed if isinstance(changed, str) else json.dumps(changed)
    path.write_text("\n".join(lines))
    with pytest.raises(MsencError, match=expected):
        read_items(path)
