"""A page to talk to a run: type, record or upload a turn, hear the reply, and hear it in other voices.

Gradio holds the page, the queue and one `Talk` per visitor; `msenc.talk.agent` hears and answers. Handlers return a new
`Talk`, so a turn that is refused leaves the talk as it was.
"""

import html
import re
import shutil
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import gradio as gr
import numpy as np
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from msenc.files import write_json
from msenc.pages.render import PAGES, data_uri
from msenc.runs.find import run_records
from msenc.runs.record import is_finished, read_facts, read_run
from msenc.speech.description import VOCABULARY, describe, parse
from msenc.speech.pitch import HOP_S
from msenc.speech.synthesis import Synthesizer
from msenc.speech.voice import track_voice
from msenc.speech.wav import to_wav, write_wav
from msenc.talk.agent import (
    Agent,
    Heard,
    Spoken,
    Turn,
    choose_speakers,
    known_speakers,
    read_talk,
    speak_answer,
    talk_json,
)
from msenc.types import UNKNOWN, MsencError, VoiceAttributes

MAX_CHARACTERS = 2000
MAX_TURNS = 100
MAX_WAITING = 20  # visitors in the queue
HOUR_S = 3600
ANY = "any"


STYLE = PAGES / "talk.css"


@dataclass(frozen=True)
class Talk:
    """One visitor's talk.

    Args:
        folder: holds its sounds and pictures; it goes when the visitor has gone.
        run: whose encoders heard the turns.
        speakers: the visitor's name and the agent's, from the first turn on.
        turns: so far, replies included.
        spoken: the last reply.
    """

    folder: Path
    run: str | None = None
    speakers: tuple[str, str] | None = None
    turns: tuple[Heard, ...] = ()
    spoken: Spoken | None = None


class Host:
    """What all visitors share: the model of one run at a time, loaded once, and the synthesizer.

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
        self._run: str | None = None
        self._agent: Agent | None = None

    def agent(self, run: str | None) -> Agent:
        """The run's agent. That of another run is let go first: both may not fit into memory."""
        if run is None:
            raise MsencError("No run is chosen. Choose one, or train one: make train")
        if self._agent is None or run != self._run:
            self._run = self._agent = None
            self._agent = self.load(Path(run))
            self._run = run
        return self._agent

    def runs(self) -> list[tuple[str, str]]:
        """Label and folder of each run that can be chosen: the one that the command names, then the newest first."""
        folder = Path(self.config["runs_dir"])
        found = finished_runs(folder)
        if self.config["run_dir"] is not None:
            given = Path(self.config["run_dir"])
            found = [given, *(run for run in found if run.resolve() != given.resolve())]
        return [(run_label(run, folder), str(run)) for run in found]

    def begin(self) -> Talk:
        """An empty talk."""
        return Talk(Path(tempfile.mkdtemp(dir=self.folder)))

    def hear(self, talk: Talk, run: str | None, turn: Turn) -> Talk:
        """The talk with one more turn, all of it heard by this run.

        Raises:
            MsencError: nothing is said, or a clip is of no use.
        """
        if not turn.text.strip() and turn.sound is None:
            raise MsencError("Nothing is said yet: type something, or record or upload sound or video.")
        if len(turn.text) > MAX_CHARACTERS:
            raise MsencError(f"The text has {len(turn.text)} characters; a turn may have {MAX_CHARACTERS}. Shorten it.")
        if len(talk.turns) >= MAX_TURNS:
            raise MsencError(f"The talk has {len(talk.turns)} turns, which is the most. Begin a new one.")
        agent = self.agent(run)
        before = talk.turns if talk.run == run else tuple(_hear_again(agent, heard.turn) for heard in talk.turns)
        speakers = talk.speakers or self.speakers((), agent.speakers)
        heard = agent.hear(replace(turn, speaker=speakers[0]))
        number = len(talk.turns) + 1
        files = {
            name: shutil.copyfile(path, talk.folder / f"{number}-{name}{path.suffix.lower()}")
            for name in ("audio", "video")
            if (path := getattr(turn, name)) is not None
        }
        heard = replace(heard, turn=replace(heard.turn, **files))
        return replace(talk, run=run, speakers=speakers, turns=(*before, heard))

    def answer(self, talk: Talk) -> tuple[Talk, list[str], dict[str, float]]:
        """The talk with a reply, notices, and the seconds that it took."""
        assert talk.speakers is not None
        agent, speaker = self.agent(talk.run), talk.speakers[1]
        began = time.perf_counter()
        (answer, *_), notices = agent.answer(talk.turns, speaker, self.config["decoding"], self.config["seed"])
        seconds = {"writing": time.perf_counter() - began}
        spoken = speak_answer(self.synthesizer, answer, speaker)
        turn = Turn(speaker, answer.text or "...", description=answer.description)
        if spoken.sound is not None:
            seconds["speaking"] = spoken.seconds
            turn = replace(turn, audio=talk.folder / f"{len(talk.turns) + 1}-reply.wav")
            write_wav(turn.audio, spoken.sound, spoken.sample_rate)
        return replace(talk, turns=(*talk.turns, _hear_again(agent, turn)), spoken=spoken), notices, seconds

    def say_again(self, talk: Talk | None, description: str) -> Spoken:
        """The last reply in another voice."""
        if talk is None or talk.spoken is None:
            raise MsencError("There is no reply yet: say something first.")
        if self.synthesizer is None:
            raise MsencError("The page was started without a voice (speech=none).")
        answer = replace(talk.spoken.answer, description=description, attributes=parse(description))
        return speak_answer(self.synthesizer, answer, talk.turns[-1].turn.speaker)

    def load_talk(self, path: Path, run: str | None) -> Talk:
        """Continue from a file that `save_talk` wrote, or a history file without clips.

        Raises:
            MsencError: it is no such file, too large, or names files that are not in it.
        """
        talk = self.begin()
        try:
            turns = read_saved(path, talk.folder / "loaded", int(self.config["max_upload_mb"] * 2**20))
            agent = self.agent(run)
            heard = tuple(_hear_again(agent, turn) for turn in turns)
            return replace(talk, run=run, speakers=self.speakers(turns, agent.speakers), turns=heard)
        except MsencError:
            shutil.rmtree(talk.folder)
            raise

    def speakers(self, before: Sequence[Turn], known: tuple[str, str]) -> tuple[str, str]:
        """The visitor's name and the agent's; see `choose_speakers`."""
        return choose_speakers(before, True, self.config["speaker"], self.config["reply_as"], known)

    def without_folders(self, message: MsencError | str) -> str:
        """A message that calls files of visitors by their names alone."""
        return re.sub(rf"{re.escape(str(self.folder))}/(\S*/)?", "", str(message))


