"""Voices designed from words: Qwen3-TTS as vLLM-Omni serves it (docs.vllm.ai: vLLM-Omni, Speech API).

One server designs (task ``VoiceDesign``): every call then has another voice that fits the description. A second one
clones (task ``Base``): each speaker's voice is designed once, uploaded there under a name of its own, and kept.
"""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPException, HTTPResponse
from queue import SimpleQueue
from random import Random
from threading import Thread
from typing import Any
from uuid import uuid4

import numpy as np

from msenc.files import digest
from msenc.speech.acting import LOUDNESS_LUFS, PAUSE_S, SNR_DB, act, bend
from msenc.speech.description import describe
from msenc.speech.synthesis import choose, read_voice, sentences_of, split_sentences
from msenc.speech.synthesizers.hibari import PITCH_HZ, SPEED, SPREAD
from msenc.speech.synthesizers.openai import MAX_BYTES, OpenAISpeech, words_of
from msenc.speech.synthesizers.psola import change_melody
from msenc.speech.voice import loudness_lufs
from msenc.types import UNKNOWN, MsencError, VoiceAttributes

MAX_BATCH = 32
"""Sentences in one request, of vLLM-Omni's default."""

SAMPLE_TEXT = "Good morning. I would like to tell you about my garden, where the first roses opened yesterday."
"""What a designed voice says in the sample that it is cloned from."""

CHARACTERS = ("warm", "bright", "smooth", "slightly nasal", "resonant", "breathy", "crisp", "husky")
"""Timbres, of which a speaker's name chooses one."""

STREAM_RATE = 24_000
"""Of Qwen3-TTS, in Hz: a stream of PCM does not say it."""

_FIRST_S, _PIECE_S = 0.5, 0.25
_MAX_READ = 1 << 16


