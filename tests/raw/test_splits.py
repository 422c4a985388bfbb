import json
import os
from collections import Counter
from pathlib import Path

import pytest

from msenc.raw.splits import split_dialogues
from msenc.raw.timestamps import read_timestamps
from msenc.types import MsencError

SHARED = Path(os.environ.get("MSENC_SHARED", ""))
needs_shared = pytest.mark.skipif("MSENC_SHARED" not in os.environ, reason="needs MSENC_SHARED, with MSenC's files")
FRACTIONS = {"train": 0.8, "val": 0.1, "test": 0.1}


@pytest.fixture
def msenc_videos():
    return [span.video for span in read_timestamps(SHARED / "data/msenc/timestamp.json").spans]


@needs_shared
def test_official_splits_are_those_of_msenc(msenc_videos):
    splits = split_dialogues("official", msenc_videos, FRACTIONS, seed=1)

    for split, file in {"train": "train", "val": "valid", "test": "test"}.items():
        published = json.loads((SHARED / f"data/msenc/{file}_dictionary.json").read_text())
        ours = [number for number, s in enumerate(splits) if s == split]
        assert {str(number): place for place, number in enumerate(ours)} == published


@needs_shared
def test_by_video_of_msenc_comes_near_the_wanted_shares(msenc_videos):
    splits = split_dialogues("by_video", msenc_videos, FRACTIONS, seed=1)

    assert len({(v, s) for v, s in zip(msenc_videos, splits, strict=True)}) == len(set(msenc_videos))
    counts = Counter(splits)
    assert all(abs(counts[split] / 1120 - share) < 0.03 for split, share in FRACTIONS.items())


def test_by_video_never_parts_a_video():
    videos = [f"{number % 7}.mp4" for number in range(100)]
    for seed in range(20):
        splits = split_dialogues("by_video", videos, FRACTIONS, seed)
        assert len(set(zip(videos, splits, strict=True))) == 7
        assert set(splits) == {"train", "val", "test"}


def test_random_has_the_wanted_shares_and_hangs_on_the_seed():
    videos = ["a.mp4"] * 1000
    splits = split_dialogues("random", videos, FRACTIONS, seed=1)

    assert Counter(splits) == {"train": 800, "val": 100, "test": 100}
    assert split_dialogues("random", videos, FRACTIONS, seed=1) == splits
    assert split_dialogues("random", videos, FRACTIONS, seed=2) != splits


def test_few_dialogues_still_fill_every_split():
    assert set(split_dialogues("random", ["a.mp4"] * 3, FRACTIONS, seed=1)) == {"train", "val", "test"}


def test_a_share_of_zero_leaves_a_split_empty():
    splits = split_dialogues("random", ["a.mp4"] * 10, {"train": 0.5, "test": 0.5}, seed=1)
    assert Counter(splits) == {"train": 5, "test": 5}


@pytest.mark.parametrize(
    ("rule", "videos", "fractions", "expected"),
    [
        ("by_film", ["a"] * 9, FRACTIONS, "no such rule. Expected one of official, by_video, random"),
        ("by_video", ["a"] * 9, FRACTIONS, "found 1 videos; expected at least one for each"),
        ("random", ["a"] * 2, FRACTIONS, "found 2 dialogues"),
        ("random", ["a"] * 9, {"train": 0.8, "val": 0.1}, "sum to 1"),
        ("random", ["a"] * 9, {"train": 1.2, "val": -0.2}, "sum to 1"),
        ("random", ["a"] * 9, {"train": 0.9, "valid": 0.1}, "sum to 1"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused(rule, videos, fractions, expected):
    with pytest.raises(MsencError, match=expected):
        split_dialogues(rule, videos, fractions, seed=1)


def test_every_split_gets_its_share_of_the_dialogues_that_have_a_target():
    has_target = [number % 10 == 0 for number in range(300)]
    for seed in range(5):
        splits = split_dialogues("random", ["a.mp4"] * 300, FRACTIONS, seed, has_target)
        counts = Counter(split for split, has in zip(splits, has_target, strict=True) if has)
        assert counts == {"train": 24, "val": 3, "test": 3}
        assert Counter(splits) == {"train": 240, "val": 30, "test": 30}
    few = [True, True, False, False]
    assert set(split_dialogues("random", ["a.mp4"] * 4, FRACTIONS, 1, few)) == {"train", "val", "test"}
