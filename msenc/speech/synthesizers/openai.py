"""Any server with OpenAI's ``/v1/audio/speech`` as a synthesizer: hosted, or one's own (vLLM-Omni with Qwen3-TTS ...).

The voice description travels as ``instructions``, which not every model follows.
"""

import email.utils
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.client import HTTPException, HTTPResponse, IncompleteRead
from random import Random
from typing import Any

import numpy as np

from msenc.speech.acting import act
from msenc.speech.description import describe
from msenc.speech.synthesis import SentenceSynthesizer, choose, read_voice, sentences_of
from msenc.speech.wav import from_wav
from msenc.types import UNKNOWN, MsencError, VoiceAttributes

MAX_WAIT_S = 60.0
"""Longest time that a server may ask to be left alone; beyond it, the request is given up."""

MAX_BYTES = 100_000_000
_RETRIED = (408, 409, 429, 500, 502, 503, 504)
_HINTS = {
    401: " Put a valid key into OPENAI_API_KEY.",
    403: " The key in OPENAI_API_KEY may not do this.",
    404: " Look at {where}.",
}


class ServerError(MsencError):
    """A server that did not do what it was asked for.

    Args:
        message: the whole of it.
        problem: what the server said, or did not.
        is_final: the same request will fail again.
    """

    def __init__(self, message: str, problem: str, is_final: bool) -> None:
        super().__init__(message)
        self.problem = problem
        self.is_final = is_final


def check_address(key: str, value: str, advice: str = " Set OPENAI_BASE_URL.") -> None:
    """Refuse what is no address of a server.

    Args:
        key: of the config, that holds it.
        value: what it holds.
        advice: what else to do.

    Raises:
        MsencError: names the key.
    """
    if not value.startswith(("http://", "https://")):
        raise MsencError(f"{key}: found {value!r}, expected an address such as http://localhost:8000/v1.{advice}")


def completion(content: bytes) -> str | None:
    """The text of a chat completion; None where the model has given none.

    Raises:
        ValueError: it is no completion.
    """
    try:
        text = json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"found {content[:80]!r}, expected a chat completion") from error
    if text is not None and not isinstance(text, str):
        raise ValueError(f"found {content[:80]!r}, expected a chat completion")
    return text


