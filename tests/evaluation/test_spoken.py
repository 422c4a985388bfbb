"""The replies of a split as sound: one file per reply that differs, found again by what makes it."""

import copy
import os
import re
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from msenc.config.build import with_current_targets, with_first_targets
from msenc.config.schema import EvaluateConfig
from msenc.config.targets import BUILDABLE
from msenc.evaluation.spoken import listen_to_replies, speak_replies
from msenc.files import digest
from msenc.pipelines.evaluate import _settings_of_replies
from msenc.speech.attributes import Bin
from msenc.speech.description import parse
from msenc.speech.synthesizers.espeak import ESpeak
from msenc.speech.wav import from_wav
from msenc.types import MsencError

NODE = {"_target_": "msenc.speech.synthesizers.espeak.ESpeak", "language": "en-us"}


def prediction(text, description, speaker="Anna", dialogue="d0"):
    return {"dialogue": dialogue, "speaker": speaker, "reply": {"text": text, "description": description}}


PREDICTIONS = [
    prediction("Hello.", "a woman speaks fast"),
    prediction("You look sad.", "a woman speaks with flat intonation"),
    prediction("Hello.", "a woman speaks fast"),
    prediction("Hello.", "a man speaks fast", "Leo"),
    prediction("...", "a woman speaks fast"),
    prediction("I am here.", None, "Leo"),
    prediction("Hello.", "a woman speaks fast", "Clara"),
]


def test_replies_are_spoken_once_and_in_any_number_of_processes(tmp_path):
    here, there = copy.deepcopy(PREDICTIONS), copy.deepcopy(PREDICTIONS)
    assert speak_replies(here, NODE, tmp_path / "here", 0) == 5
    assert speak_replies(there, NODE, tmp_path / "there", 2) == 5
    assert here == there
    files = [p["speech"] for p in here]
    assert files[0] == files[2]
    assert files[4] is None
    assert len(set(files)) == 6
    for file in {f for f in files if f}:
        assert re.fullmatch(r"speech/\w+\.wav", file)
        assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes()
    assert len(list((tmp_path / "there" / "speech").iterdir())) == 5
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
    assert speak_replies(predictions, {**NODE, "language": "de"}, tmp_path, 0) == 5


def test_what_was_spoken_before_the_synthesizers_moved_is_not_spoken_again(tmp_path):
    predictions = copy.deepcopy(PREDICTIONS[:1])
    speak_replies(predictions, NODE, tmp_path, 0)
    said, by = predictions[0], {**NODE, "_target_": "msenc.speech.espeak.ESpeak"}
    voice = asdict(parse(said["reply"]["description"]))
    key = digest({"by": by, "text": said["reply"]["text"], "voice": voice, "speaker": said["speaker"]})
    assert said["speech"] == f"speech/{key}.wav"
    settings = _settings_of_replies(EvaluateConfig(speech=NODE, recogniser=None), [])  # which tell evaluations apart
    assert settings["speech"] == {**by, "recogniser": None}


def test_no_move_of_a_synthesizer_is_forgotten():
    synthesizers = BUILDABLE["speech"]
    assert len(synthesizers) == 5
    for target in synthesizers:
        first = with_first_targets({"_target_": target})["_target_"]
        assert first == target.replace(".synthesizers.", ".") != target
        assert with_current_targets({"_target_": first}) == {"_target_": target}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_refusal_comes_out_as_it_is_and_keeps_what_was_spoken(tmp_path, num_workers):
    with pytest.raises(MsencError, match="no voice 'xx"):
        speak_replies(copy.deepcopy(PREDICTIONS), {**NODE, "language": "xx"}, tmp_path, num_workers)
    assert list((tmp_path / "speech").iterdir()) == []


# ---- what is heard ----

BINS = {
    name: Bin(edges, words, "given", 0, None)
    for name, edges, words in [
        ("pitch/woman", (200.0,), ("low", "high")),
        ("pitch/man", (110.0,), ("low", "high")),
        ("range", (2.3,), ("flat", "expressive")),
        ("rate", None, ("slow", "fast")),
        ("loudness", None, ("quiet", "loud")),
        ("pauses", None, ("few", "many")),
        ("noise", None, ("noisy", "clean")),
    ]
}


def answered(text, description, reference, speaker):
    return prediction(text, description, speaker) | {"reference": {"text": text, "description": reference}}