def _hear_again(agent: Agent, turn: Turn) -> Heard:
    """A turn that was taken before. A clip that this run cannot use is left out, and said; all else was said then."""
    try:
        return replace(agent.hear(turn), notices=())
    except MsencError as error:
        heard = agent.hear(replace(turn, audio=None, video=None))
        return replace(heard, turn=turn, notices=(f"{error} The turn is read without.",))


# ---------------------------------------------------------------------------------------------------- runs and files


def finished_runs(folder: Path) -> list[Path]:
    """Folders of the finished runs below, the newest first."""
    found = [path for path in run_records([folder]) if is_finished(read_facts(path))]
    return [path.parent for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]


def run_label(run: Path, runs_dir: Path) -> str:
    """A run as a person tells it from others: its folder, and what it reads."""
    name = run.relative_to(runs_dir) if run.is_relative_to(runs_dir) else run
    return f"{name} ({read_facts(run / 'run.json').get('modality', 'unknown')})"


def save_talk(talk: Talk) -> Path:
    """Write the talk as a history file, which `respond.py` takes; with clips, a ZIP of it and them."""
    turns, files = talk_json([heard.turn for heard in talk.turns])["turns"], {}
    for number, turn in enumerate(turns, start=1):
        for name in {"audio", "video"} & turn.keys():
            file = Path(turn[name])
            turn[name] = f"{number}-{name}{file.suffix}"
            files[turn[name]] = file
    path = talk.folder / "talk.json"
    write_json(path, {"turns": turns})
    if not files:
        return path
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:  # stored, as clips are compressed already
        for name, file in {path.name: path, **files}.items():
            archive.write(file, name)
    return path.with_suffix(".zip")


