"""The listening page in a real browser, opened as a file: what listeners see and hear, and the file that they send."""

import json
import time

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from clips import write_media
from listeners import HOSTILE, call, make_page, prefer, write_spoken_sweep

from msenc.report.listening.answers import read_answers
from msenc.report.listening.heard import judge
from msenc.report.listening.study import CHECKS, QUESTIONS

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

TRIALS = 8
AGAIN = "!document.getElementById('begin').hidden"
HEADING = "document.querySelector('#trial h1').textContent"

# A listener who hears every sound to its end, then chooses by the sounds' names, as preferences[item][question] say.
LISTEN = """(async (listener, preferences) => {
  const choose = (name, value) => document.querySelector(`input[name="${name}"][value="${value}"]`).click();
  document.getElementById("listener").value = listener;
  document.querySelector("[name=agreed]").checked = true;
  document.querySelector("#begin button").click();
  while (!document.getElementById("trial").hidden) {
    const trial = order[state.done.length];
    for (const audio of document.querySelectorAll("#replies audio")) {
      const over = new Promise(resolve => audio.addEventListener("ended", resolve));
      await audio.play();
      await over;
    }
    for (const [question, wanted] of Object.entries(preferences[trial.id])) {
      const side = trial.sounds.indexOf(wanted);
      choose(question, side < 0 ? wanted : study.kind === "ab" ? "AB"[side] : "1");
    }
    document.querySelector("#trial button").click();
  }
  document.getElementById("download").click();
  return document.getElementById("download").download;
})"""


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A sweep with clips, and its page."""
    sweep = write_spoken_sweep(tmp_path_factory.mktemp("spoken"), seconds=0.02, clip=write_media)
    return sweep, *make_page(sweep, listen_trials=TRIALS)


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(window, spoken):
    """The page, just opened by nobody who has been there."""
    window.problems.clear()
    open_page(window, spoken, 1280)
    window.evaluate("localStorage.clear()")
    open_page(window, spoken, 1280)
    window.requests.clear()
    return window


def open_page(browser, spoken, width, query=""):
    browser.open((spoken[1] / "index.html").as_uri() + query, width)


def begin(browser, code="anna"):
    browser.type("#listener", code)
    browser.click("[name=agreed]")
    browser.click("#begin button")
    browser.wait("!document.getElementById('trial').hidden")


def hear(browser, number):
    """Play a reply by its own controls."""
    browser.evaluate(f"document.querySelectorAll('#replies audio')[{number}].focus()")
    press(browser, " ")
    browser.wait(f"document.querySelectorAll('#replies audio')[{number}].dataset.heard === 'yes'")


def press(browser, key):
    codes = {" ": ("Space", 32), "Tab": ("Tab", 9), "Enter": ("Enter", 13), "ArrowRight": ("ArrowRight", 39)}
    code, number = codes[key]
    options = {"key": key, "code": code, "windowsVirtualKeyCode": number}
    options |= {"text": {" ": " ", "Enter": "\r"}[key]} if key in (" ", "Enter") else {}
    for kind in ("keyDown", "keyUp"):
        browser.send("Input.dispatchKeyEvent", type=kind, **options)


def test_thirty_listeners_with_a_planted_preference(browser, spoken, tmp_path):
    sweep, page, study = spoken
    browser.send("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.click("[name=agreed]")  # a person's click, after which pages may play
    rng = np.random.default_rng(20)
    sides = []
    for n in range(30):
        chosen = prefer(study, "text_audio", 0.65, rng)
        wanted = {t["id"]: {q: chosen[t["id"], q] for q in QUESTIONS} for t in study["trials"]}
        name = browser.evaluate(f"{LISTEN}('L{n}', {json.dumps(wanted)})")
        until = time.monotonic() + 20
        while not (tmp_path / name).exists():
            assert time.monotonic() < until, f"{name} was not downloaded"
            time.sleep(0.02)
        sides.append(tuple(line.split(",")[3:7] for line in (tmp_path / name).read_text().splitlines()[1::3]))
        browser.click("#again")
    found_study, listeners, problems = read_answers(tmp_path, {study["page"]: study})
    assert (found_study, len(listeners), problems) == (study, 30, [])
    heard = judge(study, listeners)
    assert heard.listeners == 30  # all attentive
    for j in heard.judgements:
        assert j.effect.low < 0.65 < j.effect.high, j
        assert j.adjusted < 0.05
    call(sweep, answers=str(tmp_path))
    assert "30 listeners, 8 trials each" in (sweep / "report" / "report.html").read_text()
    # every listener has an order and sides of their own, half of them one way round
    assert len({tuple(row[0] for row in rows) for rows in sides}) == 30
    of = {sound["id"]: sound["of"] for trial in study["trials"] if not trial["is_check"] for sound in trial["sounds"]}
    is_check = {trial["id"]: trial["is_check"] for trial in study["trials"]}
    for rows in sides:
        assert sum(of[first] == "text" for item, _, first, _ in rows if not is_check[item]) == TRIALS / 2
    assert len({tuple(sorted((item, first) for item, _, first, _ in rows)) for rows in sides}) > 20
    places = [n for rows in sides for n, (item, *_) in enumerate(rows) if is_check[item]]
    assert min(places) < 2
    assert max(places) > TRIALS + CHECKS - 3
    outside = [r for r in browser.requests if not r.startswith((page.as_uri(), "data:", "blob:"))]
    assert outside == []
    assert browser.problems == []


def test_nothing_is_answered_before_it_is_heard_and_asked(browser):
    assert browser.evaluate("document.getElementById('trial').hidden")
    browser.click("#begin button")  # without consent
    assert browser.evaluate("document.getElementById('trial').hidden")
    begin(browser)
    browser.click("#trial button")
    said = browser.evaluate("document.getElementById('lacking').textContent")
    assert said == "Listen to both replies to their end. Answer every question."
    hear(browser, 0)
    for question in QUESTIONS:
        browser.evaluate(f"document.querySelector('input[name={question}][value=A]').click()")
    browser.click("#trial button")
    assert browser.evaluate("document.getElementById('lacking').textContent") == "Listen to both replies to their end."
    hear(browser, 1)
    browser.click("#trial button")
    browser.wait(f"{HEADING} === '2 of {TRIALS + CHECKS}'")
    assert browser.problems == []


def test_the_page_is_used_by_the_keyboard_alone(browser):
    browser.evaluate("document.getElementById('listener').focus()")
    press(browser, "Tab")
    press(browser, " ")
    press(browser, "Tab")
    press(browser, "Enter")
    browser.wait("!document.getElementById('trial').hidden")
    assert browser.evaluate("document.activeElement.textContent") == f"1 of {TRIALS + CHECKS}"
    browser.wait("[...document.querySelectorAll('audio, video')].every(media => media.readyState === 4)")
    for number in (0, 1):
        for _ in range(40):
            press(browser, "Tab")
            if browser.evaluate(f"document.activeElement === document.querySelectorAll('#replies audio')[{number}]"):
                break
        press(browser, " ")
        browser.wait(f"document.querySelectorAll('#replies audio')[{number}].dataset.heard === 'yes'")
    for question in QUESTIONS:
        for _ in range(20):
            press(browser, "Tab")
            if browser.evaluate(f"document.activeElement.name === '{question}'"):
                break
        press(browser, " ")
        press(browser, "ArrowRight")
        assert browser.evaluate(f"new FormData(document.getElementById('trial')).get('{question}')") == "same"
    press(browser, "Tab")
    press(browser, "Enter")
    browser.wait(f"{HEADING} === '2 of {TRIALS + CHECKS}'")


def test_progress_is_kept_and_another_listener_begins_anew(browser, spoken):
    begin(browser)
    first = browser.evaluate("order.map(trial => [trial.id, ...trial.sounds])")
    hear(browser, 0)
    hear(browser, 1)
    for question in QUESTIONS:
        browser.evaluate(f"document.querySelector('input[name={question}][value=same]').click()")
    browser.click("#trial button")
    open_page(browser, spoken, 1280)
    assert browser.evaluate(HEADING) == f"2 of {TRIALS + CHECKS}"
    assert browser.evaluate("order.map(trial => [trial.id, ...trial.sounds])") == first
    open_page(browser, spoken, 1280, "?listener=ben")
    assert browser.evaluate(AGAIN)
    assert browser.evaluate("document.getElementById('listener').value") == "ben"
    begin(browser, "ben")
    assert browser.evaluate(HEADING) == f"1 of {TRIALS + CHECKS}"
    assert browser.evaluate("order.map(trial => [trial.id, ...trial.sounds])") != first
    open_page(browser, spoken, 1280, "?listener=anna")
    begin(browser)
    assert browser.evaluate(HEADING) == f"2 of {TRIALS + CHECKS}"


def test_what_is_kept_and_is_no_progress_is_not_believed(browser, spoken):
    for found in ("[]", "null", "{", '{"listener": "anna", "done": [{"answers": {"context": "C"}, "seconds": 1}]}'):
        kept = f"msenc-listen-{spoken[2]['page']}/anna"
        browser.evaluate(f"localStorage.setItem({json.dumps(kept)}, {json.dumps(found)})")
        open_page(browser, spoken, 1280, "?listener=anna")
        begin(browser)
        assert browser.evaluate(HEADING) == f"1 of {TRIALS + CHECKS}"
        browser.evaluate("localStorage.clear()")
    assert browser.problems == []


@pytest.mark.parametrize("width", [390, 1280])
def test_it_is_readable_and_shows_the_conversation(browser, spoken, width):
    open_page(browser, spoken, width)
    fits = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    assert browser.evaluate(fits)
    begin(browser)
    assert browser.evaluate(fits)
    shown = browser.evaluate("document.getElementById('context').innerText")
    assert f"Ana {HOSTILE}: words 0 {HOSTILE}" in shown  # as text
    browser.wait("document.querySelector('#context video').readyState > 0")
    assert browser.evaluate("document.querySelector('#context video').videoWidth") == 48
    smallest = "Math.min(...[...document.querySelectorAll('.choices label')].map(e => e.clientHeight))"
    assert browser.evaluate(smallest) >= 40  # a finger's
    assert browser.evaluate("[...document.querySelectorAll('#replies audio')].every(a => a.clientWidth > 150)")
    assert browser.problems == []


def test_a_sound_that_is_missing_is_named(browser, spoken, tmp_path):
    _, page, _ = spoken
    moved = tmp_path / "page"
    moved.mkdir()
    (moved / "index.html").write_bytes((page / "index.html").read_bytes())
    browser.open((moved / "index.html").as_uri(), 1280)
    begin(browser)
    browser.wait("document.getElementById('trouble').textContent.includes('Is the whole folder of this page there?')")
    browser.problems.clear()


def test_one_reply_is_rated_from_one_to_five(browser, spoken, tmp_path):
    sweep, *_ = spoken
    page, study = make_page(sweep, listen="rating", listen_trials=4, listen_consent=f"I agree. {HOSTILE}")
    browser.send("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.open((page / "index.html").as_uri(), 390)
    assert f"I agree. {HOSTILE}" in browser.evaluate("document.getElementById('begin').innerText")
    browser.click("[name=agreed]")
    wanted = {t["id"]: dict.fromkeys(QUESTIONS, "1" if t["is_check"] else "4") for t in study["trials"]}
    name = browser.evaluate(f"{LISTEN}('L0', {json.dumps(wanted)})")
    browser.wait("!!document.getElementById('download').href")
    until = time.monotonic() + 20
    while not (tmp_path / name).exists() and time.monotonic() < until:
        time.sleep(0.02)
    heard = judge(*read_answers(tmp_path, {study["page"]: study}))
    means = [j.effect.mean for j in heard.judgements if j.baseline is None]
    assert means == [4.0] * 2 * len(QUESTIONS)
    assert browser.problems == []
