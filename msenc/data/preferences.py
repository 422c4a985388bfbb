"""Preferences: replies that a run is to find likelier than others in the same place.

conflicts of a split, or a table -> contexts with preferences -> samples whose targets have rejected replies

The reply that is preferred and those that are rejected are branches of one trunk (`collate.dialogue_rows`).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from msenc.data.batches import Unit, parts_within
from msenc.data.collate import Features, dialogue_rows
from msenc.data.conflict import ConflictItem, exchange_stream, exchange_words, find_conflicts
from msenc.data.controls import ControlledDialogues
from msenc.data.datamodule import DialogueDataModule
from msenc.data.dataset import DialogueDataset
from msenc.data.loader import UnitDataset
from msenc.files import digest, parse_table, read_text
from msenc.files.kinds import short
from msenc.prompt import TokenizedDialogue
from msenc.types import Dialogue, MsencError, Utterance

CONFLICT, WRONG = "conflict", "wrong"
"""Sources of preferences: the items of the conflict test, in which the voice or the face is right; the turns as they
are, whose replies are rejected with the word, description or words that another turn's label wants."""
COLUMNS, OPTIONAL = ("dialogue", "utterance", "rejected"), ("rejected_description",)
"""Of a table of preferences."""


def is_table(pairs: str) -> bool:
    """Whether preferences are the user's own, in a file."""
    return pairs not in (CONFLICT, WRONG)


class Preference(NamedTuple):
    """A reply, and those that it is to be preferred to.

    Args:
        chosen: the reply.
        rejected: one or more others.
    """

    chosen: Utterance
    rejected: tuple[Utterance, ...]


@dataclass(frozen=True)
class Context:
    """A dialogue, as it is or with parts of another in a turn, and its preferences.

    Args:
        dialogue: index into the split's dialogues.
        preferences: target turn -> what is preferred there.
        item: whose turn gets something of its donor; None leaves the dialogue as it is.
        stream: the turn gets the donor's voice or face.
        words: it gets the donor's words.
        kept: other target turns, whose replies of the data are to stay likely.
    """

    dialogue: int
    preferences: Mapping[int, Preference]
    item: ConflictItem | None = None
    stream: bool = False
    words: bool = False
    kept: tuple[int, ...] = ()

    @property
    def turns(self) -> tuple[int, ...]:
        """Target turns, in their order."""
        return tuple(sorted({*self.preferences, *self.kept}))


def follow_stream(items: Sequence[ConflictItem]) -> list[Context]:
    """Four contexts of each item: either turn's words with either's voice (or face), whose reply is to be preferred.

    Two contradict, two agree: in contradictions alone, a run would learn to say the opposite of the words.
    """
    found = []
    for item in items:
        index, turn = item.place
        own, other = item.replies
        for stream, words in product((False, True), repeat=2):
            preference = Preference(other, (own,)) if stream else Preference(own, (other,))
            found.append(Context(index, {turn + 1: preference}, item, stream, words))
    return found


def wrong_replies(items: Sequence[ConflictItem]) -> list[Context]:
    """The dialogues as they are: a turn's own reply is to be preferred to all that items have for it."""
    rejected: dict[tuple[int, str], dict[int, dict[Utterance, None]]] = defaultdict(lambda: defaultdict(dict))
    chosen = {}
    for item in items:
        index, turn = item.place
        own, other = item.replies
        chosen[index, item.compared, turn + 1] = own
        rejected[index, item.compared][turn + 1][other] = None
    return [
        Context(i, {turn: Preference(chosen[i, compared, turn], tuple(said)) for turn, said in sorted(turns.items())})
        for (i, compared), turns in rejected.items()
    ]


def keep_others(contexts: Sequence[Context], num_replies: Callable[[int], int]) -> list[Context]:
    """Replies that no preference is about stay likely, too: each is kept once, in its dialogue as it is.

    Args:
        contexts: of labels.
        num_replies: index of a dialogue -> its target turns.
    """
    about = defaultdict(set)
    for context in contexts:
        about[context.dialogue] |= set(context.preferences)
    found, done = [], set()
    for context in contexts:
        if context.dialogue not in done and not context.stream and not context.words:
            done.add(context.dialogue)
            others = set(range(1, num_replies(context.dialogue) + 1)) - about[context.dialogue]
            context = replace(context, kept=tuple(sorted(others)))
        found.append(context)
    return found


