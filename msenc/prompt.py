"""dialogue -> token layout with media slots; generated text -> Reply.

Above `types` and below `models`: it uses tokenizers, but no tensors.

A prompt has four templates. The *instruction* starts every sample; each *turn* of the history follows with its speaker,
media slots and text; the *response* asks for the next turn, and the *target* is what the LLM has to generate. A
template is split at its media slots, and each piece is tokenized separately, so that the tokens of a turn do not
depend on its neighbours and every layout of a dialogue uses the same ones.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from msenc.types import Dialogue, MsencError, Reply, Utterance

TOKEN_KINDS = ("reply", "description", "end", "planted_text", "planted_audio", "planted_video", "planted_both", "begin")
"""Kinds of target tokens; predictions store the index."""

MOST_KNOWN = 100_000  # number of texts whose tokens are cached
SLOTS = ("video", "audio")
_FIELDS = ("speaker", "text", *SLOTS)
_FIELD = re.compile(r"\{(\w*)\}")


@dataclass(frozen=True)
class Slot:
    """A place in the layout that a stream's connector fills with its query vectors."""

    stream: str


class Span(NamedTuple):
    """A span of a target with known information."""

    start: int
    end: int
    kind: str
    bits: float


@dataclass(frozen=True)
class Target:
    """The tokens the LLM has to generate for one turn.

    Args:
        ids: token ids, the end token last.
        kinds: index into `TOKEN_KINDS` of each token.
        bits: planted bits by kind (`planted_audio`: 1.0); empty if nothing is planted.
        words: tokens before the description part.
    """

    ids: tuple[int, ...]
    kinds: tuple[int, ...]
    bits: Mapping[str, float] = field(default_factory=dict)
    words: int = 0


class History(NamedTuple):
    """The start of a target's history.

    Args:
        start: the first turn kept.
        skips: (stream, frames) that a window cuts off the start of that turn's features.
    """

    start: int
    skips: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class TokenizedDialogue:
    """A tokenized dialogue, split at its turns.

    Args:
        id: the dialogue's id.
        instruction: tokens before the first turn.
        turns: per turn its block in the history: runs of tokens and media slots.
        responses: per target (turn 1, 2, ...) the tokens that ask for it.
        targets: per target the tokens to generate.
        turn_tokens: text tokens of each turn's block, without slots, as counted for history truncation.
        windows: per target the history within the prompt's windows; empty without windows.
        rejected: per target the replies that its own is to be preferred to; empty without preferences.
    """

    id: str
    instruction: tuple[int, ...]
    turns: tuple[tuple[Slot | tuple[int, ...], ...], ...]
    responses: tuple[tuple[int, ...], ...]
    targets: tuple[Target, ...]
    turn_tokens: tuple[int, ...]
    windows: tuple[History, ...] = ()
    rejected: tuple[tuple[Target, ...], ...] = ()


