"""What all synthesizers share: sentences, pauses in the text, and who speaks in which voice."""

import numpy as np
import pytest

from msenc.speech.acting import HEAD_S, PAUSE_S, TAIL_S
from msenc.speech.description import VOCABULARY, parse
from msenc.speech.synthesis import SentenceSynthesizer, choose, settle_gender, split_phrases, split_sentences
from msenc.types import UNKNOWN, MsencError, VoiceAttributes

LONG = "I went to the market, then to the station " * 12


class Recorder(SentenceSynthesizer):
    """Gives the nth phrase n seconds of a tone."""

    def __init__(self):
        self.asked = []

    def synthesize(self, phrase, voice, speaker):
        self.asked.append((phrase, voice, speaker))
        time = np.arange(8_000 * len(self.asked)) / 8_000
        return np.sin(2 * np.pi * 200 * time).astype(np.float32), 8_000


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("  Much \n space. ", ["Much space."]),
        ('"Stop!" he said. Well...', ['"Stop!"', "he said.", "Well..."]),
        ("Mr. Fox met J. Doe at 3.50 p.m. Yes.", ["Mr. Fox met J. Doe at 3.50 p.m.", "Yes."]),
        ("Really?! No.", ["Really?!", "No."]),
        ("... !? \u2026", []),
        ("", []),
        ("no stop", ["no stop"]),
        ("Über. Ça va?", ["Über.", "Ça va?"]),
    ],
)
def test_a_text_is_split_at_its_sentences(text, sentences):
    assert split_sentences(text) == sentences


@pytest.mark.parametrize("text", [LONG, LONG.replace(",", ""), "a" * 700, LONG.replace(",", ";")])
def test_a_long_sentence_is_cut_and_nothing_is_lost(text):
    pieces = split_sentences(text, 100)
    assert max(map(len, pieces)) <= 100
    assert "".join(pieces).replace(" ", "") == text.replace(" ", "")
    assert len(pieces) < len(text) / 30
    if text == LONG:
        assert all(piece.endswith(",") for piece in pieces[:-1])


def test_pauses_are_commas():
    sentence = "Yes, we went home and we slept until noon because it was late"
    assert split_phrases(sentence, UNKNOWN) == [sentence]
    assert split_phrases(sentence, "some") == ["Yes, we went home and we slept,", "until noon because it was late"]
    assert split_phrases(sentence, "few") == [sentence.replace(",", "")]
    assert split_phrases("It costs 1,000 euros", "few") == ["It costs 1,000 euros"]
    many = ["Yes, we went home,", "and we slept,", "until noon,", "because it was late"]
    assert split_phrases(sentence, "many") == many
    assert split_phrases("Do you see me", "many") == ["Do you,", "see me"]
    assert split_phrases("You look sad.", "many") == ["You look sad."]
    assert split_phrases("one two three four five six", "many") == ["one two three four,", "five six"]


def test_sentences_are_spoken_one_after_another():
    speak = Recorder()
    samples, sample_rate = speak("One. Four five.", "a woman speaks fast", "Ana")
    assert sample_rate == 8_000
    around = HEAD_S + TAIL_S[UNKNOWN]
    assert len(samples) / sample_rate == pytest.approx(3 + 2 * around, abs=0.03)
    voice = VoiceAttributes(gender="woman", rate="fast")
    assert speak.asked == [("One.", voice, "Ana"), ("Four five.", voice, "Ana")]
    first = next(speak.stream("One. Four five.", voice))
    assert len(first[0]) / sample_rate == pytest.approx(3 + around, abs=0.02)
    assert len(speak.asked) == 3  # the second sentence was not waited for


def test_phrases_are_parted_by_pauses():
    samples, sample_rate = Recorder()("Do you see me", VoiceAttributes(pauses="many"))
    seconds = HEAD_S + 1 + PAUSE_S["many"] + 2 + TAIL_S["many"]
    assert len(samples) / sample_rate == pytest.approx(seconds, abs=0.03)
    assert not samples[round((HEAD_S + 1.05) * 8_000) : round((HEAD_S + 1.4) * 8_000)].any()


def test_what_cannot_be_spoken_is_refused():
    with pytest.raises(MsencError, match=r"found '\?!', expected words"):
        Recorder()("?!", "a man speaks slowly")
    with pytest.raises(MsencError, match="attribute rate: found 'hasty'"):
        Recorder()("Hello.", VoiceAttributes(rate="hasty"))


def test_a_name_has_one_voice():
    names = [f"speaker {n}" for n in range(60)]
    chosen = [choose("abc", name) for name in names]
    assert chosen == [choose("abc", name) for name in names]
    assert all(chosen.count(option) > 8 for option in "abc")
    assert choose("abc", None) == "a"


def test_a_speaker_keeps_the_gender_that_most_turns_state():
    said = ["a woman speaks fast", "a man speaks fast", "a woman speaks slowly", "someone speaks loudly"]
    voices = {turn: ("Ana", parse(line)) for turn, line in enumerate(said)}
    voices |= {9: ("Ben", parse("a man speaks fast")), 10: ("Cleo", parse("someone speaks fast"))}
    settled = settle_gender(voices)
    assert [settled[turn].gender for turn in (0, 1, 2, 3, 9, 10)] == ["woman"] * 4 + ["man", UNKNOWN]
    assert [settled[turn].rate for turn in (0, 2)] == ["fast", "slow"]
    assert set(VOCABULARY["gender"]) == {"woman", "man"}
