"""A client of OpenAI's speech interface, against a small real server that checks requests by the documented schema."""

import email.utils
import json
import struct
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

import numpy as np
import pytest
from local_server import answering

from msenc.speech.synthesizers.openai import OpenAISpeech
from msenc.speech.voice import loudness_lufs
from msenc.speech.wav import to_wav
from msenc.types import MsencError, VoiceAttributes

VOICES = {"woman": ["coral", "nova"], "man": ["ash", "echo"]}
TONE = (0.1 * np.sin(2 * np.pi * 200 * np.arange(24_000) / 24_000)).astype(np.float32)

NAMES = [
    "alloy",
    "ash",
    "ballad",
    "coral",
    "echo",
    "fable",
    "onyx",
    "nova",
    "sage",
    "shimmer",
    "verse",
    "marin",
    "cedar",
]

# What OpenAI's reference says of the body of createSpeech: type, and limit or choices.
SCHEMA = {
    "model": (str, None),
    "input": (str, 4096),
    "voice": (str, NAMES),
    "instructions": (str, 4096),
    "response_format": (str, ["mp3", "opus", "aac", "flac", "wav", "pcm"]),
    "speed": (float, [0.25, 4.0]),
    "stream_format": (str, ["sse", "audio"]),
}
REQUIRED = {"model", "input", "voice"}


def faults(body: dict) -> list[str]:
    """What OpenAI's schema would refuse."""
    found = [f"missing {name}" for name in REQUIRED - set(body)] + [f"unknown {n}" for n in set(body) - set(SCHEMA)]
    for name, value in body.items():
        kind, limit = SCHEMA.get(name, (object, None))
        if not isinstance(value, kind):
            found.append(f"type of {name}")
        elif isinstance(limit, int) and not 0 < len(value) <= limit:
            found.append(f"length of {name}")
        elif isinstance(limit, list) and kind is str and value not in limit:
            found.append(f"{name}={value}")
    return found


@contextmanager
def serving(*answers):
    """A server that gives the answers one after another, and the last one from then on.

    An answer is (status, headers, body), or a function that is called with the handler.
    """
    received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = answers[min(len(received), len(answers) - 1)]
            received.append((self.path, dict(self.headers), body))
            if callable(answer):
                answer(self)
                return
            status, headers, content = answer
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    with answering(Handler) as url:
        yield url, received


SPOKEN = (200, {"Content-Type": "audio/wav"}, to_wav(TONE, 24_000))


