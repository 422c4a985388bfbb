"""What a stranger might hand on: a run with its data and export, copied for a test that then spoils a file of it."""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from msenc.types import MsencError

ARCHIVE = Path(__file__).parents[1] / "old_run.tar.xz"
RUN = Path("runs/single/old")
DATA = Path("data/demo")
EVALUATION = RUN / "evaluation/demo-test-27a120fa3447"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """Read only: what `tests/test_old_run.py` describes."""
    folder = tmp_path_factory.mktemp("original")
    with tarfile.open(ARCHIVE) as file:
        file.extractall(folder, filter="data")
    return folder


@pytest.fixture
def place(original, tmp_path, monkeypatch) -> Path:
    """A copy in which the test works; beside it lies what nobody may touch, and nothing else may appear there."""
    place = tmp_path / "place"
    shutil.copytree(original, place)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious.txt").write_text("untouched")
    for name in ("MSENC_DATA", "MSENC_RUNS", "MSENC_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(place)
    yield place
    assert sorted(p.name for p in tmp_path.iterdir()) == ["outside", "place"]
    assert [p.name for p in (tmp_path / "outside").iterdir()] == ["precious.txt"]
    assert (tmp_path / "outside" / "precious.txt").read_text() == "untouched"


def refusal(act: Callable[[], Any]) -> str:
    """What is said where something is refused, in one or two lines; empty where it is not."""
    try:
        act()
    except MsencError as error:
        said = str(error)
    else:
        return ""
    assert 1 <= len(said.splitlines()) <= 2
    assert len(said) < 1500
    return said


def change_json(path: Path, *keys: str | int, value: Any = None, drop: bool = False) -> None:
    """Put a value at a place of a JSON file, or drop the key there."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    node = whole
    for key in keys[:-1]:
        node = node[key]
    if drop:
        del node[keys[-1]]
    else:
        node[keys[-1]] = value
    path.write_text(json.dumps(whole), encoding="utf-8")
