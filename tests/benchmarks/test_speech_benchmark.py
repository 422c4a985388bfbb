"""What the benchmark of synthesizers counts, on values that are known."""

import json
import os

import mood
import pytest
import speech

from msenc.speech.description import VOCABULARY
from msenc.types import MsencError


def test_order_counts_sentences_and_takes_no_gap_for_a_value():
    assert speech.share_in_order([1.0, 2.0, None, 3.0], [2.0, 1.0, 3.0, 3.0]) == 0.25


@pytest.mark.parametrize(("step", "expected"), [(1.0, 1.0), (0.0, 1 / 3)])
def test_agreement_is_that_of_the_measured_words(step, expected):
    """Rates of 3, 4 and 5 syllables per second, and rates that do not follow the word."""
    heard = {
        word: [
            speech.Heard({"rate": 3 + step * level + 0.6 * (1 - step) * (i % 3), "pitch": 200.0}, None)
            for i in range(12)
        ]
        for level, word in enumerate(VOCABULARY["rate"])
    }
    assert speech.agreement("rate", heard, ["woman", "man"] * 6) == pytest.approx(expected)


def test_every_attribute_is_spoken_in_all_its_words_and_alone():
    takes = speech.takes_of(speech.SENTENCES)
    assert set(takes) == {(name, word) for name, words in VOCABULARY.items() for word in words}
    assert len(speech.SENTENCES) == len(set(speech.SENTENCES)) == 50
    for (name, word), group in takes.items():
        assert [take.sentence for take in group] == list(speech.SENTENCES)
        for take in group:
            known = {key for key, value in vars(take.voice).items() if value != "unknown"}
            assert known == {"gender", name}
            assert getattr(take.voice, name) == word


def test_the_latest_spoken_evaluation_is_taken(tmp_path):
    with pytest.raises(MsencError, match=r"no spoken replies\. First: python evaluate\.py"):
        mood.spoken_evaluation(tmp_path)
    for number, speech_file in enumerate(["speech/a.wav", "speech/b.wav", None]):
        folder = tmp_path / "evaluation" / f"demo-test-{number}"
        folder.mkdir(parents=True)
        (folder / "predictions.jsonl").write_text(json.dumps({"speech": speech_file}) + "\n")
        os.utime(folder / "predictions.jsonl", (number, number))
    assert mood.spoken_evaluation(tmp_path) == (tmp_path / "evaluation/demo-test-1", [{"speech": "speech/b.wav"}])
