"""Spoken replies of a report's configurations -> the trials of a listening study, and the key to them.

Listeners get sounds under names that tell nothing; which configuration spoke each stands in the key alone.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, TypedDict

from msenc.files import digest, read_json
from msenc.files.kinds import Count, Must, Name, Split
from msenc.report.compare import Configuration, pairs_to_compare
from msenc.report.items import Items
from msenc.types import MsencError
from msenc.work.command import as_typed

if TYPE_CHECKING:
    from msenc.report.table import Table

VERSION = 1
CHECKS = 4
"""Trials that tell who listens: a reply, and the same one played backwards."""

FORWARD, BACKWARD = "forward", "backward"
KEY = "key.json"
ADVICE = "Make the page again (report.py listen=true), or move its folder away."

QUESTIONS = {
    "naturalness": {"ab": "Which reply sounds more natural?", "rating": "How natural does the reply sound?"},
    "context": {"ab": "Which reply fits the conversation better?", "rating": "How well does it fit the conversation?"},
    "engaging": {"ab": "Which reply is more engaging?", "rating": "How engaging is the reply?"},
}
ANSWERS = {"ab": ("A", "same", "B"), "rating": ("1", "2", "3", "4", "5")}


class Sound(TypedDict):
    """A file of the page, and the configuration that spoke it; of a check `FORWARD` or `BACKWARD`."""

    id: Name
    of: str


class Trial(TypedDict):
    """What is judged at once: two sounds side by side, or a single one.

    ``group`` numbers the comparisons, then the checks; ``block`` is what is turned at once (`name_trials`). A check
    with a single sound names the trial of the same reply (``beside``).
    """

    id: Name
    dialogue: str
    turn: Count
    group: Count
    block: Count
    is_check: bool
    sounds: Annotated[list[Sound], Must(lambda sounds: 1 <= len(sounds) <= 2, "one or two")]
    beside: NotRequired[str | None]


class Study(TypedDict):
    """What ``key.json`` has: the page's name, what is asked, whose replies are heard, in which trials; its own hash."""

    schema_version: int
    page: Name
    kind: Literal["ab", "rating"]
    split: Split
    seeds: dict[str, int]
    pairs: list[tuple[str, str]]
    trials: list[Trial]
    hash: str


@dataclass(frozen=True)
class Clip:
    """One sound of a trial before it has a name: its file, whose it is, and whether it is played backwards."""

    file: Path
    of: str
    is_backward: bool = False


@dataclass(frozen=True)
class Draft:
    """A trial before its sounds have names; `row` is the target's prediction, `beside` a number of another draft."""

    row: dict[str, Any]
    group: int
    clips: tuple[Clip, ...]
    is_check: bool = False
    beside: int | None = None


def draft_trials(
    table: Table, folders: Sequence[Path], kind: str, num_trials: int, seed: int
) -> tuple[list[Draft], list[tuple[str, str]], list[str]]:
    """Choose what listeners hear: replies of each configuration's first run.

    Of each dialogue one target is taken before any gives a second one, in an order that the seed draws, so that all
    comparisons have the same targets where they can. Targets to which both sides say the same in the same voice cannot
    tell them apart, and are not played.

    Args:
        table: of the report.
        folders: reported ones, for the command that speaks replies.
        kind: ``ab`` or ``rating``.
        num_trials: in all, without checks; shared out over the comparisons, or the configurations that are rated.
        seed: of the choice.

    Returns:
        The trials in the order of their groups; the pairs that are compared; and notes on the choice.

    Raises:
        MsencError: there is nothing to compare, too few trials, or replies have no sound.
    """
    pairs = [(a, b) for _, a, b in pairs_to_compare(table.configurations)]
    if kind == "ab" and not pairs:
        raise MsencError("listen: found one configuration, expected two or more to compare. Rate it: listen=rating")
    groups = pairs if kind == "ab" else [(c,) for c in table.configurations]
    of_each = num_trials // len(groups)
    if of_each < 2:
        raise MsencError(
            f"listen_trials: found {num_trials}, expected {2 * len(groups)} or more: two of each of the {len(groups)} "
            f"{'comparisons' if kind == 'ab' else 'configurations'}. Each listener hears all of them."
        )
    spoken = {name: _spoken(c) for name, c in {c.name: c for group in groups for c in group}.items()}
    _refuse_silent(table, folders, spoken)
    items = next(c.items[0] for c in groups[0] if c.items[0] is not None)
    order = list(_by_dialogue(items, Random(seed)))
    drafts, notes = [], []
    for number, group in enumerate(groups):
        name = " and ".join(c.name for c in group)
        # ratings are compared on the same targets
        heard = [[spoken[c.name][i] for i in order] for c in (table.configurations if kind == "rating" else group)]
        known = [(i, files) for i, *files in zip(order, *heard, strict=True) if all(files)]
        # a file is named by all that decides its sound
        usable = [i for i, files in known if kind == "rating" or len({file.name for file in files}) == len(files)]
        if len(usable) < 2:
            raise MsencError(
                f"listen: {name} have {len(usable)} targets with sounds that differ, expected two or more. Evaluate "
                "more dialogues (limit=), or compare other runs."
            )
        if kind == "ab" and len(usable) < len(known):
            notes.append(
                f"{name} say the same in the same voice to {len(known) - len(usable)} of {len(known)} targets, which "
                "are not played: answers hold for the others."
            )
        if len(usable) < of_each:
            notes.append(f"{name}: {len(usable)} trials, as there are no more targets, instead of {of_each}.")
        for i in usable[:of_each]:
            clips = tuple(Clip(file, c.name) for c in group if (file := spoken[c.name][i]))
            drafts.append(Draft(items.rows[i], number, clips))
    return [*drafts, *_checks(drafts, items, spoken, kind, len(groups))], [(a.name, b.name) for a, b in pairs], notes


