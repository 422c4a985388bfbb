"""What respond.py does: a run and a turn -> a reply in words and sound."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig
from rich.table import Table

from msenc.config.build import build
from msenc.config.checks import checked
from msenc.files import inside, write_json
from msenc.models.llm import load_tokenizer
from msenc.models.recognition import Recogniser
from msenc.prompt import DialogueTokenizer
from msenc.raw.media import read_audio
from msenc.runs.hub import HUB, fetched
from msenc.speech.wav import write_wav
from msenc.talk.address import is_loopback
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
from msenc.talk.live import Ledger, reply_live
from msenc.training.assembly import GIVEN, num_parameters
from msenc.training.export import load_encoders, load_export, read_export
from msenc.training.restore import find_device, load_trained, open_run
from msenc.types import UNKNOWN, MsencError, needing
from msenc.work.console import console, quieten, shown
from msenc.work.threads import settle_threads


def respond(cfg: DictConfig) -> Path | None:
    """Hear the turn that the config gives, reply, and write reply.json and reply.wav; returns their folder.

    With ``page=true`` it serves a page instead, until it is ended.
    """
    config = checked(cfg, GIVEN)
    quieten()
    if config["page"]:
        return serve_page(config)
    if config["run_dir"] is None:
        raise MsencError("run_dir: no value. Give the run that replies: run_dir=runs/single/TIME")
    # What can be refused without the model is refused before it is loaded.
    before = read_talk(Path(config["history"])) if config["history"] else []
    given = any(config[key] is not None for key in ("text", "audio", "video"))
    if not given and not before:
        raise MsencError("There is no turn to answer: give text=..., audio=..., video=... or history=...")
    moment = datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    own = Path(config["runs_dir"] if config["run_dir"].startswith(HUB) else config["run_dir"])
    folder = Path(config["out"]) if config["out"] else inside(own, "replies", moment)
    if (folder / "reply.json").exists():
        raise MsencError(f"out={folder}: holds a reply already. Give another folder, or move it away.")
    began = time.perf_counter()
    synthesizer = build(config["speech"], "speech") if config["speech"] else None
    agent = load_agent(config["run_dir"], config)
    seconds = {"loading": time.perf_counter() - began}
    user, reply_as = choose_speakers(before, given, config["speaker"], config["reply_as"], agent.speakers)
    files = {key: Path(config[key]) if config[key] is not None else None for key in ("audio", "video")}
    turns = [*before, *([Turn(user, config["text"] or "", **files)] if given else [])]
    heard = [agent.hear(turn) for turn in turns[:-1]]
    ledger = Ledger()
    heard.append(agent.hear(turns[-1]))
    ledger.note_heard(heard[-1])
    for turn in heard:
        for name, value in turn.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + value
    began, latency = time.perf_counter(), {}
    if config["num_replies"] == 1:
        *_, last = reply_live(agent, synthesizer, heard, reply_as, config["decoding"], config["seed"], ledger)
        if last.fault is not None:
            raise last.fault
        spoken, notices, latency = [last.spoken], [*last.notices], ledger.seconds
    else:
        answers, notices = agent.answer(heard, reply_as, config["decoding"], config["seed"], config["num_replies"])
        spoken = [speak_answer(synthesizer, answer, reply_as) for answer in answers]
    seconds["speaking"] = sum(s.seconds for s in spoken)
    seconds["writing"] = time.perf_counter() - began - seconds["speaking"]
    notices = [*dict.fromkeys([n for h in heard for n in h.notices] + notices)]
    files = write_replies_to(folder, config["run_dir"], heard, reply_as, spoken, notices, seconds, latency)
    _print(spoken, reply_as, notices, seconds)
    console.print(f"Written: {', '.join(str(shown(f)) for f in files)}", soft_wrap=True)
    return folder


def serve_page(config: Mapping[str, Any]) -> None:
    """Serve the page until Ctrl-C or SIGTERM; what visitors leave is removed then."""
    given = [key for key in ("text", "audio", "video", "history", "out") if config[key] is not None]
    if given or config["num_replies"] > 1:
        raise MsencError(f"page=true: {', '.join(given or ['num_replies'])} is for one reply. Leave it out.")
    if config["run_dir"] is not None:
        open_run(Path(config["run_dir"]), config["data_dir"], config["urls"])
    before = signal.signal(signal.SIGTERM, _interrupt)  # else nothing would be removed
    try:
        with (
            suppress(KeyboardInterrupt),
            TemporaryDirectory(prefix="msenc-talk-") as folder,
            running_page(config, Path(folder)) as address,
        ):
            console.print(f"Talk to the run at {address} (Ctrl-C ends it)")
            threading.Event().wait()
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: Any) -> None:
    """As Ctrl-C; a second SIGTERM does not keep the first from removing what visitors left."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def check_page(config: Mapping[str, Any]) -> None:
    """Refuse what a page cannot be served with, and warn where others reach it."""
    host, password = config["host"], config["page_password"]
    if not host.strip():
        raise MsencError("host='': no address. Give host=127.0.0.1, or host=0.0.0.0 to let others in.")
    if password is not None and not password.strip():
        raise MsencError("page_password='': an empty password keeps nobody out. Give one, or null.")
    for key in ("max_upload_mb", "max_total_mb"):
        if config[key] < 1:
            raise MsencError(f"{key}: found {config[key]}, expected a whole number of 1 or more.")
    if is_loopback(host):
        return
    if password is None:
        raise MsencError(
            f"host={host}: whoever reaches this machine could open the page. Give page_password=... (or the variable "
            "MSENC_PAGE_PASSWORD), or page_password=none to let everyone in."
        )
    who = "Whoever reaches this machine" if password == "none" else "Whoever knows the password"
    console.print(
        f"host={host}: {who} can open the page. What is said there crosses the network unencrypted.",
        style="yellow",
        soft_wrap=True,
    )


