"""A client of Qwen3-TTS on vLLM-Omni, against a stand-in that follows its documented interface."""

import base64
import json
from contextlib import contextmanager
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler

import numpy as np
import pytest
from local_server import answering

from msenc.speech.synthesizers.qwen import MAX_BATCH, SAMPLE_TEXT, STREAM_RATE, QwenSpeech
from msenc.speech.voice import loudness_lufs, measure
from msenc.speech.wav import from_wav, to_wav
from msenc.types import MsencError, VoiceAttributes

# vLLM-Omni's Speech API: the type of each field, of one request or of a batch's.
FIELDS = {
    "model": str,
    "input": str,
    "voice": str,
    "response_format": str,
    "speed": float,
    "task_type": str,
    "language": str,
    "instructions": str,
    "stream_format": str,
}


def voiced(hertz, seconds=1.5):
    """A sawtooth with a voice's harmonics."""
    time = np.arange(round(seconds * STREAM_RATE)) / STREAM_RATE
    return (0.2 * sum(np.sin(2 * np.pi * n * hertz * time) / n for n in range(1, 12))).astype(np.float32)


class Omni:
    """One server with one model, as vLLM-Omni is: ``VoiceDesign`` or ``Base``.

    Args:
        task: what its model can.
        breaks: whether a stream ends in its middle.
        bad: phrases that a batch fails at.
    """

    def __init__(self, task, breaks=False, bad=()):
        self.task, self.breaks, self.bad = task, breaks, bad
        self.uploaded, self.requests, self.designed = {}, [], 0

    def fault(self, body):
        """What the interface's description says against a request."""
        wrong = [n for n, v in body.items() if not isinstance(v, FIELDS.get(n, ()))]
        if wrong:
            return f"fields {wrong}"
        if body["task_type"] != self.task:
            return f"Qwen3-TTS {self.task} checkpoint does not support task_type={body['task_type']!r}."
        if self.task == "VoiceDesign" and not body.get("instructions"):
            return "VoiceDesign needs instructions"
        if self.task == "Base" and body.get("voice") not in self.uploaded:
            return f"Unknown voice {body.get('voice')!r}"
        if body.get("stream_format") and (body["response_format"] != "pcm" or body.get("speed", 1.0) != 1.0):
            return "Streaming needs pcm and no speed"
        return None

    def speak(self, body):
        if self.task == "VoiceDesign":
            self.designed += 1
            return voiced(150 + 10 * self.designed)  # another voice at each call
        return from_wav(self.uploaded[body["voice"]]["sample"])[0]

    def answer(self, handler, path, content):
        if path == "/v1/audio/voices":
            if content is None:
                rows = [{k: v for k, v in one.items() if k != "sample"} for one in self.uploaded.values()]
                return 200, json.dumps({"voices": [*self.uploaded], "uploaded_voices": rows}).encode()
            kind = handler.headers["Content-Type"]
            form = BytesParser().parsebytes(f"Content-Type: {kind}\r\n\r\n".encode() + content)
            parts = {
                p.get_param("name", header="content-disposition"): p.get_payload(decode=True)
                for p in form.get_payload()
            }
            if missing := {"audio_sample", "consent", "name"} - set(parts):
                return 400, json.dumps({"error": {"message": f"missing {missing}"}}).encode()
            voice = {n: v.decode() for n, v in parts.items() if n != "audio_sample"}
            self.uploaded[voice["name"]] = voice | {"sample": parts["audio_sample"]}
            return 200, json.dumps({"success": True, "voice": voice}).encode()
        body = json.loads(content)
        self.requests.append((path, body))
        items = body.pop("items", None)
        if found := self.fault({**body, "input": body.get("input", "x")}):
            return 400, json.dumps({"error": {"message": found, "type": "BadRequestError", "code": 400}}).encode()
        if path == "/v1/audio/speech/batch":
            results = [self.one_of_batch(body, index, item) for index, item in enumerate(items)]
            return 200, json.dumps({"id": "speech-batch-1", "results": results[::-1], "total": len(items)}).encode()
        samples = self.speak(body)
        if body.get("stream_format"):
            self.send(handler, to_wav(samples, STREAM_RATE)[44:])
            return None
        return 200, to_wav(samples, STREAM_RATE)

    def one_of_batch(self, body, index, item):
        if item["input"] in self.bad:
            return {"index": index, "status": "error", "error": "Input text cannot be spoken"}
        audio = base64.b64encode(to_wav(self.speak(body), STREAM_RATE)).decode()
        return {"index": index, "status": "success", "audio_data": audio, "media_type": "audio/wav"}

    def send(self, handler, pcm):
        """In pieces of an odd number of bytes, each when the former has been read; or only a part of them."""
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for start in range(0, len(pcm) // (2 if self.breaks else 1), 9_001):
            piece = pcm[start : start + 9_001]
            handler.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            handler.wfile.flush()
        if not self.breaks:
            handler.wfile.write(b"0\r\n\r\n")


@contextmanager
def serving(omni):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self, content):
            answer = omni.answer(self, self.path, content)
            if answer is not None:
                status, body = answer
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            self.close_connection = True

        def do_GET(self):
            self.reply(None)

        def do_POST(self):
            self.reply(self.rfile.read(int(self.headers["Content-Length"])))

    with answering(Handler) as url:
        yield url


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def design():
    omni = Omni("VoiceDesign")
    with serving(omni) as omni.url:
        yield omni


@pytest.fixture
def base():
    omni = Omni("Base")
    with serving(omni) as omni.url:
        yield omni