def read_saved(path: Path, folder: Path, max_bytes: int) -> list[Turn]:
    """The turns of a file of `save_talk`, its clips unpacked into a folder.

    Raises:
        MsencError: it is no such file, larger than `max_bytes` when unpacked, too long, or names files that are not in
            it: a visitor must not reach those of this machine.
    """
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                found = archive.infolist()
                if sum(info.file_size for info in found) > max_bytes or len(found) > 2 * MAX_TURNS + 1:
                    raise MsencError(
                        f"{path.name}: holds {len(found)} files, or more than {max_bytes >> 20} MiB. Cut the talk, or "
                        "raise max_upload_mb."
                    )
                archive.extractall(folder)
        except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError) as error:
            raise MsencError(f"{path.name}: cannot be unpacked ({error}).") from error
        path = folder / "talk.json"
    turns = read_talk(path)
    if len(turns) > MAX_TURNS:
        raise MsencError(f"{path.name}: has {len(turns)} turns; a talk may have {MAX_TURNS}.")
    for number, turn in enumerate(turns, start=1):
        for file in (turn.audio, turn.video):
            if file is not None and not file.resolve().is_relative_to(folder.resolve()):
                raise MsencError(
                    f"{path.name}, turn {number}: {file.name} is not in the file. Give the ZIP that the page saved, or "
                    "turns without clips."
                )
    return turns


# ---------------------------------------------------------------------------------------------------- what is shown


