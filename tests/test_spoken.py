"""The replies of a split as sound: one file per reply that differs, found again by what makes it."""

import copy
import re

import numpy as np
import pytest

from msenc.speech.espeak import ESpeak
from msenc.speech.wav import from_wav
from msenc.spoken import speak_replies
from msenc.types import MsencError

NODE = {"_target_": "msenc.speech.espeak.ESpeak", "language": "en-us"}


def prediction(text, description, speaker="Anna", dialogue="d0"):
    return {"dialogue": dialogue, "speaker": speaker, "reply": {"text": text, "description": description}}


PREDICTIONS = [
    prediction("Hello.", "a woman speaks fast"),
    prediction("You look sad.", "a woman speaks with flat intonation"),
    prediction("Hello.", "a woman speaks fast"),
    prediction("Hello.", "a man speaks fast", "Leo"),
    prediction("...", "a woman speaks fast"),
    prediction("I am here.", None, "Leo"),
]


def test_replies_are_spoken_once_and_in_any_number_of_processes(tmp_path):
    here, there = copy.deepcopy(PREDICTIONS), copy.deepcopy(PREDICTIONS)
    assert speak_replies(here, NODE, tmp_path / "here", 0) == 4
    assert speak_replies(there, NODE, tmp_path / "there", 2) == 4
    assert here == there
    files = [p["speech"] for p in here]
    assert files[0] == files[2]
    assert files[4] is None
    assert len(set(files)) == 5
    for file in {f for f in files if f}:
        assert re.fullmatch(r"speech/\w+\.wav", file)
        assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes()
    assert len(list((tmp_path / "there" / "speech").iterdir())) == 4
    samples, _ = from_wav((tmp_path / "here" / files[5]).read_bytes())
    spoken, _ = ESpeak()("I am here.", "a man speaks", "Leo")  # as Leo's other turn says
    np.testing.assert_allclose(samples, spoken, atol=1e-4)


def test_only_what_is_missing_is_spoken(tmp_path):
    predictions = copy.deepcopy(PREDICTIONS)
    speak_replies(predictions, NODE, tmp_path, 0)
    kept, gone = (tmp_path / predictions[i]["speech"] for i in (0, 1))
    before = kept.stat().st_mtime_ns
    gone.unlink()
    assert speak_replies(predictions, NODE, tmp_path, 0) == 1
    assert gone.is_file()
    assert kept.stat().st_mtime_ns == before
    assert speak_replies(predictions, {**NODE, "language": "de"}, tmp_path, 0) == 4


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_refusal_comes_out_as_it_is_and_keeps_what_was_spoken(tmp_path, num_workers):
    with pytest.raises(MsencError, match="no voice 'xx"):
        speak_replies(copy.deepcopy(PREDICTIONS), {**NODE, "language": "xx"}, tmp_path, num_workers)
    assert list((tmp_path / "speech").iterdir()) == []
