"""msenc in Python: train a run, load it, let it reply.

run = msenc.train(["modality=text_audio", "trainer.max_epochs=4"])
agent = msenc.load(run)                                      # or a run's folder, or its export/
reply = agent.reply("That's amazing!", audio="clip.wav")     # a notebook shows it, and plays its sound
"""

import html
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import open_dict

from msenc.config.build import build
from msenc.config.checks import checked
from msenc.config.messages import CONFIGS, refusal
from msenc.config.schema import register_schemas
from msenc.pages.render import data_uri
from msenc.pipelines.respond import load_agent
from msenc.pipelines.train import train as train_pipeline
from msenc.report.collect import collect_runs
from msenc.runs.overrides import read_arguments, resumed_arguments, spelt_out
from msenc.speech.synthesis import Synthesizer
from msenc.speech.wav import to_wav, write_wav
from msenc.talk.agent import Agent, Heard, Turn, choose_speakers, read_talk, speak_answer, turns_of
from msenc.training.assembly import GIVEN
from msenc.types import MsencError, VoiceAttributes
from msenc.work.console import quieten


@dataclass(frozen=True)
class Run:
    """A run that has ended.

    Args:
        folder: of the run.
        loss: the best on the validation split, in nats per token; None without one.
        metrics: of the newest evaluation of the split that is evaluated after training; empty if none is.
    """

    folder: Path
    loss: float | None
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class Reply:
    """What the run said.

    Args:
        text: the words.
        description: of the voice, as the LLM wrote it; None if it wrote none.
        attributes: what was understood of the description.
        speaker: who speaks.
        sound: float32 (S,) in [-1, 1]; None without a synthesizer, or without words.
        sample_rate: of the sound, in Hz.
        notices: what a person should know, such as a stream that the turn lacks.
        seconds: of each step.
    """

    text: str
    description: str | None
    attributes: VoiceAttributes
    speaker: str
    sound: np.ndarray | None = field(repr=False)
    sample_rate: int
    notices: tuple[str, ...]
    seconds: Mapping[str, float] = field(repr=False)

    def save(self, path: str | Path) -> Path:
        """Write the sound as a WAV file, and return its path.

        Raises:
            MsencError: there is no sound.
        """
        if self.sound is None:
            raise MsencError("This reply has no sound: it has no words, or the agent was loaded with speech=null.")
        write_wav(Path(path), self.sound, self.sample_rate)
        return Path(path)

    def _repr_html_(self) -> str:
        sound = ""
        if self.sound is not None:
            sound = f'<audio controls src="{data_uri("audio/wav", to_wav(self.sound, self.sample_rate))}"></audio>'
        said = [f"<b>{html.escape(self.speaker)}:</b> {html.escape(self.text)}", html.escape(self.description or "")]
        return f"<p>{'<br>'.join(line for line in said if line)}</p>{sound}"


class Conversant:
    """A loaded run that replies.

    Args:
        agent: the run's model with its encoders.
        synthesizer: speaks the replies; None for words alone.
        decoding: see ``configs/decoding``.
    """

    def __init__(self, agent: Agent, synthesizer: Synthesizer | None, decoding: Mapping[str, Any]) -> None:
        self.agent = agent
        self.synthesizer = synthesizer
        self.decoding = decoding

    def reply(
        self,
        text: str = "",
        *,
        audio: str | Path | None = None,
        video: str | Path | None = None,
        history: str | Path | Sequence[Turn | Mapping[str, Any]] = (),
        speaker: str | None = None,
        reply_as: str | None = None,
        seed: int = 1,
    ) -> Reply:
        """Answer one turn.

        Args:
            text: the words; recognised from the sound if empty.
            audio: a sound file; None: that of `video`, if there is one.
            video: a video file.
            history: the turns before, as `Turn` or its fields, or a file of them (docs/talk.md).
            speaker: who takes this turn; None: as in the history, else a name that the run knows.
            reply_as: who replies.
            seed: of what is drawn.

        Raises:
            MsencError: nothing to answer, or a clip that cannot be used.
        """
        has_turn = bool(text) or audio is not None or video is not None
        before = _turns(history)
        user, reply_as = choose_speakers(before, has_turn, speaker, reply_as, self.agent.speakers)
        turn = [Turn(user, text, *(Path(p) if p is not None else None for p in (audio, video)))] if has_turn else []
        return self._answer([self.agent.hear(t) for t in (*before, *turn)], reply_as, seed)

    def talk(self) -> "Talk":
        """A conversation, whose turns are remembered."""
        return Talk(self)

    def _answer(self, heard: Sequence[Heard], reply_as: str, seed: int) -> Reply:
        began = time.perf_counter()
        (answer,), notices = self.agent.answer(heard, reply_as, self.decoding, seed)
        writing = time.perf_counter() - began
        spoken = speak_answer(self.synthesizer, answer, reply_as)
        seconds = {**(heard[-1].seconds if heard else {}), "writing": writing, "speaking": spoken.seconds}
        return Reply(
            answer.text,
            answer.description,
            answer.attributes,
            reply_as,
            spoken.sound,
            spoken.sample_rate,
            tuple(dict.fromkeys([n for h in heard for n in h.notices] + notices)),
            seconds,
        )


