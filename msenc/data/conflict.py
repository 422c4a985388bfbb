"""Items in which the words and the voice (or the face) of a turn contradict each other.

labels of turns -> pairs of turns whose labels differ -> for each, two contradictions by two targets: what a run scores

A turn gets the stream, or the words, of another turn, by the same speaker where possible. So there are the same words
in a contradicting voice, and the same voice with contradicting words; everything else stays as it was.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from msenc.data.collate import Features
from msenc.data.controls import ControlledDialogues
from msenc.data.datamodule import DialogueDataModule
from msenc.data.dataset import DialogueDataset
from msenc.data.loader import UnitSample
from msenc.prompt import SLOTS, TokenizedDialogue
from msenc.speech.description import VOCABULARY, parse
from msenc.store.labels import LABELS, VOICE_TURNS, columns_of, read_labels
from msenc.store.shards import read_index
from msenc.types import UNKNOWN, Dialogue, Mark, MsencError, Utterance

PLANTED = "planted"
"""Name of the labels that generated data plant in the replies."""
MOST_VALUES = 12
"""A column with more values is no label by itself: it has to be named."""
VOICE_LABELS = ("pitch", "range")
"""Attributes of the voice that are labels by themselves; the others have to be named."""
SEED = 0
"""Of the pairs, which are the same for every run."""

Place = tuple[int, int]
"""Index of a dialogue, and a turn in it."""


class Labelled(NamedTuple):
    """A turn with a label.

    Args:
        place: of the turn.
        speaker: who speaks.
        value: of the label.
        mark: the planted span of the reply that states the label, if it is planted.
    """

    place: Place
    speaker: str
    value: str
    mark: Mark | None = None


@dataclass(frozen=True)
class ConflictItem:
    """A turn, another one whose label differs, and the two replies between which a run decides.

    Args:
        stream: that contradicts the words.
        label: its name.
        compared: how the two replies differ: ``planted word``, ``description`` or ``reply``.
        place: of the turn whose dialogue, speaker and other streams are kept.
        donor: of the other turn.
        values: both turns' labels.
        same_speaker: whether both turns are spoken by the same speaker.
        replies: that are consistent with the turn's label, and with the donor's.
    """

    stream: str
    label: str
    compared: str
    place: Place
    donor: Place
    values: tuple[str, str]
    same_speaker: bool
    replies: tuple[Utterance, Utterance]


def find_conflicts(
    datamodule: DialogueDataModule, split: str, names: Sequence[str] | None = None, limit: int | None = None
) -> list[ConflictItem]:
    """The items of a split; they depend on the data, and on no run's streams.

    Args:
        datamodule: of the run.
        split: ``train``, ``val`` or ``test``.
        names: of labels; None: planted ones, or without these all columns of up to `MOST_VALUES` values, and the
            voice's pitch and range.
        limit: number of dialogues, from the start of the split.

    Raises:
        MsencError: no such label, or no two turns to exchange; says what is missing.
    """
    dataset = datamodule.dataset(split)
    count = min(len(dataset), limit or len(dataset))
    dialogues = [dataset.dialogue(index) for index in range(count)]
    is_described = datamodule.tokenizer.prompt.target == "text_description"
    present = _present(datamodule, split, dialogues)
    if not present:
        raise MsencError(
            f"conflict: {datamodule.folder}, split {split}: found no audio or video, expected turns whose voice or "
            "face can contradict the words. Prepare with modality=text_audio_video, or as the data allow."
        )
    labels = _labels(datamodule, dialogues, names, is_described)
    pairs = _Pairs(dialogues, is_described)
    items: list[ConflictItem] = []
    for (stream, label, _), turns in labels.items():
        items += pairs.of(stream, label, [turn for turn in turns if turn.place in present.get(stream, ())])
    if not items:
        known = ", ".join(dict.fromkeys(label for _, label, _ in labels))
        raise MsencError(
            f"conflict: {datamodule.folder}, split {split}: found no two turns that differ in {known}, have "
            f"{' or '.join(present)} and get different replies. Take another split, more dialogues, or other labels."
        )
    return items


def _present(datamodule: DialogueDataModule, split: str, dialogues: Sequence[Dialogue]) -> dict[str, set[Place]]:
    """Stream -> the turns that have it; of streams that the run does not read, too."""
    manifest, found = datamodule.manifest, {}
    for stream in SLOTS[::-1]:
        folders = [name for name, info in manifest.streams.items() if info.kind == stream]
        if stream in datamodule.streams:
            folders = [f"{stream}-{datamodule.streams[stream].name}"]
        if folders:
            samples = read_index(datamodule.folder / folders[0], datamodule.hint)["samples"]
            lengths = {sample["id"]: sample["lengths"] for sample in samples if sample["split"] == split}
            found[stream] = {(i, k) for i, d in enumerate(dialogues) for k, n in enumerate(lengths.get(d.id, ())) if n}
    if not found:  # prepared for text only: the clips say which turns have something to exchange
        clips = {(i, k) for i, d in enumerate(dialogues) for k, u in enumerate(d.utterances) if u.clips}
        found = dict.fromkeys(SLOTS[::-1], clips) if clips else {}
    return {stream: places for stream, places in found.items() if places}


def _labels(
    datamodule: DialogueDataModule, dialogues: Sequence[Dialogue], names: Sequence[str] | None, is_described: bool
) -> dict[tuple[str, str, str], list[Labelled]]:
    """(stream, label, field of a planted word) -> the turns that have the label, and a reply."""
    planted = _planted(dialogues, is_described)
    if planted and names is None:
        return planted
    ids = {f"{d.id}/utt{u.id}": (i, k) for i, d in enumerate(dialogues) for k, u in enumerate(d.utterances[:-1])}
    columns = _read(datamodule, LABELS)
    measured = _read(datamodule, VOICE_TURNS)
    values: dict[str, dict[Place, str]] = defaultdict(dict)
    for id, place in ids.items():
        for column, value in columns.get(id, {}).items():
            if str(value).strip():
                values[column][place] = str(value).strip().lower()
    of_voice = set()
    for id, (i, k) in ids.items():
        turn = dialogues[i].utterances[k]
        own = measured.get(id, {}).get("measured") or vars(turn.attributes or parse(turn.description or ""))
        for name in VOCABULARY:
            if name not in columns_of(columns) and own.get(name, UNKNOWN) != UNKNOWN:
                values[name][i, k] = own[name]
                of_voice.add(name)
    kinds = {name: len({*of_turns.values()}) for name, of_turns in values.items()}
    known = [*([PLANTED] if planted else []), *(name for name, count in kinds.items() if count > 1)]
    if names is None:
        names = [n for n in known if (n in VOICE_LABELS if n in of_voice else kinds[n] <= MOST_VALUES)]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        found = f"no label {unknown[0]} that varies" if unknown else "no label of the turns"
        raise MsencError(
            f"conflict: {datamodule.folder}, split {dialogues[0].split}: found {found}. Known: "
            f"{', '.join(known) or 'none'}. Labels are columns of the table (data.labels), or the voices that "
            "prepare.py describe=true measures."
        )
    found = {}
    for name in names:
        if name == PLANTED:
            found |= planted
            continue
        turns = [Labelled((i, k), dialogues[i].utterances[k].speaker, v) for (i, k), v in values[name].items()]
        for stream in ("audio",) if name in of_voice else SLOTS[::-1]:
            found[stream, name, ""] = turns
    return found


def _planted(dialogues: Sequence[Dialogue], is_described: bool) -> dict[tuple[str, str, str], list[Labelled]]:
    found: dict[tuple[str, str, str], list[Labelled]] = defaultdict(list)
    for i, dialogue in enumerate(dialogues):
        for k, reply in enumerate(dialogue.utterances[1:]):
            marks = {(m.kind, m.field): m for m in reversed(reply.marks) if m.kind in SLOTS}
            for (kind, part), mark in marks.items():
                said = getattr(reply, part)
                if said is not None and (part == "text" or is_described):
                    value = said[mark.start : mark.end].lower()
                    found[kind, PLANTED, part].append(Labelled((i, k), dialogue.utterances[k].speaker, value, mark))
    return dict(found)


def _read(datamodule: DialogueDataModule, name: str) -> Mapping[str, Mapping[str, Any]]:
    path = datamodule.folder / name
    return read_labels(datamodule.folder, name, datamodule.hint) if path.is_file() else {}


class _Pairs:
    """Pairs turns whose labels differ; each turn once per label, and with its own speaker where that is possible."""

    def __init__(self, dialogues: Sequence[Dialogue], is_described: bool) -> None:
        self.dialogues = dialogues
        described = any(u.description is not None for d in dialogues for u in d.utterances)
        self.compared = "description" if is_described and described else "reply"

    def of(self, stream: str, label: str, turns: Sequence[Labelled]) -> Iterator[ConflictItem]:
        by_speaker: dict[str, list[Labelled]] = defaultdict(list)
        for k in np.random.default_rng(SEED).permutation(len(turns)).tolist():
            by_speaker[turns[k].speaker].append(turns[k])
        left: list[Labelled] = []
        for own in by_speaker.values():
            yield from self._match(stream, label, own, left)
        yield from self._match(stream, label, left, [])

    def _match(
        self, stream: str, label: str, turns: Iterable[Labelled], left: list[Labelled]
    ) -> Iterator[ConflictItem]:
        groups: dict[str, list[Labelled]] = defaultdict(list)
        for turn in turns:
            groups[turn.value].append(turn)
        while groups:
            most = max(groups, key=lambda value: len(groups[value]))
            one = groups[most].pop()
            if not groups[most]:
                del groups[most]
            for other in self._partners(one, groups):
                replies = self._replies(one, other), self._replies(other, one)
                if all(replies):
                    groups[other.value].remove(other)
                    if not groups[other.value]:
                        del groups[other.value]
                    for (a, b), said in zip(((one, other), (other, one)), replies, strict=True):
                        compared = f"{PLANTED} word" if a.mark else self.compared
                        is_same = a.speaker == b.speaker
                        yield ConflictItem(stream, label, compared, a.place, b.place, (a.value, b.value), is_same, said)
                    break
            else:
                left.append(one)

    def _partners(self, one: Labelled, groups: Mapping[str, Sequence[Labelled]]) -> Iterator[Labelled]:
        """Turns with another label: first those of other dialogues, and of the largest group."""
        others = [groups[v] for v in sorted(groups, key=lambda v: -len(groups[v])) if v != one.value]
        for is_same in (False, True):
            for group in others:
                yield from (other for other in group if (other.place[0] == one.place[0]) == is_same)

    def _replies(self, one: Labelled, other: Labelled) -> tuple[Utterance, Utterance] | None:
        """The turn's reply, and the same as the other turn's label wants it; None where they do not differ."""
        own, theirs = (self.dialogues[i].utterances[k + 1] for i, k in (one.place, other.place))
        if one.mark and other.mark:
            said = getattr(own, one.mark.field)
            word = getattr(theirs, other.mark.field)[other.mark.start : other.mark.end]
            if said[one.mark.start].isupper():
                word = word[0].upper() + word[1:]
            changed = replace(own, **{one.mark.field: said[: one.mark.start] + word + said[one.mark.end :]})
        elif self.compared == "description":
            if own.description is None or theirs.description is None:
                return None
            changed = replace(own, description=theirs.description)
        else:
            changed = replace(own, text=theirs.text, description=None)
            own = replace(own, description=None)
        if (own.text, own.description) == (changed.text, changed.description):
            return None
        return replace(own, marks=()), replace(changed, marks=())


class ConflictSamples(Dataset):
    """Item -> its four samples: (stream, words exchanged) by (own reply, the other's reply).

    Args:
        dialogues: of the split.
        items: from `find_conflicts`.
    """

    def __init__(self, dialogues: DialogueDataset | ControlledDialogues, items: Sequence[ConflictItem]) -> None:
        self.dialogues = dialogues
        self.items = items

    def __len__(self) -> int:
        """Items."""
        return len(self.items)

    def __getitem__(self, number: int) -> list[UnitSample]:
        """The item's samples; a run that does not read the stream sees no exchange of it."""
        item, dialogues = self.items[number], self.dialogues
        index, turn = item.place
        tokens, features = dialogues.tokens(index), dialogues.features(index)
        samples = []
        for words, streams in (
            (tokens, exchange_stream(dialogues, item, features)),
            (exchange_words(dialogues, item), features),
        ):
            for reply in item.replies:
                target = dialogues.tokenizer.target(reply)
                targets = (*tokens.targets[:turn], target, *tokens.targets[turn + 1 :])
                samples.append((replace(words, targets=targets), streams, (turn + 1,)))
        return samples


def exchange_stream(
    dialogues: DialogueDataset | ControlledDialogues, item: ConflictItem, features: Features
) -> Features:
    """The features of an item's dialogue with those of the donor in its turn; unchanged if the stream is not read."""
    (index, turn), (donor, their_turn) = item.place, item.donor
    if item.stream not in features:
        return features
    frames, own = dialogues.features(donor)[item.stream][their_turn], features[item.stream]
    if dialogues.tokens(index).windows:  # they count frames, and should keep the same turns
        frames = np.resize(frames, (len(own[turn]), frames.shape[1]))
    return {**features, item.stream: [*own[:turn], frames, *own[turn + 1 :]]}


def exchange_words(dialogues: DialogueDataset | ControlledDialogues, item: ConflictItem) -> TokenizedDialogue:
    """The tokens of an item's dialogue with the donor's words in its turn."""
    (index, turn), (donor, their_turn) = item.place, item.donor
    tokens, dialogue = dialogues.tokens(index), dialogues.dialogue(index)
    said = list(dialogue.utterances)
    said[turn] = replace(said[turn], text=dialogues.dialogue(donor).utterances[their_turn].text)
    blocks = dialogues.tokenizer.turns(replace(dialogue, utterances=tuple(said)), dialogues.frames(index))
    return replace(tokens, turns=(*tokens.turns[:turn], blocks[turn], *tokens.turns[turn + 1 :]))
