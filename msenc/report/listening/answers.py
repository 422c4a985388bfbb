"""The files that listeners sent, one each -> what they answered; a file that is not as the page wrote it is named."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from msenc.files import parse_csv, read_text
from msenc.files.kinds import short
from msenc.report.listening.study import ANSWERS, QUESTIONS, Study
from msenc.types import MsencError

COLUMNS = ("page", "listener", "place", "item", "question", "first", "second", "answer", "seconds", "check")
MAX_BYTES = 4_000_000
EDITED = "Ask the listener for the file as the page downloads it; this one is left out."


@dataclass(frozen=True)
class Listener:
    """What one listener answered.

    Args:
        code: that the page was begun with.
        answers: (item, question) -> the id of the sound that was preferred, ``same``, or the rating.
        minutes: that all trials took.
    """

    code: str
    answers: Mapping[tuple[str, str], str]
    minutes: float


def read_answers(folder: Path, studies: Mapping[str, Study]) -> tuple[Study, list[Listener], list[str]]:
    """Read all files of a folder.

    Args:
        folder: with a CSV file per listener.
        studies: pages that were made of these runs, by name.

    Returns:
        The page that was answered, its listeners by code, and a line on each file that was left out.

    Raises:
        MsencError: there is no such folder, no file in it is an answer to one of the pages, or some are to another.
    """
    if not folder.is_dir():
        raise MsencError(f"answers: no folder {folder}. Expected one with the CSV files that listeners sent.")
    if not studies:
        raise MsencError("answers: no listening page was made of these runs. Make one: report.py listen=true")
    found: dict[tuple[str, str], list[tuple[Path, Listener]]] = defaultdict(list)
    problems = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        try:
            page, listener = _read_file(path, studies)
            found[page, listener.code].append((path, listener))
        except MsencError as error:
            problems.append(str(error))
    listeners = []
    for (_, code), files in found.items():
        if all(listener == files[0][1] for _, listener in files):
            listeners.append(files[0][1])
            first = files[0][0].name
            problems += [f"{path}: the same answers as {first}; counted once." for path, _ in files[1:]]
        else:
            names = ", ".join(path.name for path, _ in files)
            problems.append(f"{folder}: {names} have the same listener {code} with other answers; all are left out.")
    pages = sorted({page for page, _ in found})
    if len(pages) > 1:
        raise MsencError(
            f"answers: {folder} has answers to {len(pages)} pages ({', '.join(pages)}), expected one. Give those of "
            "each page a folder of their own."
        )
    if not listeners:
        said = "".join(f"\n{line}" for line in problems[:3]) or " It has no files."
        raise MsencError(f"answers: nothing in {folder} can be used.{said}")
    return studies[pages[0]], sorted(listeners, key=lambda listener: listener.code), problems


def row_check(values: list[str]) -> str:
    """What the page writes after a row, to notice what was changed since (FNV-1a, 32 bits).

    Example:
        >>> row_check(["a"])
        'e40c292c'
    """
    value = 0x811C9DC5
    for byte in ",".join(values).encode():
        value = (value ^ byte) * 0x01000193 % 2**32
    return f"{value:08x}"


def _read_file(path: Path, studies: Mapping[str, Study]) -> tuple[str, Listener]:
    if path.suffix.lower() != ".csv":
        raise MsencError(f"{path}: is no CSV file, so it was not read.")
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise MsencError(f"{path}: found {path.stat().st_size:,} bytes, expected the answers of one listener. {EDITED}")
    rows = parse_csv(read_text(path, EDITED), path, COLUMNS, EDITED)
    if not rows:
        raise MsencError(f"{path}: has no answers. {EDITED}")
    first = rows[0]
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", first["listener"]):
        raise MsencError(f"{path}, row 2: listener: found {short(first['listener'])}, expected a code. {EDITED}")
    if first["page"] not in studies:
        raise MsencError(
            f"{path}, row 2: page: found {short(first['page'])}, expected {' or '.join(sorted(studies))}: it answers "
            "the page of other runs, or of another sweep_dir, and is left out."
        )
    study = studies[first["page"]]
    trials = {trial["id"]: trial for trial in study["trials"]}
    answers: dict[tuple[str, str], str] = {}
    seconds: dict[str, float] = {}
    for number, row in enumerate(rows, start=2):  # row 1 is the header
        for name in ("page", "listener"):
            if row[name] != first[name]:
                raise MsencError(
                    f"{path}, row {number}: {name}: found {short(row[name])}, expected {short(first[name])}, as in row "
                    f"2. {EDITED}"
                )
        if row["check"] != row_check([row[name] for name in COLUMNS[:-1]]):
            raise MsencError(f"{path}, row {number}: was edited: its values do not fit its check. {EDITED}")
        trial = trials.get(row["item"])
        heard = [row["first"], *([row["second"]] if row["second"] else [])]
        fits = {
            "item": trial is not None,
            "question": row["question"] in QUESTIONS,
            "first": trial is not None and sorted(heard) == sorted(sound["id"] for sound in trial["sounds"]),
            "answer": row["answer"] in ANSWERS[study["kind"]],
            "seconds": re.fullmatch(r"\d{1,7}\.\d", row["seconds"]) is not None,
        }
        if wrong := [name for name, is_right in fits.items() if not is_right]:
            raise MsencError(
                f"{path}, row {number}: {wrong[0]}: found {short(row[wrong[0]])}, which the page {study['page']} does "
                f"not have. {EDITED}"
            )
        place = row["item"], row["question"]
        if place in answers:
            raise MsencError(f"{path}, row {number}: {', '.join(place)} is answered twice. {EDITED}")
        answers[place] = {"A": row["first"], "B": row["second"]}.get(row["answer"], row["answer"])
        seconds[row["item"]] = float(row["seconds"])
    expected = len(trials) * len(QUESTIONS)
    if len(answers) < expected:
        raise MsencError(
            f"{path}: found {len(answers)} of {expected} answers: the listener did not finish, or rows were removed. "
            "It is left out."
        )
    return first["page"], Listener(first["listener"], answers, math.fsum(seconds.values()) / 60)