def client(design, base=None, **settings):
    clone = {"clone_url": base.url, "clone_model": "Qwen3-TTS-Base"} if base else {}
    return QwenSpeech(design.url, "Qwen3-TTS-VoiceDesign", **clone, max_retries=0, **settings)


def test_a_description_reaches_the_server_in_its_own_words(design):
    samples, sample_rate = client(design)("Hello. Bye.", "an elderly woman whispers sadly", "Ana")
    assert sample_rate == STREAM_RATE
    assert loudness_lufs(samples, sample_rate) < -28  # a whisper is made quiet
    assert [body["input"] for _, body in design.requests] == ["Hello.", "Bye."]
    assert {body["instructions"] for _, body in design.requests} == {"an elderly woman whispers sadly"}
    client(design)("Hello.", VoiceAttributes("man", rate="slow"))
    assert "slow" in design.requests[-1][1]["instructions"]


def test_a_speaker_is_designed_once_uploaded_and_cloned(design, base):
    speak = client(design, base)
    sounds = [speak("Hello.", voice, "Ana")[0] for voice in ("a woman speaks loudly", "a woman speaks quietly")]
    assert design.designed == 1
    (voice,) = base.uploaded.values()
    assert voice["ref_text"] == SAMPLE_TEXT == design.requests[0][1]["input"]
    assert "woman" in voice["speaker_description"] or "female" in voice["speaker_description"]
    assert {body["voice"] for _, body in base.requests} == {voice["name"]}
    assert loudness_lufs(sounds[0], STREAM_RATE) - loudness_lufs(sounds[1], STREAM_RATE) == pytest.approx(18, abs=1)
    client(design, base)("Hello.", "a woman speaks fast", "Ana")  # another process
    assert design.designed == 1
    assert base.requests[-1][1]["speed"] > 1
    for speaker, gender in (("Ben", "woman"), ("Ana", "man")):
        speak("Hello.", VoiceAttributes(gender), speaker)
    assert design.designed == len(base.uploaded) == 3


def test_a_clone_follows_a_pitch_that_its_server_does_not(design, base):
    speak = client(design, base)
    low, high = (measure(*speak("Hello.", VoiceAttributes("woman", word), "Ana")).f0_hz for word in ("low", "high"))
    assert low < 175 < 220 < high


def test_a_reply_travels_in_one_batch(design, base):
    text = "One. Two. Three."
    samples, _ = client(design, base, batch=2)(text, "a woman speaks", "Ana")
    assert [path for path, _ in base.requests] == ["/v1/audio/speech/batch", "/v1/audio/speech"]
    assert len(samples) > 3 * STREAM_RATE
    one_by_one, _ = client(design, base)(text, "a woman speaks", "Ana")
    np.testing.assert_allclose(samples, one_by_one, atol=1e-4)


def test_a_batch_that_fails_in_part_names_the_sentence():
    with (
        serving(Omni("VoiceDesign", bad=("Two.",))) as url,
        pytest.raises(
            MsencError, match=r"/audio/speech/batch: speech was not made of 'Two\.': Input text cannot be spoken"
        ),
    ):
        QwenSpeech(url, "m", batch=8)("One. Two.", "a man speaks")


def test_a_stream_is_heard_in_pieces_and_is_the_whole_sound(design):
    pieces = [samples for samples, _ in client(design, streaming=True).stream("Hello.", "a man speaks loudly", "Ben")]
    assert len(pieces) > 3
    sound = np.concatenate(pieces)
    assert len(sound) == len(voiced(160))
    assert loudness_lufs(sound, STREAM_RATE) == pytest.approx(-15, abs=1.5)
    assert np.abs(sound).max() < 1
    assert design.requests[0][1]["stream_format"] == "audio"
    # noise is added to a whole sentence
    assert len(list(client(design, streaming=True).stream("Hello.", "a man in a noisy recording", "Ben"))) == 1


def test_a_stream_that_breaks_is_said_and_not_begun_again():
    omni = Omni("VoiceDesign", breaks=True)
    with serving(omni) as url, pytest.raises(MsencError, match=r"broke off after [\d,]+ bytes"):
        list(QwenSpeech(url, "m", streaming=True).stream("Hello.", "a man speaks"))
    assert len(omni.requests) == 1


def test_a_server_of_the_other_task_is_named(design, base):
    with pytest.raises(MsencError, match=r"400.*Base checkpoint does not support task_type='VoiceDesign'"):
        client(base)("Hello.", "a man speaks")
    swapped = QwenSpeech(base.url, "m", clone_url=design.url, clone_model="m", max_retries=0)
    with pytest.raises(MsencError, match=r"400.*Base checkpoint does not support"):
        swapped("Hello.", "a man speaks")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 0}, r"speech\.batch: found 0, expected 1 to 32"),
        ({"batch": MAX_BATCH + 1}, r"speech\.batch: found 33"),
        ({"clone_url": "localhost:8092", "clone_model": "m"}, r"speech\.clone_url: found 'localhost:8092'"),
        ({"clone_url": "http://localhost:8092/v1"}, r"speech\.clone_model=None"),
    ],
)
def test_settings_that_do_not_work_are_refused(settings, message):
    with pytest.raises(MsencError, match=message):
        QwenSpeech("http://localhost/v1", "m", **settings)


def test_what_is_no_answer_of_such_a_server_is_refused(design):
    broken = Omni("Base")
    broken.answer = lambda *_: (200, b"<html>")
    with (
        serving(broken) as broken.url,
        pytest.raises(MsencError, match=r"/audio/voices: found b'<html>', expected JSON"),
    ):
        client(design, broken)("Hello.", "a man speaks", "Ben")
