"""A page to talk to a run: type, record, upload or just speak, hear the reply as it comes, and hear it in other voices.

Gradio holds the page and the queue, `Visitors` one `Talk` per visitor; `msenc.talk.live` answers, `Listeners` hear open
microphones, and ``pages/talk.js`` shows and plays in the browser. A turn is put into the talk when its reply is there:
one that is refused, or whose visitor has gone, leaves the talk as it was.
"""

import html
import mimetypes
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from queue import SimpleQueue
from random import Random
from typing import Any

import gradio as gr
import numpy as np
from gradio.context import LocalContext

from msenc.pages.render import data_uri
from msenc.raw.container import MediaError
from msenc.runs.find import run_records
from msenc.runs.record import is_finished, read_facts, read_run
from msenc.speech.description import VOCABULARY, describe, parse
from msenc.speech.pitch import HOP_S
from msenc.speech.synthesis import Synthesizer
from msenc.speech.voice import track_voice
from msenc.speech.wav import to_wav, write_wav
from msenc.talk.agent import (
    MAX_CHARACTERS,
    MAX_TURNS,
    AbandonedError,
    Agent,
    Heard,
    Spoken,
    Turn,
    choose_speakers,
    known_speakers,
    speak_answer,
)
from msenc.talk.examples import NUM_EXAMPLES, Example, find_examples
from msenc.talk.interruption import Said
from msenc.talk.listening import Listeners
from msenc.talk.live import Ledger, Progress, percentiles, reply_live
from msenc.talk.saved import read_saved, save_turns
from msenc.talk.visitors import NO_WORDS, Talk, Visitors
from msenc.types import UNKNOWN, MsencError, VoiceAttributes

ANY = "any"
CONTROLS = """
<button id="mic" aria-pressed="false">Open microphone</button>
<button id="stop">Stop</button>
<button id="replay">Say again</button>
<span id="mic-state" role="status"></span>
<small id="here"></small>
"""
"""Buttons of talk.js, and where it says what it hears, and how long the sound took to come."""
INTERRUPTED = "(interrupted)"
"""Below a reply of which the talk keeps what was heard."""
MAX_HEARD_S = 86_400.0
"""Of one reply; no browser tells of more."""
SHOWN_S = 0.1
"""Between two looks at a reply that is being written: the browser draws the whole talk each time."""


_NAME = re.compile(r"[\w-]{1,40}", re.ASCII)


def _always() -> bool:
    return True