class Talk:
    """A conversation with a loaded run: each turn is heard once, with all turns before it.

    Args:
        conversant: who replies.
    """

    def __init__(self, conversant: Conversant) -> None:
        self.conversant = conversant
        self.heard: list[Heard] = []

    @property
    def turns(self) -> list[Turn]:
        """So far, the replies among them."""
        return [h.turn for h in self.heard]

    def say(
        self, text: str = "", *, audio: str | Path | None = None, video: str | Path | None = None, seed: int = 1
    ) -> Reply:
        """Take a turn, and get the reply; see `Conversant.reply`. A turn that is refused is not remembered."""
        agent = self.conversant.agent
        user, reply_as = choose_speakers(self.turns, True, None, None, agent.speakers)
        heard = agent.hear(Turn(user, text, *(Path(p) if p is not None else None for p in (audio, video))))
        reply = self.conversant._answer([*self.heard, heard], reply_as, seed)
        own = Heard(Turn(reply_as, reply.text, description=reply.description))
        self.heard += [heard, own]
        return reply


def load(
    place: "str | Path | Run",
    overrides: Sequence[str] = (),
    *,
    plugins: Sequence[str] = (),
    base: str | Path | None = None,
    encoders: Mapping[str, str | Path] | None = None,
) -> Conversant:
    """Load a run, to let it reply.

    Args:
        place: a run's folder, what `train` returned, a run's ``export/``, wherever it has been copied to, or one on the
            Hugging Face hub: ``hub:OWNER/NAME``, or ``hub:OWNER/NAME@REVISION``.
        overrides: as of respond.py, such as ``speech=kokoro``, ``decoding=sample``, ``device=cuda``.
        plugins: modules with classes of your own that the run is made of.
        base: of an export, hub id or folder of its base LLM, where that was a local folder, or has moved.
        encoders: of an export, stream -> hub id or folder of its encoder's model, likewise.

    Raises:
        MsencError: no run, or one that does not fit what it was trained on.
    """
    folder = place.folder if isinstance(place, Run) else place
    named = [f"plugins=[{','.join(plugins)}]"] if plugins else []
    config = _respond_config([f"run_dir={folder}", *named, *overrides])
    config["base"] = str(base) if base is not None else config["base"]
    config["encoders"] |= {stream: str(model) for stream, model in (encoders or {}).items()}
    quieten()
    synthesizer = build(config["speech"], "speech") if config["speech"] else None
    return Conversant(load_agent(folder, config), synthesizer, config["decoding"])


def train(overrides: Sequence[str] = ()) -> Run:
    """Train one run and evaluate it, as ``msenc train`` does.

    Args:
        overrides: as on its command line.

    Returns:
        The run; for a sweep use the command.

    Raises:
        MsencError: what the command would refuse.
    """
    register_schemas()
    try:
        arguments = resumed_arguments(read_arguments(spelt_out(list(overrides))))
        if any(a.startswith(("-", "sweep=", "hydra.mode=")) for a in overrides):
            raise MsencError("msenc.train trains one run: for a sweep, use the command (msenc train -m ...).")
        with initialize_config_dir(str(CONFIGS), job_name="train", version_base="1.3"):
            done = GlobalHydra.instance().hydra.run("train", train_pipeline, arguments, with_log_configuration=False)
        loss = done.return_value
    except Exception as error:
        raise _refused(error) from error
    folder, split = Path(done.cfg.paths.output_dir), done.cfg.evaluate
    (run,) = collect_runs(folder)
    found = [e for e in run.evaluations if e.control is None and e.split == split]
    return Run(folder, loss, max(found, key=lambda e: e.written).metrics if found else {})


def _respond_config(overrides: Sequence[str]) -> dict[str, Any]:
    from msenc.commands import LITERAL

    register_schemas()
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            cfg = compose("respond", read_arguments(list(overrides), LITERAL["respond"]))
        with open_dict(cfg):
            return checked(cfg, GIVEN)
    except Exception as error:
        raise _refused(error) from error


def _refused(error: Exception) -> Exception:
    """What a library says of a wrong override, as msenc says it; a bug stays what it is."""
    said = refusal(error)
    return error if isinstance(error, MsencError) or said is None else MsencError(said.partition(": ")[2])


def _turns(history: str | Path | Sequence[Turn | Mapping[str, Any]]) -> list[Turn]:
    if isinstance(history, str | Path):
        return read_talk(Path(history))
    rows = [vars(turn) if isinstance(turn, Turn) else turn for turn in history]
    return turns_of({"turns": [_with_names(row) for row in rows]}, "history", Path())


def _with_names(turn: Any) -> Any:
    """Its files as a history file has them."""
    if not isinstance(turn, Mapping):
        return turn
    return {key: str(value) if isinstance(value, Path) else value for key, value in turn.items()}