def said():
    flat, lively = "{} speaks with flat intonation", "{} speaks with expressive intonation"
    text = "You look sad. Here is the garden."
    return [
        answered(text, flat.format("a woman"), flat.format("a woman"), "Anna"),
        answered(text, lively.format("a man"), flat.format("a man"), "Leo"),
        answered(text, lively.format("a man"), lively.format("a man"), "Leo"),
        answered("!", lively.format("a man"), lively.format("a man"), "Leo"),
    ]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_voice_is_heard_against_the_reply_and_against_the_reference(tmp_path, num_workers):
    predictions = said()
    speak_replies(predictions, NODE, tmp_path, 0)
    found = listen_to_replies(predictions, tmp_path, BINS, None, num_workers)
    assert found == {
        "speech/spoken": 3,
        "speech/gender/as_written": 0.75,
        "speech/range/as_written": 0.75,  # the last has no sound
        "speech/gender/as_reference": 0.75,
        "speech/range/as_reference": 0.5,
    }
    voices = [{k: v for k, v in p["spoken_attributes"].items() if k != "pitch"} for p in predictions]
    assert voices[:2] == [{"gender": "woman", "range": "flat"}, {"gender": "man", "range": "expressive"}]
    assert voices[3] == {}


def test_without_bins_and_recogniser_the_sounds_are_counted(tmp_path):
    predictions = said()
    speak_replies(predictions, NODE, tmp_path, 0)
    assert listen_to_replies(predictions, tmp_path, None, None, 0) == {"speech/spoken": 3}


def test_quality_and_voices_of_the_sounds_are_measured(tmp_path):
    for package in ("onnxruntime", "speechmos", "resemblyzer"):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}")
    predictions = [
        answered(text, "a woman speaks" if speaker == "Anna" else "a man speaks", "", speaker)
        for speaker in ("Anna", "Leo")
        for text in ("You look sad. Here is the garden.", "I have never been to this city before.", "!")
    ]
    speak_replies(predictions, NODE, tmp_path, 0)
    found = listen_to_replies(predictions, tmp_path, None, None, 0, ["mos", "speaker_similarity"])
    scores = [p.get("scores", {}).get("speech/mos/overall") for p in predictions]
    assert [s is None for s in scores] == [False, False, True] * 2
    assert found["speech/mos/overall"] == pytest.approx(np.mean([s for s in scores if s]))
    assert 1 < found["speech/mos/overall"] < 5
    assert found["speech/speaker_similarity/same"] > found["speech/speaker_similarity/others"] + 0.1


@pytest.mark.real
def test_words_are_understood(tmp_path):
    whisper = Path(os.environ.get("MSENC_MODELS", "nowhere")) / "whisper-base"
    if not whisper.is_dir():
        pytest.skip("MSENC_MODELS names no folder with whisper-base")
    predictions = said()
    speak_replies(predictions, NODE, tmp_path, 0)
    found = listen_to_replies(predictions, tmp_path, None, str(whisper), 0)
    assert 0 <= found["speech/cer"] < found["speech/wer"] < 0.5 or found["speech/wer"] == 0
    assert [set(p.get("scores", {})) for p in predictions] == [{"speech/wer", "speech/cer"}] * 3 + [set()]


def test_what_listens_is_where_the_evaluation_is(tmp_path, monkeypatch):
    places = {}

    def stub(name, hear):
        def build(*settings, device=None):
            places[name] = settings[-1] if device is None else device
            return hear

        monkeypatch.setattr(f"msenc.evaluation.spoken.{name}", build)

    class Hearing:
        sample_rate = 16_000

        def __init__(self, found):
            self.found = found

        def __call__(self, samples):
            return self.found

        def text(self, samples):
            return "words"

    stub("Recogniser", Hearing(None))
    stub("PredictedMos", Hearing({"overall": 3.0, "sig": 3.0, "bak": 3.0}))
    stub("Resemblyzer", Hearing(np.ones(1)))
    predictions = said()
    speak_replies(predictions, NODE, tmp_path, 0)
    listen_to_replies(predictions, tmp_path, None, "whisper", 0, ["mos", "speaker_similarity"], device="cuda:3")
    assert places == dict.fromkeys(["Recogniser", "PredictedMos", "Resemblyzer"], "cuda:3")