class QwenSpeech(OpenAISpeech):
    """A client of one or two servers; a key, if they need one, is in ``OPENAI_API_KEY``.

    Args:
        base_url: of the server that designs, up to and with ``/v1``.
        model: its name there.
        clone_url: of the server that clones, or null: then each sentence's voice is designed anew.
        clone_model: its name there.
        batch: sentences that one request asks for (``/audio/speech/batch``); 1 asks one by one.
        streaming: give a sentence's sound while the server makes it, where nothing is done to all of it afterwards.
        language: of the texts.
        timeout_s: longest silence of a server.
        max_retries: of one request, when a server is busy or does not answer.

    Raises:
        MsencError: an address is none, or the batch is too large.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        clone_url: str | None = None,
        clone_model: str | None = None,
        batch: int = 1,
        streaming: bool = False,
        language: str = "English",
        timeout_s: float = 120.0,
        max_retries: int = 3,
    ) -> None:
        super().__init__(base_url, model, {"woman": ["designed"], "man": ["designed"]}, None, timeout_s, max_retries)
        if not 1 <= batch <= MAX_BATCH:
            raise MsencError(f"speech.batch: found {batch}, expected 1 to {MAX_BATCH} sentences.")
        if clone_url is not None and (not clone_url.startswith(("http://", "https://")) or not clone_model):
            raise MsencError(
                f"speech.clone_url: found {clone_url!r} and speech.clone_model={clone_model!r}, expected the address "
                "of the server that clones, such as http://localhost:8092/v1, and its model."
            )
        self.design_url = self.url
        self.clone_base = clone_url and clone_url.rstrip("/")
        self.clone_model = clone_model
        self.batch = batch
        self.streaming = streaming
        self.language = language
        if self.clone_base:
            self.url = f"{self.clone_base}/audio/speech"
        self._known: set[str] = set()

    def __call__(self, text: str, voice: VoiceAttributes | str, speaker: str | None = None) -> tuple[np.ndarray, int]:
        """See `Synthesizer`; sentences travel in batches."""
        sentences = split_sentences(text)
        if self.batch == 1 or len(sentences) < 2:
            return super().__call__(text, voice, speaker)
        attributes, pieces = read_voice(voice), []
        for start in range(0, len(sentences), self.batch):
            some = sentences[start : start + self.batch]
            for samples, sample_rate in self._synthesize_all(some, attributes, words_of(voice), speaker):
                pieces.append(act([samples], sample_rate, attributes))
        return np.concatenate(pieces), sample_rate

    def stream(
        self, text: str, voice: VoiceAttributes | str, speaker: str | None = None
    ) -> Iterator[tuple[np.ndarray, int]]:
        """See `OpenAISpeech`."""
        attributes = read_voice(voice)
        if not self.streaming or not self._is_left_alone(attributes):
            yield from super().stream(text, voice, speaker)
            return
        for sentence in sentences_of(text):
            body = self._request_for(attributes, words_of(voice), speaker)
            body |= {"input": sentence, "response_format": "pcm", "stream_format": "audio"}
            yield from self._pieces(body, attributes, sentence)

    def _speak(self, phrase: str, voice: VoiceAttributes, words: str, speaker: str | None) -> tuple[np.ndarray, int]:
        return self._synthesize_all([phrase], voice, words, speaker)[0]

    def _synthesize_all(
        self, phrases: Sequence[str], voice: VoiceAttributes, words: str, speaker: str | None
    ) -> list[tuple[np.ndarray, int]]:
        shared = {**self._request_for(voice, words, speaker), "response_format": "wav"}
        if len(phrases) == 1:
            body = {**shared, "input": phrases[0]}
            spoken = [self._decoded(self._request(json.dumps(body).encode()), phrases[0])]
        else:
            spoken = self._ask_batch(shared, phrases)
        if not self.clone_base:
            return spoken
        # a clone does not read instructions: its melody is changed afterwards
        hertz = PITCH_HZ[_gender_of(voice, speaker)][voice.pitch] if voice.pitch in ("low", "high") else None
        return [(change_melody(s, rate, hertz, SPREAD.get(voice.range, 1.0)), rate) for s, rate in spoken]

    def _request_for(self, voice: VoiceAttributes, words: str, speaker: str | None) -> dict[str, Any]:
        """What all requests of a voice have in common."""
        if not self.clone_base:
            design = {"model": self.model, "task_type": "VoiceDesign", "instructions": words}
            return design | {"language": self.language}
        name = self._kept_voice(_gender_of(voice, speaker), speaker)
        shared = {"model": self.clone_model, "task_type": "Base", "voice": name, "language": self.language}
        return shared | ({"speed": SPEED[voice.rate]} if voice.rate in SPEED else {})

    def _is_left_alone(self, voice: VoiceAttributes) -> bool:
        """Whether nothing is done to a voice's sound for which all of a sentence has to be there."""
        is_whole = voice.noise in SNR_DB or voice.pauses in PAUSE_S
        is_changed = voice.pitch in ("low", "high") or voice.range in SPREAD or voice.rate in SPEED
        return not is_whole and not (self.clone_base and is_changed)

    def _ask_batch(self, shared: Mapping[str, Any], phrases: Sequence[str]) -> list[tuple[np.ndarray, int]]:
        url = f"{self.url}/batch"
        body = {**shared, "items": [{"input": phrase} for phrase in phrases]}
        found = self._json(self._request(json.dumps(body).encode(), url), url)
        results = {one.get("index"): one for one in found.get("results", ()) if isinstance(one, dict)}
        spoken = []
        for index, phrase in enumerate(phrases):
            one = results.get(index, {})
            if one.get("status") != "success":
                said = one.get("error") or "it is not among the results"
                raise MsencError(f"{url}: speech was not made of {phrase!r}: {said}")
            try:
                content = base64.b64decode(one.get("audio_data") or "", validate=True)
            except ValueError as error:
                raise MsencError(f"{url}: found audio of {phrase!r} that is no base64 ({error}).") from error
            spoken.append(self._decoded(content, phrase))
        return spoken

    def _kept_voice(self, gender: str, speaker: str | None) -> str:
        """The name of a speaker's voice on the server that clones; designed and uploaded where it is not there yet."""
        character = choose(CHARACTERS, speaker)
        description = (
            f"{describe(VoiceAttributes(gender), Random(0))} in a {character} voice, at a moderate pace, in a clean "
            "recording"
        )
        name = f"msenc-{digest([self.model, speaker, description, SAMPLE_TEXT], length=16)}"
        if name in self._known:
            return name
        url = f"{self.clone_base}/audio/voices"
        there = self._json(self._request(None, url), url).get("uploaded_voices", ())
        if not any(isinstance(one, dict) and one.get("name") == name for one in there):
            design = {
                **{"model": self.model, "task_type": "VoiceDesign", "language": self.language},
                **{"instructions": description, "input": SAMPLE_TEXT, "response_format": "wav"},
            }
            content = self._request(json.dumps(design).encode(), self.design_url)
            self._decoded(content, SAMPLE_TEXT)
            fields = {
                "name": name,
                "consent": "designed",  # of nobody: there is no person with this voice
                "ref_text": SAMPLE_TEXT,
                "speaker_description": description,
            }
            body, kind = _form(fields, content)
            answer = self._json(self._request(body, url, content_type=kind), url)
            if answer.get("success") is not True:
                raise MsencError(f"{url}: the voice of {speaker!r} was not taken: {str(answer)[:200]}")
        self._known.add(name)
        return name

    def _json(self, content: bytes, url: str) -> dict[str, Any]:
        try:
            value = json.loads(content)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise MsencError(f"{url}: found {content[:60]!r}, expected JSON as vLLM-Omni answers.")
        return value

    def _pieces(
        self, body: Mapping[str, Any], voice: VoiceAttributes, sentence: str
    ) -> Iterator[tuple[np.ndarray, int]]:
        """One sentence while the server decodes it, as loud as its first half second is to be."""
        arrived: SimpleQueue[bytes | BaseException | None] = SimpleQueue()

        def take(answer: HTTPResponse) -> bytes:
            num_bytes = 0
            try:
                while part := answer.read1(_MAX_READ):
                    num_bytes += len(part)
                    arrived.put(part)
                    if num_bytes > MAX_BYTES:
                        raise MsencError(f"{self.url}: found more than {MAX_BYTES:,} bytes for one sentence.")
            except (HTTPException, OSError) as error:
                # asked again, the beginning would be heard twice
                raise MsencError(f"{self.url}: speech broke off after {num_bytes:,} bytes ({error}).") from error
            return b""

        def ask() -> None:
            try:
                self._request(json.dumps(body).encode(), take=take)
                arrived.put(None)
            except BaseException as error:
                arrived.put(error)

        Thread(target=ask, daemon=True).start()
        waiting, gain = b"", None
        while True:
            part = arrived.get()
            if isinstance(part, BaseException):
                raise part
            waiting += part or b""
            size = len(waiting) // 2 * 2
            if part is not None and size < 2 * round((_PIECE_S if gain else _FIRST_S) * STREAM_RATE):
                continue
            samples, waiting = np.frombuffer(waiting[:size], "<i2").astype(np.float32) / 32767, waiting[size:]
            if gain is None:
                now = loudness_lufs(np.pad(samples, (0, max(0, round(0.4 * STREAM_RATE) - size // 2))), STREAM_RATE)
                gain = 1.0 if now is None else 10 ** ((LOUDNESS_LUFS[voice.loudness] - now) / 20)
                if len(samples) == 0:
                    raise MsencError(f"{self.url}: found a stream without samples, expected speech for {sentence!r}.")
            if len(samples):
                yield bend(samples * np.float32(gain)), STREAM_RATE
            if part is None:
                return


def _gender_of(voice: VoiceAttributes, speaker: str | None) -> str:
    return voice.gender if voice.gender != UNKNOWN else choose(("woman", "man"), speaker)


def _form(fields: Mapping[str, str], sample: bytes) -> tuple[bytes, str]:
    """A form with a WAV file, and its content type."""
    boundary = uuid4().hex
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{n}"\r\n\r\n{v}\r\n'.encode() for n, v in fields.items()
    ]
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="audio_sample"; filename="voice.wav"\r\n'
        "Content-Type: audio/wav\r\n\r\n"
    )
    body = b"".join(parts) + head.encode() + sample + f"\r\n--{boundary}--\r\n".encode()
    return body, f"multipart/form-data; boundary={boundary}"
