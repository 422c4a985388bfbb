"""The examples of docs/architecture.md run, and it names no module or function that is not there."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from msenc.config.targets import buildable, locate_target
from msenc.evaluation.metrics.scores import mean_scores
from msenc.evaluation.metrics.text import TEXT_METRICS, build_text_metrics
from msenc.models.connector import Connector, EmbeddingScale
from msenc.models.llm import load_llm
from msenc.raw.annotations import row_of
from msenc.raw.layouts.layout import files_of, lines_of, read_layout
from msenc.speech.synthesis import SentenceSynthesizer

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
KNOWN = {
    **{"np": np, "torch": torch, "nn": nn, "Connector": Connector, "EmbeddingScale": EmbeddingScale},
    **{"load_llm": load_llm, "mean_scores": mean_scores, "build_text_metrics": build_text_metrics},
    **{"buildable": buildable, "SentenceSynthesizer": SentenceSynthesizer, "row_of": row_of},
    **{"files_of": files_of, "lines_of": lines_of, "read_layout": read_layout},
}


def test_there_is_an_example_of_each_kind():
    assert len(EXAMPLES) == PAGE.count("\n**A") == 6


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda code: code.split("\n")[0])
def test_an_example_runs(example, tiny_models, tmp_path, monkeypatch):
    metrics = dict(TEXT_METRICS)
    monkeypatch.setattr("msenc.evaluation.metrics.text.TEXT_METRICS", metrics)
    monkeypatch.setattr("msenc.config.targets._registered", {})
    names = {**KNOWN, "FOLDER": str(tiny_models["llama"]), "TMP": tmp_path, "TEXT_METRICS": metrics}
    exec(example, names)
    for place, name in re.findall(r'@buildable\("(.+)"\)\nclass (\w+)', example):
        assert locate_target(f"{names[name].__module__}.{name}", place) is names[name]


def test_every_example_of_a_class_enters_the_table():
    assert PAGE.count("\n@buildable(") == sum(example.count("class ") for example in EXAMPLES) == 4


def test_what_the_way_of_an_utterance_names_is_there():
    rows = re.findall(r"^\| [^|]+ \| (`[^|]+) \| [^|]+ \|$", PAGE, re.MULTILINE)
    assert len(rows) == 15
    for file, names in (re.search(r"`([\w/]+\.py)(?:: (\w+))?", row).groups() for row in rows):
        text = (ROOT / "msenc" / file).read_text(encoding="utf-8")
        assert names is None or re.search(rf"^(?:def|class) {names}\b", text, re.MULTILINE), file


def test_the_tree_names_every_folder():
    (tree,) = re.findall(r"^msenc/\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
    folders = {path.parent.name for path in (ROOT / "msenc").glob("*/__init__.py")}
    assert set(re.findall(r"(\w+)/(?: |$)", tree)) - {"metrics"} == folders


def test_no_folder_is_too_long_to_be_read():
    modules = Counter(path.parent for path in (ROOT / "msenc").rglob("*.py") if path.name != "__init__.py")
    assert {str(folder): count for folder, count in modules.items() if count > 14} == {}
