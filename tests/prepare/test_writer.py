"""Descriptions by a language model: checked, counted, kept; against a small server with OpenAI's chat interface."""

import json
import time
from contextlib import contextmanager
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler

import pytest
from local_server import answering

from msenc.prepare import writer
from msenc.prepare.describe import describe_dialogues, describe_settings
from msenc.prepare.writer import NOT_READ_BACK, VARIANTS, checked, write_sentences
from msenc.raw.annotations import read_meld
from msenc.speech.attributes import VoiceSettings
from msenc.speech.description import parse
from msenc.types import MsencError, VoiceAttributes

FAST = VoiceAttributes("woman", rate="fast")
DEEP = VoiceAttributes("man", pitch="low")


@contextmanager
def serving(write):
    """A server whose model's answer to the template's sentence is `write` of it: a text, or a status and bytes."""
    received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received.append((self.path, body))
            found = write(body["messages"][-1]["content"])
            if isinstance(found, str):
                found = 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": found}}]}).encode()
            self.send_response(found[0])
            self.send_header("Content-Length", str(len(found[1])))
            self.end_headers()
            self.wfile.write(found[1])

    with answering(Handler) as url:
        yield f"{url}/", received


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def settings(url, **more):
    return VoiceSettings(levels=2, writer="llm", writer_url=url, **more)


def test_sentences_are_asked_for_once_and_read_back(tmp_path, monkeypatch):
    def write(template):
        return "She is talking in a hurry." if parse(template) == FAST else "he mumbles"

    with serving(write) as (url, received):
        first = write_sentences([FAST, DEEP, FAST], settings(url), tmp_path)
        assert len(received) == 2 * VARIANTS
        path, body = received[0]
        assert path == "/v1/chat/completions"
        assert body["model"] == "llm"
        assert {parse(b["messages"][-1]["content"]) for _, b in received} == {FAST, DEEP}
        assert write_sentences([FAST, DEEP], settings(url), tmp_path) == first
        assert len(received) == 2 * VARIANTS
    assert first == {FAST: ["she is talking in a hurry"] * VARIANTS, DEEP: [None] * VARIANTS}
    of_another = VoiceSettings(writer="other", writer_url="http://127.0.0.1:9/v1")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(MsencError, match="Is the server running there"):  # another model's are not the same
        write_sentences([FAST], of_another, tmp_path)


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ('"A woman is speaking hurriedly."', "a woman is speaking hurriedly"),
        ("A woman who\nspeaks rapidly", "a woman who speaks rapidly"),
        ("someone speaks rapidly", None),
        ("a man speaks rapidly", None),
        ("a woman speaks rapidly and loudly", None),
        ("a woman speaks rapidly, with a lisp", None),
        ("a woman speaks rapidly (as ever)", None),
        ("a woman speaks angrily", None),
        ("", None),
        ("a woman speaks rapidly " + "and so on " * 20, None),
    ],
)
def test_a_sentence_says_the_same_and_no_more(sentence, expected):
    assert checked(sentence, FAST) == expected


def test_what_was_written_before_a_refusal_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_REQUESTS", 1)
    answers = iter(["a woman talks quickly"] * 2 + [(400, b'{"error": {"message": "The model is out."}}')])
    with serving(lambda _: next(answers)) as (url, received):
        with pytest.raises(MsencError, match=r"chat/completions: a description was not made.*400.*The model is out"):
            write_sentences([FAST], settings(url), tmp_path)
        assert len((tmp_path / writer.CACHE).read_text(encoding="utf-8").splitlines()) == 2
    with serving(lambda _: "a woman talks fast") as (url, received):
        assert len(write_sentences([FAST], settings(url), tmp_path)[FAST]) == VARIANTS
        assert len(received) == VARIANTS - 2


@pytest.mark.parametrize(
    "content", [b"<html>", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}']
)
def test_what_is_no_completion_is_refused(content, tmp_path):
    with serving(lambda _: (200, content)) as (url, _), pytest.raises(MsencError, match="expected a chat completion"):
        write_sentences([FAST], settings(url), tmp_path)


def test_an_address_that_is_none_is_refused():
    with pytest.raises(MsencError, match=r"data\.voice\.writer_url: found 'localhost', expected an address"):
        VoiceSettings(writer="llm", writer_url="localhost")


def test_the_address_is_not_among_the_settings_and_without_a_writer_nothing_is_new():
    assert "writer_url" not in describe_settings(settings("http://localhost:1/v1"))
    assert describe_settings(settings("http://localhost:1/v1"))["writer"] == "llm"
    assert "writer" not in describe_settings(VoiceSettings())


def test_turns_are_described_by_the_writer_or_the_template(demo_home, tmp_path):
    """A writer that knows women only: the men's sentences are the template's, and each source is counted."""
    raw = demo_home / "data" / "demo-raw"
    dialogues = [d for d in read_meld(raw, "demo").dialogues if d.split == "train"][:6]

    def write(template):
        return template.replace("a woman", "a lady").replace("a female speaker", "a lady").replace("someone", "a man")

    with serving(lambda template: write(template) if "wom" in template or "female" in template else "no idea") as (
        url,
        _,
    ):
        after, _ = describe_dialogues(dialogues, raw, tmp_path, settings(url, overwrite=True), 0, [])
    rows = [json.loads(line) for line in (tmp_path / "voice-turns.jsonl").read_text(encoding="utf-8").splitlines()]
    sources = {row["id"]: row["description_source"] for row in rows}
    assert set(sources.values()) - {None} == {"writer", NOT_READ_BACK}
    for dialogue in after:
        for turn in dialogue.utterances:
            source = sources[f"{dialogue.id}/utt{turn.id}"]
            if source is not None:
                assert asdict(parse(turn.description)) == asdict(turn.attributes)
                assert ("a lady" in turn.description) == (source == "writer") == (turn.attributes.gender == "woman")
