"""How many tokens each dialogue takes, before any batch is made, and without reading a feature.

turns, indexes of the streams -> DialogueLengths (cached beside the data) -> tokens of rows
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.progress import track

from msenc.data.collate import Layout, group_targets, histories
from msenc.files import inside, read_json, write_text
from msenc.files.kinds import Count
from msenc.prompt import DialogueTokenizer, Slot, TokenizedDialogue
from msenc.store.location import Place, RemotePath
from msenc.store.shards import ShardReader
from msenc.types import Dialogue, MsencError
from msenc.work.processes import is_first_process

SCHEMA_VERSION = 2
"""Version of the cached files; changing it invalidates them."""


@dataclass(frozen=True)
class DialogueLengths:
    """Tokens of a dialogue's parts.

    Args:
        instruction: tokens before the first turn.
        turns: per turn the text tokens of its block, cut at its slots as they are.
        slots: per turn the streams of its slots.
        responses: per target the tokens that ask for it.
        targets: per target the tokens to generate.
        turn_tokens: counted for history truncation; see `TokenizedDialogue`.
        described: number of targets with a voice description.
        windows: see `TokenizedDialogue`.
    """

    instruction: int
    turns: Sequence[int]
    slots: Sequence[Sequence[str]]
    responses: Sequence[int]
    targets: Sequence[int]
    turn_tokens: Sequence[int]
    described: int
    windows: Sequence[Sequence[Any]] = ()


@dataclass(frozen=True)
class _Lengths:
    """`DialogueLengths` as they are cached: plain values, all of them counts."""

    instruction: Count
    turns: list[Count]
    slots: list[list[str]]
    responses: list[Count]
    targets: list[Count]
    turn_tokens: list[Count]
    described: Count
    windows: list[tuple[int, list[tuple[str, Count]]]] = field(default_factory=list)


def measure(tokens: TokenizedDialogue, dialogue: Dialogue) -> DialogueLengths:
    """Count a dialogue's tokens."""
    return DialogueLengths(
        instruction=len(tokens.instruction),
        turns=[sum(len(piece) for piece in block if not isinstance(piece, Slot)) for block in tokens.turns],
        slots=[[piece.stream for piece in block if isinstance(piece, Slot)] for block in tokens.turns],
        responses=[len(ids) for ids in tokens.responses],
        targets=[len(target.ids) for target in tokens.targets],
        turn_tokens=list(tokens.turn_tokens),
        described=sum(u.description is not None for u in dialogue.utterances[1:]),
        windows=[[start, [list(skip) for skip in skips]] for start, skips in tokens.windows],
    )


def row_tokens(
    lengths: DialogueLengths,
    budget: int,
    num_queries: Mapping[str, int],
    layout: Layout = "dialogue",
    turns: Sequence[int] | None = None,
) -> list[int]:
    """The length of each row that `dialogue_rows` would make with the same arguments."""
    starts = histories(lengths.turn_tokens, budget, lengths.windows)
    blocks = [
        text + sum(num_queries[stream] for stream in slots)
        for text, slots in zip(lengths.turns, lengths.slots, strict=True)
    ]
    return [
        lengths.instruction
        + sum(blocks[history.start : max(group)])
        + sum(lengths.responses[turn - 1] + lengths.targets[turn - 1] for turn in group)
        for history, group in group_targets(starts, layout, turns)
    ]


def split_lengths(
    folder: Place,
    ids: Sequence[str],
    turns: ShardReader,
    streams: Mapping[str, ShardReader],
    tokenizer: DialogueTokenizer,
) -> list[DialogueLengths]:
    """Lengths of a split's dialogues; tokenized once per data, prompt, tokenizer and set of streams.

    Cached in ``lengths/`` of the prepared data, or of its cache, if that is writable.

    Args:
        folder: the prepared data.
        ids: the dialogues wanted.
        turns: the split's turns.
        streams: the split's streams that the model reads; of these, the index alone is looked at.
        tokenizer: of the run's prompt and LLM.
    """
    local = folder.copy if isinstance(folder, RemotePath) else folder
    name = f"{turns.split}-{_key(turns, streams, tokenizer)}.json"
    path = local / "lengths" / name
    with suppress(MsencError, KeyError):  # unreadable counts as absent
        known = read_json(path, dict[str, _Lengths])
        turns_of = dict(zip(turns.ids, turns.lengths, strict=True))
        found = [DialogueLengths(**known[id]) for id in ids]
        if all(_fits(one, len(turns_of[id]), streams) for one, id in zip(found, ids, strict=True)):
            return found
    frames = {stream: dict(zip(reader.ids, reader.lengths, strict=True)) for stream, reader in streams.items()}
    lengths = {}
    # A transient bar: most data take a moment, some take minutes.
    for id in track(ids, f"counting tokens of {turns.split}", transient=True, disable=not is_first_process()):
        dialogue = Dialogue.from_json(turns.read(id)["turns.json"])
        present = [{s: frames[s][id][k] for s in streams if frames[s][id][k]} for k in range(len(dialogue.utterances))]
        lengths[id] = measure(tokenizer(dialogue, present), dialogue)
    with suppress(MsencError):
        write_text(inside(local, "lengths", name), json.dumps({id: asdict(known) for id, known in lengths.items()}))
    return [lengths[id] for id in ids]


def _fits(lengths: DialogueLengths, num_turns: int, streams: Collection[str]) -> bool:
    """Whether cached lengths can be those of a dialogue of so many turns."""
    turns = (lengths.turns, lengths.slots, lengths.turn_tokens)
    targets = (lengths.responses, lengths.targets)
    return (
        all(len(one) == num_turns for one in turns)
        and all(len(one) == num_turns - 1 for one in targets)
        and all(stream in streams for slots in lengths.slots for stream in slots)
    )


def _key(turns: ShardReader, streams: Mapping[str, ShardReader], tokenizer: DialogueTokenizer) -> str:
    """A hash of everything that lengths depend on."""
    kind = tokenizer.tokenizer
    value = {
        "schema_version": SCHEMA_VERSION,
        "turns": turns.hash,
        "streams": {stream: reader.hash for stream, reader in streams.items()},
        # Fields newer than the schema only count if set, so that existing caches stay valid.
        "prompt": {k: v for k, v in asdict(tokenizer.prompt).items() if k != "template_arguments" or v},
        "tokenizer": [
            kind.backend_tokenizer.to_str(),
            kind.chat_template,
            {name: str(token) for name, token in kind.special_tokens_map.items()},
        ],
    }
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
