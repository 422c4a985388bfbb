"""A trained run in conversation: turns so far -> the next one. Sits above the module; respond.py uses it.

Turn (words, sound, picture) -> features by the run's own encoders -> prompt -> LLM -> Answer (words, voice description)
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
from torch import Tensor

from msenc.data.collate import Layout, histories
from msenc.evaluation.replies import decoding_for, write_replies
from msenc.files import hold, read_json
from msenc.files.kinds import Must
from msenc.models.conversation import ConversationModel
from msenc.models.encoders import Encoder
from msenc.prepare.features import encode_clip
from msenc.prompt import DialogueTokenizer
from msenc.raw.container import MediaError
from msenc.raw.media import read_properties
from msenc.speech.description import parse, read
from msenc.speech.synthesis import Synthesizer
from msenc.types import Dialogue, MsencError, Reply, Utterance, VoiceAttributes

DEFAULT_SPEAKERS = ("User", "Agent")
MAX_TURNS = 100
MAX_CHARACTERS = 2000
"""Of a turn's words, and of its voice description; whichever way the turn comes in."""
MAX_NAME = 100

_File = Annotated[str, Must(lambda path: "\0" not in path and len(path) <= MAX_CHARACTERS, "a file")]
_Words = Annotated[str, Must(lambda text: len(text) <= MAX_CHARACTERS, f"at most {MAX_CHARACTERS:,} characters")]
_Speaker = Annotated[
    str, Must(lambda name: name.strip() != "" and len(name) <= MAX_NAME, f"a name of at most {MAX_NAME} characters")
]

NO_CLIP = {
    "clip missing": "there is no such file",
    "clip corrupt": "it cannot be decoded as sound or video",
    "no sound": "it has no sound",
    "silent": "its sound is silent",
    "no picture": "it has no moving picture",
    "clip too short": "it is too short for the encoder",
    "clip too long": "it is too long",
    "clip too large": "its picture is too large",
    "bad sample rate": "its sample rate is none of sound",
    "no such track": "it has no such track",
    "playlist": "it is a list of other files, which is not opened",
}
"""Why a clip is of no use, in a sentence."""


class AbandonedError(Exception):
    """Nobody waits for this reply any more."""


class _CutError(Exception):
    """The rest of this reply is not wanted."""


@dataclass(frozen=True)
class Turn:
    """One turn of a talk, as it is given.

    Args:
        speaker: who speaks.
        text: what is said; empty where it is to be recognised from the sound.
        audio: a sound file, or None; the sound of `video` is taken then.
        video: a video file, or None.
        description: how it was spoken, where that is known (a reply of the agent).
        interrupted: whether a reply ends where its hearer took the turn; it is what was heard.
    """

    speaker: str
    text: str = ""
    audio: Path | None = None
    video: Path | None = None
    description: str | None = None
    interrupted: bool = False

    @property
    def sound(self) -> Path | None:
        """The file that holds this turn's sound."""
        return self.audio or self.video


@dataclass(frozen=True)
class Heard:
    """A turn that has passed the encoders, with words.

    Args:
        turn: with its text.
        features: stream -> (T, D) float16; streams that the turn lacks, or the model does not read, are left out.
        notices: what a person should know: streams that are missing, or that nothing reads.
        seconds: of what was done (``features``, ``recognition``).
    """

    turn: Turn
    features: Mapping[str, np.ndarray] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """A reply.

    Args:
        text: what is said.
        description: how, as the model wrote it; None where it wrote none.
        attributes: what the description says, in the words of `msenc.speech.description`.
    """

    text: str
    description: str | None
    attributes: VoiceAttributes

    @property
    def voice(self) -> VoiceAttributes | str:
        """What a synthesizer is given: the description as it is written, of which each takes what it can follow."""
        return self.description or self.attributes

    @property
    def not_understood(self) -> tuple[str, ...]:
        """Words of the description that no attribute holds; at most a synthesizer that reads words follows them."""
        return read(self.description or "").unread


