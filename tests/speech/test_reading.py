"""Everyday wording of voices: what is read of it, what is implied, and what is said not to be understood."""

import re
from pathlib import Path
from random import Random

import pytest

from msenc.speech.description import VOCABULARY, describe, parse, read
from msenc.speech.lexicon import entries
from msenc.types import UNKNOWN, VoiceAttributes

PHRASES = [
    (phrase.strip(), key)
    for line in re.sub(r"\n +", " ", (Path(__file__).parent / "phrases.txt").read_text(encoding="utf-8")).splitlines()
    for key, _, phrases in [line.partition(": ")]
    for phrase in phrases.split(" | ")
]


def known(attributes):
    return {name: word for name, word in vars(attributes).items() if word != UNKNOWN}


def expected(key):
    return dict(part.split("=") for part in key.split() if part != "nothing")


def test_the_list_has_what_it_is_to_have():
    stated = {pair for _, key in PHRASES for pair in expected(key).items()}
    assert len(PHRASES) > 400
    assert stated == {(name, word) for name, words in VOCABULARY.items() for word in words}


@pytest.mark.parametrize(("phrase", "key"), PHRASES, ids=[phrase for phrase, _ in PHRASES])
def test_everyday_wording_is_read(phrase, key):
    assert known(parse(phrase)) == expected(key)


@pytest.mark.parametrize(
    ("text", "stated", "implied"),
    [
        ("shouts angrily", {"loudness": "loud"}, {"rate": "fast", "range": "expressive"}),
        ("an elderly man mutters", {"gender": "man", "loudness": "quiet"}, {"rate": "slow"}),
        ("an elderly man mutters fast", {"gender": "man", "loudness": "quiet", "rate": "fast"}, {}),
        ("she whispers excitedly", {"gender": "woman", "loudness": "quiet"}, {"rate": "fast", "range": "expressive"}),
        ("sad but loud", {"loudness": "loud"}, {"rate": "slow", "range": "flat"}),
        (
            "he's furious but speaks slowly",
            {"gender": "man", "rate": "slow"},
            {"loudness": "loud", "range": "expressive"},
        ),
        ("with fear in her voice", {"gender": "woman"}, {"pitch": "high", "rate": "fast"}),
        ("not loud, but angry", {}, {"rate": "fast", "range": "expressive"}),
        ("not angry", {}, {}),
        ("without anger", {}, {}),
        ("sad, then thrilled", {}, {}),
        ("a little boy", {"gender": "man"}, {"pitch": "high"}),
    ],
)
def test_a_mood_implies_what_nothing_states(text, stated, implied):
    reading = read(text)
    assert known(reading.attributes) == stated | implied
    assert set(reading.implied) == set(implied)


@pytest.mark.parametrize(
    ("text", "unread"),
    [
        ("a woman speaks fast, in a quiet voice", ()),
        ("An elderly man mutters angrily.", ()),
        ("a hoarse woman with a Scottish accent", ("hoarse", "scottish accent")),
        ("a low voice", ("low",)),
        ("she talks loudly, then softly", ("loudly", "softly")),
        ("he isn't loud", ("isn't loud",)),
        ("slightly fast", ("fast",)),
        ("neither fast nor slow", ()),
        ("in a loud shirt", ("loud shirt",)),
        ("sad, then thrilled", ("sad", "thrilled")),
        ("", ()),
        ("?! 12", ("12",)),
    ],
)
def test_what_was_not_understood_is_said(text, unread):
    assert read(text).unread == unread


@pytest.mark.parametrize(
    "change", [str.upper, str.title, "  {}  ".format, "({})".format, "{}!".format, "\u201c{}\u201d".format]
)
def test_case_and_punctuation_change_nothing(change):
    for phrase, key in PHRASES:
        assert known(parse(change(phrase))) == expected(key), change(phrase)


def test_every_entry_is_of_the_vocabulary_and_compiles():
    for says, _, _, pattern in entries():
        assert re.compile(pattern)
        assert all(word in VOCABULARY[name] for name, word in says.items())
        assert "{" not in re.sub(r"\{\d,\d\}", "", pattern)


@pytest.mark.parametrize("words", ["very ", "loud ", "not ", "soft and ", "not loud or ", "pitch is ", "no any ", "a"])
def test_a_long_text_is_read(words):
    """A visitor of the page may write 2,000 characters; patterns that try everything would never end."""
    assert known(read(words * (2000 // len(words))).attributes).keys() <= {"loudness"}


def test_all_of_an_own_sentence_is_understood():
    rng = Random(0)
    for _ in range(500):
        attributes = VoiceAttributes(*(rng.choice((*words, UNKNOWN)) for words in VOCABULARY.values()))
        assert read(describe(attributes, rng)) == (attributes, (), ())


def test_nothing_is_read_of_nothing():
    assert read("").attributes == VoiceAttributes()