@dataclass(frozen=True)
class Prompt:
    """The templates of a prompt.

    Args:
        instruction: text before the first turn.
        turn: one turn of the history; fields ``{speaker}``, ``{text}`` and the media slots ``{video}``, ``{audio}``.
        response: text that asks for the next turn; field ``{speaker}``.
        response_text: the same for targets without a description; `response` if None.
        target: ``text_description`` (text, then the voice description in brackets) or ``text``.
        target_format: the target's shape with ``{text}`` and ``{description}``; the description stands in round
            brackets at the end, which is how `parse` finds it again.
        speakers: ``names`` as the data has them, or ``numbers`` in order of appearance.
        chat: wrap instruction and turns in the tokenizer's chat template (system and user message).
        piecewise: split the turn at its media slots whether they are filled or not, and tokenize every piece, the
            target included, separately, so that each begins with BOS if the tokenizer adds one.
        windows: stream -> frames; of all frames of a target's history, only the last so many are read, and turns whose
            frames all fall out of a stream's window are dropped, text included. None: no window.
        template_arguments: of the chat template besides the messages, such as ``enable_thinking: false``.
    """

    instruction: str
    turn: str
    response: str
    response_text: str | None = None
    target: Literal["text", "text_description"] = "text_description"
    target_format: str = " {text} ({description})"
    speakers: Literal["names", "numbers"] = "names"
    chat: bool = False
    piecewise: bool = False
    windows: Mapping[str, int] | None = None
    template_arguments: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Refuse templates that cannot be filled or parsed."""
        if self.target not in ("text", "text_description"):
            raise MsencError(f"prompt.target: found {self.target!r}, expected 'text' or 'text_description'.")
        if self.speakers not in ("names", "numbers"):
            raise MsencError(f"prompt.speakers: found {self.speakers!r}, expected 'names' or 'numbers'.")
        for name, allowed in (("turn", _FIELDS), ("response", ("speaker",)), ("response_text", ("speaker",))):
            template = getattr(self, name) or ""
            for found in _FIELD.findall(template):
                if found not in allowed:
                    raise MsencError(f"prompt.{name}: unknown field {{{found}}} in {template!r}; known: {allowed}.")
        if "{text}" not in self.turn or "{speaker}" not in self.turn:
            raise MsencError(f"prompt.turn: {self.turn!r} lacks {{text}} or {{speaker}}: the history would be lost.")
        if not re.fullmatch(r"\s*\{text\}\s*\(\{description\}\)", self.target_format):
            raise MsencError(
                f"prompt.target_format: {self.target_format!r} must be '{{text}} ({{description}})', with or without "
                "spaces before its parts: the brackets are needed to parse text and description of a reply."
            )
        for stream, frames in (self.windows or {}).items():
            if stream not in SLOTS or not isinstance(frames, int) or frames < 1:
                raise MsencError(
                    f"prompt.windows: found {stream}: {frames!r}, expected audio or video: frames, 1 or more."
                )
        if self.template_arguments and not self.chat:
            raise MsencError("prompt.template_arguments: only chat templates take them. Set prompt=chat.")
        if self.piecewise and self.chat:
            raise MsencError(
                "prompt: chat and piecewise exclude each other: a chat template produces a single text. Remove one."
            )

    def speaker_labels(self, dialogue: Dialogue) -> list[str]:
        """The label of each turn's speaker, by `speakers`.

        Example:
            >>> turns = tuple(Utterance(str(i), s, "Hi.") for i, s in enumerate(["Ana", "Ben", "Ana"]))
            >>> prompt = Prompt(instruction="", turn="{speaker}:{text}", response="{speaker}:", speakers="numbers")
            >>> prompt.speaker_labels(Dialogue("d", "train", turns))
            ['0', '1', '0']
        """
        names = [u.speaker for u in dialogue.utterances]
        if self.speakers == "names":
            return names
        order = {name: str(i) for i, name in enumerate(dict.fromkeys(names))}
        return [order[name] for name in names]

    def turn_pieces(
        self, speaker: str, text: str, streams: Collection[str], words: Mapping[str, str] | None = None
    ) -> Iterator[str | Slot]:
        """Fill the turn's template: text pieces and slots, in order.

        Args:
            speaker: the speaker's label.
            text: what is said.
            streams: streams that this turn has and the model reads; other slots are removed.
            words: text that replaces a stream's slot (used to pre-train the tiny LLM).
        """
        piece, at = "", 0
        for match in _FIELD.finditer(self.turn):
            piece += self.turn[at : match.start()]
            at = match.end()
            name = match.group(1)
            if name == "speaker":
                piece += speaker
            elif name == "text":
                piece += text
            elif words and name in words:
                piece += words[name]
            elif name in streams or self.piecewise:
                if piece:
                    yield piece
                    piece = ""
                if name in streams:
                    yield Slot(name)
        piece += self.turn[at:]
        if piece:
            yield piece

    def format_target(self, utterance: Utterance) -> tuple[str, int, list[Span]]:
        """The target's string, the start of its description, and its planted spans.

        Returns:
            The string without the end token; the first character of the description part, bracket included (the
            string's length if there is none); the planted spans.

        Raises:
            MsencError: the description contains brackets.
        """
        before, _, rest = self.target_format.partition("{text}")
        text, description = utterance.text, utterance.description
        start = {"text": len(before)}
        string = before + text
        split = len(string)
        if self.target == "text_description" and description is not None:
            if "(" in description or ")" in description:
                raise MsencError(
                    f"utterance {utterance.id}: brackets in the voice description {description!r}. A target ends in "
                    "its description in brackets, so the description must not contain any."
                )
            opening, _, closing = rest.partition("{description}")
            start["description"] = split + len(opening)
            string += opening + description + closing
        spans = [
            Span(start[m.field] + m.start, start[m.field] + m.end, f"planted_{m.kind}", m.bits)
            for m in utterance.marks
            if m.field in start
        ]
        return string, split, spans

    def parse(self, generated: str) -> Reply:
        """Parse a generated target.

        The description is the last bracket group, if the string ends in one; brackets elsewhere belong to the text,
        and a bracket that was opened and never closed stays in the text too, so nothing that was generated is lost.

        Example:
            >>> prompt = Prompt(instruction="", turn="{speaker}:{text}", response="{speaker}:")
            >>> prompt.parse(" Well (you know). (a man speaks fast)")
            Reply(text='Well (you know).', description='a man speaks fast')
            >>> prompt.parse(" Well (you kn")
            Reply(text='Well (you kn', description=None)
        """
        string = generated.strip()
        if self.target == "text" or not string.endswith(")"):
            return Reply(string)
        opening = string.rfind("(")
        if opening < 0 or ")" in string[opening:-1]:
            return Reply(string)
        return Reply(string[:opening].rstrip(), string[opening + 1 : -1].strip())

    def settled_text(self, generated: str) -> str:
        """What an unfinished target says for certain: a bracket at its end may turn out to be the description.

        Example:
            >>> prompt = Prompt(instruction="", turn="{speaker}:{text}", response="{speaker}:")
            >>> [prompt.settled_text(t) for t in (" Well (you", " Well (you know)", " Well (you know). Go")]
            ['Well', 'Well', 'Well (you know). Go']
        """
        string = generated.strip()
        opening = string.rfind("(")
        if self.target == "text" or opening < 0 or (")" in string[opening:] and not string.endswith(")")):
            return string
        return string[:opening].rstrip()


def window_histories(frames: Sequence[Mapping[str, int]], windows: Mapping[str, int]) -> tuple[History, ...]:
    """The history within the windows, for targets 1, 2, ... (every turn but the first).

    Args:
        frames: per turn the frames of its streams.
        windows: see `Prompt`.

    Example:
        >>> window_histories([{"audio": 4}, {"audio": 3}, {"audio": 5}, {}], {"audio": 6})
        (History(start=0, skips=()), History(start=0, skips=(('audio', 1),)), History(start=1, skips=(('audio', 2),)))
    """
    histories = []
    for target in range(1, len(frames)):
        begins = {
            stream: _window_begin([f.get(stream, 0) for f in frames[:target]], n) for stream, n in windows.items()
        }
        start = max(turn for turn, _ in begins.values())
        skips = tuple((stream, skip) for stream, (turn, skip) in begins.items() if turn == start and skip)
        histories.append(History(start, skips))
    return tuple(histories)


def _window_begin(frames: Sequence[int], window: int) -> tuple[int, int]:
    """The turn in which the last `window` frames begin, 0 if these are all; how many of its frames come before them."""
    oldest = 0
    for turn in reversed(range(len(frames))):
        if frames[turn] > window:
            return (turn, frames[turn] - window) if window else (oldest, 0)
        window -= frames[turn]
        oldest = turn if frames[turn] else oldest
    return 0, 0


class DialogueTokenizer:
    """Dialogue -> TokenizedDialogue.

    Args:
        prompt: the templates.
        tokenizer: a fast tokenizer of transformers, with an end token.
    """

    def __init__(self, prompt: Prompt, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise MsencError(
                f"tokenizer {type(tokenizer).__name__} is not a fast tokenizer: token kinds need character offsets. "
                "Use a model with a tokenizer.json."
            )
        self.notes: list[str] = []
        """Notes for the user on how this tokenizer handles the prompt."""
        normalizer = tokenizer.backend_tokenizer.normalizer
        if normalizer is not None and normalizer.normalize_str("e\u0301") == "\u00e9":
            self.notes.append(
                "The LLM's tokenizer normalizes text (NFC): replies are normalized too, whichever form the data has."
            )
        if tokenizer.eos_token_id is None:
            raise MsencError("the tokenizer has no end token (eos_token): replies could not end.")
        self.prompt = prompt
        self.tokenizer = tokenizer
        self._known: dict[tuple[str, bool], tuple[int, ...]] = {}
        opening, closing = prompt.instruction, ""
        if prompt.chat:
            opening, closing = self._chat_frame()
        self._instruction = self._opening_ids(opening)
        response = prompt.response
        if prompt.target == "text" and prompt.response_text is not None:
            response = prompt.response_text
        self._response = closing + response

    @property
    def instruction(self) -> tuple[int, ...]:
        """The tokens at the start of every sample."""
        return self._instruction

    def tokens_per_word(self, dialogues: Iterable[Dialogue]) -> float:
        """Tokens per word of these dialogues: well above 2 if the LLM spells them out; 0.0 without a word."""
        texts = [utterance.text for dialogue in dialogues for utterance in dialogue.utterances]
        words = sum(len(text.split()) for text in texts)
        tokens = sum(len(self.tokenizer(f" {text}", add_special_tokens=False).input_ids) for text in texts)
        return tokens / words if words else 0.0

    def _chat_frame(self) -> tuple[str, str]:
        """The chat template's text before the turns, and between the turns and the reply."""
        from jinja2 import TemplateError  # comes with torch and transformers

        if not self.tokenizer.chat_template:
            raise MsencError(
                "prompt=chat: the LLM's tokenizer has no chat template. "
                "Take an instruction-tuned LLM, or prompt=default."
            )
        arguments = dict(self.prompt.template_arguments or {})
        self._check_arguments(arguments)
        mark, instruction = "\u0001turns\u0001", self.prompt.instruction.strip()
        joined = [{"role": "user", "content": f"{instruction}\n\n{mark}" if instruction else mark}]
        found = ""
        separate = [{"role": "system", "content": self.prompt.instruction}, {"role": "user", "content": mark}]
        for messages in (separate, joined):
            try:
                frame = self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, **arguments
                )
            except (TemplateError, TypeError) as e:  # what templates raise of a role or of an argument's type
                found = f" ({e})"
                continue
            opening, has_turns, closing = frame.partition(mark)
            if has_turns and instruction in opening:  # some templates silently drop a system message
                if messages is joined:
                    self.notes.append(
                        "The LLM's chat template has no system role: the instruction starts the user's message."
                    )
                return opening, closing
        raise MsencError(
            f"prompt=chat: the LLM's chat template does not write the instruction and a user message{found}. "
            "Take another instruction-tuned LLM, or prompt=default."
        )

    def _check_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Refuse an argument that the template never reads: it would silently have no effect."""
        from jinja2 import Environment, TemplateSyntaxError, meta

        templates = self.tokenizer.chat_template
        texts = templates.values() if isinstance(templates, dict) else [templates]
        try:
            read = set().union(*(meta.find_undeclared_variables(Environment().parse(t)) for t in texts))
        except TemplateSyntaxError:  # transformers' own tags, which plain Jinja does not know
            return
        for name in arguments.keys() - read:
            raise MsencError(
                f"prompt.template_arguments.{name}: the LLM's chat template reads no such argument; it reads "
                f"{', '.join(sorted(read))}."
            )

    def _opening_ids(self, text: str) -> tuple[int, ...]:
        """The instruction's tokens, with BOS where the tokenizer adds one (a chat template writes its own)."""
        ids = self.tokenizer(text, add_special_tokens=not self.prompt.chat).input_ids if text else []
        if not ids and self.tokenizer.bos_token_id is not None:
            ids = [self.tokenizer.bos_token_id]
        return tuple(ids if self.prompt.chat else self._without_end(ids))

    def _response_ids(self, label: str) -> tuple[int, ...]:
        text = self._response.replace("{speaker}", label)
        if not self.prompt.chat or not any(token in label for token in self.tokenizer.all_special_tokens):
            return self._ids(text, self.prompt.chat)
        # The chat template's control tokens are meant, and those that a speaker is called are not.
        pieces = re.split(r"(\{speaker\})", self._response)
        ids = (self._ids(label) if p == "{speaker}" else self._ids(p, allow_special=True) for p in pieces if p)
        return tuple(id for piece in ids for id in piece)

    def _ids(self, text: str, allow_special: bool = False) -> tuple[int, ...]:
        # Speaker labels and response prompts come again and again; a tokenizer call costs far more than a look-up.
        key = (text, allow_special)
        if key not in self._known:
            # An utterance may contain the characters of a control token; it stays text.
            piecewise = self.prompt.piecewise
            ids = self.tokenizer(text, add_special_tokens=piecewise, split_special_tokens=not allow_special).input_ids
            if len(self._known) >= MOST_KNOWN:  # a server may run for weeks
                self._known.clear()
            self._known[key] = tuple(self._without_end(ids) if piecewise else ids)
        return self._known[key]

    def _without_end(self, ids: list[int]) -> list[int]:
        """A tokenizer that adds special tokens may end each text with one; remove it, as the sample continues."""
        end, begin = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        return ids[:-1] if ids and ids[-1] == end != begin else ids

    def __call__(
        self,
        dialogue: Dialogue,
        streams: Sequence[Collection[str]],
        words: Sequence[Mapping[str, str]] | None = None,
    ) -> TokenizedDialogue:
        """Tokenize a dialogue.

        Args:
            dialogue: the turns.
            streams: per turn the streams that it has and the model reads; with windows, and their frames (a mapping).
            words: per turn, texts that stand in place of slots.

        Raises:
            MsencError: a response without a token, or a description that holds brackets.
        """
        labels = self.prompt.speaker_labels(dialogue)
        # Counted as if no slot had split the text, so that every modality keeps the same turns.
        turn_tokens = [
            sum(len(self._ids(p)) for p in self.prompt.turn_pieces(label, utterance.text, ()))
            for label, utterance in zip(labels, dialogue.utterances, strict=True)
        ]
        replies = list(zip(labels, dialogue.utterances, strict=True))[1:]
        responses = tuple(self._response_ids(label) for label, _ in replies)
        if not all(responses):
            raise MsencError(
                f"prompt.response: {self._response!r} has no token in dialogue {dialogue.id}. A target's first token "
                "is predicted from its response prompt: add a word or a character."
            )
        return TokenizedDialogue(
            id=dialogue.id,
            instruction=self._instruction,
            turns=self.turns(dialogue, streams, words),
            responses=responses,
            targets=tuple(self.target(utterance) for _, utterance in replies),
            turn_tokens=tuple(turn_tokens),
            windows=window_histories(streams, self.prompt.windows) if self.prompt.windows else (),
        )

    def turns(
        self,
        dialogue: Dialogue,
        streams: Sequence[Collection[str]],
        words: Sequence[Mapping[str, str]] | None = None,
    ) -> tuple[tuple[Slot | tuple[int, ...], ...], ...]:
        """Only the blocks of the turns, with the same arguments."""
        return tuple(
            tuple(
                p if isinstance(p, Slot) else self._ids(p)
                for p in self.prompt.turn_pieces(label, utterance.text, streams[k], words[k] if words else None)
            )
            for k, (label, utterance) in enumerate(
                zip(self.prompt.speaker_labels(dialogue), dialogue.utterances, strict=True)
            )
        )

    def target(self, utterance: Utterance) -> Target:
        """The tokens to generate for an utterance.

        Raises:
            MsencError: a description that holds brackets.
        """
        string, split, spans = self.prompt.format_target(utterance)
        piecewise = self.prompt.piecewise
        encoded = self.tokenizer(
            string, add_special_tokens=piecewise, split_special_tokens=True, return_offsets_mapping=True
        )
        ids, kinds = self._without_end(encoded.input_ids) if piecewise else encoded.input_ids, []
        for id, (start, end) in zip(ids, encoded.offset_mapping[: len(ids)], strict=True):
            kind = "reply" if end <= split else "description"
            if id == self.tokenizer.bos_token_id:
                kind = "begin"
            # Every token that overlaps a planted span counts, so that none of the span's loss is lost.
            kinds.append(next((s.kind for s in spans if start < s.end and s.start < end), kind))
        bits: dict[str, float] = {}
        for span in spans:
            bits[span.kind] = bits.get(span.kind, 0.0) + span.bits
        return Target(
            ids=(*ids, self.tokenizer.eos_token_id),
            kinds=tuple(TOKEN_KINDS.index(k) for k in (*kinds, "end")),
            bits=bits,
            words=sum(end <= split for _, end in encoded.offset_mapping[: len(ids)]),
        )
