"""The live page in Chromium: replies that are heard by themselves, and a microphone that is a file."""

import io
import json
import os
import tempfile
import urllib.request
import wave
import zipfile
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, Browser

from msenc.raw.media import read_audio
from msenc.speech.wav import write_wav

pytest.importorskip("gradio", reason="the page needs the extra talk")

from page import served

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
RATE = 48_000
LONG = ["speech=espeak", "decoding.max_new_tokens=100", "+decoding.min_new_tokens=100"]
"""Replies that are heard for longer than it takes to interrupt them."""
AT_END = "(e => e.scrollHeight - e.scrollTop - e.clientHeight < 3)(document.querySelector('#chat [role=log]'))"


def open_page(browser, address, width=1280):
    browser.open(address, width)
    browser.wait("document.querySelector('#status')?.innerText.includes('reads text, audio and video')")
    browser.wait("!!document.querySelector('#mic')")


def says(selector):
    return f"document.querySelector('{selector}').innerText"


@pytest.fixture(scope="module")
def address(short_run, tmp_path_factory):
    with served(short_run, tmp_path_factory.mktemp("temporary"), LONG) as (address, _):
        yield address


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.parametrize("width", [390, 1280])
def test_a_first_click_shows_a_turn_and_plays_its_reply(width, window, address):
    open_page(window, address, width)
    below = "document.querySelector('#text').getBoundingClientRect().top"
    assert window.evaluate(f"{below} < document.querySelector('#change').getBoundingClientRect().top") or width > 600
    window.click("#examples button")
    window.wait("document.querySelectorAll('#chat .user').length == 1", 5)
    window.wait("talk.isPlaying()")  # nobody pressed play
    assert "Read of this turn: text, audio and video." in window.evaluate(says("#streams"))
    window.wait("!!document.querySelector('#ledger table')")
    assert "first sound" in window.evaluate(says("#ledger"))
    assert "From sending to sound in this browser" in window.evaluate(says("#here"))
    window.click("#stop")
    assert not window.evaluate("talk.isPlaying()")
    window.click("#replay")
    window.wait("talk.isPlaying()")
    window.type("#text textarea", "And now?")
    window.click("#text button")
    window.wait("document.querySelectorAll('#chat .user').length == 2", 2)  # before its reply
    window.wait("document.querySelectorAll('#chat .bot').length == 2 && document.querySelector('#status p') != null")
    window.wait(AT_END)
    assert "Read of this turn: text. It had no audio and no video." in window.evaluate(says("#streams"))
    assert window.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")

    window.type("#text textarea", "half a thought")
    window.type("#description textarea", "a woman shouts")
    window.click("#new")
    window.wait("document.querySelectorAll('#chat .user').length == 0")
    window.wait("document.querySelector('#text textarea').value == ''")
    assert not window.evaluate("talk.isPlaying()")
    assert window.evaluate("document.querySelector('#description textarea').value") == ""
    for place in ("#voice", "#ledger", "#streams", "#status", "#here"):
        assert window.evaluate(says(place)).strip() == ""


def test_stop_ends_a_reply_that_is_being_written(window, address):
    open_page(window, address)
    window.type("#text textarea", "Hello!")
    window.click("#text button")
    window.click("#stop")
    window.wait("document.querySelectorAll('#chat .bot').length == 1 && !!document.querySelector('#voice .voice')")
    window.type("#text textarea", "Still there?")
    window.click("#text button")
    window.wait("document.querySelectorAll('#chat .bot').length == 2 && talk.isPlaying()")


@pytest.mark.parametrize("how", ["by the button", "by the next turn"])
def test_a_reply_that_is_interrupted_stays_as_far_as_it_was_heard(how, window, address):
    open_page(window, address)
    window.type("#text textarea", "Hello!")
    window.click("#text button")
    window.wait("talk.isPlaying() && !!document.querySelector('#voice .voice')")
    words = "[...document.querySelectorAll('#chat .bot .md')].map(e => e.innerText.trim())"
    (whole,) = window.evaluate(words)
    window.wait("Object.values(talk.played())[0] > 1")
    if how == "by the button":
        window.click("#stop")
    else:
        window.type("#text textarea", "And now?")
        window.click("#text button")
    window.wait("document.querySelector('#chat .bot').innerText.includes('(interrupted)')")
    kept, mark, *_ = window.evaluate(words)
    assert mark == "(interrupted)"
    assert whole.startswith(kept)
    assert 0 < len(kept) < len(whole) - 10
    if how == "by the next turn":
        window.wait("document.querySelectorAll('#chat .bot').length == 2 && talk.isPlaying()")
        assert window.evaluate(words)[0] == kept
    window.click("#save")
    window.wait("!!document.querySelector('#saved a')")
    with urllib.request.urlopen(window.evaluate("document.querySelector('#saved a').href")) as answer:
        content = answer.read()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        turns = json.loads(archive.read("talk.json"))["turns"]
        with wave.open(io.BytesIO(archive.read("2-audio.wav"))) as sound:
            assert 0.9 < sound.getnframes() / sound.getframerate() < 10
    assert (turns[1]["text"], turns[1]["interrupted"]) == (kept, True)
    assert all("interrupted" not in turn for turn in turns if turn is not turns[1])


def test_a_turn_that_is_sent_while_a_reply_is_written_is_answered_too(window, address):
    open_page(window, address)
    for text in ("One.", "Two."):
        window.type("#text textarea", text)
        window.click("#text button")
    window.wait("document.querySelectorAll('#chat .bot').length == 2")
    said = window.evaluate("[...document.querySelectorAll('#chat .user')].map(e => e.innerText.trim())")
    assert said == ["One.", "Two."]


def test_three_turns_hands_free_with_an_interruption(short_run, demo_home, tmp_path):
    pytest.importorskip("silero_vad")
    whisper = Path(os.environ.get("MSENC_MODELS", "nowhere")) / "whisper-base"
    if not whisper.is_dir():
        pytest.skip("MSENC_MODELS names no folder with whisper-base")
    clip = sorted((demo_home / "data" / "demo-raw").rglob("*.mp4"))[0]
    quiet = np.random.default_rng(0).normal(0, 1e-3, 7 * RATE).astype(np.float32)
    write_wav(tmp_path / "spoken.wav", np.concatenate([quiet[:RATE], read_audio(clip, RATE), quiet]), RATE)
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    with (
        served(short_run, folder, [*LONG, f"recogniser={whisper}"]) as (address, _),
        Browser(tmp_path / "profile", tmp_path / "spoken.wav") as browser,
    ):
        open_page(browser, address)
        browser.click("#mic")
        browser.wait("talk.isListening()")
        browser.wait("document.querySelectorAll('#chat .bot').length >= 3 && talk.interruptions() >= 1", 180)
        assert "(interrupted)" in browser.evaluate(says("#chat"))
        browser.click("#mic")
        assert not browser.evaluate("talk.isListening()")
        browser.wait("!!document.querySelector('#ledger table')")
        for step in ("end of speech", "hearing", "first sound"):
            assert step in browser.evaluate(says("#ledger"))
        said = browser.evaluate("[...document.querySelectorAll('#chat .user')].map(e => e.innerText)")
        assert all(len(words.strip()) > 3 for words in said[:3])
        assert browser.problems == []
