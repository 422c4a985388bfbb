import json
import os
from pathlib import Path

import pytest

from msenc.raw.timestamps import DialogueSpan, read_timestamps
from msenc.types import MsencError

SHARED = Path(os.environ.get("MSENC_SHARED", ""))
needs_shared = pytest.mark.skipif("MSENC_SHARED" not in os.environ, reason="needs MSENC_SHARED, with MSenC's files")


def _read(tmp_path, content):
    path = tmp_path / "timestamp.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return read_timestamps(path)


@needs_shared
def test_reads_every_dialogue_of_msenc():
    found = read_timestamps(SHARED / "data/msenc/timestamp.json")

    assert len(found.spans) == 1120
    assert len({span.video for span in found.spans}) == 71
    assert round(found.hours, 2) == 23.68
    assert [(r.id.split(",")[0][-6:], r.reason) for r in found.rejections] == [
        ("27.mp4", "span inverted"),
        ("48.mp4", "span inverted"),
        ("54.mp4", "span inverted"),
    ]
    assert [line.split(",")[0][-6:] for line in found.overlaps] == ["34.mp4"]


def test_spans_keep_the_order_of_the_file(tmp_path):
    found = _read(tmp_path, {"b.mp4": [[0, 1.5], [2, 3]], "a.mp4": [[4, 5]]})

    assert found.spans == [DialogueSpan("b.mp4", 0, 1.5), DialogueSpan("b.mp4", 2, 3), DialogueSpan("a.mp4", 4, 5)]
    assert (found.rejections, found.overlaps) == ([], [])


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ([3.0, 2.0], "span inverted"),
        ([2.0, 2.0], "span inverted"),
        ([-1.0, 2.0], "span time negative"),
        (["1.0", "2.0"], "span time is no number"),
        ([None, 2.0], "span time is no number"),
        ([True, 2.0], "span time is no number"),
        ([0, float("nan")], "span time is no number"),
        ([0, float("inf")], "span time is no number"),
        ([1.0], "span is no pair of times"),
        ([1, 2, 3], "span is no pair of times"),
        ("1-2", "span is no pair of times"),
        ({"start": 1}, "span is no pair of times"),
    ],
)
def test_a_bad_span_is_listed_and_the_others_are_used(tmp_path, entry, reason):
    found = _read(tmp_path, {"a.mp4": [[0, 1], entry, [5, 6]]})

    assert [span.start_s for span in found.spans] == [0, 5]
    assert [(r.id, r.reason) for r in found.rejections] == [("a.mp4, span 1", reason)]
    assert found.rejections[0].found


@pytest.mark.parametrize("name", ["../a.mp4", "/etc/a.mp4", "", "x/../../a.mp4"])
def test_a_name_that_leads_elsewhere_is_listed(tmp_path, name):
    found = _read(tmp_path, {name: [[0, 1]], "a.mp4": [[0, 1]]})

    assert [span.video for span in found.spans] == ["a.mp4"]
    assert [r.reason for r in found.rejections] == ["video name leads out of the folder"]


def test_a_video_without_a_list_is_listed(tmp_path):
    found = _read(tmp_path, {"b.mp4": 3, "a.mp4": [[0, 1]]})

    assert [(r.id, r.reason, r.found) for r in found.rejections] == [("b.mp4", "not a list of spans", "3")]


def test_spans_that_overlap_are_used_and_told(tmp_path):
    found = _read(tmp_path, {"a.mp4": [[0, 10], [2, 3], [9, 12], [12, 13]]})

    assert len(found.spans) == 4
    assert [line.split(":")[0] for line in found.overlaps] == ["a.mp4, span 1", "a.mp4, span 2"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[[0, 1]]", "found"),
        ("{", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ('{"a.mp4": [[0, 1]], "a.mp4": [[2, 3]]}', "names 'a.mp4' twice"),
        ("{}", "no usable span"),
        ('{"a.mp4": [[1, 0]]}', "no usable span"),
    ],
)
def test_another_file_is_refused(tmp_path, content, expected):
    with pytest.raises(MsencError, match=expected):
        _read(tmp_path, content)


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "timestamp.json").write_bytes(b'{"caf\xe9.mp4": [[0, 1]]}')
    with pytest.raises(MsencError, match="not readable as JSON"):
        read_timestamps(tmp_path / "timestamp.json")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(MsencError, match="no such file"):
        read_timestamps(tmp_path / "timestamp.json")