class PreferenceDataset(Dataset):
    """Index of a context -> (tokens, features).

    Args:
        dialogues: of the split.
        contexts: with preferences.
    """

    def __init__(self, dialogues: DialogueDataset | ControlledDialogues, contexts: Sequence[Context]) -> None:
        self.dialogues = dialogues
        self.contexts = contexts

    def __len__(self) -> int:
        """Contexts."""
        return len(self.contexts)

    def tokens(self, number: int) -> TokenizedDialogue:
        """The context's turns as the model reads them, its targets with the replies rejected in their places."""
        context, dialogues = self.contexts[number], self.dialogues
        tokens = dialogues.tokens(context.dialogue)
        if context.item is not None and context.words:
            tokens = exchange_words(dialogues, context.item)
        targets, rejected = list(tokens.targets), [()] * len(tokens.targets)
        for turn, preference in context.preferences.items():
            targets[turn - 1] = dialogues.tokenizer.target(preference.chosen)
            rejected[turn - 1] = tuple(map(dialogues.tokenizer.target, preference.rejected))
        return replace(tokens, targets=tuple(targets), rejected=tuple(rejected))

    def features(self, number: int) -> Features:
        """Per stream each turn's frames, as `DialogueDataset.features`."""
        context = self.contexts[number]
        features = self.dialogues.features(context.dialogue)
        if context.item is None or not context.stream:
            return features
        return exchange_stream(self.dialogues, context.item, features)

    def __getitem__(self, number: int) -> tuple[TokenizedDialogue, Features]:
        """Tokens and features."""
        return self.tokens(number), self.features(number)


