"""The page in a real browser, as respond.py serves it, with a run that has trained for a moment."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, Browser

from msenc.config.schema import plain
from msenc.files import write_json
from msenc.pipelines.respond import load_agent, respond
from msenc.raw.media import read_audio
from msenc.runs.record import read_run
from msenc.speech.description import parse
from msenc.speech.wav import write_wav
from msenc.talk.agent import Answer, Spoken, Turn, read_talk
from msenc.types import MsencError

pytest.importorskip("gradio", reason="the page needs the extra talk")

from page import served

from msenc.talk.page import Host, draw_sound, finished_runs, read_saved, run_label, show_status, show_voice

ROOT = Path(__file__).parents[2]
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

ANSWERED = "!!document.querySelector('#voice .voice')"


@pytest.fixture(scope="module")
def address(short_run, demo_home, tmp_path_factory):
    """Where the page is served, with narrow limits; when it is ended, nothing that it wrote is left."""
    here, temporary = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("temporary")
    limits = ["max_clip_s=20", "max_upload_mb=1", "decoding.max_new_tokens=24", "speaker=User", "reply_as=Agent"]
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


@needs_browser
def test_the_reply_is_heard_in_another_voice(browser):
    say(browser, "Hello, how are you?")
    browser.wait(ANSWERED)
    browser.type("#description textarea", "a man speaks slowly in a deep voice")
    browser.click("#again")
    browser.wait("document.querySelector('#other-voice audio')?.duration > 0.3")
    chips = "[...document.querySelectorAll('#other-voice .chips span')].map(e => e.innerText)"
    assert browser.evaluate(chips) == ["gender man", "pitch low", "rate slow"]
    source = "document.querySelector('{} audio').src"
    assert browser.evaluate(source.format("#voice")) != browser.evaluate(source.format("#other-voice"))
    chosen = "[...document.querySelectorAll('#change input')].map(e => e.value)"
    assert browser.evaluate(chosen) == ["man", "low", "any", "slow", "any", "any", "any"]


@needs_browser
def test_a_talk_is_saved_and_continued(browser, address, clip, tmp_path):
    give(browser, "video", clip)
    say(browser, "Hello, how are you?")
    browser.wait(ANSWERED)
    browser.click("#save")
    browser.wait("!!document.querySelector('#saved a')")
    saved = tmp_path / "talk.zip"
    urllib.request.urlretrieve(browser.evaluate("document.querySelector('#saved a').href"), saved)
    with zipfile.ZipFile(saved) as archive:
        archive.extractall(tmp_path / "talk")
    user, agent = read_talk(tmp_path / "talk" / "talk.json")
    assert (user.speaker, user.text, agent.speaker) == ("User", "Hello, how are you?", "Agent")
    assert user.video.read_bytes() == clip.read_bytes()
    assert agent.audio.is_file()

    open_page(browser, address)
    assert browser.evaluate("document.querySelectorAll('#chat .bot').length") == 0
    browser.choose_file("input[type=file][accept*=zip]", saved)
    browser.wait("document.querySelector('#status').innerText.includes('talk.zip: 2 turns')")
    say(browser, "Where were we?")
    browser.wait(ANSWERED)
    browser.wait("document.querySelectorAll('#chat .bot').length == 2")
    assert browser.evaluate("document.querySelector('#chat .user').innerText").startswith("Hello, how are you?")


@needs_browser
def test_what_cannot_be_used_is_said_and_the_talk_goes_on(browser, tmp_path):
    text, long = tmp_path / "text.wav", tmp_path / "long.wav"
    text.write_text("no sound", encoding="utf-8")
    write_wav(long, np.zeros(8_000 * 30, np.float32), 8_000)
    large = tmp_path / "large.wav"
    large.write_bytes(bytes(2 << 20))
    browser.click("#text button")
    browser.wait("document.querySelector('#status').innerText.includes('Nothing is said yet')")
    for path, message in [
        (text, "text.wav: it cannot be decoded"),
        (long, "long.wav: lasts longer than 20 s, which is the most for a turn"),
    ]:
        give(browser, "audio", path)
        say(browser, "Hello!")
        browser.wait(f"document.querySelector('#status').innerText.includes('{message}')")
        assert browser.evaluate("document.querySelector('#text textarea').value")  # what was typed is still there
        browser.click("#audio [title=Clear]")
    browser.choose_file("#audio input[type=file]", large)
    browser.wait("document.body.innerText.includes('exceed the maximum allowed size of 1.0 Mb')")
    say(browser, "Hello!")
    browser.wait(ANSWERED)


@needs_browser
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (None, "This machine has none that the browser finds"),
        ("NotAllowedError", "The browser does not allow it: allow the microphone for this page"),
        ("NotReadableError", "Another program holds it"),
    ],
)
def test_a_microphone_that_cannot_be_opened_is_explained_and_the_talk_goes_on(error, message, browser):
    if error is not None:  # as when a person says no
        refusal = f"throw new DOMException('none', '{error}')"
        browser.evaluate(f"navigator.mediaDevices.getUserMedia = async () => {{ {refusal} }}; 1")
    browser.click("#mic")
    browser.wait(f"document.querySelector('#mic-state').innerText.includes('{message}')")
    say(browser, "Hello!")
    browser.wait(ANSWERED)
    browser.wait("!talk.isPlaying()")
    assert message in shown(browser, "#mic-state")  # it stays to be read
    assert not browser.evaluate("talk.isListening()")


@needs_browser
def test_an_example_whose_clip_is_gone_is_refused_in_a_sentence(short_run, demo_home, tmp_path, window):
    data, temporary = tmp_path / "data", tmp_path / "temporary"
    shutil.copytree(demo_home / "data", data)
    temporary.mkdir()
    with served(short_run, temporary, [f"data_dir={data}"]) as (address, _):
        open_page(window, address)
        window.wait("document.querySelectorAll('#examples button').length == 3")
        shutil.rmtree(data / "demo-raw")
        window.click("#examples button")
        window.wait("document.querySelector('#status').innerText.includes('cannot be read any more')")
        assert window.evaluate("document.querySelectorAll('#chat .user').length") == 0
        say(window, "Hello!")
        window.wait(ANSWERED)


@needs_browser
def test_the_page_opens_though_a_run_is_gone_and_another_is_damaged(short_run, tmp_path, window):
    runs, temporary = tmp_path / "runs", tmp_path / "temporary"
    for name in ("first", "second"):
        shutil.copytree(short_run, runs / name)
    (runs / "third").mkdir()
    (runs / "third" / "run.json").write_text("{", encoding="utf-8")
    temporary.mkdir()
    with served(runs / "first", temporary, [f"runs_dir={runs}"]) as (address, _):
        shutil.rmtree(runs / "first")
        window.open(address, 1200)
        window.wait("document.querySelector('#status')?.innerText.includes('reads text, audio and video')")
        status = shown(window, "#status")
        assert "first/run.json: missing" in status
        assert "third/run.json" in status
        say(window, "Hello!")
        window.wait(ANSWERED)


@needs_browser
def test_nothing_on_the_page_is_unnamed_or_cut_off(browser):
    say(browser, "Hello!")
    browser.wait("!!document.querySelector('#ledger table')")
    browser.type("#description textarea", "a woman speaks very expressively, at a moderate pace, moderately loudly")
    browser.click("#again")
    browser.wait("!!document.querySelector('#other-voice audio')")
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    named = {"button", "textbox", "combobox", "Audio", "table", "link"}
    found = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in named
    ]
    assert [role for role, name in found if not name.strip()] == []
    assert len(found) > 20
    assert not any(name.startswith("Textbox") for _, name in found)
    for width in (1280, 390):
        browser.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        cut = "[...document.querySelectorAll('#change input')].filter(e => e.scrollWidth > e.clientWidth)"
        browser.wait(f"{cut}.map(e => e.value).length == 0", 5)


@needs_browser
def test_two_visitors_do_not_see_each_others_talk(browser, address, tmp_path):
    with Browser(tmp_path / "profile") as other:
        open_page(other, address)
        say(browser, "I am Anna.")
        say(other, "I am Ben.")
        for visitor in (browser, other):
            visitor.wait(ANSWERED)
        assert shown(browser, "#chat").startswith("I am Anna.")
        assert "Ben" not in shown(browser, "#chat")
        assert shown(other, "#chat").startswith("I am Ben.")
        assert "Anna" not in shown(other, "#chat")


@needs_browser
def test_a_visitor_who_goes_away_leaves_the_page_to_others(browser, address, tmp_path):
    with Browser(tmp_path / "profile") as other:
        open_page(other, address)
        say(other, "Hello!")
    say(browser, "Are you still there?")
    browser.wait(ANSWERED)


def test_one_model_at_a_time_is_loaded_and_hears_the_talk_so_far(short_run, train, compose, clip, tmp_path):
    text_run = train(["modality=text", "trainer.max_epochs=1", "evaluate=null"]).folder
    config = plain(compose([f"runs_dir={tmp_path}", "decoding.max_new_tokens=8"], "respond"))
    loaded = []

    def load(run):
        loaded.append(run)
        return load_agent(run, config)

    host = Host(load, None, config, tmp_path)
    first, second = host.begin(), host.begin()
    for _ in range(2):
        first = host.answer(host.hear(first, str(short_run), Turn("", "Hello!", video=clip)))[0]
        second = host.answer(host.hear(second, str(short_run), Turn("", "Hello!")))[0]
    assert loaded == [short_run]
    assert len(first.turns) == 4
    assert first.speakers == tuple(read_run(short_run)[0]["speakers"])
    assert first.turns[0].features.keys() == {"audio", "video"}
    first = host.hear(first, str(text_run), Turn("", "And now?", video=clip))
    assert loaded == [short_run, text_run]
    assert [heard.features for heard in first.turns] == [{}] * 5
    assert any("trained without video" in notice for notice in first.turns[-1].notices)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["text=Hello"], "page=true: text is for one reply"),
        (["num_replies=2", "decoding=sample"], "page=true: num_replies is for one reply"),
        (["run_dir=nowhere"], "run_dir=nowhere: does not exist"),
        (["speech=none", "host=192.0.2.1"], "host=192.0.2.1 port=None: cannot be served"),
        (["speech=none", "port={taken}"], "cannot be served .*in use"),
    ],
)
def test_what_a_page_cannot_be_served_with_is_refused(overrides, message, compose):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = [override.format(taken=taken.getsockname()[1]) for override in overrides]
        cfg = compose(["page=true", *given], "respond")
        with pytest.raises(MsencError, match=message):
            respond(cfg)


def test_without_a_run_there_is_nothing_to_talk_to(compose, tmp_path):
    with pytest.raises(MsencError, match="make train"):
        Host(Path, None, plain(compose([], "respond")), tmp_path).agent(None)
    with pytest.raises(MsencError, match="run_dir: no value"):
        respond(compose(["text=Hello"], "respond"))


def test_the_newest_finished_run_comes_first(tmp_path):
    for age, (name, status) in enumerate([("new", "finished"), ("going", "running"), ("old", "finished")]):
        write_json(tmp_path / name / "run.json", {"status": status, "modality": "text_audio"})
        os.utime(tmp_path / name / "run.json", (1e9 - age, 1e9 - age))
    assert finished_runs(tmp_path) == ([tmp_path / "new", tmp_path / "old"], [])
    assert run_label(tmp_path / "old", tmp_path) == "old (text_audio)"


def test_a_saved_talk_reaches_no_file_but_its_own(tmp_path):
    secret = tmp_path / "secret.wav"
    secret.write_bytes(b"")
    path = tmp_path / "talk.json"
    for reference in (str(secret), "../secret.wav"):
        path.write_text(json.dumps({"turns": [{"speaker": "A", "text": "Hi", "audio": reference}]}))
        with pytest.raises(MsencError, match=r"talk.json, turn 1: secret.wav is not in the file"):
            read_saved(path, tmp_path / "unpacked", 1000)
    with zipfile.ZipFile(tmp_path / "talk.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("talk.json", '{"turns": [' + " " * 5000 + "]}")
    with pytest.raises(MsencError, match="holds 1 files, or more than"):
        read_saved(tmp_path / "talk.zip", tmp_path / "unpacked", 1000)
    whole = (tmp_path / "talk.zip").read_bytes()
    (tmp_path / "talk.zip").write_bytes(whole[:20] + bytes(20) + whole[40:])
    with pytest.raises(MsencError, match="cannot be unpacked"):
        read_saved(tmp_path / "talk.zip", tmp_path / "unpacked", 10_000)


def test_what_of_a_voice_description_is_not_understood_is_said():
    def shown(description):
        return show_voice("Voice", Spoken(Answer("Hi.", description, parse(description or ""))), {})

    assert "Not understood: welsh accent" in shown("an elderly man mutters slowly, with a Welsh accent")
    assert "Not understood" not in shown("a man speaks slowly") + shown(None)


def test_what_a_file_or_a_visitor_says_is_no_html():
    assert "<b>" not in show_status(["<b>.wav"]) + show_status(refusal="<b>.wav")


def test_the_pitch_curve_rises_with_the_voice():
    rate = 16_000
    phase = 2 * np.pi * np.cumsum(np.linspace(100, 200, rate)) / rate
    sound = sum(np.sin(k * phase) / k for k in range(1, 9)).astype(np.float32)
    svg, words = draw_sound(sound, rate)
    points = [tuple(map(float, p.split(","))) for p in re.search(r'pitch" points="([^"]*)"', svg)[1].split()]
    assert points[0][0] < points[-1][0] <= 600
    assert points[0][1] > points[-1][1] + 30  # upwards
    assert "1.0 s · pitch 15" in words
    assert draw_sound(np.zeros(100, np.float32), rate)[1] == "<small>0.0 s</small>"