@contextmanager
def running_page(config: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """The page, served in threads of its own; gives its address.

    Args:
        config: keys of `RespondConfig`.
        folder: for all that is written.
    """
    host, port = config["host"], config["port"]
    try:
        socket.create_server((host, port or 0)).close()  # Gradio would try a hundred ports, minutes with some hosts
    except OSError as error:
        raise MsencError(f"host={host} port={port}: cannot be served ({error.strerror}). Give another.") from error
    check_page(config)
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "gradio")
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "100"  # each event sums up all that it remembers
    with needing("page=true", "talk"):
        from msenc.talk.page import Host, build_page
        from msenc.talk.serve import launch_page
    synthesizer = build(config["speech"], "speech") if config["speech"] else None
    shared = Host(lambda run: load_agent(run, config), synthesizer, config, folder)
    page = build_page(shared)
    threading.Thread(target=shared.visitors.sweep_until_closed, daemon=True).start()
    try:
        yield launch_page(page, config, shared.visitors, shared.listeners)
    finally:
        shared.close()
        page.close(verbose=False)


def load_agent(run_dir: str | Path, config: Mapping[str, Any]) -> Agent:
    """A run's model with the encoders that made its features, ready to hear and answer.

    Args:
        run_dir: the run, its export, or ``hub:REPO[@REVISION]``.
        config: keys of `RespondConfig`.
    """
    run_dir = fetched(run_dir)
    if (run_dir / "export.json").is_file():
        return _agent_of_export(run_dir, config)
    if given := [key for key in ("base", "encoders") if config[key]]:
        raise MsencError(f"{given[0]}: is of an export, and {run_dir} is a run, which knows its own. Leave it out.")
    record, own = open_run(run_dir, config["data_dir"], config["urls"])
    L.seed_everything(own["seed"], workers=True, verbose=False)
    model = load_trained(run_dir, config["checkpoint"], record, own)
    settle_threads(num_parameters(model))
    streams, connector = own["model"]["streams"], own["model"]["connector"]
    return Agent(
        model.to(find_device(config["device"])),
        DialogueTokenizer(build(own["prompt"], "prompt"), load_tokenizer(own["model"]["llm"]["name_or_path"])),
        encoders={name: build(stream["encoder"], f"model.streams.{name}.encoder") for name, stream in streams.items()},
        num_queries=dict.fromkeys(streams, connector["num_queries"] if connector else 0),
        budget=own["data"]["max_history_tokens"],
        layout=own["model"]["layout"],
        recognise=_Recognise(config["recogniser"], config["max_clip_s"]),
        max_clip_s=config["max_clip_s"],
        speakers=known_speakers(record),
    )


