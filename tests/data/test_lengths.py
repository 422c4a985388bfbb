import json
import shutil
from itertools import pairwise

import numpy as np
import pytest

from msenc.data.collate import dialogue_rows
from msenc.data.lengths import row_tokens, split_lengths
from msenc.models.llm import load_tokenizer
from msenc.prompt import DialogueTokenizer, Prompt, Slot
from msenc.store.location import locate
from msenc.store.shards import ShardReader, stream_hash
from msenc.types import Dialogue

PROMPT = {"instruction": "A conversation.\n", "turn": "{speaker}:{audio} {text}\n", "response": "{speaker}:"}
STREAMS = {"audio": "audio-logmel", "video": "video-pixels"}


class CountingTokenizer(DialogueTokenizer):
    """Notes which dialogues it is asked for."""

    def __call__(self, dialogue, streams, words=None):
        self.__dict__.setdefault("seen", []).append(dialogue.id)
        return super().__call__(dialogue, streams, words)


@pytest.fixture
def prepared(demo_home, tmp_path):
    folder = shutil.copytree(demo_home / "data" / "demo", tmp_path / "demo")
    shutil.rmtree(folder / "lengths", ignore_errors=True)
    return folder


@pytest.fixture
def llm(demo_home):
    return demo_home / "data" / "tiny-llm"


def count(folder, llm, streams=("audio",), split="train", **prompt):
    """(lengths, number of dialogues that were tokenized)."""
    tokenizer = CountingTokenizer(Prompt(**{**PROMPT, **prompt}), load_tokenizer(str(llm)))
    turns = ShardReader(folder / "turns", split)
    readers = {stream: ShardReader(folder / STREAMS[stream], split) for stream in streams}
    found = split_lengths(folder, turns.ids, turns, readers, tokenizer)
    return found, len(tokenizer.__dict__.get("seen", []))


def test_lengths_are_those_of_the_tokens(prepared, llm):
    found, _ = count(prepared, llm)
    tokenizer = DialogueTokenizer(Prompt(**PROMPT), load_tokenizer(str(llm)))
    turns = ShardReader(prepared / "turns", "train")
    frames = ShardReader(prepared / "audio-logmel", "train")
    for i, id in enumerate(turns.ids):
        offsets = frames.read(id)["offsets.npy"]
        present = [["audio"] * int(b > a) for a, b in pairwise(offsets)]
        tokens = tokenizer(Dialogue.from_json(turns.read(id)["turns.json"]), present)
        assert found[i].instruction == len(tokens.instruction)
        assert found[i].slots == [[p.stream for p in block if isinstance(p, Slot)] for block in tokens.turns]
        assert found[i].targets == [len(target.ids) for target in tokens.targets]
        assert found[i].turn_tokens == list(tokens.turn_tokens)


@pytest.mark.parametrize("layout", ["dialogue", "sample"])
def test_rows_with_windows_are_as_long_as_was_counted(prepared, llm, layout):
    prompt = {"windows": {"audio": 150}}  # 3 s
    for _ in range(2):  # counted, and read again
        found, _ = count(prepared, llm, **prompt)
    assert {skips[0][0] for known in found for _, skips in known.windows if skips} == {"audio"}
    tokenizer = DialogueTokenizer(Prompt(**{**PROMPT, **prompt}), load_tokenizer(str(llm)))
    turns, frames = ShardReader(prepared / "turns", "train"), ShardReader(prepared / "audio-logmel", "train")
    for known, id in zip(found, turns.ids, strict=True):
        present = [{"audio": n} if n else {} for n in np.diff(frames.read(id)["offsets.npy"]).tolist()]
        tokens = tokenizer(Dialogue.from_json(turns.read(id)["turns.json"]), present)
        rows = dialogue_rows(tokens, 10**6, {"audio": 4}, layout)
        assert row_tokens(known, 10**6, {"audio": 4}, layout) == [len(row.ids) for row in rows]


def test_a_second_start_tokenizes_nothing(prepared, llm):
    first, tokenized = count(prepared, llm)
    assert tokenized == len(first) == 16
    again, tokenized = count(prepared, llm)
    assert tokenized == 0
    assert again == first
    assert [path.name.split("-")[0] for path in (prepared / "lengths").iterdir()] == ["train"]


def test_what_lengths_depend_on_makes_another_key(prepared, llm, tmp_path):
    other = shutil.copytree(llm, tmp_path / "llm")
    same = shutil.copytree(llm, tmp_path / "same")
    value = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    value["model"]["merges"] = value["model"]["merges"][:-50]
    (other / "tokenizer.json").write_text(json.dumps(value), encoding="utf-8")
    count(prepared, llm)
    assert count(prepared, same)[1] == 0  # the content counts, not where it lies
    variants = [
        {"llm": other},
        {"streams": ()},
        {"streams": ("audio", "video")},
        {"split": "val"},
        {"response": "And {speaker}:"},
        {"target": "text"},
    ]
    for variant in variants:
        assert count(prepared, **{"llm": llm, **variant})[1] > 0, variant
    assert len(list((prepared / "lengths").iterdir())) == 1 + len(variants)
    for stream in ("turns", "audio-logmel"):
        index = json.loads((prepared / stream / "index.json").read_text(encoding="utf-8"))
        index["settings"] = {**index["settings"], "made": "otherwise"}
        index["hash"] = stream_hash(index["settings"], index["shards"])
        (prepared / stream / "index.json").write_text(json.dumps(index), encoding="utf-8")
        assert count(prepared, llm)[1] == 16, stream


def test_behind_a_url_lengths_are_kept_in_the_cache(prepared, llm, tmp_path):
    place = locate(f"file://{prepared}", tmp_path / "cache")
    first, tokenized = count(place, llm)
    assert tokenized == 16
    assert count(locate(f"file://{prepared}", tmp_path / "cache"), llm) == (first, 0)
    assert not (prepared / "lengths").exists()
    assert list((tmp_path / "cache").rglob("lengths/train-*.json"))


def test_where_nothing_can_be_kept_lengths_are_counted_again(prepared, llm):
    (prepared / "lengths").write_text("in the way", encoding="utf-8")
    first = count(prepared, llm)
    assert first[1] == 16
    assert count(prepared, llm) == first


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"demo/train/dia0": {"instruction": 3}}'])
def test_a_spoilt_file_is_made_anew(prepared, llm, content):
    first, _ = count(prepared, llm)
    (path,) = (prepared / "lengths").iterdir()
    path.write_text(content, encoding="utf-8")
    assert count(prepared, llm) == (first, 16)
    assert count(prepared, llm) == (first, 0)