def show_talk(talk: Talk | None) -> list[dict[str, Any]]:
    """The turns as messages of Gradio's chatbot."""
    messages = []
    for heard in talk.turns if talk else ():
        turn = heard.turn
        is_agent = talk.speakers is not None and turn.speaker == talk.speakers[1]
        files = [{"path": str(file)} for file in (turn.audio, turn.video) if file is not None]
        messages.append({"role": "assistant" if is_agent else "user", "content": [turn.text, *files]})
    return messages


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
    parts = [f"<h3>{html.escape(title)}</h3>", f"<p>{html.escape(answer.description or 'no description')}</p>"]
    parts.append(f'<p class="chips">{"".join(chips) or "It names no attribute that is known."}</p>')
    if spoken.sound is not None:
        uri = data_uri("audio/wav", to_wav(spoken.sound, spoken.sample_rate))
        parts += [*draw_sound(spoken.sound, spoken.sample_rate), f'<audio controls src="{uri}"></audio>']
    else:
        parts.append("<p>No sound: the reply has no words, or the page was started without a voice.</p>")
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

    def on_open() -> tuple[Any, str]:
        runs = host.runs()
        value = runs[0][1] if runs else None
        return gr.Dropdown(runs, value=value), on_run(value)

    def on_run(run: str | None) -> str:
        if run is None:
            return show_status(refusal=f"No finished run in {host.config['runs_dir']}. Train one: make train")
        try:
            record, own = read_run(run)
        except MsencError as error:
            return show_status(refusal=str(error))
        user, agent = host.speakers((), known_speakers(record))
        streams = _listed(["text", *own.model.streams])
        return show_status([f"This run reads {streams}. You speak as {user}, it replies as {agent}."])

    def on_send(
        talk: Talk | None,
        run: str | None,
        text: str,
        audio: str | None,
        video: str | None,
        progress: Any = gr.Progress(),  # noqa: B008 (Gradio finds it there)
    ) -> Iterator[dict[Any, Any]]:
        before = talk or host.begin()
        try:
            progress(0.1, "Hearing the turn")
            talk = host.hear(before, run, Turn("", text, *(Path(file) if file else None for file in (audio, video))))
            heard = talk.turns[-1]
            yield {chat: show_talk(talk), text_box: "", audio_box: None, video_box: None, status: ""}
            progress(0.5, "Writing and speaking the reply")
            talk, notices, seconds = host.answer(talk)
        except MsencError as error:
            given = {text_box: text, audio_box: audio, video_box: video}
            refusal = show_status(refusal=host.without_folders(error))
            yield {state: before, chat: show_talk(before), **given, status: refusal}
            return
        shown = show_voice("The reply's voice", talk.spoken, {**heard.seconds, **seconds})
        attributes = asdict(talk.spoken.answer.attributes)
        notices = [host.without_folders(n) for n in (*heard.notices, *notices, *talk.turns[-1].notices)]
        yield {
            state: talk,
            chat: show_talk(talk),
            voice: shown,
            other_voice: "",
            description_box: talk.spoken.answer.description or "",
            status: show_status(notices),
            saved: gr.File(visible=False),
            **{box: attributes[name] for name, box in attribute_boxes.items()},
        }

    def on_say_again(talk: Talk | None, description: str) -> dict[Any, Any]:
        try:
            spoken = host.say_again(talk, description)
        except MsencError as error:
            return {status: show_status(refusal=str(error))}
        attributes = asdict(spoken.answer.attributes)
        return {
            other_voice: show_voice("The same words, as you ask", spoken, {"speaking": spoken.seconds}),
            status: "",
            **{box: attributes[name] for name, box in attribute_boxes.items()},
        }

    def on_attributes(*words: str) -> str:
        return describe(VoiceAttributes(**dict(zip(attribute_boxes, words, strict=True))), Random(0))

    def on_new(talk: Talk | None) -> dict[Any, Any]:
        if talk:
            shutil.rmtree(talk.folder, ignore_errors=True)
        return {state: None, chat: [], voice: "", other_voice: "", status: "", saved: gr.File(visible=False)}

    def on_save(talk: Talk | None) -> dict[Any, Any]:
        if not talk or not talk.turns:
            return {status: show_status(refusal="There is nothing to save yet: say something first.")}
        return {saved: gr.File(str(save_talk(talk)), visible=True)}

    def on_continue(file: str, run: str | None) -> dict[Any, Any]:
        try:
            talk = host.load_talk(Path(file), run)
        except MsencError as error:
            return {status: show_status(refusal=host.without_folders(error))}
        notices = [f"{Path(file).name}: {len(talk.turns)} turns. Say how it goes on."]
        notices += [host.without_folders(notice) for heard in talk.turns for notice in heard.notices]
        return {state: talk, chat: show_talk(talk), voice: "", other_voice: "", status: show_status(notices)}

    with gr.Blocks(title="Talk to a run", analytics_enabled=False, delete_cache=(HOUR_S, 24 * HOUR_S)) as page:
        state = gr.State(None, delete_callback=lambda talk: talk and shutil.rmtree(talk.folder, ignore_errors=True))
        gr.Markdown("# Talk to a run")
        run_box = gr.Dropdown(label="Run", elem_id="run")
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                chat = gr.Chatbot(
                    show_label=False,
                    height=400,
                    render_markdown=False,
                    buttons=[],
                    placeholder="Type something, or give sound or video, and the run replies.",
                    elem_id="chat",
                )
            with gr.Column(scale=2, min_width=320):
                voice = gr.HTML(elem_id="voice")
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                status = gr.HTML(elem_id="status")
                text_box = gr.Textbox(
                    show_label=False,
                    placeholder="Say something",
                    max_lines=4,
                    max_length=MAX_CHARACTERS,
                    submit_btn="Send",
                    elem_id="text",
                )
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
            with (
                gr.Column(scale=2, min_width=320),
                gr.Accordion("Hear it in another voice", elem_id="change"),
            ):
                description_box = gr.Textbox(label="Voice description", lines=2, elem_id="description")
                with gr.Row():
                    attribute_boxes = {
                        name: gr.Dropdown(
                            [*words, (ANY, UNKNOWN)],
                            value=UNKNOWN,
                            label=name,
                            filterable=False,
                            min_width=110,
                        )
                        for name, words in VOCABULARY.items()
                    }
                again = gr.Button("Say it again", variant="primary", elem_id="again")
                other_voice = gr.HTML(elem_id="other-voice")

        # One at a time: model and synthesizer serve all visitors.
        alone = {
            "concurrency_limit": 1,
            "concurrency_id": "model",
            "show_progress_on": status,
            "api_visibility": "private",
        }
        everything = [state, chat, status, voice, other_voice, saved, text_box, audio_box, video_box, description_box]
        everything += attribute_boxes.values()
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        page.load(on_open, None, [run_box, status], **quiet)
        run_box.input(on_run, run_box, status, **quiet)
        text_box.submit(on_send, [state, run_box, text_box, audio_box, video_box], everything, **alone)
        gr.on([again.click, description_box.submit], on_say_again, [state, description_box], everything, **alone)
        for box in attribute_boxes.values():
            box.input(on_attributes, [*attribute_boxes.values()], description_box, **quiet)
        gr.on([new.click, chat.clear], on_new, state, everything, **quiet)
        save.click(on_save, state, everything, **quiet)
        load.upload(on_continue, [load, run_box], everything, **alone)
    return page


def launch_page(page: gr.Blocks, config: Mapping[str, Any]) -> str:
    """Serve the page, and return its address; `page.close()` ends it."""
    _, address, _ = page.queue(max_size=MAX_WAITING).launch(
        server_name=config["host"],
        server_port=config["port"],
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size=f"{config['max_upload_mb']}mb",
        app_kwargs={"middleware": [Middleware(_KeepRequestsHere)]},
        theme=gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css_paths=STYLE,
    )
    return address


class _KeepRequestsHere:
    """Tells the browser to fetch nothing from elsewhere, whatever a model writes or a part of Gradio asks for."""

    POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", self.POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy if scope["type"] == "http" else send)


def _listed(names: Sequence[str]) -> str:
    """Names in a sentence: a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
