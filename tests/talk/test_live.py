import time
from types import SimpleNamespace

import numpy as np
import pytest

from msenc.config.build import build
from msenc.config.schema import plain
from msenc.pipelines.respond import load_agent
from msenc.prompt import Prompt
from msenc.speech.description import parse
from msenc.speech.synthesis import read_voice
from msenc.talk.agent import AbandonedError, Answer, Turn, speak_answer
from msenc.talk.live import Ledger, percentiles, reply_live
from msenc.types import MsencError, VoiceAttributes

WORDS = "One is here. Two is (well) there. Three is"


class Writer:
    """Stands in for an agent: writes a text slowly, word by word."""

    def __init__(self, target, words=WORDS):
        self.tokenizer = SimpleNamespace(prompt=Prompt("", "{speaker}:{text}", "{speaker}:", target=target))
        self.words = words.split()
        self.done = False

    def answer(self, turns, speaker, decoding, seed, is_wanted=None, is_cut=None, on_text=None):
        said = []
        for word in self.words:
            if is_wanted is not None and not is_wanted():
                raise AbandonedError
            if is_cut is not None and is_cut():
                break
            said.append(word)
            on_text(" ".join(said))
            time.sleep(0.02)
        self.done = True
        return [Answer(" ".join(said), "a man speaks", VoiceAttributes("man"))], []


def speak(sentence, voice, speaker):
    return np.full(len(sentence), 0.5 if read_voice(voice).gender == "man" else 0.1, np.float32), 8000


@pytest.mark.parametrize("target", ["text", "text_description"])
def test_a_sentence_is_spoken_as_soon_as_it_and_its_voice_are_known(target):
    writer, ledger, early = Writer(target), Ledger(), []
    for progress in reply_live(writer, speak, [], "Ben", {}, 1, ledger):
        if progress.sound is not None and not writer.done:
            early.append(len(progress.sound))
    if target == "text":  # while the rest is written
        assert early == [len("One is here."), len("Two is (well) there.")]
    else:  # the voice stands at the target's end
        assert early == []
    assert len(progress.spoken.sound) == len("One is here.Two is (well) there.Three is")
    assert progress.spoken.answer.text == WORDS
    steps = [ledger.seconds[step] for step in ("first token", "first sentence", "first sound")]
    assert steps == sorted(steps)
    assert steps[0] > 0


def test_a_reply_that_is_cut_keeps_what_was_written_and_one_that_nobody_awaits_keeps_nothing():
    count = []
    *_, last = reply_live(
        Writer("text"), speak, [], "Ben", {}, 1, Ledger(), is_cut=lambda: len(count) > 2 or count.append(1)
    )
    assert last.spoken.answer.text == "One is here."
    with pytest.raises(AbandonedError):
        [*reply_live(Writer("text"), speak, [], "Ben", {}, 1, Ledger(), is_wanted=lambda: False)]


def test_the_pieces_are_the_sound_of_the_whole_reply(short_run, compose):
    config = plain(compose(["decoding.max_new_tokens=40"], "respond"))
    agent, synthesizer = load_agent(short_run, config), build(config["speech"], "speech")
    heard, told = [agent.hear(Turn("User", "Hello!"))], []
    (answer,), _ = agent.answer(heard, "Agent", config["decoding"], on_text=told.append)
    *progress, last = reply_live(agent, synthesizer, heard, "Agent", config["decoding"], 1, Ledger())
    assert last.spoken.answer == answer
    pieces = [one.sound for one in progress if one.sound is not None]
    np.testing.assert_array_equal(np.concatenate(pieces), speak_answer(synthesizer, answer, "Agent").sound)
    assert all(answer.text.startswith(text) for text in told)
    assert told[-1]
    asked = []
    (short,), _ = agent.answer(heard, "Agent", config["decoding"], is_cut=lambda: len(asked) > 2 or asked.append(1))
    assert answer.text.startswith(short.text)
    assert 0 < len(short.text) < len(answer.text)


@pytest.mark.parametrize("description", ["a woman whispers sadly, as if to herself", None])
def test_a_synthesizer_is_given_the_description_in_the_models_words(description):
    attributes = VoiceAttributes("woman") if description is None else parse(description)
    answer = Answer("One is here.", description, attributes)
    writer, given = Writer("text_description"), []
    writer.answer = lambda *_, **__: ([answer], [])

    def note(sentence, voice, speaker):
        given.append(voice)
        return np.zeros(8, np.float32), 8000

    [*reply_live(writer, note, [], "Ben", {}, 1, Ledger())]
    speak_answer(note, answer, "Ben")
    assert given == [description or VoiceAttributes("woman")] * 2


@pytest.mark.parametrize("target", ["text", "text_description"])
def test_a_reply_whose_synthesizer_goes_away_keeps_its_words_and_what_was_spoken(target):
    spoken = []

    def fails_at_the_second(sentence, voice, speaker):
        if spoken:
            raise MsencError("http://localhost: no speech")
        spoken.append(sentence)
        return speak(sentence, voice, speaker)

    *progress, last = reply_live(Writer(target), fails_at_the_second, [], "Ben", {}, 1, Ledger())
    assert last.spoken.answer.text == WORDS
    assert len(last.spoken.sound) == len(spoken[0]) == len("One is here.")
    assert str(last.fault) == "http://localhost: no speech"
    assert sum(one.sound is not None for one in progress) == 1


def test_percentiles_are_of_the_turns_that_had_the_step():
    turns = [{"first sound": value} for value in (0.1, 0.2, 0.9)] + [{"hearing": 1.0}]
    assert percentiles(turns) == {"hearing": (1.0, 1.0), "first sound": (0.2, 0.83)}
