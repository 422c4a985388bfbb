"""Replies for HumDial's judge: every turn is answered, and what is no such task is refused before a run is loaded."""

import json

import numpy as np
import pytest
from humdial import answer

from msenc.speech.wav import write_wav
from msenc.types import MsencError

SHORT = ["decoding.max_new_tokens=8"]


def write_task(folder, **changed):
    write_wav(folder / "a.wav", np.random.default_rng(1).normal(0, 0.1, 16000).astype(np.float32), 16000)
    turns = [
        {"turn_id": 2, "text": "I found another!", "emotion": "happy", "split_audio_file": "a.wav"},
        {"turn_id": 1, "text": "I lost my job.", "emotion": "sad", **changed},
    ]
    path = folder / "task3.jsonl"
    path.write_text(json.dumps({"dialogue_id": "task3_3_en_0001", "turns": turns, "language": "en"}) + "\n")
    return path


def test_every_turn_is_answered_in_its_order(short_run, tmp_path):
    written = answer(short_run, write_task(tmp_path), tmp_path / "out", SHORT)
    (line,) = map(json.loads, written.read_text().splitlines())
    assert line["dialogue_id"] == "task3_3_en_0001"
    assert [(t["input_emotion"], t["input_text"]) for t in line["turns"]] == [
        ("sad", "I lost my job."),
        ("happy", "I found another!"),
    ]
    for turn in line["turns"]:
        assert {*turn} == {"input_emotion", "input_text", "response_text", "response_audio"}
        assert bool(turn["response_text"]) == bool(turn["response_audio"])
    with pytest.raises(MsencError, match=r"replies\.jsonl: is there already"):
        answer(short_run, tmp_path / "task3.jsonl", tmp_path / "out", SHORT)


@pytest.mark.parametrize(
    ("changed", "refusal"),
    [({"text": 3}, r"line 1, turns\[1\]\.text: found 3"), ({"split_audio_file": "../a.wav"}, "expected a path below")],
)
def test_another_task_is_refused(changed, refusal, short_run, tmp_path):
    with pytest.raises(MsencError, match=refusal):
        answer(short_run, write_task(tmp_path, **changed), tmp_path / "out", SHORT)
    assert not (tmp_path / "out" / "replies.jsonl").exists()
