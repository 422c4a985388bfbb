"""`prepare.py`, killed again and again: what it leaves in the end is what an unbroken run leaves, to the byte."""

import csv
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from conftest import run_driver

from msenc.raw.annotations import MELD_FILES

KEEP = {"train": 5, "val": 1, "test": 1}
MAX_ITEM = {"audio": 8, "video": 8, "voice": 3}  # turns: an item of less than 3, and then a dialogue of 6


@pytest.fixture
def root(demo_home, tmp_path) -> Path:
    """The demo's first dialogues, with their clips."""
    source, root = demo_home / "data" / "demo-raw", tmp_path / "raw"
    for split, (name, clips) in MELD_FILES.items():
        with (source / name).open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["Dialogue_ID"]) < KEEP[split]]
        (root / clips).mkdir(parents=True)
        with (root / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        for row in rows:
            clip = f"dia{row['Dialogue_ID']}_utt{row['Utterance_ID']}.mp4"
            shutil.copy2(source / clips / clip, root / clips / clip)
    return root


def prepare_killed(root: Path, home: Path, moments: dict[str, list[int | str]]) -> list[list[dict]]:
    """Start, be killed at each of a folder's moments, start again; see `preparation_driver`."""
    specs = []
    for name, of_folder in moments.items():
        arguments = ["data=meld", f"data.root={root}", f"data.dir={home / name}", "prepare_workers=0", "describe=true"]
        specs.append(
            {"arguments": arguments, "folder": str(home / name), "log": str(home / "log"), "moments": of_folder}
        )
    results = run_driver(Path(__file__).parent / "preparation_driver.py", specs, home)
    for starts in results:
        assert starts[-1]["status"] == 0, starts[-1]["said"]
    return results


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_kills_change_no_byte_and_lose_the_item_in_hand_alone(root, tmp_path):
    rng = random.Random(1)
    steps = iter([rng.randint(18, 36) for _ in range(2)] + [rng.randint(29, 34) for _ in range(3)])  # of about 170
    moments = [
        next(steps),
        "os.rename voice-cache.jsonl",
        next(steps),
        # Right before shards and tables appear, or items go: what is half done must not stay, nor count as done.
        "os.rename audio-logmel",
        "os.rename audio-logmel/rejected.csv",
        *steps,
        "os.rename video-pixels/rejected.csv",
        "os.rmdir .video-pixels.items",
        "os.rename dataset.json",
    ]
    (unbroken,), starts = prepare_killed(root, tmp_path, {"whole": [], "killed": moments})
    assert [start["is_killed"] for start in starts] == [True] * len(moments) + [False]
    assert sum(len(start["work"]) > 0 for start in starts) >= 5
    assert not any(Path(name).name.startswith(".") for name in contents(tmp_path / "whole"))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")

    assert set(unbroken["work"]) == {clip for start in starts for clip in start["work"]}
    for number, start in enumerate(starts):
        later = {clip for other in starts[number + 1 :] for clip in other["work"]}
        again = Counter(clip.split()[0] for clip in set(start["work"]) & later)
        assert all(count <= MAX_ITEM[kind] for kind, count in again.items()), again
        assert len(again) <= 1
        assert len(set(start["work"])) == len(start["work"])
