"""A reply that is interrupted: the talk keeps what was heard of it, and the run is given no more."""

import json

import numpy as np
import pytest

from msenc.config.build import build
from msenc.config.schema import plain
from msenc.pipelines.respond import load_agent
from msenc.raw.media import read_audio
from msenc.talk.agent import Answer, Turn, read_talk, talk_json
from msenc.talk.interruption import words_heard
from msenc.types import MsencError, VoiceAttributes

pytest.importorskip("gradio", reason="the page needs the extra talk")

from msenc.talk.page import INTERRUPTED, Host, heard_in, show_talk

LONG = ["decoding.max_new_tokens=60", "+decoding.min_new_tokens=60"]


@pytest.fixture
def host(short_run, compose, tmp_path):
    config = plain(compose([f"runs_dir={tmp_path}", *LONG], "respond"))
    host = Host(lambda run: load_agent(run, config), build(config["speech"], "speech"), config, tmp_path)
    yield host
    host.close()


@pytest.fixture
def replied(host, short_run):
    """A talk of one turn and its reply, not yet given to its visitor."""
    answer = Answer("The garden is quiet. I hear a dog near the gate.", "a man speaks", VoiceAttributes("man"))
    host.agent(str(short_run)).answer = lambda *_, **__: ([answer], [])  # of a model that has learnt more
    return host.answer(host.hear(host.begin(), str(short_run), Turn("", "Hello!")), name="first")[0]


@pytest.mark.parametrize("is_told_before", [False, True])
def test_the_talk_keeps_what_was_heard_and_the_run_hears_no_more(is_told_before, host, replied, short_run):
    (said,), whole = replied.said.values(), replied.turns[-1].turn
    rate = replied.spoken.sample_rate
    assert said.seconds == pytest.approx(len(replied.spoken.sound) / rate)
    heard_s, moment = 0.6 * said.seconds, host.visitors.moment("anna")
    if is_told_before:
        host.visitors.note_heard("anna", {"first": heard_s})
    assert host.visitors.replace("anna", moment, replied)
    if not is_told_before:
        host.visitors.note_heard("anna", {"first": heard_s})
    talk = host.visitors.talk("anna")
    turn = talk.turns[-1].turn
    assert turn.interrupted
    assert turn.text == talk.spoken.answer.text == words_heard(whole.text, said.sentences, heard_s)
    assert 0 < len(turn.text) < len(whole.text)
    assert whole.text.startswith(turn.text)
    assert len(read_audio(turn.audio, rate)) == len(talk.spoken.sound) == pytest.approx(heard_s * rate, abs=1)
    assert show_talk(talk)[-1]["content"][:2] == [turn.text, INTERRUPTED]

    later = host.hear(talk, str(short_run), Turn("", "And now?"))
    agent = host.agent(str(short_run))
    assert later.turns[1].turn == turn
    np.testing.assert_array_equal(later.turns[1].features["audio"], agent.hear(turn).features["audio"])
    assert len(later.turns[1].features["audio"]) < len(replied.turns[1].features["audio"])
    assert later.turns[0] is talk.turns[0]  # what nobody interrupted is not heard again


def test_what_was_heard_to_its_end_is_not_interrupted(host, replied):
    host.visitors.replace("anna", host.visitors.moment("anna"), replied)
    host.visitors.note_heard("anna", {"first": replied.said["first"].seconds - 0.01, "unknown": 0.0})
    assert host.visitors.talk("anna").turns == replied.turns


def test_a_reply_of_which_nothing_was_heard_has_no_words(host, replied):
    host.visitors.replace("anna", host.visitors.moment("anna"), replied)
    host.visitors.note_heard("anna", {"first": 0.0})
    talk = host.visitors.talk("anna")
    assert (talk.turns[-1].turn.text, talk.turns[-1].turn.audio, talk.spoken.sound) == ("...", None, None)


def test_a_reply_that_is_stopped_while_it_is_read_keeps_what_was_written(host, short_run):
    moment = host.visitors.moment("anna")
    now = host.hear(host.begin(), str(short_run), Turn("", "Hello!"))
    told, is_cut = [], host.visitors.watch_cuts("anna", "first")

    def on_progress(progress):
        told.append(progress.text)
        if len(told) == 5:
            host.visitors.note_heard("anna", {"first": None})

    after = host.answer(now, is_cut=is_cut, on_progress=on_progress, name="first")[0]
    host.visitors.replace("anna", moment, after)
    turn = host.visitors.talk("anna").turns[-1].turn
    assert turn.interrupted
    assert turn.text.startswith(told[4].strip())
    assert turn.audio is None


def test_a_saved_talk_says_that_a_reply_was_interrupted(host, replied, tmp_path):
    host.visitors.replace("anna", host.visitors.moment("anna"), replied)
    host.visitors.note_heard("anna", {"first": replied.said["first"].seconds / 2})
    talk = host.visitors.talk("anna")
    again = host.load_talk(host.save_talk(talk), talk.run)
    assert [heard.turn.interrupted for heard in again.turns] == [False, True]
    assert again.turns[-1].turn.text == talk.turns[-1].turn.text
    path = tmp_path / "talk.json"
    path.write_text(json.dumps(talk_json([Turn("Ben", "I am", interrupted=True), Turn("Ana", "Yes?")])))
    assert json.loads(path.read_text())["turns"][1] == {"speaker": "Ana", "text": "Yes?"}
    assert [turn.interrupted for turn in read_talk(path)] == [True, False]


def test_a_synthesizer_that_goes_away_is_said_and_the_talk_goes_on(host, short_run, replied):
    voice, spoken = host.synthesizer, []

    def fails_at_the_second(*given):
        if spoken:
            raise MsencError("http://localhost:1/v1: no speech. Is the server running there?")
        spoken.append(given)
        return voice(*given)

    host.synthesizer = fails_at_the_second
    talk, notices, _ = host.answer(host.hear(replied, str(short_run), Turn("", "And now?")), name="second")
    fault = "http://localhost:1/v1: no speech. Is the server running there?"
    assert notices == [f"The reply is not heard to its end. {fault}"]
    turn = talk.turns[-1].turn
    assert (turn.text, turn.interrupted) == (replied.turns[1].turn.text, False)
    assert turn.audio.is_file()
    talk, notices, _ = host.answer(host.hear(talk, str(short_run), Turn("", "And now?")), name="third")
    assert notices == [f"The reply is not heard. {fault}"]
    assert talk.turns[-1].turn.audio is None


def test_words_end_where_the_sound_was_ended():
    whole, sentences = "One is here. ... Two is (well) there.", [("One is here.", 1.0), ("Two is (well) there.", 2.0)]
    found = [words_heard(whole, sentences, second) for second in (0.0, 0.5, 0.95, 1.2, 2.0, 3.0)]
    assert found == ["", "One is", "One is here.", "One is here.", "One is here. ... Two is", whole]


@pytest.mark.parametrize(
    ("note", "expected"),
    [
        ({"heard": {"a-1": 2, "b": None, "c": 0.5}}, {"a-1": 2.0, "b": None, "c": 0.5}),
        ({"heard": {"x" * 41: 1, "a b": 1, "c": "1", "d": True, "e": -1, "f": float("nan"), "g": 1e9}}, {}),
        ({"heard": [1]}, {}),
        ("heard", {}),
        (None, {}),
    ],
)
def test_only_what_a_browser_tells_is_taken(note, expected):
    assert heard_in(note) == expected
