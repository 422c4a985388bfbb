import json

import measure


def test_rounds_are_interleaved_and_their_order_turns():
    calls = []
    seconds = measure.interleave({name: lambda name=name: calls.append(name) for name in "abc"}, repetitions=3)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratios_are_those_of_the_medians(tmp_path):
    results = measure.summarise({"ours": [2.0, 1.0, 9.0], "theirs": [5.0, 4.0, 8.0]}, base="ours")
    assert results["ratios"] == {"theirs": 2.5}
    assert results["seconds"]["ours"] == {"median": 2.0, "min": 1.0, "max": 9.0, "all": [2.0, 1.0, 9.0]}
    assert measure.time_rows(results, "ours") == [["ours", 2.0, 1.0, 9.0, "1"], ["theirs", 5.0, 4.0, 8.0, 2.5]]
    measure.write_json(tmp_path / "x.json", results)
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["ratios"] == {"theirs": 2.5}
    assert written["commit"] == measure.commit()
    assert "torch" in written["machine"]