class Host:
    """What all visitors share: the model of one run at a time, loaded once, the synthesizer, and the space.

    Args:
        load: run's folder -> its agent.
        synthesizer: None leaves replies without sound.
        config: keys of `RespondConfig`.
        folder: for all that visitors leave.
    """

    def __init__(
        self, load: Callable[[Path], Agent], synthesizer: Synthesizer | None, config: Mapping[str, Any], folder: Path
    ) -> None:
        self.load = load
        self.synthesizer = synthesizer
        self.config = config
        self.folder = folder
        self.visitors = Visitors(folder, config["max_total_mb"] << 20)
        self.alone = threading.Lock()
        """Held by whoever uses the model: a turn that was given up may still be at its last token."""
        self.listeners = Listeners(self.visitors, self._recognise, config["max_clip_s"])
        self._run: str | None = None
        self._agent: Agent | None = None
        self._examples: dict[str, list[Example]] = {}

    def _recognise(self, path: Path) -> str:
        """Words of a turn that may not be over; none before a run is loaded, which recognises them then."""
        return self._agent.recognise(path) if self._agent is not None else ""

    def agent(self, run: str | None) -> Agent:
        """The run's agent. That of another run is let go first: both may not fit into memory."""
        if run is None:
            raise MsencError("No run is chosen. Choose one, or train one: make train")
        if self._agent is None or run != self._run:
            self._run = self._agent = None
            self._agent = self.load(Path(run))
            self._run = run
        return self._agent

    def runs(self) -> tuple[list[tuple[str, str]], list[str]]:
        """Label and folder of each run that can be chosen: the one that the command names, then the newest first.

        Also why others, whose records cannot be read, are not among them.
        """
        folder, given = Path(self.config["runs_dir"]), self.config["run_dir"]
        found, faults = finished_runs(folder)
        if given is not None:
            found = [Path(given), *(run for run in found if run.resolve() != Path(given).resolve())]
        labelled = []
        for run in found:
            try:
                labelled.append((run_label(run, folder), str(run)))
            except MsencError as error:
                faults.append(str(error))
        return labelled, [*dict.fromkeys(faults)]

    def examples(self, run: str) -> list[Example]:
        """First turns that fit a run's data; see `find_examples`."""
        if run not in self._examples:
            self._examples[run] = find_examples(Path(run), self.config["data_dir"])
        return self._examples[run]

    def take_example(self, run: str, number: int) -> tuple[str, Path | None]:
        """An example's words, and its clip as an upload.

        Raises:
            MsencError: there is none, or no space for it.
        """
        if not 0 <= number < len(self.examples(run)):
            raise MsencError("There is no such example. Choose a run of the list, and one of its own.")
        example = self.examples(run)[number]
        if example.clip is None:
            return example.text, None
        try:
            with self.visitors.incoming(example.clip.stat().st_size) as place:
                return example.text, Path(shutil.copyfile(example.clip, place / example.clip.name))
        except OSError as error:
            raise MsencError(
                f"{example.clip.name}: the example's clip cannot be read any more ({error.strerror}). Type its words, "
                "or give a clip of your own."
            ) from error

    def listen(self, run: str | None) -> None:
        """Load what a spoken turn needs, before it is spoken.

        Raises:
            MsencError: it cannot be loaded.
        """
        agent = self.agent(run)
        with self.visitors.incoming(32_044) as place:
            hiss = np.random.default_rng(0).normal(0, 1e-3, 16_000)  # silence is refused, as no speech
            write_wav(place / "hiss.wav", hiss.astype(np.float32), 16_000)
            agent.recognise(place / "hiss.wav")
        self.visitors.drop(place)

    def check_run(self, run: Any) -> str | None:
        """A run that a visitor names, if it is one of those that can be chosen."""
        if run is None or run == self._run or run in {folder for _, folder in self.runs()[0]}:
            return run
        raise MsencError("There is no such run here. Choose one of the list.")

    def begin(self) -> Talk:
        """An empty talk."""
        return Talk(self.visitors.new_folder())

    def hear(self, talk: Talk, run: str | None, turn: Turn, is_wanted: Callable[[], bool] = _always) -> Talk:
        """The talk with one more turn, all of it heard by this run.

        Raises:
            MsencError: nothing is said, or a clip is of no use.
            AbandonedError: the turn is not wanted any more.
        """
        if not turn.text.strip() and turn.sound is None:
            raise MsencError("Nothing is said yet: type something, or record or upload sound or video.")
        if len(talk.turns) + 2 > MAX_TURNS:
            raise MsencError(f"The talk has {len(talk.turns)} turns; {MAX_TURNS} are the most. Begin a new one.")
        agent = self.agent(run)
        stale = talk.stale if talk.run == run else frozenset(range(len(talk.turns)))
        before = _hear_all(agent, talk.turns, is_wanted, stale)
        speakers = talk.speakers or self.speakers((), agent.speakers)
        words = self.listeners.words(turn.audio) if turn.audio is not None and not turn.text.strip() else None
        heard = agent.hear(replace(turn, speaker=speakers[0]), (lambda _: words) if words else None)
        talk = replace(talk, run=run, speakers=speakers, turns=(*before, heard), stale=frozenset())
        self.visitors.make_room(Talk(talk.folder, turns=(heard,)).num_bytes)
        return talk

    def answer(
        self,
        talk: Talk,
        is_wanted: Callable[[], bool] = _always,
        is_cut: Callable[[], bool] | None = None,
        ledger: Ledger | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        name: str = "",
    ) -> tuple[Talk, list[str], dict[str, float]]:
        """The talk with a reply, its clips in its folder; notices, and the seconds that it took.

        Args:
            talk: so far.
            is_wanted: see `reply_live`.
            is_cut: see `reply_live`.
            ledger: of the turn.
            on_progress: told of each word and each sentence's sound.
            name: of the reply, by which it can be cut afterwards; see `Talk.cut`.

        Raises:
            MsencError: there is no space for it.
            AbandonedError: the reply is not wanted any more; nothing is left of the turn.
        """
        assert talk.speakers is not None
        agent, speaker = self.agent(talk.run), talk.speakers[1]
        began = time.perf_counter()
        decoding, seed, ledger = self.config["decoding"], self.config["seed"], ledger or Ledger()
        for progress in reply_live(
            agent, self.synthesizer, talk.turns, speaker, decoding, seed, ledger, is_wanted, is_cut
        ):
            if on_progress is not None:
                on_progress(progress)
        assert progress.spoken is not None  # the last one
        spoken, answer, notices = progress.spoken, progress.spoken.answer, [*progress.notices]
        if progress.fault is not None:
            heard = "not heard" if spoken.sound is None else "not heard to its end"
            notices.append(f"The reply is {heard}. {progress.fault}")
        seconds = {"writing": time.perf_counter() - began - spoken.seconds}
        words, description = answer.text or NO_WORDS, answer.description
        if len(words) > MAX_CHARACTERS:
            notices.append(f"The reply has {len(words):,} characters; the talk keeps the first {MAX_CHARACTERS:,}.")
        turn = Turn(
            speaker,
            words[:MAX_CHARACTERS],
            description=description and description[:MAX_CHARACTERS],
            interrupted=spoken.is_cut,
        )
        reply = talk.folder / f"{len(talk.turns) + 1}-reply.wav"
        try:
            if spoken.sound is not None:
                seconds["speaking"] = spoken.seconds
                self.visitors.make_room(4 * len(spoken.sound))
                turn = replace(turn, audio=reply)
                write_wav(reply, spoken.sound, spoken.sample_rate)
            heard = _hear_again(agent, turn)
            if not is_wanted():
                raise AbandonedError
            *before, last = talk.turns
            files = {
                name: self.visitors.keep(path, talk.folder / f"{len(talk.turns)}-{name}{media_suffix(path)}")
                for name in ("audio", "video")
                if (path := getattr(last.turn, name)) is not None
            }
        except BaseException as error:
            reply.unlink(missing_ok=True)
            if not isinstance(error, OSError):
                raise
            if not is_wanted():
                raise AbandonedError from error  # the talk was put away meanwhile, and its folder went
            raise MsencError(f"The reply cannot be kept ({error.strerror}). Begin a new talk.") from error
        last = replace(last, turn=replace(last.turn, **files))
        talk = replace(talk, spoken=spoken, seconds=(*talk.seconds, ledger.seconds))
        if self.synthesizer is not None:  # else it is read
            sentences = tuple((sentence, samples / spoken.sample_rate) for sentence, samples in spoken.sentences)
            talk = replace(talk, said={**talk.said, name: Said(len(talk.turns), sentences)})
        return replace(talk, turns=(*before, last, heard)), notices, seconds

    def say_again(self, talk: Talk | None, description: str) -> Spoken:
        """The last reply in another voice."""
        if talk is None or talk.spoken is None:
            raise MsencError("There is no reply yet: say something first.")
        if self.synthesizer is None:
            raise MsencError("The page was started without a voice (speech=none).")
        if len(description) > MAX_CHARACTERS:
            raise MsencError(f"The description is too long; it may have {MAX_CHARACTERS:,} characters.")
        answer = replace(talk.spoken.answer, description=description, attributes=parse(description))
        return speak_answer(self.synthesizer, answer, talk.turns[-1].turn.speaker)

    def save_talk(self, talk: Talk) -> Path:
        """The talk's saved file; see `save_turns`."""
        turns = [heard.turn for heard in talk.turns]
        clips = {path for turn in turns for path in (turn.audio, turn.video) if path is not None}
        (talk.folder / "talk.zip").unlink(missing_ok=True)
        self.visitors.make_room(sum(path.stat().st_size for path in clips))
        return save_turns(turns, talk.folder)

    def load_talk(self, path: Path, run: str | None, is_wanted: Callable[[], bool] = _always) -> Talk:
        """Continue from a file that `save_talk` wrote, or a history file without clips.

        Raises:
            MsencError: it is no such file, too large, or names files that are not in it.
            AbandonedError: the talk is not wanted any more.
        """
        talk = self.begin()
        try:
            most = self.config["max_upload_mb"] << 20
            self.visitors.make_room(path.stat().st_size)
            turns = read_saved(path, talk.folder / "loaded", most)
            agent = self.agent(run)
            heard = _hear_all(agent, [Heard(turn) for turn in turns], is_wanted, range(len(turns)))
            self.visitors.make_room(Talk(talk.folder, turns=heard).num_bytes)
            return replace(talk, run=run, speakers=self.speakers(turns, agent.speakers), turns=heard)
        except (MsencError, AbandonedError):
            shutil.rmtree(talk.folder, ignore_errors=True)
            raise

    def speakers(self, before: Sequence[Turn], known: tuple[str, str]) -> tuple[str, str]:
        """The visitor's name and the agent's; see `choose_speakers`."""
        return choose_speakers(before, True, self.config["speaker"], self.config["reply_as"], known)

    def without_folders(self, message: MsencError | str) -> str:
        """A message that calls files of visitors by their names alone."""
        return re.sub(rf"{re.escape(str(self.folder))}/(\S*/)?", "", str(message))

    def close(self) -> None:
        """Let nobody begin anything more, and wait for the turn that is under way."""
        self.visitors.is_closed.set()
        self.listeners.close()
        if self.alone.acquire(timeout=10.0):
            self.alone.release()


