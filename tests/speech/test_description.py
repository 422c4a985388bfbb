import re
from collections import Counter
from itertools import product
from random import Random

import pytest

from msenc.demo.world import draw_dialogues
from msenc.speech.description import PHRASES, TEMPLATES, VOCABULARY, describe, parse
from msenc.types import UNKNOWN, Dialogue, MsencError, Utterance, VoiceAttributes


def all_attributes():
    return (VoiceAttributes(*words) for words in product(*((*words, UNKNOWN) for words in VOCABULARY.values())))


def test_every_combination_is_read_back_from_its_sentence():
    count = 0
    for number, attributes in enumerate(all_attributes()):
        sentence = describe(attributes, Random(number))
        assert parse(sentence) == attributes, sentence
        assert not re.search(r"[()\[\]]|\s\s|^\s|\s$|, ,", sentence), sentence
        count += 1
    assert count == 3 * 4**6


def test_every_template_and_phrase_is_used_and_read_back():
    """Also after what a model or a person does to a sentence: a capital, a full stop, more words around it."""
    rng, seen = Random(0), Counter()
    for _ in range(2000):
        attributes = VoiceAttributes(*(rng.choice((*words, UNKNOWN)) for words in VOCABULARY.values()))
        sentence = describe(attributes, rng)
        for changed in (sentence[0].upper() + sentence[1:] + ".", f"Well, {sentence}, it seems."):
            assert parse(changed) == attributes, changed
        for template in TEMPLATES:
            seen[template] += bool(re.fullmatch(template.format(who="a.*|someone", how=".+"), sentence))
        seen.update(p for by in PHRASES.values() for ps in by.values() for p in ps if p in sentence)
    assert all(seen[template] for template in TEMPLATES)
    assert all(seen[p] for by in PHRASES.values() for ps in by.values() for p in ps)


def test_the_seed_decides_the_sentence():
    attributes = VoiceAttributes("man", "low", "flat", "slow", "quiet", "many", "noisy")
    assert describe(attributes, Random("a")) == describe(attributes, Random("a"))
    assert len({describe(attributes, Random(n)) for n in range(50)}) > 45


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("bla bla 12 (", {}),
        ("a person talks in a low voice", {}),  # deep, or quiet?
        ("He speaks with a deep voice.", {"gender": "man", "pitch": "low"}),
        ("A male voice, low-pitched and monotone", {"gender": "man", "pitch": "low", "range": "flat"}),
        ("Her pitch is very high", {"gender": "woman", "pitch": "high"}),
        ("a woman speaks to a man", {}),
        ("she speaks loudly, then quietly", {"gender": "woman"}),
        ("she does not speak loudly", {"gender": "woman"}),
        ("he isn't very loud", {"gender": "man"}),
        ("fast or slow", {}),
        ("loudly or at a fast pace", {}),
        ("less expressive than before", {}),
        ("slightly high-pitched", {}),
        ("a fast pace with high volume", {"rate": "fast", "loudness": "loud"}),
        ("normal pitch, normal speed", {"pitch": "medium", "rate": "moderate"}),
        ("a loud background noise", {"noise": "noisy"}),
        ("the woman speaks slightly expressively with very slow speech", {"gender": "woman", "rate": "slow"}),
        ("breakfast, highness, softly-softly; a womanizer of steadfast manners", {}),
        ("very\u00a0loudly \n spoken", {"loudness": "loud"}),
    ],
)
def test_free_text_gives_what_it_states_and_no_more(text, expected):
    assert parse(text) == VoiceAttributes(**expected)


def test_the_demo_descriptions_are_read():
    words = set()
    for demo in draw_dialogues("train", 20, seed=1):
        for utterance, turn in zip(demo.dialogue.utterances, demo.turns, strict=True):
            read = parse(utterance.description)
            expected = "expressive" if turn.is_expressive else "flat"
            gender = "woman" if "a woman" in utterance.description else "man"
            assert read == VoiceAttributes(gender=gender, range=expected)
            words.add((gender, expected))
    assert len(words) == 4


def test_a_word_of_no_vocabulary_is_refused():
    with pytest.raises(MsencError, match="voice attribute rate: found 'high', expected one of slow, moderate, fast"):
        describe(VoiceAttributes(rate="high"), Random(0))


def test_attributes_are_stored_and_absent_ones_change_no_byte():
    plain = Dialogue("demo/train/dia0", "train", (Utterance("0", "Ana", "Hi!"),))
    assert "attributes" not in plain.to_json()["utterances"][0]
    assert Dialogue.from_json(plain.to_json()) == plain
    attributes = VoiceAttributes("man", pitch="low")
    described = Dialogue("d", "train", (Utterance("0", "Ana", "Hi!", "a man", attributes=attributes),))
    assert Dialogue.from_json(described.to_json()) == described
