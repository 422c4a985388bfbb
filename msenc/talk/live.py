"""A reply while it comes: words as the LLM writes them, sound sentence by sentence, and when each step was done.

`Agent.answer` in a thread of its own -> words -> whole sentences -> synthesizer -> pieces of sound

A sentence can be spoken once its voice is known. A target without description leaves the voice open, and its first
sentence is spoken while the next is written; a target with one states the voice at its end, so that the first sound
waits for the last token, and then for one sentence only.
"""

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import numpy as np

from msenc.speech.synthesis import Synthesizer, split_sentences
from msenc.talk.agent import Agent, Answer, Heard, Spoken
from msenc.types import MsencError, VoiceAttributes

STEPS = ("end of speech", "features", "hearing", "first token", "first sentence", "first sound")
"""Of a turn and its reply. ``end of speech`` is the silence by which an open microphone knows that a turn has ended,
``hearing`` the recognition of its words, ``first sentence`` the moment at which its text and its voice are known."""


class Ledger:
    """When each of `STEPS` was done, in seconds from the end of the turn.

    Args:
        before_s: that have passed since the end of the turn.
        silence_s: that an open microphone waited for before it took the turn to have ended; part of `before_s`.
    """

    def __init__(self, before_s: float = 0.0, silence_s: float = 0.0) -> None:
        self.began = time.perf_counter() - before_s
        self.seconds: dict[str, float] = {"end of speech": silence_s} if silence_s else {}

    def note(self, step: str) -> None:
        """A step is done now, unless it was before."""
        self.seconds.setdefault(step, time.perf_counter() - self.began)

    def note_heard(self, heard: Heard) -> None:
        """The turn has been heard: of its steps, the durations are known."""
        now = time.perf_counter() - self.began
        if "recognition" in heard.seconds:
            self.seconds["hearing"] = now
        self.seconds["features"] = now - heard.seconds.get("recognition", 0.0)


def percentiles(turns: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """Of each step the median and the 95th percentile over the turns that had it, in seconds.

    Example:
        >>> percentiles([{"first sound": 0.1}, {"first sound": 0.3}, {"first token": 0.1}])["first sound"]
        (0.2, 0.29)
    """
    found = {step: [turn[step] for turn in turns if step in turn] for step in STEPS}
    return {
        step: (statistics.median(values), round(float(np.percentile(values, 95)), 6))
        for step, values in found.items()
        if values
    }


@dataclass(frozen=True)
class Progress:
    """What has come of a reply.

    Args:
        text: so far.
        sound: the next sentence, float32 (S,), or None.
        sample_rate: of the sound, in Hz.
        spoken: the whole reply, at the end.
        notices: what a person should know, at the end.
        fault: why the rest of the reply was not spoken, at the end; its words are whole.
    """

    text: str
    sound: np.ndarray | None = None
    sample_rate: int = 0
    spoken: Spoken | None = None
    notices: Sequence[str] = field(default_factory=tuple)
    fault: MsencError | None = None


def reply_live(
    agent: Agent,
    synthesizer: Synthesizer | None,
    turns: Sequence[Heard],
    speaker: str,
    decoding: Mapping[str, Any],
    seed: int,
    ledger: Ledger,
    is_wanted: Callable[[], bool] | None = None,
    is_cut: Callable[[], bool] | None = None,
) -> Iterator[Progress]:
    """Write a reply and speak it, each sentence as soon as it and its voice are known.

    The sound's pieces together are what the synthesizer makes of the whole reply.

    Args:
        agent: see `Agent.answer`, as of the arguments that are not named here.
        synthesizer: None for words alone.
        turns: so far.
        speaker: who replies.
        decoding: how.
        seed: of what is drawn.
        ledger: notes the steps of the reply.
        is_wanted: whether anybody still waits.
        is_cut: whether the rest is unwanted; what is written stays, and nothing more is spoken.

    Raises:
        MsencError: as `Agent.answer`.
        AbandonedError: nobody waits any more.
    """
    told: SimpleQueue[str | BaseException | tuple[list[Answer], list[str]]] = SimpleQueue()

    def write() -> None:
        try:
            told.put(agent.answer(turns, speaker, decoding, seed, is_wanted=is_wanted, is_cut=is_cut, on_text=told.put))
        except BaseException as error:  # to be raised where the reply is waited for
            told.put(error)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    has_own_voice = agent.tokenizer.prompt.target == "text_description"
    voice: VoiceAttributes | str = VoiceAttributes()
    pieces: list[np.ndarray] = []
    said: list[tuple[str, int]] = []
    rate, speaking, answer, notices, fault = 0, 0.0, None, [], None
    try:
        while answer is None:
            news = told.get()
            while isinstance(news, str) and not told.empty():
                news = told.get()  # only the newest words count
            if isinstance(news, BaseException):
                raise news
            ledger.note("first token")
            if isinstance(news, str):
                text = news
                sentences = [] if has_own_voice else split_sentences(text)[:-1]
                yield Progress(text)
            else:
                (answer, *_), notices = news
                text, voice, sentences = answer.text, answer.voice, split_sentences(answer.text)
            for sentence in sentences[len(said) :]:
                ledger.note("first sentence")
                if synthesizer is None or fault is not None or (is_cut is not None and is_cut()):
                    break
                began = time.perf_counter()
                try:
                    sound, rate = synthesizer(sentence, voice, speaker)
                except MsencError as error:
                    fault = error
                    break
                speaking += time.perf_counter() - began
                pieces.append(sound)
                said.append((sentence, len(sound)))
                ledger.note("first sound")
                yield Progress(text, sound, rate)
    finally:
        writer.join()  # the model is used by one at a time
    whole = np.concatenate(pieces) if pieces else None
    spoken = Spoken(answer, whole, rate, speaking, tuple(said), is_cut is not None and is_cut())
    yield Progress(answer.text, spoken=spoken, notices=notices, fault=fault)