@dataclass(frozen=True)
class Spoken:
    """A reply with its sound.

    Args:
        answer: words and voice description.
        sound: float32 (S,), or None where no synthesizer is chosen, or the model wrote no words.
        sample_rate: of the sound, in Hz.
        seconds: that speaking took.
        sentences: whose sounds follow one another in it, each with its number of samples.
        is_cut: whether it was ended before it was written and spoken as a whole.
    """

    answer: Answer
    sound: np.ndarray | None = None
    sample_rate: int = 0
    seconds: float = 0.0
    sentences: tuple[tuple[str, int], ...] = ()
    is_cut: bool = False


class Agent:
    """A run's model, loaded once: hears turns and answers them.

    Args:
        model: in eval mode, on its device.
        tokenizer: of the run's prompt and LLM.
        encoders: stream -> the encoder that made the run's features.
        num_queries: tokens that each stream's slot takes.
        budget: see `collate.history_starts`.
        layout: the run's.
        recognise: sound file -> words.
        max_clip_s: longest clip that is taken, in seconds.
        speakers: see `known_speakers`.
    """

    def __init__(
        self,
        model: ConversationModel,
        tokenizer: DialogueTokenizer,
        encoders: Mapping[str, Encoder],
        num_queries: Mapping[str, int],
        budget: int,
        layout: Layout,
        recognise: Callable[[Path], str],
        max_clip_s: float,
        speakers: tuple[str, str],
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.encoders = dict(encoders)
        self.num_queries = dict(num_queries)
        self.budget = budget
        self.layout: Layout = layout
        self.recognise = recognise
        self.max_clip_s = max_clip_s
        self.speakers = speakers

    def hear(self, turn: Turn, recognise: Callable[[Path], str] | None = None) -> Heard:
        """Encode a turn's clips as `prepare.py` does, and recognise its words where it has none.

        Args:
            turn: as given.
            recognise: in place of the agent's own.

        Raises:
            MsencError: a clip that cannot be used, a turn in which nothing is said, or one that is too long.
        """
        _check_length(turn.text)
        for name in ("audio", "video"):
            if (path := getattr(turn, name)) is not None:
                self._check_clip(name, path)
        files = {"audio": turn.sound, "video": turn.video}
        features, notices = {}, []
        began = time.perf_counter()
        for stream, encoder in self.encoders.items():
            path = files[stream]
            if path is None:
                notices.append(f"The run was trained with {stream}, this turn has none: it is answered without.")
                continue
            try:
                features[stream] = encode_clip(path, encoder, stream, self.max_clip_s)
            except MediaError as error:
                if path == turn.video and stream == "audio" and error.reason != "clip too long":
                    notices.append(f"{path}: {NO_CLIP[error.reason]}; the turn is answered without audio.")
                else:
                    raise self._refusal(stream, path, error.reason) from error
        notices += [
            f"The run was trained without {stream}: {getattr(turn, stream)} is not used"
            + (", but for its words." if stream == "audio" and not turn.text else ".")
            for stream in ("audio", "video")
            if stream not in self.encoders and getattr(turn, stream) is not None
        ]
        seconds = {"features": time.perf_counter() - began}
        text = " ".join(turn.text.split())
        if not text:
            if turn.sound is None:
                raise MsencError("Nothing is said: give text=..., or sound in which something is said.")
            began = time.perf_counter()
            try:
                text = " ".join((recognise or self.recognise)(turn.sound).split())
            except MediaError as error:
                raise self._refusal("audio", turn.sound, error.reason) from error
            seconds["recognition"] = time.perf_counter() - began
            if not text:
                raise MsencError(f"{turn.sound}: no words were recognised in it. Give them: text=...")
            _check_length(text)
            notices.append(f"Recognised: {text}")
        return Heard(replace(turn, text=text), features, tuple(notices), seconds)

    def answer(
        self,
        turns: Sequence[Heard],
        speaker: str,
        decoding: Mapping[str, Any],
        seed: int = 1,
        num_replies: int = 1,
        is_wanted: Callable[[], bool] | None = None,
        is_cut: Callable[[], bool] | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> tuple[list[Answer], list[str]]:
        """Write the turn that follows.

        Args:
            turns: so far, at least one.
            speaker: who is to speak next.
            decoding: see ``configs/decoding``.
            seed: of what is drawn.
            num_replies: alternatives.
            is_wanted: asked before every token.
            is_cut: asked before every token of one reply; it ends there, with what is written.
            on_text: told before every token of one reply what it says so far (`Prompt.settled_text`). Beam search has
                no such text: its reply comes as a whole.

        Returns:
            The replies, and notices.

        Raises:
            MsencError: no turn, or settings that do not go together.
            AbandonedError: the reply is not wanted any more.
        """
        if not turns:
            raise MsencError("There is no turn to answer: give text=..., audio=..., video=... or history=...")
        notices = []
        utterances = [Utterance(str(n), h.turn.speaker, h.turn.text) for n, h in enumerate(turns)]
        # The tokenizer takes the reply's own words too; they do not enter the history.
        dialogue = Dialogue("talk", "test", (*utterances, Utterance(str(len(turns)), speaker, "?")))
        tokens = self.tokenizer(dialogue, [*({s: len(f) for s, f in h.features.items()} for h in turns), {}])
        (*_, history) = histories(tokens.turn_tokens, self.budget, tokens.windows)
        if history.start:
            notices.append(f"The history is too long: its first {history.start} of {len(turns)} turns are not read.")
        features = {s: [*(h.features.get(s) for h in turns), None] for s in self.encoders}
        how = decoding_for(decoding, self.tokenizer.tokenizer, seed)
        prompt = self.tokenizer.prompt
        is_told = num_replies == 1 and (how.search.num_beams or 1) == 1
        watch = _Watch(is_wanted, is_cut, on_text and (lambda ids: on_text(prompt.settled_text(self._decode(ids)))))
        if is_told or is_wanted is not None:
            how = replace(how, processors=(*how.processors, watch if is_told else _Watch(is_wanted)))
        try:
            written = write_replies(
                self.model,
                [tokens],
                lambda _: features,
                how,
                budget=self.budget,
                num_queries=self.num_queries,
                layout=self.layout,
                turns=[[len(turns)]],
                num_replies=num_replies,
            )
            replies = [prompt.parse(self._decode(one.ids)) for one in written]
        except _CutError:
            replies = [Reply(prompt.settled_text(self._decode(watch.ids)))]
        answers = []
        for reply in replies:
            attributes = parse(reply.description) if reply.description else VoiceAttributes()
            answers.append(Answer(reply.text, reply.description, attributes))
        return answers, notices

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.tokenizer.decode(ids, skip_special_tokens=True)

    def _check_clip(self, name: str, path: Path) -> None:
        try:
            read_properties(path)
        except MediaError as error:
            raise self._refusal(name, path, error.reason) from error

    def _refusal(self, name: str, path: Path, reason: str) -> MsencError:
        if reason == "clip too long":
            return MsencError(
                f"{name}={path}: lasts longer than {self.max_clip_s:g} s, which is the most for a turn. Cut it, "
                "or raise max_clip_s."
            )
        return MsencError(f"{name}={path}: {NO_CLIP[reason]} ({reason}). Give a sound or video file that plays.")


class _Watch:
    """Follows decoding, and ends it in mid-reply; it changes no score."""

    def __init__(
        self,
        is_wanted: Callable[[], bool] | None,
        is_cut: Callable[[], bool] | None = None,
        on_ids: Callable[[list[int]], None] | None = None,
    ) -> None:
        self.is_wanted = is_wanted
        self.is_cut = is_cut
        self.on_ids = on_ids
        self.ids: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.is_wanted is not None and not self.is_wanted():
            raise AbandonedError
        if self.is_cut is not None or self.on_ids is not None:
            self.ids = input_ids[0].tolist()
        if self.is_cut is not None and self.is_cut():
            raise _CutError
        if self.on_ids is not None and self.ids:
            self.on_ids(self.ids)
        return scores


def _check_length(text: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise MsencError(f"The text has {len(text):,} characters; a turn may have {MAX_CHARACTERS:,}. Shorten it.")


def known_speakers(record: Mapping[str, Any]) -> tuple[str, str]:
    """Two names that a run knows, for a user and an agent without: a model that never read a name replies worse to it.

    Args:
        record: of the run.

    Example:
        >>> known_speakers({"speakers": ["Anna", "Ben"]}), known_speakers({})
        (('Anna', 'Ben'), ('User', 'Agent'))
    """
    first, second, *_ = [*record.get("speakers", ()), *DEFAULT_SPEAKERS]
    return first, second


def choose_speakers(
    before: Sequence[Turn],
    has_turn: bool,
    speaker: str | None,
    reply_as: str | None,
    known: tuple[str, str] = DEFAULT_SPEAKERS,
) -> tuple[str, str]:
    """Who the user is, and who the agent: as given, else the last two of the history, else names that the run knows.

    Args:
        before: the history.
        has_turn: whether the user takes a turn now; else the history's last turn is the user's.
        speaker: the user, if given.
        reply_as: the agent, if given.
        known: user and agent.
    """
    last, other, *_ = [*dict.fromkeys(turn.speaker for turn in reversed(before)), *known]
    user, agent = known if not before else (other, last) if has_turn else (last, other)
    names = (agent, user, *known, *DEFAULT_SPEAKERS)
    reply_as = reply_as or next(n for n in names if n != speaker)
    return speaker or next(n for n in (user, *names) if n != reply_as), reply_as


def speak_answer(synthesizer: Synthesizer | None, answer: Answer, speaker: str) -> Spoken:
    """The reply's sound, in the voice that its description asks for."""
    if synthesizer is None or not any(character.isalnum() for character in answer.text):
        return Spoken(answer)
    began = time.perf_counter()
    sound, sample_rate = synthesizer(answer.text, answer.voice, speaker)
    return Spoken(answer, sound, sample_rate, time.perf_counter() - began)


# ---------------------------------------------------------------------------------------------------- histories


@dataclass(frozen=True)
class _Turn:
    """`Turn` as it is written."""

    speaker: _Speaker
    text: _Words | None = None
    audio: _File | None = None
    video: _File | None = None
    description: _Words | None = None
    interrupted: bool | None = None


class _Talk(TypedDict):
    turns: Annotated[list[_Turn], Must(lambda turns: len(turns) <= MAX_TURNS, f"at most {MAX_TURNS} turns")]


EXPECTED_TALK = 'Expected {"turns": [...]}, turns with speaker and text.'


def read_talk(path: Path) -> list[Turn]:
    """The turns of a history file: ``{"turns": [{"speaker": ..., "text": ..., "audio": ..., "video": ...}, ...]}``.

    Files are relative to the history file. `talk_json` writes such a file.

    Raises:
        MsencError: it is missing, no JSON, too long, or a turn is not as described; it names the turn.
    """
    return turns_of(read_json(path, Any, EXPECTED_TALK), path, path.parent)


def turns_of(talk: Any, where: object, folder: Path) -> list[Turn]:
    """The turns of a history file's value.

    Args:
        talk: the value.
        where: it stands, for messages.
        folder: that its files are relative to.

    Raises:
        MsencError: it is too long, or a turn is not as described; it names the turn.
    """
    return [
        Turn(
            turn["speaker"],
            turn.get("text") or "",
            **{k: folder / turn[k] if turn.get(k) else None for k in ("audio", "video")},
            description=turn.get("description"),
            interrupted=bool(turn.get("interrupted")),
        )
        for turn in hold(talk, _Talk, where, EXPECTED_TALK)["turns"]
    ]


def talk_json(turns: Sequence[Turn]) -> dict[str, Any]:
    """Turns as the value of a history file; files by their absolute paths."""
    rows = []
    for turn in turns:
        row = {k: str(v.resolve()) if isinstance(v, Path) else v for k, v in asdict(turn).items()}
        rows.append({k: v for k, v in row.items() if v not in (None, False)})
    return {"turns": rows}
