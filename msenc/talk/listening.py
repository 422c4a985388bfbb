"""An open microphone: its sound in small parts -> when somebody begins to speak, and each turn as a sound file.

Sound -> Silero VAD, per window of 32 ms -> speech begins -> a pause: the words so far are recognised, in case it is the
end -> the pause lasts: the turn is an upload of the visitor, and its words are there already, or soon
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msenc.raw.segment import load_silero
from msenc.speech.wav import to_wav
from msenc.talk.visitors import Visitors
from msenc.types import MsencError

SAMPLE_RATE = 16_000
WINDOW = 512
WINDOW_S = WINDOW / SAMPLE_RATE
MAX_PART_BYTES = 2 * 4 * SAMPLE_RATE
"""Of sound that arrives at once: 4 s."""
MAX_LISTENERS = 8
"""Open microphones at a time; each holds at most one turn's sound, and a detector of 3 MB."""
IDLE_S = 5.0
"""An open microphone sends sound all the time; after this long without any it is closed."""

SPEECH, NO_SPEECH = 0.5, 0.35
"""Silero's probability from which on speech begins, and below which it pauses."""
BEGIN_S, PAUSE_S, END_S = 0.13, 0.16, 0.6
"""Of speech until a turn has begun; of silence until its words are recognised; and until it has ended."""
BEFORE_S = 0.4
"""Of sound before a turn's beginning that is kept: quiet first sounds."""
KEPT = round((BEFORE_S + BEGIN_S) / WINDOW_S)
"""Windows that are kept while nobody speaks."""
MIN_SPEECH_S = 0.25
"""Speech in a turn; a shorter sound is a cough."""


def load_detector() -> Callable[[np.ndarray], float]:
    """Silero VAD, with a memory of its own: window of sound, float32 (512,) at 16 kHz -> probability of speech.

    Raises:
        MsencError: if the package is missing.
    """
    model = load_silero("an open microphone", "talk")

    @torch.inference_mode()
    def probability(window: np.ndarray) -> float:
        return float(model(torch.from_numpy(window), SAMPLE_RATE))

    return probability


@dataclass
class Take:
    """A turn's sound in a file.

    Args:
        path: of the file, an upload.
        words: what is recognised in it, or will be.
        until: when its last speech was heard (`time.monotonic`).
    """

    path: Path
    words: Future[str]
    until: float


class Listener:
    """Finds the turns in one microphone's sound.

    Args:
        detect: see `load_detector`.
        keep: float32 (S,) -> the turn with this sound; called in every pause.
        drop: forgets such a turn: its speaker went on.
        max_s: longest turn; it ends there.
    """

    def __init__(
        self,
        detect: Callable[[np.ndarray], float],
        keep: Callable[[np.ndarray], Take],
        drop: Callable[[Take], None],
        max_s: float,
    ) -> None:
        self.detect = detect
        self.keep = keep
        self.drop = drop
        self.max_windows = int(max_s / WINDOW_S)
        self.is_speaking = False
        self._rest = np.zeros(0, np.float32)
        self._windows: deque[np.ndarray] | list[np.ndarray] = deque(maxlen=KEPT)
        self._speech = self._quiet = 0  # windows
        self._take: Take | None = None

    def __call__(self, sound: np.ndarray) -> list[Take]:
        """Hear float32 (S,) more; the turns that have ended in it. `is_speaking` says whether one is under way."""
        sound = np.concatenate([self._rest, sound])
        whole = len(sound) // WINDOW * WINDOW
        self._rest = sound[whole:]
        return [take for window in sound[:whole].reshape(-1, WINDOW) if (take := self._hear(window)) is not None]

    def close(self) -> None:
        """Forget what was heard."""
        if self._take is not None:
            self.drop(self._take)
        self._take, self.is_speaking, self._speech, self._quiet = None, False, 0, 0
        self._windows = deque(maxlen=KEPT)

    def _hear(self, window: np.ndarray) -> Take | None:
        probability = self.detect(window)
        self._windows.append(window)
        if not self.is_speaking:
            self._speech = self._speech + 1 if probability >= SPEECH else 0
            if self._speech * WINDOW_S >= BEGIN_S:
                self.is_speaking, self._quiet, self._windows = True, 0, [*self._windows]
            return None
        if probability < NO_SPEECH:
            self._quiet += 1
        else:
            self._speech, self._quiet = self._speech + 1, 0
            if self._take is not None:
                self.drop(self._take)
                self._take = None
        is_full = len(self._windows) >= self.max_windows
        is_speech = self._speech * WINDOW_S >= MIN_SPEECH_S
        if self._take is None and is_speech and (is_full or self._quiet * WINDOW_S >= PAUSE_S):
            self._take = self.keep(np.concatenate(self._windows))
            self._take.until = time.monotonic() - self._quiet * WINDOW_S
        if not is_full and self._quiet * WINDOW_S < END_S:
            return None
        ended, self._take = self._take, None
        self.close()
        return ended