def _hear_all(
    agent: Agent, turns: Sequence[Heard], is_wanted: Callable[[], bool], stale: Container[int]
) -> tuple[Heard, ...]:
    """Turns, of which some are to be heard anew."""
    found = []
    for number, heard in enumerate(turns):
        if not is_wanted():
            raise AbandonedError
        found.append(_hear_again(agent, heard.turn) if number in stale else heard)
    return tuple(found)


def _hear_again(agent: Agent, turn: Turn) -> Heard:
    """A turn that was taken before. A clip that this run cannot use is left out, and said; all else was said then."""
    try:
        return replace(agent.hear(turn), notices=())
    except MsencError as error:
        if turn.sound is None:
            raise
        heard = agent.hear(replace(turn, audio=None, video=None))
        return replace(heard, turn=turn, notices=(f"{error} The turn is read without.",))


def media_suffix(path: Path) -> str:
    """A file's suffix, if it is one of audio or video."""
    kind = mimetypes.guess_type(f"x{path.suffix}")[0] or ""
    return path.suffix.lower() if kind.startswith(("audio/", "video/")) else ".bin"


# ---------------------------------------------------------------------------------------------------- runs and files


def finished_runs(folder: Path) -> tuple[list[Path], list[str]]:
    """Folders of the finished runs below, the newest first, and what is wrong with records that cannot be read."""
    found, faults = [], []
    for path in run_records([folder]):
        try:
            if is_finished(read_facts(path)):
                found.append((path.stat().st_mtime, path.parent))
        except (MsencError, FileNotFoundError) as error:  # another process may be removing it
            faults.append(str(error))
    return [run for _, run in sorted(found, reverse=True)], faults


