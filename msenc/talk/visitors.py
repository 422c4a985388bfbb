"""What visitors of the page leave on this machine: their talks and uploads, within one limit of bytes.

Upload -> a folder of its own -> into the talk's folder once its turn is answered. Nothing is shared between visitors,
and whatever nobody can come back to is removed.
"""

import itertools
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from msenc.talk.agent import Heard, Spoken
from msenc.talk.interruption import END_S, Said, cut_sound, words_heard
from msenc.types import MsencError

MAX_VISITORS = 200
LEFT_S = 60.0
"""How long a talk is kept for a visitor whose connection broke; a page that is opened anew begins a new talk."""
UNUSED_S = 900.0
"""How long an upload waits for its turn to be sent."""
NO_WORDS = "..."
"""In the place of a reply without any."""
MAX_HEARD = 100
"""Interrupted replies that are remembered of a visitor; none is told of twice for long."""
FRESH_S = 60.0
"""Younger uploads are not given up when space is short."""


@dataclass(frozen=True)
class Talk:
    """One visitor's talk.

    Args:
        folder: holds its audio, video and saved file.
        run: whose encoders heard the turns.
        speakers: the visitor's name and the agent's, from the first turn on.
        turns: so far, replies included.
        spoken: the last reply.
        seconds: of each turn, when the steps to its reply were done (`msenc.talk.live.Ledger`).
        said: replies that can still be cut, by their names.
        stale: places of turns whose features are of more than they hold now.
    """

    folder: Path
    run: str | None = None
    speakers: tuple[str, str] | None = None
    turns: tuple[Heard, ...] = ()
    spoken: Spoken | None = None
    seconds: tuple[Mapping[str, float], ...] = ()
    said: Mapping[str, Said] = field(default_factory=dict)
    stale: frozenset[int] = frozenset()

    def cut(self, heard: Mapping[str, float | None]) -> "Talk":
        """The talk with what was heard of the replies that were interrupted.

        Args:
            heard: name of a reply -> seconds of its sound that were; None: it was stopped while it was read.
        """
        talk = self
        for name, heard_s in heard.items():
            if heard_s is not None and name in self.said:
                talk = talk._cut_one(name, heard_s)
        return talk

    def _cut_one(self, name: str, heard_s: float) -> "Talk":
        said = self.said[name]
        before = self.turns[said.turn].turn
        if heard_s >= said.seconds - END_S and not before.interrupted:
            return self
        words = words_heard(before.text, said.sentences, heard_s)
        audio = cut_sound(before.audio, heard_s) if before.audio is not None and words else None
        heard = Heard(replace(before, text=words or NO_WORDS, audio=audio, interrupted=True))
        spoken = self.spoken
        if spoken is not None and said.turn == len(self.turns) - 1:
            sound = spoken.sound[: round(heard_s * spoken.sample_rate)] if audio and spoken.sound is not None else None
            spoken = replace(spoken, answer=replace(spoken.answer, text=words), sound=sound)
        turns = (*self.turns[: said.turn], heard, *self.turns[said.turn + 1 :])
        left = {other: one for other, one in self.said.items() if other != name}
        return replace(self, turns=turns, spoken=spoken, said=left, stale=self.stale | {said.turn})

    @property
    def num_bytes(self) -> int:
        """What it takes of memory."""
        features = sum(array.nbytes for heard in self.turns for array in heard.features.values())
        return features + (self.spoken.sound.nbytes if self.spoken and self.spoken.sound is not None else 0)


@dataclass
class _Visitor:
    moment: int
    talk: Talk | None = None
    connections: int = 0
    num_cuts: int = 0
    heard: dict[str, float | None] = field(default_factory=dict)
    left_at: float = field(default_factory=time.monotonic)


