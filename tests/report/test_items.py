import json

import pytest
from sweeps import write_run

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


def test_items_without_a_score_weigh_nothing(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["scores"]["rouge_l"] = None
    path.write_text("\n".join(map(json.dumps, rows)))
    assert sorted(read_items(path).weights["rouge_l"])[:2] == [0.0, 1.0]


def test_empty_predictions_are_refused(path):
    path.write_text("\n")
    with pytest.raises(MsencError, match=r"predictions\.jsonl: holds no prediction, expected one line per target"):
        read_items(path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda row: "{", r"line 2: is not JSON"),
        (lambda row: "[]", r"line 2: holds a list, expected an object"),
        (lambda row: row | {"nll": None}, r"line 2: found nll=None, expected nll as a list"),
        (lambda row: {k: v for k, v in row.items() if k != "turn"}, r"line 2: found no turn, expected turn as a int"),
        (lambda row: row | {"kinds": []}, r"line 2: found 4 nll, 0 kinds, 4 correct"),
        (lambda row: row | {"nll": [1, 2, 3, float("nan")]}, r"line 2: a token's loss is no finite number"),
        (lambda row: row | {"turn": 1}, r"turn 1 of demo/test/dia0 stands there twice"),
    ],
)
def test_malformed_rows_are_refused_by_line(path, change, expected):
    lines = path.read_text().splitlines()
    changed = change(json.loads(lines[1]))
    lines[1] = changed if isinstance(changed, str) else json.dumps(changed)
    path.write_text("\n".join(lines))
    with pytest.raises(MsencError, match=expected):
        read_items(path)
