"""Another writer of voice descriptions: a language model behind OpenAI's interface, whose sentences are read back.

Attributes -> a template's sentence -> the model's own -> checked: it has to say the same attributes, and nothing else.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import TypedDict

from msenc.files import digest, parse_json, write_text
from msenc.speech.attributes import VoiceSettings
from msenc.speech.description import describe, read
from msenc.speech.synthesizers.openai import Server, completion
from msenc.types import UNKNOWN, MsencError, VoiceAttributes
from msenc.work.progress import progress_bar

CACHE = "voice-writer.jsonl"
VARIANTS = 4
"""Sentences per combination of attributes; a turn takes one by chance."""

NOT_READ_BACK = "template, as the writer's does not read back"

MAX_WORDS = 40
_REQUESTS = 8  # at a time
_TIMEOUT_S = 60.0
_ASKED = (
    "You rephrase descriptions of how somebody speaks. Answer with one sentence of everyday English, in lower case, "
    "without brackets, quotation marks or a full stop. Say the gender and every quality of the description, and add "
    "none."
)


class _Written(TypedDict):
    key: str
    sentence: str


def write_sentences(
    wanted: Iterable[VoiceAttributes], settings: VoiceSettings, folder: Path
) -> dict[VoiceAttributes, list[str | None]]:
    """`VARIANTS` sentences for each combination of attributes, None for one that does not read back.

    What was written is kept in ``voice-writer.jsonl`` in `folder`: a second call asks for nothing.

    Args:
        wanted: attributes, of which some are known.
        settings: with the writer and its address.
        folder: of the prepared data set.

    Raises:
        MsencError: the server refuses, or does not answer as it should; what it wrote until then is kept.
    """
    server = Server(_TIMEOUT_S, 3, "a description", "data.voice.writer_url (it ends in /v1) and data.voice.writer")
    url = f"{settings.writer_address.rstrip('/')}/chat/completions"
    written = _read_cache(folder / CACHE)
    asked = {
        _key(settings.writer, attributes, variant): (attributes, variant)
        for attributes in dict.fromkeys(wanted)
        for variant in range(VARIANTS)
    }
    missing = [key for key in asked if key not in written]

    def ask(key: str) -> tuple[str, str]:
        attributes, variant = asked[key]
        body = {
            "model": settings.writer,
            "messages": [
                {"role": "system", "content": _ASKED},
                {"role": "user", "content": describe(attributes, Random(variant))},
            ],
            "temperature": 1.0,
            "seed": variant,
            "max_tokens": 200,
        }
        return key, _sentence(server.ask(url, json.dumps(body).encode()), url)

    if missing:
        try:
            with progress_bar("sentences") as bar, ThreadPoolExecutor(_REQUESTS) as threads:
                futures = [threads.submit(ask, key) for key in missing]
                try:
                    for future in bar.track(futures, description="voice: writing"):
                        key, sentence = future.result()
                        written[key] = sentence
                finally:
                    threads.shutdown(wait=False, cancel_futures=True)
        finally:
            lines = (json.dumps({"key": k, "sentence": s}, ensure_ascii=False) + "\n" for k, s in written.items())
            write_text(folder / CACHE, "".join(lines))
    sentences: dict[VoiceAttributes, list[str | None]] = {}
    for key, (attributes, _) in asked.items():
        sentences.setdefault(attributes, []).append(checked(written[key], attributes))
    return sentences


def checked(sentence: str, attributes: VoiceAttributes) -> str | None:
    """A writer's sentence as it may stand in a reply; None if it says other than these attributes, or more.

    Example:
        >>> checked('"A woman is talking in a hurry."', VoiceAttributes("woman", rate="fast"))
        'a woman is talking in a hurry'
        >>> checked("She talks in a hurry, with a lisp.", VoiceAttributes("woman", rate="fast"))
    """
    sentence = " ".join(sentence.split()).strip(" .\"'\u201c\u201d").lower()
    if not sentence or re.search(r"[()\[\]<>{}]", sentence) or len(sentence.split()) > MAX_WORDS:
        return None
    reading = read(sentence)
    return sentence if reading.attributes == attributes and not reading.unread else None


def _key(writer: str | None, attributes: VoiceAttributes, variant: int) -> str:
    known = {name: word for name, word in asdict(attributes).items() if word != UNKNOWN}
    return digest([writer, _ASKED, known, variant])


def _sentence(content: bytes, url: str) -> str:
    try:
        text = completion(content)
    except ValueError as error:
        raise MsencError(f"{url}: {error}. Look at data.voice.writer_url.") from error
    if text is None:
        raise MsencError(f"{url}: found {content[:80]!r}, expected a chat completion. Look at data.voice.writer_url.")
    return text


def _read_cache(path: Path) -> dict[str, str]:
    """Sentences by key; damaged lines count as not there."""
    written: dict[str, str] = {}
    if path.is_file():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines()):
            with suppress(MsencError):
                entry = parse_json(line, number, _Written)
                written[entry["key"]] = entry["sentence"]
    return written


def choose_sentence(
    sentences: Mapping[VoiceAttributes, Sequence[str | None]], attributes: VoiceAttributes, rng: Random
) -> tuple[str, str]:
    """A turn's description and its source: ``writer``, ``template``, or `NOT_READ_BACK`.

    Args:
        sentences: of `write_sentences`; empty without a writer.
        attributes: of the turn.
        rng: source of chance.
    """
    template = describe(attributes, rng)
    if attributes not in sentences:
        return template, "template"
    sentence = rng.choice(sentences[attributes])
    return (sentence, "writer") if sentence is not None else (template, NOT_READ_BACK)