def _spoken(configuration: Configuration) -> list[Path | None]:
    """The sound of each target's reply, of the first run."""
    items, folder = configuration.items[0], configuration.evaluations[0].folder
    if items is None:
        raise MsencError(f"listen: {configuration.runs[0].name} has no predictions.jsonl. Evaluate that run again.")
    files = [folder / row["speech"] if row.get("speech") else None for row in items.rows]
    return [file if file is not None and file.is_file() else None for file in files]


def _refuse_silent(table: Table, folders: Sequence[Path], spoken: dict[str, list[Path | None]]) -> None:
    silent = [name for name, files in spoken.items() if not any(files)]
    if not silent:
        return
    places = ",".join(map(str, folders))
    run_dir = f"run_dir={places}" if len(folders) == 1 else f"run_dir=[{places}]"
    command = shlex.join(["python", "evaluate.py", run_dir, f"split={table.split}", "speech=espeak"])
    raise MsencError(
        as_typed(
            f"listen: the replies of {', '.join(silent)} have no sound. Speak those of all runs: {command}\nWhere both "
            "evaluations are there, choose the spoken one with settings=."
        )
    )


def _by_dialogue(items: Items, random: Random) -> Iterator[int]:
    """Places of the targets: one of each dialogue, then a second of each, ..."""
    places: dict[str, list[int]] = {}
    for i, (dialogue, _) in enumerate(items.ids):
        places.setdefault(dialogue, []).append(i)
    dialogues = sorted(places)
    random.shuffle(dialogues)
    for dialogue in dialogues:
        random.shuffle(places[dialogue])
    for rank in range(max(map(len, places.values()))):
        yield from (places[dialogue][rank] for dialogue in dialogues if rank < len(places[dialogue]))


def _checks(
    drafts: Sequence[Draft], items: Items, spoken: dict[str, list[Path | None]], kind: str, group: int
) -> list[Draft]:
    """The longest replies, backwards: of a word alone, that may sound like another word."""
    played = {(d.row["dialogue"], d.row["turn"]) for d in drafts}
    if kind == "rating":
        pool = [(n, draft.row, draft.clips[0].file, draft.clips[0].of) for n, draft in enumerate(drafts)]
    else:
        rows = list(enumerate(items.rows))
        pool = [(None, row, files[i], of) for of, files in spoken.items() for i, row in rows if files[i]]

    def preferred(entry: Any) -> Any:
        number, row, file, _ = entry
        return number is None and (row["dialogue"], row["turn"]) in played, -file.stat().st_size, str(file)

    # a reply that several configurations give is one check
    distinct = {
        file.name: (number, row, file, of) for number, row, file, of in sorted(pool, key=preferred, reverse=True)
    }
    checks = []
    for number, row, file, _ in sorted(distinct.values(), key=preferred)[:CHECKS]:
        sounds = (Clip(file, BACKWARD, is_backward=True),) if kind == "rating" else _both_ways(file)
        checks.append(Draft(row, group, sounds, is_check=True, beside=number))
    return checks


def _both_ways(file: Path) -> tuple[Clip, Clip]:
    return Clip(file, FORWARD), Clip(file, BACKWARD, is_backward=True)


def name_trials(drafts: Sequence[Draft], sound_id: Callable[[Clip], str], seed: int) -> list[tuple[Draft, Trial]]:
    """Give the trials names, in an order that tells nothing: neither which are checks, nor whose sound comes first.

    Two trials of a group are a block, in which the same side comes first once. Whoever turns both or neither has half
    of the group one way round, and need not know whose sounds they are.
    """
    random = Random(seed)
    order = list(range(len(drafts)))
    random.shuffle(order)
    names = {number: f"t{place:03d}" for place, number in enumerate(order, start=1)}
    blocks: dict[tuple[int, int], tuple[int, bool]] = {}
    seen: Counter[int] = Counter()
    found = []
    for number in order:
        draft = drafts[number]
        rank = seen[draft.group]
        seen[draft.group] += 1
        block, is_turned = blocks.setdefault((draft.group, rank // 2), (len(blocks), random.random() < 0.5))
        sounds: list[Sound] = [{"id": sound_id(clip), "of": clip.of} for clip in draft.clips]
        trial: Trial = {
            "id": names[number],
            "dialogue": draft.row["dialogue"],
            "turn": draft.row["turn"],
            "group": draft.group,
            "block": block,
            "is_check": draft.is_check,
            "sounds": sounds[::-1] if is_turned ^ (rank % 2) else sounds,
            "beside": None if draft.beside is None else names[draft.beside],
        }
        found.append((draft, trial))
    return found


def read_studies(folder: Path) -> dict[str, Study]:
    """The keys of all pages that were made in a folder, by the pages' names.

    Raises:
        MsencError: a key cannot be understood, or is not as it was written.
    """
    found = {}
    for path in sorted(folder.glob(f"*/{KEY}")):
        study = read_json(path, Study, ADVICE, version=VERSION)
        if study["hash"] != hash_of(study):
            raise MsencError(f"{path}: was edited since the page was made, so answers cannot be told apart. {ADVICE}")
        found[study["page"]] = study
    return found


def hash_of(study: Mapping[str, Any]) -> str:
    """Of all that a key holds beside it."""
    return digest({name: value for name, value in study.items() if name != "hash"})