def run_label(run: Path, runs_dir: Path) -> str:
    """A run as a person tells it from others: its folder, and what it reads."""
    name = run.relative_to(runs_dir) if run.is_relative_to(runs_dir) else run
    return f"{name} ({read_facts(run / 'run.json').get('modality', 'unknown')})"


# ---------------------------------------------------------------------------------------------------- what is shown


def show_talk(talk: Talk | None, reply: str = "", hidden: Path | None = None) -> list[dict[str, Any]]:
    """The turns as messages of Gradio's chatbot, and the reply that is being written.

    Args:
        talk: so far.
        reply: so far.
        hidden: a clip that is not shown, as it is about to be moved.
    """
    messages = []
    for heard in talk.turns if talk else ():
        turn = heard.turn
        is_agent = talk.speakers is not None and turn.speaker == talk.speakers[1]
        files = [{"path": str(file)} for file in (turn.audio, turn.video) if file not in (None, hidden)]
        words = [turn.text, *([INTERRUPTED] if turn.interrupted else [])]
        messages.append({"role": "assistant" if is_agent else "user", "content": [*words, *files]})
    if reply:
        messages.append({"role": "assistant", "content": [reply]})
    return messages


def show_streams(heard: Heard, agent: Agent) -> str:
    """Which streams a turn had, of those that the run reads, as HTML."""
    read = ["text", *(stream for stream in agent.encoders if stream in heard.features)]
    missing = [stream for stream in agent.encoders if stream not in heard.features]
    told = f"Read of this turn: {_listed(read)}." + (f" It had no {' and no '.join(missing)}." if missing else "")
    return f"<p>{told}</p>"


def show_sound(reply: str, pieces: Sequence[str]) -> str:
    """A reply's sound so far, for ``talk.js`` to play.

    Args:
        reply: tells it from others.
        pieces: addresses that hold WAV files.
    """
    return "".join(f'<i data-reply="{reply}" data-src="{piece}"></i>' for piece in pieces)


def show_ledger(turns: Sequence[Mapping[str, float]]) -> str:
    """When the steps to a reply were done, as an HTML table: in the last turn, and of all turns p50 and p95."""
    if not turns:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{step}</th><td>{_seconds(turns[-1].get(step))}</td>'
        f"<td>{p50:.2f}</td><td>{p95:.2f}</td></tr>"
        for step, (p50, p95) in percentiles(turns).items()
    )
    names = ("seconds from the end of the turn", "last", "p50", "p95")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return f'<table class="ledger" aria-label="When each step to a reply was done"><tr>{head}</tr>{rows}</table>'


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def show_status(notices: Sequence[str] = (), refusal: str | None = None) -> str:
    """What a person should know, as HTML."""
    lines = [f"<p>{html.escape(notice)}</p>" for notice in notices]
    if refusal is not None:
        lines = [f'<p class="refused" role="alert">{html.escape(refusal)}</p>']
    return "".join(lines)


def show_voice(title: str, spoken: Spoken, seconds: Mapping[str, float]) -> str:
    """A reply's voice as HTML: description, attributes, sound, its waveform and pitch, and what took how long."""
    answer = spoken.answer
    chips = [
        f"<span><b>{name}</b> {word}</span>" for name, word in asdict(answer.attributes).items() if word != UNKNOWN
    ]
    parts = [f"<h3>{html.escape(title)}</h3>"]
    if answer.description:
        parts.append(f"<p>{html.escape(answer.description)}</p>")
        parts.append(f'<p class="chips">{"".join(chips) or "It names no attribute that is known."}</p>')
    else:
        parts.append("<p>No voice description was written.</p>")
    if answer.not_understood:
        parts.append(f'<p class="unread">Not understood: {html.escape(", ".join(answer.not_understood))}</p>')
    if spoken.sound is not None:
        uri = data_uri("audio/wav", to_wav(spoken.sound, spoken.sample_rate))
        parts += [
            *draw_sound(spoken.sound, spoken.sample_rate),
            f'<audio controls aria-label="{html.escape(title)}" src="{uri}"></audio>',
        ]
    else:
        parts.append("<p>No sound: there are no words to speak, or nothing that speaks them.</p>")
    took = " · ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    return f'<section class="voice">{"".join(parts)}<small>{took}</small></section>'


