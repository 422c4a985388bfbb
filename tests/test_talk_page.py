"""The page in a real browser, as respond.py serves it, with a run that has trained for a moment."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser

from msenc.data.media import read_audio
from msenc.speech.wav import write_wav

pytest.importorskip("gradio", reason="the page needs the extra talk")


ROOT = Path(__file__).parents[1]
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

ANSWERED = "!!document.querySelector('#voice audio')"


@pytest.fixture(scope="module")
def address(short_run, demo_home, tmp_path_factory):
    """Where the page is served, with narrow limits; when it is ended, nothing that it wrote is left."""
    here, temporary = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("temporary")
    limits = ["max_clip_s=6", "max_upload_mb=1", "decoding.max_new_tokens=24"]
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "respond.py"), "page=true", f"run_dir={short_run}", f"runs_dir={here}", *limits],
        cwd=here,
        env={**os.environ, "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        line = server.stdout.readline()
        yield re.search(r"http://127\.0\.0\.1:\d+/", line)[0]
    finally:
        server.send_signal(signal.SIGTERM)
        said = server.communicate(timeout=30)[0]
    assert (server.returncode, said) == (0, "")
    assert [*here.iterdir(), *temporary.iterdir()] == []


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(window, address):
    """The page, just opened."""
    window.requests.clear()
    window.problems.clear()
    open_page(window, address)
    return window


@pytest.fixture(scope="module")
def clip(demo_home):
    """A video of the demo."""
    return sorted((demo_home / "data" / "demo-raw").rglob("*.mp4"))[0]


@pytest.fixture(scope="module")
def sound(clip, tmp_path_factory):
    """Its sound."""
    path = tmp_path_factory.mktemp("sound") / "hello.wav"
    write_wav(path, read_audio(clip, 16_000), 16_000)
    return path


def open_page(browser, address, width=1200):
    browser.open(address, width)
    browser.wait("document.querySelector('#status')?.innerText.includes('reads text, audio and video')")


def say(browser, text):
    browser.type("#text textarea", text)
    browser.click("#text button")


def give(browser, kind, path):
    """Upload a file, and wait until it lies there."""
    browser.choose_file(f"#{kind} input[type=file]", path)
    browser.wait(f"!!document.querySelector('#{kind} [title=Clear]')")


def shown(browser, selector):
    return browser.evaluate(f"document.querySelector('{selector}').innerText")


@needs_browser
@pytest.mark.parametrize("width", [390, 1200])
def test_a_turn_of_all_streams_is_answered_in_words_and_sound(width, browser, address, clip, sound):
    open_page(browser, address, width)
    say(browser, "Hello, how are you?")
    browser.wait(ANSWERED)
    assert "The run was trained with audio, this turn has none" in shown(browser, "#status")
    give(browser, "audio", sound)
    give(browser, "video", clip)
    say(browser, "And now?")
    browser.wait("document.querySelectorAll('#chat .bot').length == 2 && !!document.querySelector('#chat video')")
    browser.wait("document.querySelector('#chat video').duration > 0.3")
    assert shown(browser, "#status").strip() == ""  # nothing was missing
    voice = shown(browser, "#voice")
    assert "features" in voice
    assert "speaking" in voice
    assert browser.evaluate("!!document.querySelector('#voice svg .wave')")
    browser.wait("document.querySelector('#voice audio').duration > 0.3")
    assert len(browser.evaluate("[...document.querySelectorAll('#chat .bot .md')].at(-1).innerText").strip()) > 1
    assert browser.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert [r for r in browser.requests if not r.startswith((address, "data:", "blob:"))] == []