class Listeners:
    """The open microphones of all visitors; used from many threads.

    Args:
        visitors: whose uploads the turns become.
        recognise: sound file -> words.
        max_s: longest turn.
    """

    def __init__(self, visitors: Visitors, recognise: Callable[[Path], str], max_s: float) -> None:
        self.visitors = visitors
        self.recognise = recognise
        self.max_s = max_s
        self._lock = threading.Lock()
        self._listeners: dict[str, tuple[Listener, threading.Lock]] = {}
        self._heard_at: dict[str, float] = {}
        self._takes: dict[Path, Take] = {}
        self._pool = ThreadPoolExecutor(1)

    def hear(self, session: str, samples: bytes) -> dict[str, Any]:
        """Hear a part of a visitor's microphone.

        Args:
            session: of the visitor; a reply that is being given ends where the visitor begins to speak.
            samples: 16 bits each, little-endian, at 16 kHz.

        Returns:
            ``speaking``: whether a turn is under way; ``turns``: paths of those that have ended.

        Raises:
            MsencError: too many microphones are open, there is no space, or a package is missing.
        """
        listener, alone = self._listener(session)
        sound = np.frombuffer(samples[: len(samples) // 2 * 2], "<i2").astype(np.float32) / 32768
        with alone:
            was_speaking = listener.is_speaking
            takes = listener(sound)
        if listener.is_speaking and not was_speaking:
            self.visitors.cut(session)
        return {"speaking": listener.is_speaking, "turns": [str(take.path) for take in takes]}

    def words(self, path: Path) -> str | None:
        """What was recognised in a turn; None for a file that is no turn of a microphone.

        Raises:
            MsencError, MediaError: as the recogniser.
        """
        take = self._takes.get(path)
        return take.words.result() if take is not None else None

    def waited_s(self, path: Path | None) -> float:
        """Seconds since the last speech in a turn of a microphone; 0 for another file."""
        take = self._takes.get(path) if path is not None else None
        return time.monotonic() - take.until if take is not None else 0.0

    def close(self) -> None:
        """End all that waits."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _listener(self, session: str) -> tuple[Listener, threading.Lock]:
        now = time.monotonic()
        with self._lock:
            for other in [s for s, at in self._heard_at.items() if now - at > IDLE_S]:
                del self._heard_at[other]
                listener, alone = self._listeners.pop(other)
                with alone:
                    listener.close()
            for path in [path for path in [*self._takes] if not self.visitors.is_upload(path)]:
                del self._takes[path]
            if session not in self._listeners:
                if len(self._listeners) >= MAX_LISTENERS:
                    raise MsencError(f"{MAX_LISTENERS} microphones are open, which is the most. Type, or come later.")
                made = Listener(load_detector(), self._keep, self._drop, self.max_s)
                self._listeners[session] = (made, threading.Lock())
            self._heard_at[session] = now
            return self._listeners[session]

    def _keep(self, sound: np.ndarray) -> Take:
        content = to_wav(sound, SAMPLE_RATE)
        with self.visitors.incoming(len(content)) as place:
            path = place / "spoken.wav"
            path.write_bytes(content)
        take = Take(path, self._pool.submit(self.recognise, path), time.monotonic())
        self._takes[path] = take
        return take

    def _drop(self, take: Take) -> None:
        take.words.cancel()
        self._takes.pop(take.path, None)
        self.visitors.drop(take.path)