def draw_sound(sound: np.ndarray, sample_rate: int) -> list[str]:
    """Waveform and pitch curve on one time axis, and their figures in words: an SVG and a line of HTML.

    Args:
        sound: float32 (S,).
        sample_rate: in Hz.
    """
    width, height, low_hz, high_hz = 600, 150, 60.0, 400.0
    length_s = len(sound) / sample_rate
    columns = np.array_split(np.abs(sound), min(width // 2, len(sound)))
    peaks = np.array([column.max() for column in columns]) / max(float(np.abs(sound).max()), 1e-9)
    across = np.linspace(0, width, len(peaks))
    middle = height / 2
    outline = [
        *zip(across, middle - middle * peaks, strict=True),
        *reversed([*zip(across, middle + middle * peaks, strict=True)]),
    ]
    wave = " ".join(f"{x:.0f},{y:.0f}" for x, y in outline)
    pitch = track_voice(sound, sample_rate)
    voiced = pitch > 0
    curves, words = [], f"{length_s:.1f} s"
    if voiced.any():
        heights = height * (1 - np.log(np.clip(pitch, low_hz, high_hz) / low_hz) / np.log(high_hz / low_hz))
        for part in np.split(np.arange(len(pitch)), np.flatnonzero(np.diff(voiced)) + 1):
            if voiced[part[0]]:
                points = " ".join(f"{width * HOP_S * n / length_s:.1f},{heights[n]:.1f}" for n in part)
                curves.append(f'<polyline class="pitch" points="{points}"/>')
        low, median, high = np.percentile(pitch[voiced], [10, 50, 90])
        words += f" · pitch {median:.0f} Hz, mostly {low:.0f} to {high:.0f} Hz"
    svg = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Waveform and pitch curve">'
    return [f'{svg}<polygon class="wave" points="{wave}"/>{"".join(curves)}</svg>', f"<small>{words}</small>"]


# ---------------------------------------------------------------------------------------------------- the page


def build_page(host: Host) -> gr.Blocks:
    """Lay the page out and connect it."""

    def on_open() -> tuple[Any, ...]:
        runs, faults = host.runs()
        value = runs[0][1] if runs else None
        told, *examples = on_run(value)
        return gr.Dropdown(runs, value=value), told + show_status(faults), *examples

    def on_run(run: str | None) -> tuple[Any, ...]:
        """What a run reads, and its examples."""
        hidden = [gr.Button(visible=False)] * NUM_EXAMPLES
        try:
            run = host.check_run(run)
            if run is None:
                text = f"No finished run in {host.config['runs_dir']}. Train one: make train"
                return show_status(refusal=text), *hidden
            record, own = read_run(run)
        except MsencError as error:
            return show_status(refusal=str(error)), *hidden
        user, agent = host.speakers((), known_speakers(record))
        streams = _listed(["text", *own.model.streams])
        examples = [
            gr.Button(example.text + (" (with its clip)" if example.clip else ""), visible=True)
            for example in host.examples(run)
        ]
        told = show_status([f"This run reads {streams}. You speak as {user}, it replies as {agent}."])
        return told, *[*examples, *hidden][:NUM_EXAMPLES]

    def watch(session: str, moment: int) -> Callable[[], bool]:
        """Whether somebody waits for what the handler that asks is doing: Gradio drops events of who has gone."""
        events, id = page._queue.event_ids_to_events, LocalContext.event_id.get(None)

        def is_wanted() -> bool:
            event = events.get(id)
            return (
                event is not None
                and event.alive
                and not host.visitors.is_closed.is_set()
                and host.visitors.moment(session) == moment
            )

        return is_wanted

    def on_send(
        run: str | None,
        text: str,
        audio: dict[str, Any] | None,
        video: dict[str, Any] | None,
        note: Any,
        request: gr.Request,
    ) -> Iterator[dict[Any, Any]]:
        if isinstance(note, dict) and "refusal" in note:
            yield {status: show_status(refusal=str(note["refusal"]))}
            return
        session = str(request.session_hash)
        name = name_in(note)
        host.visitors.note_heard(session, heard_in(note))
        news: SimpleQueue[dict[Any, Any] | BaseException | None] = SimpleQueue()
        try:
            moment = host.visitors.moment(session)
            # In a thread of its own: it holds the model until it is done, whatever becomes of this handler.
            given = run, str(text or ""), audio, video
            wanted = watch(session, moment), host.visitors.watch_cuts(session, name)
            threading.Thread(target=send, args=(session, moment, name, *given, *wanted, news.put), daemon=True).start()
        except MsencError as error:
            news.put({status: show_status(refusal=str(error))})
            news.put(None)
        while (update := news.get()) is not None:
            if isinstance(update, BaseException):
                raise update
            yield update

    def send(
        session: str,
        moment: int,
        name: str,
        run: str | None,
        text: str,
        audio: Any,
        video: Any,
        is_wanted: Callable[[], bool],
        is_cut: Callable[[], bool],
        tell: Callable[[dict[Any, Any] | BaseException | None], None],
    ) -> None:
        """Hear a turn, and tell of its reply as it comes."""
        before, talk, is_put = host.visitors.talk(session), None, False
        pieces, shown_at = [], 0.0

        def tell_waiting(update: dict[Any, Any]) -> None:
            if is_wanted():  # "New talk" has emptied the page meanwhile
                tell(update)

        try:
            clips = [uploaded(host, file) for file in (audio, video)]
            waited_s = host.listeners.waited_s(clips[0])
            ledger, spoken_clip = Ledger(waited_s, waited_s), clips[0] if waited_s else None
            tell_waiting({streams: "<p>Hearing the turn.</p>"})
            with host.alone:
                talk = before or host.begin()
                now = host.hear(talk, host.check_run(run), Turn("", text, *clips), is_wanted)
                ledger.note_heard(now.turns[-1])
                agent = host.agent(now.run)

                def on_progress(progress: Progress) -> None:
                    nonlocal shown_at
                    if progress.sound is not None:
                        pieces.append(data_uri("audio/wav", to_wav(progress.sound, progress.sample_rate)))
                        tell_waiting({sound: show_sound(name, pieces)})
                    if progress.spoken is None and time.monotonic() - shown_at > SHOWN_S:
                        shown_at = time.monotonic()
                        tell_waiting({chat: show_talk(now, progress.text, spoken_clip)})

                tell_waiting({chat: show_talk(now, "", spoken_clip), streams: show_streams(now.turns[-1], agent)})
                after, notices, seconds = host.answer(now, is_wanted, is_cut, ledger, on_progress, name)
            is_put = host.visitors.replace(session, moment, after)
            if is_put:
                tell(answered(host.visitors.talk(session) or after, notices, seconds))
        except MsencError as error:
            given = {text_box: text, audio_box: path_of(audio), video_box: path_of(video)}
            refused = show_status(refusal=host.without_folders(error))
            tell({chat: show_talk(before), **given, status: refused, streams: ""})
        except AbandonedError:
            pass
        except BaseException as error:  # to be raised in the handler, which shows that something is wrong
            tell(error)
        finally:
            if talk is not None and before is None and not is_put:
                shutil.rmtree(talk.folder, ignore_errors=True)
            tell(None)

    def answered(talk: Talk, notices: Sequence[str], seconds: Mapping[str, float]) -> dict[Any, Any]:
        assert talk.spoken is not None
        heard, reply = talk.turns[-2:]
        attributes = asdict(talk.spoken.answer.attributes)
        return {
            chat: show_talk(talk),
            voice: show_voice("The reply's voice", talk.spoken, {**heard.seconds, **seconds}),
            other_voice: "",
            description_box: talk.spoken.answer.description or "",
            status: show_status([host.without_folders(n) for n in (*heard.notices, *notices, *reply.notices)]),
            saved: gr.File(visible=False),
            ledger_table: show_ledger(talk.seconds),
            **{box: attributes[name] for name, box in attribute_boxes.items()},
        }

    def take_example(number: int) -> Callable[[str | None], dict[Any, Any]]:
        def on_example(run: str | None) -> dict[Any, Any]:
            try:
                run = host.check_run(run)
                text, clip = host.take_example(run, number) if run is not None else ("", None)
            except MsencError as error:  # on_send says it; Gradio would lay "Error" over what is there
                return dict(zip(sent, ("", None, None, {"refusal": host.without_folders(error)}), strict=True))
            return dict(zip(sent, (text, None, as_file(clip), None), strict=True))

        return on_example

    def on_cut(note: Any, request: gr.Request) -> dict[Any, Any]:
        """End the replies that the visitor has stopped, and show what the talk keeps of them."""
        session = str(request.session_hash)
        before = host.visitors.talk(session)
        host.visitors.note_heard(session, heard_in(note))
        talk = host.visitors.talk(session)
        if talk is None or talk.spoken is None or talk is before:
            return {chat: gr.skip()}
        return {chat: show_talk(talk), voice: show_voice("The reply's voice", talk.spoken, {}), other_voice: ""}

    def on_listen(run: str | None) -> str:
        try:
            with host.alone:
                host.listen(host.check_run(run))
        except (MsencError, MediaError) as error:
            return show_status(refusal=f"The microphone was closed. {str(error).partition(chr(10))[0]}")
        return ""

    def on_say_again(description: str, request: gr.Request) -> dict[Any, Any]:
        try:
            with host.alone:
                spoken = host.say_again(host.visitors.talk(str(request.session_hash)), str(description or ""))
        except MsencError as error:
            return {status: show_status(refusal=str(error))}
        attributes = asdict(spoken.answer.attributes)
        return {
            other_voice: show_voice("The same words, as you ask", spoken, {"speaking": spoken.seconds}),
            status: "",
            **{box: attributes[name] for name, box in attribute_boxes.items()},
        }

    def on_attributes(*words: str) -> str:
        known = {name: [*VOCABULARY[name], ANY, UNKNOWN] for name in attribute_boxes}
        chosen = {n: word if word in known[n] else UNKNOWN for n, word in zip(attribute_boxes, words, strict=True)}
        return describe(VoiceAttributes(**chosen), Random(0))

    def on_new(request: gr.Request) -> dict[Any, Any]:
        session = str(request.session_hash)
        with suppress(MsencError):  # too many visitors: this one has no talk
            host.visitors.replace(session, host.visitors.moment(session), None)
        return {**blank(), chat: []}

    def blank() -> dict[Any, Any]:
        """What the page shows of no talk, but for its turns."""
        empty = dict.fromkeys((status, streams, voice, other_voice, ledger_table, sound, text_box, description_box), "")
        unknown = dict.fromkeys(attribute_boxes.values(), UNKNOWN)
        return {**empty, **unknown, audio_box: None, video_box: None, saved: gr.File(visible=False)}

    def on_save(request: gr.Request) -> dict[Any, Any]:
        talk = host.visitors.talk(str(request.session_hash))
        if not talk or not talk.turns:
            return {status: show_status(refusal="There is nothing to save yet: say something first.")}
        try:
            return {saved: gr.File(str(host.save_talk(talk)), visible=True)}
        except MsencError as error:
            return {status: show_status(refusal=str(error))}

    def on_continue(file: dict[str, Any] | None, run: str | None, request: gr.Request) -> dict[Any, Any]:
        session, path = str(request.session_hash), None
        try:
            moment = host.visitors.moment(session)
            path = uploaded(host, file)
            if path is None:
                raise MsencError("No file has arrived. Choose one that the page saved.")
            with host.alone:
                talk = host.load_talk(path, host.check_run(run), watch(session, moment))
            if not host.visitors.replace(session, moment, talk):
                return {status: ""}
        except MsencError as error:
            return {status: show_status(refusal=host.without_folders(error))}
        except AbandonedError:
            return {status: ""}
        finally:
            if path is not None:
                host.visitors.drop(path)
        notices = [f"{path.name}: {len(talk.turns)} turns. Say how it goes on."]
        notices += [host.without_folders(notice) for heard in talk.turns for notice in heard.notices]
        return {**blank(), chat: show_talk(talk), status: show_status(notices)}

    with gr.Blocks(title="Talk to a run", analytics_enabled=False) as page:
        gr.Markdown("# Talk to a run")
        run_box = gr.Dropdown(label="Run", elem_id="run")
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                chat = gr.Chatbot(
                    show_label=False,
                    height=400,
                    render_markdown=False,
                    autoscroll=False,  # talk.js does it, for what has clips too
                    buttons=[],
                    placeholder="Type something, give sound or video, or open the microphone: the run replies.",
                    elem_id="chat",
                )
                with gr.Row(elem_id="examples"):
                    examples = [gr.Button(visible=False, size="sm", min_width=200) for _ in range(NUM_EXAMPLES)]
                text_box = gr.Textbox(
                    label="Say something",  # read out, not shown
                    show_label=False,
                    placeholder="Say something",
                    max_lines=4,
                    max_length=MAX_CHARACTERS,
                    submit_btn="Send",
                    elem_id="text",
                )
                gr.HTML(CONTROLS, elem_id="live", padding=False)
                streams = gr.HTML(elem_id="streams", padding=False)
                status = gr.HTML(elem_id="status", padding=False)
                with gr.Row():
                    clip = {"min_width": 200}
                    audio_box = gr.Audio(
                        label="Sound",
                        sources=["upload", "microphone"],
                        type="filepath",
                        editable=False,
                        elem_id="audio",
                        **clip,
                    )
                    video_box = gr.Video(
                        label="Video", sources=["upload", "webcam"], include_audio=True, elem_id="video", **clip
                    )
                with gr.Row():
                    new = gr.Button("New talk", size="sm", min_width=80, elem_id="new")
                    save = gr.Button("Save talk", size="sm", min_width=80, elem_id="save")
                    load = gr.UploadButton(
                        "Continue talk", file_types=[".json", ".zip"], size="sm", min_width=80, elem_id="load"
                    )
                saved = gr.File(label="The talk as a history file", visible=False, elem_id="saved")
            with gr.Column(scale=2, min_width=320):
                voice = gr.HTML(elem_id="voice")
                ledger_table = gr.HTML(elem_id="ledger")
                with gr.Accordion("Hear it in another voice", elem_id="change"):
                    description_box = gr.Textbox(label="Voice description", lines=2, elem_id="description")
                    with gr.Row():
                        attribute_boxes = {
                            name: gr.Dropdown(
                                [*words, (ANY, UNKNOWN)],
                                value=UNKNOWN,
                                label=name,
                                filterable=False,
                                min_width=130,  # for "expressive"
                            )
                            for name, words in VOCABULARY.items()
                        }
                    again = gr.Button("Hear it in this voice", variant="primary", elem_id="again")
                    other_voice = gr.HTML(elem_id="other-voice")
        # In the page, and not to be seen: what talk.js reads, presses, and hands over.
        sound = gr.HTML(elem_id="sound", visible="hidden")
        sent = [gr.Textbox(visible="hidden"), *(gr.JSON(visible="hidden") for _ in range(3))]
        spoken = gr.Button(visible="hidden", elem_id="spoken")
        cut = gr.Button(visible="hidden", elem_id="cut")
        listen = gr.Button(visible="hidden", elem_id="listen")

        # Values come as they are sent, and are checked here: Gradio would fetch and copy files. What takes the model
        # waits in the queue, one at a time; all else is answered at once, beside it.
        raw = {"preprocess": False, "api_visibility": "private"}
        alone = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "hidden", **raw}
        quiet = {"queue": False, "show_progress": "hidden", **raw}
        everything = [chat, status, voice, other_voice, saved, text_box, audio_box, video_box, description_box]
        everything += [*attribute_boxes.values(), streams, sound, ledger_table, *sent]
        page.load(on_open, None, [run_box, status, *examples], **quiet)
        run_box.input(on_run, run_box, [status, *examples], **quiet)

        # A turn is shown by the browser, at once, and sent from where it cannot be changed any more.
        composer, waiting = [text_box, audio_box, video_box], [chat, status, streams, sound, *sent]
        typed = text_box.submit(None, [chat, *composer], [*waiting, *composer], js="talk.send")
        heard = spoken.click(None, [chat, video_box], [*waiting, video_box], js="talk.sendSpoken")
        shown = [typed, heard]
        for number, example in enumerate(examples):
            taken = example.click(take_example(number), run_box, sent, **quiet)
            shown.append(taken.success(None, [chat, *sent], waiting, js="talk.sendExample"))
        for one in shown:  # "multiple": a turn may be sent while the reply to another is on its way
            one.then(on_send, [run_box, *sent], everything, api_name="on_send", trigger_mode="multiple", **alone)
        cut.click(on_cut, sent[-1], everything, js="talk.note", **quiet)
        listening = listen.click(on_listen, run_box, status, **alone)
        listening.then(None, status, None, js="talk.checkEars")

        gr.on([again.click, description_box.submit], on_say_again, description_box, everything, **alone)
        for box in attribute_boxes.values():
            box.input(on_attributes, [*attribute_boxes.values()], description_box, **quiet)
        gr.on([new.click, chat.clear], on_new, None, everything, **quiet)
        save.click(on_save, None, everything, **quiet)
        load.upload(on_continue, [load, run_box], everything, **alone)
    return page


def as_file(path: Path | None) -> dict[str, Any] | None:
    """An uploaded file, as the browser names it."""
    if path is None:
        return None
    kind = mimetypes.guess_type(path.name)[0]
    return {"path": str(path), "orig_name": path.name, "mime_type": kind, "meta": {"_type": "gradio.FileData"}}


def path_of(file: Any) -> str | None:
    """The path of an uploaded file, as the browser names it."""
    path = file.get("path") if isinstance(file, dict) else None
    return path if isinstance(path, str) else None


def name_in(note: Any) -> str:
    """What the browser calls the reply that it asks for; a name of our own where it does not say."""
    name = note.get("reply") if isinstance(note, dict) else None
    return name if isinstance(name, str) and _NAME.fullmatch(name) else secrets.token_hex(4)


def heard_in(note: Any) -> dict[str, float | None]:
    """The replies that the browser has stopped, with what was heard of each; see `Talk.cut`."""
    heard = note.get("heard") if isinstance(note, dict) else None
    return {
        name: None if seconds is None else float(seconds)
        for name, seconds in (heard.items() if isinstance(heard, dict) else ())
        if _NAME.fullmatch(name)
        and (seconds is None or (type(seconds) in (int, float) and 0 <= seconds <= MAX_HEARD_S))
    }


def uploaded(host: Host, file: Any) -> Path | None:
    """An uploaded file, or None where nothing is given.

    Raises:
        MsencError: it is none, or was removed because it was not used.
    """
    if file is None:
        return None
    path = path_of(file)
    if path is None or not host.visitors.is_upload(Path(path)):
        raise MsencError("The uploaded file is not there any more. Remove it, and upload it again.")
    return Path(path)


def _listed(names: Sequence[str]) -> str:
    """Names in a sentence: a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