def fault(status, headers=None, **error):
    return status, headers or {}, json.dumps({"error": error}).encode()


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def waits(monkeypatch):
    """Seconds that the client would have waited."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def client(url, **settings):
    return OpenAISpeech(url, "gpt-4o-mini-tts", VOICES, **settings)


def test_requests_follow_the_documented_schema():
    with serving(SPOKEN) as (url, received):
        speak = client(url + "/")
        samples, sample_rate = speak("Hello there. How are you?", "a woman speaks quickly in a quiet voice", "Ana")
        quiet, loud = (speak("Hello.", VoiceAttributes(loudness=word), "Ana")[0] for word in ("quiet", "loud"))
    assert sample_rate == 24_000
    assert len(samples) > 2 * len(TONE)
    assert loudness_lufs(loud, sample_rate) - loudness_lufs(quiet, sample_rate) == pytest.approx(18, abs=0.5)
    assert [faults(body) for _, _, body in received] == [[]] * 4
    assert [body["input"] for _, _, body in received] == ["Hello there.", "How are you?", "Hello.", "Hello."]
    path, headers, body = received[0]
    assert path == "/v1/audio/speech"
    assert headers["Authorization"] == "Bearer secret-key"
    assert headers["Content-Type"] == "application/json"
    assert body["voice"] in VOICES["woman"]
    assert body["voice"] == received[1][2]["voice"]
    assert body["instructions"] == "a woman speaks quickly in a quiet voice"  # moods and all, in its own words
    assert "loud" in received[3][2]["instructions"]
    assert body["response_format"] == "wav"
    assert faults({"input": "", "voice": "robot", "pitch": 1}) == [
        "missing model",
        "unknown pitch",
        "length of input",
        "voice=robot",
    ]


def test_a_server_of_ones_own_needs_no_key_and_may_take_more(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with serving(SPOKEN) as (url, received):
        client(url, extra={"task_type": "VoiceDesign"})("Hi.", "a man speaks slowly")
    assert "Authorization" not in received[0][1]
    assert received[0][2]["task_type"] == "VoiceDesign"


def test_a_stream_of_unknown_length_is_read():
    content = bytearray(to_wav(TONE, 24_000))
    struct.pack_into("<I", content, 4, 0xFFFFFFFF)
    struct.pack_into("<I", content, 40, 0xFFFFFFFF)
    with serving((200, {}, bytes(content))) as (url, _):
        samples, _ = client(url).synthesize("Hi.", VoiceAttributes(), None)
    np.testing.assert_allclose(samples, TONE, atol=1e-4)


def test_a_busy_server_is_asked_again_when_it_says(waits):
    soon = email.utils.formatdate(time.time() + 20, usegmt=True)
    limit = {"type": "requests", "code": "rate_limit_exceeded", "message": "Rate limit reached."}
    answers = fault(429, {"Retry-After": "7"}, **limit), fault(503, {"Retry-After": soon}), fault(500), SPOKEN
    with serving(*answers) as (url, received):
        samples, _ = client(url)("Hi.", "a man speaks slowly")
    assert len(samples) > len(TONE) / 2
    assert len(received) == 4
    assert waits == [7.0, pytest.approx(20, abs=2), 2.0]


def test_a_limit_that_stays_or_a_long_wait_is_refused(waits):
    limit = fault(429, {"Retry-After": "1"}, code="rate_limit_exceeded", message="Rate limit reached.")
    with (
        serving(limit) as (url, received),
        pytest.raises(MsencError, match=r"after 3 request.*429.*Rate limit reached"),
    ):
        client(url, max_retries=2)("Hi.", "a man speaks slowly")
    assert len(received) == 3
    assert waits == [1.0, 1.0]
    hours = fault(429, {"Retry-After": "7200"}, message="Come back.")
    with serving(hours) as (url, received), pytest.raises(MsencError, match=r"1 request.*asks to wait 7200 s"):
        client(url)("Hi.", "a man speaks slowly")
    spent = fault(429, code="insufficient_quota", message="You exceeded your current quota.")
    with serving(spent) as (url, received), pytest.raises(MsencError, match=r"1 request.*insufficient_quota You exc"):
        client(url)("Hi.", "a man speaks slowly")
    assert len(received) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (fault(401, message="Incorrect API key provided."), r"401.*Incorrect API key.*OPENAI_API_KEY"),
        (fault(404, code="model_not_found", message="No such model."), r"404.*model_not_found No such.*speech\.model"),
        (fault(400, type="invalid_request_error", message="Bad voice."), "400.*invalid_request_error Bad voice"),
        ((400, {}, b"<html>\n proxy </html>"), r"400 Bad Request: <html> proxy </html>\."),
        ((302, {"Location": "http://127.0.0.1:9/elsewhere"}, b""), "302 Found"),
        ((200, {}, b'{"status": "queued"}'), "found b'.*expected a WAV file"),
        ((200, {}, b""), "expected a WAV file"),
        ((200, {}, to_wav(TONE[:0], 24_000)), "WAV file without samples, expected speech for 'Hi.'"),
        ((200, {}, b"ID3" + bytes(200)), "expected a WAV file"),
    ],
)
def test_a_refusal_says_what_the_server_says(answer, message, waits):
    with serving(answer) as (url, received), pytest.raises(MsencError, match=message) as caught:
        client(url)("Hi.", "a man speaks slowly")
    assert len(received) == 1
    assert waits == []
    assert f"{url}/audio/speech" in str(caught.value)
    assert "secret-key" not in str(caught.value)


def test_a_server_that_is_silent_or_gone_is_named(waits):
    with serving(lambda handler: threading.Event().wait(0.5)) as (url, received):
        with pytest.raises(MsencError, match=r"after 2 request.*no answer within 0\.1 s"):
            client(url, timeout_s=0.1, max_retries=1)("Hi.", "a man speaks slowly")
        assert len(received) == 2
    with pytest.raises(MsencError, match=r"after 1 request.*Is the server running there\?"):
        client(url, max_retries=0)("Hi.", "a man speaks slowly")


def test_a_connection_that_breaks_is_tried_again(waits):
    def hang_up(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "999999")
        handler.end_headers()
        handler.wfile.write(b"RIFF")

    with serving(hang_up, SPOKEN) as (url, received):
        client(url)("Hi.", "a man speaks slowly")
    assert len(received) == 2


@pytest.mark.parametrize("address", ["", "localhost:8000/v1", "file:///etc"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(MsencError, match=r"speech\.base_url.*expected an address"):
        client(address)
    with pytest.raises(MsencError, match=r"speech\.voices\.man"):
        OpenAISpeech("http://localhost/v1", "m", {"woman": ["a"]})