class Server:
    """Requests to a server with OpenAI's interface; its key, if it needs one, is in ``OPENAI_API_KEY``.

    Args:
        timeout_s: longest silence of the server.
        max_retries: of one request, when the server is busy or does not answer.
        what: is made there, for messages.
        where: the config says where it is, for messages.
    """

    def __init__(self, timeout_s: float, max_retries: int, what: str, where: str) -> None:
        self.timeout_s = timeout_s
        self.max_retries = max_retries
        self.what = what
        self.where = where

    def ask(
        self,
        url: str,
        body: bytes | None,
        content_type: str = "application/json",
        take: Callable[[HTTPResponse], bytes] | None = None,
    ) -> bytes:
        """The server's answer; asks again where that may help.

        Args:
            url: of what is asked.
            body: of a POST; None sends a GET.
            content_type: of the body.
            take: what to do with the answer, before the connection is closed; by default it is read.

        Raises:
            ServerError: it refuses, or does not answer.
            MsencError: it sends too much.
        """
        for attempt in range(self.max_retries + 1):
            wait_s = 0.5 * 2**attempt
            try:
                return self._ask_once(body, url, content_type, take or self._read)
            except urllib.error.HTTPError as error:
                problem, is_final = _explain(error), error.code not in _RETRIED
                is_final = is_final or "insufficient_quota" in problem
                wait_s = _retry_after(error.headers.get("Retry-After")) or wait_s
                problem += _HINTS.get(error.code, "").format(where=self.where)
            except TimeoutError:
                problem, is_final = f"no answer within {self.timeout_s:g} s", False
            except (urllib.error.URLError, HTTPException, OSError) as error:
                is_slow = isinstance(getattr(error, "reason", None), TimeoutError)
                reason = f"no answer within {self.timeout_s:g} s" if is_slow else getattr(error, "reason", error)
                problem, is_final = f"{reason}. Is the server running there?", False
            if is_final or attempt == self.max_retries or wait_s > MAX_WAIT_S:
                break
            time.sleep(wait_s)
        asked = f" It asks to wait {wait_s:.0f} s." if wait_s > MAX_WAIT_S else ""
        message = f"{url}: {self.what} was not made, after {attempt + 1} request(s): {problem}{asked}"
        raise ServerError(message, problem, is_final)

    def _ask_once(
        self, body: bytes | None, url: str, content_type: str, take: Callable[[HTTPResponse], bytes]
    ) -> bytes:
        headers = {"Content-Type": content_type, "Accept": "audio/wav, application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(url, body, headers)
        # redirects would carry the key to another server
        opener = urllib.request.build_opener(_NoRedirect)
        with opener.open(request, timeout=self.timeout_s) as answer:
            return take(answer)

    def _read(self, answer: HTTPResponse) -> bytes:
        content = answer.read(MAX_BYTES + 1)
        missing = int(answer.headers.get("Content-Length") or 0) - len(content)
        if missing > 0 and len(content) <= MAX_BYTES:  # a read with a limit takes a cut answer for a whole one
            raise IncompleteRead(content, missing)
        if len(content) > MAX_BYTES:
            raise MsencError(f"{answer.url}: found more than {MAX_BYTES:,} bytes, expected {self.what}.")
        return content


class OpenAISpeech(SentenceSynthesizer):
    """A client of one server; its key, if it needs one, is in ``OPENAI_API_KEY``.

    Args:
        base_url: up to and with ``/v1``.
        model: its name there.
        voices: gender -> names of the server's voices.
        extra: more fields of a request, which servers add to OpenAI's (``task_type`` ...).
        timeout_s: longest silence of the server.
        max_retries: of one request, when the server is busy or does not answer.

    Raises:
        MsencError: the address is none, or a gender has no voice.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        voices: Mapping[str, Sequence[str]],
        extra: Mapping[str, Any] | None = None,
        timeout_s: float = 60.0,
        max_retries: int = 3,
    ) -> None:
        check_address("speech.base_url", base_url)
        for gender in ("woman", "man"):
            if not voices.get(gender):
                raise MsencError(f"speech.voices.{gender}: found no voice, expected at least one name.")
        self.url = f"{base_url.rstrip('/')}/audio/speech"
        self.model = model
        self.voices = voices
        self.extra = dict(extra or {})
        self.server = Server(timeout_s, max_retries, "speech", "speech.base_url (it ends in /v1) and speech.model")

    def stream(
        self, text: str, voice: VoiceAttributes | str, speaker: str | None = None
    ) -> Iterator[tuple[np.ndarray, int]]:
        """See `SentenceSynthesizer`; phrasing is the server's, and a description reaches it in its own words."""
        attributes = read_voice(voice)
        for sentence in sentences_of(text):
            samples, sample_rate = self._speak(sentence, attributes, words_of(voice), speaker)
            yield act([samples], sample_rate, attributes), sample_rate

    def synthesize(self, phrase: str, voice: VoiceAttributes, speaker: str | None) -> tuple[np.ndarray, int]:
        """See `SentenceSynthesizer`."""
        return self._speak(phrase, voice, words_of(voice), speaker)

    def _speak(self, phrase: str, voice: VoiceAttributes, words: str, speaker: str | None) -> tuple[np.ndarray, int]:
        gender = voice.gender if voice.gender != UNKNOWN else choose(("woman", "man"), speaker)
        body = {
            "model": self.model,
            "input": phrase,
            "voice": choose(self.voices[gender], speaker),
            "instructions": words,
            "response_format": "wav",
            **self.extra,
        }
        return self._decoded(self._request(json.dumps(body).encode()), phrase)

    def _decoded(self, content: bytes, phrase: str) -> tuple[np.ndarray, int]:
        try:
            samples, sample_rate = from_wav(content)
        except MsencError as error:
            raise MsencError(f"{self.url}: {error}") from error
        if len(samples) == 0:
            raise MsencError(f"{self.url}: found a WAV file without samples, expected speech for {phrase!r}.")
        return samples, sample_rate

    def _request(self, body: bytes | None, url: str | None = None, **how: Any) -> bytes:
        return self.server.ask(url or self.url, body, **how)


def words_of(voice: VoiceAttributes | str) -> str:
    """A voice as instructions: a description in its own words, whose moods no attribute holds."""
    return voice if isinstance(voice, str) else describe(voice, Random(0))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        return None


def _explain(error: urllib.error.HTTPError) -> str:
    """What the server says, in one line."""
    text = error.read(10_000).decode(errors="replace")
    if key := os.environ.get("OPENAI_API_KEY"):
        text = text.replace(key, "***")  # some repeat what they were sent
    try:
        value = json.loads(text)
        detail = value.get("error", value)
        text = f"{detail.get('code') or detail.get('type') or ''} {detail['message']}".strip()
    except (ValueError, KeyError, AttributeError, TypeError):
        text = " ".join(text.split())[:300]
    return f"{error.code} {error.reason}: {text}".rstrip(": ") + ("" if text.endswith(".") else ".")


def _retry_after(value: str | None) -> float | None:
    """Seconds of a ``Retry-After`` header, which holds seconds or a date; None where it holds neither."""
    if not value:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return None