class Visitors:
    """Who is there, and what they have left; used from many threads.

    Args:
        folder: for all of it.
        max_bytes: of all visitors together, on disk and in features.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.talks, self.uploads = folder / "talks", folder / "uploads"
        for place in (self.talks, self.uploads):
            place.mkdir(parents=True, exist_ok=True)
        self.is_closed = threading.Event()
        self._lock = threading.RLock()
        self._moments = itertools.count()
        self._visitors: dict[str, _Visitor] = {}
        self._incoming: dict[Path, int] = {}  # bytes that are promised to uploads on their way

    # ------------------------------------------------------------------------------------------------ talks

    def new_folder(self) -> Path:
        """An empty folder of a talk, whose name cannot be guessed."""
        folder = self.talks / secrets.token_urlsafe(16)
        folder.mkdir()
        return folder

    def talk(self, session: str) -> Talk | None:
        """A visitor's talk."""
        with self._lock:
            found = self._visitors.get(session)
            return found.talk if found else None

    def moment(self, session: str) -> int:
        """A number that changes whenever a visitor's talk does, by whatever button.

        Raises:
            MsencError: there are too many visitors.
        """
        with self._lock:
            return self._visitor(session).moment

    def cut(self, session: str) -> None:
        """End the reply that a visitor is being given, where there is one."""
        with self._lock:
            if session in self._visitors:
                self._visitors[session].num_cuts += 1

    def note_heard(self, session: str, heard: Mapping[str, float | None]) -> None:
        """A visitor has interrupted replies: they end, and the talk keeps what was heard of them; see `Talk.cut`."""
        with self._lock:
            if (visitor := self._visitors.get(session)) is not None:
                visitor.heard = dict([*{**visitor.heard, **heard}.items()][-MAX_HEARD:])
                visitor.talk = visitor.talk and visitor.talk.cut(visitor.heard)

    def watch_cuts(self, session: str, reply: str) -> Callable[[], bool]:
        """Whether the reply of this name, which is begun now, has been ended by its visitor."""
        visitor = self._visitor(session)
        before = visitor.num_cuts
        return lambda: visitor.num_cuts != before or reply in visitor.heard

    def replace(self, session: str, moment: int, after: Talk | None) -> bool:
        """Put a talk in the place of the one that was there at a moment, unless that has changed since.

        Of replies that were interrupted meanwhile it keeps what was heard.
        The talk that has no place then is removed.
        """
        with self._lock:
            visitor = self._visitors.get(session)
            is_current = visitor is not None and visitor.moment == moment and not self.is_closed.is_set()
            if visitor and is_current and after is not None:
                after = after.cut(visitor.heard)
            before, talk = (visitor.talk, after) if visitor and is_current else (after, visitor and visitor.talk)
            if visitor and is_current:
                visitor.talk, visitor.moment = after, next(self._moments)
            if before is not None and (talk is None or talk.folder != before.folder):
                shutil.rmtree(before.folder, ignore_errors=True)
            return is_current

    @contextmanager
    def present(self, session: str) -> Iterator[None]:
        """While a connection of a visitor is open.

        Raises:
            MsencError: there are too many visitors.
        """
        with self._lock:
            visitor = self._visitor(session)
            visitor.connections += 1
        try:
            yield
        finally:
            with self._lock:
                visitor.connections -= 1
                if not visitor.connections:
                    visitor.left_at = time.monotonic()

    def _visitor(self, session: str) -> _Visitor:
        if session not in self._visitors:
            if len(self._visitors) >= MAX_VISITORS and not self._forget_who_left(0.0):
                raise MsencError(f"The page has {MAX_VISITORS} visitors, which is the most. Come back later.")
            self._visitors[session] = _Visitor(next(self._moments))
        return self._visitors[session]

    # ------------------------------------------------------------------------------------------------ uploads

    @contextmanager
    def incoming(self, num_bytes: int) -> Iterator[Path]:
        """A new folder for an upload; an upload that fails leaves nothing.

        Raises:
            MsencError: there is no space.
        """
        place = self.uploads / secrets.token_urlsafe(16)
        with self._lock:
            self.make_room(num_bytes)
            self._incoming[place] = num_bytes
        try:
            place.mkdir()
            yield place
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        finally:
            with self._lock:
                del self._incoming[place]

    def is_upload(self, path: Path) -> bool:
        """Whether a path names something that was uploaded, and not used so far."""
        try:
            return ".." not in path.parts and path.is_relative_to(self.uploads) and path.is_file()
        except (OSError, ValueError):
            return False

    def keep(self, path: Path, target: Path) -> Path:
        """Bring a clip into a talk's folder: an upload is moved, another file copied."""
        if not self.is_upload(path):
            return Path(shutil.copyfile(path, target))
        path.replace(target)
        self.drop(path)
        return target

    def drop(self, path: Path) -> None:
        """Remove an upload."""
        shutil.rmtree(self.uploads / path.relative_to(self.uploads).parts[0], ignore_errors=True)

    # ------------------------------------------------------------------------------------------------ space

    def used(self) -> int:
        """Bytes of all visitors: on disk, on their way, and in features."""
        with self._lock:
            talks = [v.talk.num_bytes for v in self._visitors.values() if v.talk]
            return sum(talks) + sum(self._incoming.values()) + _size(self.folder, set(self._incoming))

    def make_room(self, num_bytes: int) -> None:
        """See that so much more fits; what nobody may come back for goes first.

        Raises:
            MsencError: it does not.
        """
        with self._lock:
            while self.used() + num_bytes > self.max_bytes:
                if not (self._forget_uploads(FRESH_S, most=1) or self._forget_who_left(0.0, most=1)):
                    raise MsencError(
                        f"All visitors' talks and uploads together may take {self.max_bytes >> 20} MiB, and this would "
                        "be more. Begin a new talk, or come back later (max_total_mb)."
                    )

    def sweep(self) -> None:
        """Remove what has waited too long."""
        with self._lock:
            self._forget_uploads(UNUSED_S)
            self._forget_who_left(LEFT_S)

    def sweep_until_closed(self) -> None:
        """Sweep every few seconds."""
        while not self.is_closed.wait(5.0):
            self.sweep()

    def _forget_uploads(self, age_s: float, most: int | None = None) -> bool:
        """Remove unused uploads, the oldest first; whether there were any."""
        waiting = [(place.stat().st_mtime, place) for place in self.uploads.iterdir() if place not in self._incoming]
        old = sorted((made, place) for made, place in waiting if time.time() - made >= age_s)[:most]
        for _, place in old:
            shutil.rmtree(place, ignore_errors=True)
        return bool(old)

    def _forget_who_left(self, age_s: float, most: int | None = None) -> bool:
        """Remove talks of visitors without a connection, who left first first; whether there were any."""
        now = time.monotonic()
        left = [(v.left_at, key) for key, v in self._visitors.items() if not v.connections]
        old = sorted((moment, key) for moment, key in left if now - moment >= age_s)[:most]
        for _, key in old:
            if talk := self._visitors.pop(key).talk:
                shutil.rmtree(talk.folder, ignore_errors=True)
        return bool(old)


def _size(folder: Path, without: set[Path]) -> int:
    """Bytes of the files below, but for some folders; files may come and go meanwhile."""
    total = 0
    for name, inner, files in os.walk(folder):
        place = Path(name)
        inner[:] = [name for name in inner if place / name not in without]
        for name in files:
            try:
                total += (place / name).stat().st_size
            except FileNotFoundError:
                continue
    return total