def _agent_of_export(folder: Path, config: Mapping[str, Any]) -> Agent:
    encoders = load_encoders(folder, config["encoders"])
    model, tokenizer = load_export(folder, config["base"])
    settle_threads(num_parameters(model))
    content = read_export(folder)
    return Agent(
        model.to(find_device(config["device"])),
        tokenizer,
        encoders=encoders,
        num_queries={name: stream["num_queries"] for name, stream in content["streams"].items()},
        budget=content["max_history_tokens"],
        layout="dialogue",
        recognise=_Recognise(config["recogniser"], config["max_clip_s"]),
        max_clip_s=config["max_clip_s"],
        speakers=known_speakers(content),
    )


class _Recognise:
    """A sound file -> its words; the recogniser is loaded when it is first needed."""

    def __init__(self, name_or_path: str, max_clip_s: float) -> None:
        self.name_or_path = name_or_path
        self.max_clip_s = max_clip_s

    @cached_property
    def recogniser(self) -> Recogniser:
        try:
            # Half the time where the processor itself multiplies bfloat16. Older torch cannot tell.
            is_fast = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)
            return Recogniser(self.name_or_path, dtype="bfloat16" if is_fast else "float32")
        except MsencError as error:
            raise MsencError(
                f"No text is given, and what recognises it cannot be loaded. Give text=..., or recogniser=FOLDER of a "
                f"Whisper. {error}"
            ) from error

    def __call__(self, path: Path) -> str:
        sound = read_audio(path, self.recogniser.sample_rate, max_s=self.max_clip_s)
        before = torch.get_num_threads()  # of the run's model, which may be too small for more than one
        settle_threads(num_parameters(self.recogniser.model))
        try:
            return self.recogniser.text(sound)
        finally:
            torch.set_num_threads(before)


def write_replies_to(
    folder: Path,
    run_dir: str,
    heard: Sequence[Heard],
    speaker: str,
    spoken: Sequence[Spoken],
    notices: Sequence[str],
    seconds: Mapping[str, float],
    latency: Mapping[str, float],
) -> list[Path]:
    """Write ``reply.json`` and a WAV file per reply; returns their paths."""
    names = ["reply.wav"] if len(spoken) == 1 else [f"reply-{n}.wav" for n in range(1, len(spoken) + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    replies, files = [], [folder / "reply.json"]
    for name, one in zip(names, spoken, strict=True):
        reply = {
            "speaker": speaker,
            "text": one.answer.text,
            "description": one.answer.description,
            "attributes": asdict(one.answer.attributes),
            "not_understood": list(one.answer.not_understood),
        }
        if one.sound is not None:
            write_wav(folder / name, one.sound, one.sample_rate)
            files.append(folder / name)
            reply |= {"sound": name, "sound_s": round(len(one.sound) / one.sample_rate, 3)}
        replies.append(reply)
    value = {
        "run_dir": run_dir,
        "history": talk_json([h.turn for h in heard])["turns"],
        "replies": replies,
        "notices": list(notices),
        "seconds": {k: round(v, 3) for k, v in seconds.items()},
        "latency_s": {k.replace(" ", "_"): round(v, 3) for k, v in latency.items()},
    }
    write_json(folder / "reply.json", value)
    return files


def _print(spoken: Sequence[Spoken], speaker: str, notices: Sequence[str], seconds: Mapping[str, float]) -> None:
    for notice in notices:
        console.print(notice, style="yellow", soft_wrap=True)
    table = Table(show_header=False)
    for one in spoken:
        table.add_row(speaker, one.answer.text)
        table.add_row("voice", one.answer.description or "not described")
        known = {k: v for k, v in asdict(one.answer.attributes).items() if v != UNKNOWN}
        table.add_row("attributes", ", ".join(f"{k} {v}" for k, v in known.items()) or "none recognised")
        if one.answer.not_understood:
            table.add_row("not understood", ", ".join(one.answer.not_understood))
        if one.sound is not None:
            table.add_row("sound", f"{len(one.sound) / one.sample_rate:.1f} s")
        table.add_section()
    table.add_row("seconds", ", ".join(f"{name} {value:.2f}" for name, value in seconds.items()))
    console.print(table)
