"""Dialogues -> replies: groups replies that share an encoded history, and those decoded together.

(tokens, features) per dialogue -> trunks and their replies -> Batch -> token ids
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lightning.fabric.utilities import move_data_to_device

from msenc.data.batches import share
from msenc.data.collate import Features, Layout, Row, collate, dialogue_rows, histories
from msenc.models.conversation import ConversationModel
from msenc.models.generation import Decoding, Wanted, read_decoding, write_from_rows, write_from_trunks
from msenc.prompt import History, TokenizedDialogue
from msenc.types import MsencError
from msenc.work.group import ALONE, Group
from msenc.work.progress import Bar


class Written(NamedTuple):
    """A reply in tokens, and its place.

    Args:
        dialogue: its index.
        turn: the turn it takes.
        alternative: its number among replies to the same history.
        ids: token ids, without the end token.
    """

    dialogue: int
    turn: int
    alternative: int
    ids: list[int]


def decoding_for(settings: Mapping[str, Any], tokenizer: Any, seed: int) -> Decoding:
    """Settings as in ``configs/decoding``, with the end and padding tokens of the LLM's tokenizer."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return read_decoding(settings, tokenizer.eos_token_id, pad, seed)


def write_replies(
    model: ConversationModel,
    dialogues: Sequence[TokenizedDialogue],
    features: Callable[[int], Features],
    decoding: Decoding,
    *,
    budget: int,
    num_queries: Mapping[str, int],
    layout: Layout = "dialogue",
    turns: Sequence[Sequence[int]] | None = None,
    num_replies: int = 1,
    progress: str | None = None,
    group: Group = ALONE,
) -> list[Written]:
    """Generate replies to many histories.

    A reply depends on its own history, the settings and, if sampled, on the seed, its dialogue's id, its turn
    and its number, but not on other replies, on batches, or on their order.

    Args:
        model: in eval mode, on its device.
        dialogues: whose turns are generated.
        features: index of a dialogue -> its features; read when needed, so that a split need not fit into memory.
        decoding: how.
        budget: see `collate.history_starts`.
        num_queries: tokens that each stream's slot takes.
        layout: ``dialogue`` encodes what histories of a dialogue share once; ``sample`` encodes every history by
            itself, as any LLM can.
        turns: for each dialogue, the turns to generate (from 1); all if None.
        num_replies: replies to each history.
        progress: title of a progress bar; None shows none.
        group: processes that share the histories out, by their tokens.

    Returns:
        In the order of dialogues, turns and alternatives.

    Raises:
        MsencError: several replies to a history without sampling, or an LLM whose cache cannot share a history.
    """
    if num_replies > 1 and not decoding.is_sampled:
        raise MsencError(
            f"{num_replies} replies to one history: without do_sample=true they would all be the same. Use "
            "decoding=sample, or request one reply."
        )
    is_shared = layout == "dialogue"
    units = []
    for index, tokens in enumerate(dialogues):
        wanted_turns = range(1, len(tokens.turns)) if turns is None else turns[index]
        units += _units(index, tokens, budget, num_queries, is_shared, wanted_turns, num_replies)
    units.sort(key=lambda unit: max(len(trunk.row.ids) for trunk in unit), reverse=True)
    chunks = list(_chunks(units, decoding.batch_size))
    write = write_from_trunks if is_shared else write_from_rows
    device = next(model.parameters()).device

    def write_chunk(chunk: list[list[_Trunk]]) -> list[Written]:
        read = [dialogues[unit[0].dialogue] for unit in chunk]
        batch = collate(
            read,
            [features(unit[0].dialogue) for unit in chunk],
            [[trunk.row for trunk in unit] for unit in chunk],
            num_queries,
            padding_side="right" if is_shared else "left",
        )
        trunks = [(tokens, trunk) for tokens, unit in zip(read, chunk, strict=True) for trunk in unit]
        keys, wanted = [], []
        for row, (tokens, trunk) in enumerate(trunks):
            for turn, alternative, cut in trunk.replies:
                keys.append((trunk.dialogue, turn, alternative))
                wanted.append(Wanted(tokens.id, turn, alternative, row, cut, tokens.responses[turn - 1]))
        with model.computing():
            ids = write(model, move_data_to_device(batch, device), wanted, decoding)
        return [Written(*key, reply) for key, reply in zip(keys, ids, strict=True)]

    # What is decoded together is the same in any number of processes, and so are its replies, to the bit.
    own = share(range(len(chunks)), [_tokens(chunk, decoding) for chunk in chunks], group.rank, group.size)
    bar = None if progress is None else Bar()
    written = group.gather((write_chunk(chunks[i]) for i in own), len(chunks), bar, progress or "")
    return sorted(reply for of_chunk in written for reply in of_chunk)


class _Trunk(NamedTuple):
    """A row that starts with a history, and the replies to it and to its prefixes: (turn, alternative, cut)."""

    dialogue: int
    row: Row
    replies: list[tuple[int, int, int]]


def _units(
    index: int,
    tokens: TokenizedDialogue,
    budget: int,
    num_queries: Mapping[str, int],
    is_shared: bool,
    turns: Sequence[int],
    num_replies: int,
) -> list[list[_Trunk]]:
    """Trunks of a dialogue, in lists that stay in one batch, so each utterance passes its connector once.

    Histories with the same start are prefixes of the longest one.
    """
    starts = histories(tokens.turn_tokens, budget, tokens.windows)
    shared: dict[History, _Trunk] = {}
    apart = []
    for row in dialogue_rows(tokens, budget, num_queries, "sample", sorted(turns), with_targets=False):
        (turn,) = row.target_turns
        replies = [(turn, alternative, row.trunk) for alternative in range(num_replies)]
        if is_shared:
            start = starts[turn - 1]
            before = shared[start].replies if start in shared else []
            shared[start] = _Trunk(index, row, before + replies)  # turns ascend: the last row has the longest trunk
        else:
            apart += [[_Trunk(index, row, [reply])] for reply in replies]
    return [list(shared.values())] if shared else apart


def _tokens(chunk: Sequence[list[_Trunk]], decoding: Decoding) -> int:
    """Tokens that pass through the LLM, at most."""
    trunks = [trunk for unit in chunk for trunk in unit]
    return sum(len(trunk.row.ids) + len(trunk.replies) * decoding.search.max_new_tokens for trunk in trunks)


def _chunks(units: Sequence[list[_Trunk]], num_rows: int) -> Iterator[list[list[_Trunk]]]:
    """Units in order, grouped into batches of at most `num_rows` rows, but at least one unit."""
    chunk: list[list[_Trunk]] = []
    for unit in units:
        if chunk and sum(map(len, chunk)) + len(unit) > num_rows:
            yield chunk
            chunk = []
        chunk.append(unit)
    if chunk:
        yield chunk