class PreferenceDataModule(DialogueDataModule):
    """Loaders of preferences for training and validation; anything else of the data is as in `DialogueDataModule`.

    Args:
        *args: of `DialogueDataModule`.
        pairs: ``conflict``, ``wrong``, or a table (CSV; see `read_preferences`).
        labels: of `find_conflicts`.
        keeps: keep replies that no preference is about (`keep_others`), but where a table chooses the replies.
        **kwargs: of `DialogueDataModule`.
    """

    def __init__(
        self, *args: Any, pairs: str, labels: Sequence[str] | None = None, keeps: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.pairs = pairs
        self.labels = labels
        self.keeps = keeps
        self._preferences: dict[str, PreferenceDataset] = {}
        self._known_rows: dict[tuple[str, int, tuple[int, ...]], list[int]] = {}

    def pairs_hash(self) -> str | None:
        """Of the table's content; None without one.

        Raises:
            MsencError: there is no such file.
        """
        return digest(read_text(Path(self.pairs), _EXPECTED)) if is_table(self.pairs) else None

    @cached_property
    def _table(self) -> Mapping[str, Sequence[Context]]:
        return read_preferences(Path(self.pairs), self)

    def preferences(self, split: str) -> PreferenceDataset:
        """The split's contexts with preferences.

        Raises:
            MsencError: it has none; says what to do.
        """
        if split not in self._preferences:
            if is_table(self.pairs):
                contexts = self._table.get(split, [])
                if not contexts:
                    raise MsencError(
                        f"{self.pairs}: found no row of the split {split}, expected preferences to "
                        + ("train on." if split == "train" else "validate on. Add some, or set data.val=null.")
                    )
            else:
                contexts = self._of_labels(split)
                if self.keeps:
                    dialogues = self.dataset(split)
                    contexts = keep_others(contexts, lambda index: len(dialogues.tokens(index).targets))
            self._preferences[split] = PreferenceDataset(self.dataset(split), contexts)
        return self._preferences[split]

    def _of_labels(self, split: str) -> list[Context]:
        items = find_conflicts(self, split, self.labels)
        if self.pairs == WRONG:
            return wrong_replies(items)
        items = [item for item in items if item.stream in self.streams]
        if not items:
            reads = " and ".join(self.streams) or "text alone"
            raise MsencError(
                f"objective.pairs={CONFLICT}: this run reads {reads}, and no turn of the split {split} whose words "
                f"contradict what it hears or sees. Expected a modality with audio or video, or objective.pairs={WRONG}"
                " or a table."
            )
        return follow_stream(items)

    def num_pairs(self, split: str) -> int:
        """Pairs of a reply and a rejected one."""
        contexts = self.preferences(split).contexts
        return sum(len(preference.rejected) for c in contexts for preference in c.preferences.values())

    def units(self, split: str) -> list[Unit]:
        """The units of the split's batches: contexts, or parts of them under a token budget."""
        if split not in self._units:
            preferences = self.preferences(split)
            turns = [context.turns for context in preferences.contexts]
            if self.max_tokens_per_batch is None:
                units = [Unit(number, own, 0) for number, own in enumerate(turns)]
            else:
                ids = [preferences.dialogues.ids[context.dialogue] for context in preferences.contexts]
                units = parts_within(
                    turns,
                    lambda number, some: sum(self._row_lengths(split, number, tuple(some))),
                    self.layout,
                    self.max_tokens_per_batch,
                    ids,
                    self.max_history_tokens,
                )
                units = [unit._replace(turns=unit.turns or turns[unit.dialogue]) for unit in units]
            self._units[split] = [unit._replace(tokens=sum(self.row_lengths(split, unit))) for unit in units]
        return self._units[split]

    def row_lengths(self, split: str, unit: Unit) -> list[int]:
        """As in `DialogueDataModule`."""
        return self._row_lengths(split, unit.dialogue, unit.turns)

    def _row_lengths(self, split: str, number: int, turns: tuple[int, ...]) -> list[int]:
        key = (split, number, turns)
        if key not in self._known_rows:
            tokens = self.preferences(split).tokens(number)
            rows = dialogue_rows(tokens, self.max_history_tokens, self.num_queries, self.layout, turns)
            self._known_rows[key] = [len(row.ids) for row in rows]
        return self._known_rows[key]

    def _unit_dataset(self, split: str) -> UnitDataset:
        return UnitDataset(self.preferences(split), self.units(split))


# ---------------------------------------------------------------------------------------------------- tables

_EXPECTED = (
    f"Expected a table with the columns {', '.join(COLUMNS)} and perhaps {OPTIONAL[0]}, or "
    f"objective.pairs={CONFLICT} or {WRONG}."
)


def read_preferences(path: Path, datamodule: DialogueDataModule) -> dict[str, list[Context]]:
    """Read a table with a rejected reply per row: split -> contexts.

    Columns: ``dialogue`` (its id, or the last part of it), ``utterance`` (the id of the reply in it), ``rejected`` (the
    words of the other reply; empty: the same words) and, where it exists, ``rejected_description`` (how these are
    spoken; empty: as the reply).

    Args:
        path: the CSV file, in UTF-8.
        datamodule: whose dialogues the table names.

    Raises:
        MsencError: it is no such table; or a row names no reply of the data, or does not differ from it (names the
            row).
    """
    rows = parse_table(read_text(path, _EXPECTED), path, COLUMNS, OPTIONAL, _EXPECTED)
    places = _places(datamodule)
    prompt = datamodule.tokenizer.prompt
    rejected: dict[tuple[str, int], dict[int, list[Utterance]]] = defaultdict(lambda: defaultdict(list))
    dialogues: dict[tuple[str, int], Dialogue] = {}
    for where, row in rows:
        split, index, dialogue = _find(places, row["dialogue"].strip(), where, bool(datamodule.filters))
        turn = _turn_of(dialogue, row["utterance"].strip(), where)
        own, text = dialogue.utterances[turn], row["rejected"].strip()
        description = row.get("rejected_description", "").strip()
        if "(" in description or ")" in description:
            raise MsencError(f"{where}: rejected_description is {short(description)}; expected none with brackets.")
        other = replace(own, text=text or own.text, description=description or own.description, marks=())
        if prompt.format_target(own)[0] == prompt.format_target(other)[0]:
            spoken = "" if prompt.target == "text_description" else " (prompt.target=text leaves descriptions out)"
            raise MsencError(
                f"{where}: the rejected reply is that of the data, {short(own.text)}{spoken}. Expected other words in "
                "rejected, or another rejected_description."
            )
        dialogues[split, index] = dialogue
        rejected[split, index][turn].append(other)
    found: dict[str, list[Context]] = defaultdict(list)
    for (split, index), turns in sorted(rejected.items()):
        own = dialogues[split, index].utterances
        found[split].append(
            Context(index, {turn: Preference(own[turn], tuple(said)) for turn, said in sorted(turns.items())})
        )
    return dict(found)


_Places = Mapping[str, Sequence[tuple[str, int, Dialogue]]]
"""Id of a dialogue, or its last part -> split, index in it, and the dialogue."""


def _places(datamodule: DialogueDataModule) -> _Places:
    found: dict[str, list[tuple[str, int, Dialogue]]] = defaultdict(list)
    for split in datamodule.manifest.splits:
        # Indices count dialogues with a target, as `DialogueDataset` does.
        for index, dialogue in enumerate(d for d in datamodule.dialogues(split) if d.num_samples):
            for name in {dialogue.id, dialogue.id.rpartition("/")[2]}:
                found[name].append((split, index, dialogue))
    return found


def _find(places: _Places, name: str, where: str, is_filtered: bool) -> tuple[str, int, Dialogue]:
    found = places.get(name, ())
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(dialogue.id for _, _, dialogue in found)
        raise MsencError(f"{where}: dialogue is {short(name)}, which may be {ids}. Write its whole id.")
    some = ", ".join(name for name in islice(_ids(places), 3))
    left_out = "; data.filter may leave it out" if is_filtered else ""
    raise MsencError(
        f"{where}: dialogue is {short(name)}, expected one of the data with two or more turns, such as "
        f"{some}{left_out}."
    )


def _ids(places: _Places) -> Iterator[str]:
    return (name for name in places if "/" in name)


def _turn_of(dialogue: Dialogue, name: str, where: str) -> int:
    turns = {utterance.id: turn for turn, utterance in enumerate(dialogue.utterances)}
    turn = turns.get(name, turns.get(name.removeprefix("utt")))
    if turn is None or turn == 0:
        found = f"utterance is {short(name)}" + (", the first turn, which replies to nothing" if turn == 0 else "")
        raise MsencError(
            f"{where}: {found}; expected a reply in {dialogue.id}: one of {', '.join(islice(turns, 1, 12))}."
        )
    return turn
