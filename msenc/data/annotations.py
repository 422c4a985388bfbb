"""First step of the flow: a dataset's tables -> `Dialogue` objects, with what was dropped and why.

MELD's three CSV files, and every folder of that shape (the demo), are read here.
"""

import difflib
import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from msenc.data.marks import parse_marks
from msenc.types import Dialogue, MsencError, Rejection, Utterance

# split -> (annotation file, folder of its clips), as MELD's release names them
MELD_FILES = {
    "train": ("train_sent_emo.csv", "train_splits"),
    "val": ("dev_sent_emo.csv", "dev_splits_complete"),
    "test": ("test_sent_emo.csv", "output_repeated_splits_test"),
}
MELD_COLUMNS = ("Utterance", "Speaker", "Dialogue_ID", "Utterance_ID", "StartTime", "EndTime")

_TIME = re.compile(r"(\d+):(\d{1,2}):(\d{1,2}(?:[.,]\d+)?)")
# UTF-8 that was read as cp1252 (or Latin-1) and saved again: curly quotes and dashes start with "â€", Latin letters
# with "Ã", signs with "Â". Nothing in a text that was never mangled looks like these.
_DOUBLE_ENCODED = re.compile("â[€\x80][^\x00-\x7f]|[ÂÃ][\x80-\xbf]")
_C1 = re.compile("[\x80-\x9f]")


@dataclass(frozen=True)
class Annotations:
    """What a dataset's tables hold.

    Args:
        dialogues: in the order of the files, train before val before test.
        rejections: one per row that was dropped.
        repaired: ids of the utterances whose text or speaker needed a repair of its encoding, dropped ones included.
        recordings: dialogue id -> the recording that its times count in, where the tables name one.
    """

    dialogues: list[Dialogue]
    rejections: list[Rejection]
    repaired: list[str]
    recordings: dict[str, str]

    @property
    def num_repaired(self) -> int:
        """Rows whose encoding was repaired."""
        return len(self.repaired)


def read_meld(root: Path, dataset: str = "meld") -> Annotations:
    """Read a folder with MELD's CSV files; its clips need not be there.

    The turns of a dialogue keep the order of their rows. `Utterance.clip` follows from the naming rule
    (``train_splits/dia3_utt5.mp4``), whether that file exists or not. The columns ``Description`` and ``Marks`` are
    read where they exist, and so are ``Season`` and ``Episode``, which name the recording. A row without text and a
    repeated utterance id are rejected and listed; a time that cannot be read is None.

    Args:
        root: the folder that holds the three files.
        dataset: first part of the dialogue ids.

    Raises:
        MsencError: if a file is missing or not such a table, lacks a column, has no usable row, or holds an id that
            is no whole number.
    """
    dialogues: list[Dialogue] = []
    rejections: list[Rejection] = []
    repaired: list[str] = []
    recordings: dict[str, str] = {}
    for split, (name, clip_folder) in MELD_FILES.items():
        path = Path(root) / name
        turns: dict[int, dict[int, Utterance]] = {}
        for row, values, is_repaired in _read_rows(path):
            dia, utt = (_whole_number(values[c], c, path, row) for c in ("Dialogue_ID", "Utterance_ID"))
            utterance_id = f"{dataset}/{split}/dia{dia}/utt{utt}"
            if is_repaired:
                repaired.append(utterance_id)
            if values.get("Season") and values.get("Episode"):
                recordings.setdefault(
                    f"{dataset}/{split}/dia{dia}", f"season {values['Season']}, episode {values['Episode']}"
                )
            if not values["Utterance"]:
                rejections.append(Rejection(utterance_id, "row", "empty text", name, row))
            elif utt in turns.setdefault(dia, {}):
                found = values["Utterance"]
                rejections.append(Rejection(utterance_id, "row", "duplicate utterance id", name, row, found))
            else:
                clip = f"{clip_folder}/dia{dia}_utt{utt}.mp4"
                turns[dia][utt] = _utterance(values, str(utt), clip, path, row)
        found = [
            Dialogue(f"{dataset}/{split}/dia{dia}", split, tuple(by_id.values()))
            for dia, by_id in turns.items()
            if by_id
        ]
        if not found:
            raise MsencError(
                f"{path}: found no row with text; expected the utterances of the split {split!r}. "
                "Put the complete file there."
            )
        dialogues += found
    return Annotations(dialogues, rejections, repaired, recordings)


def repair_encoding(text: str) -> str:
    r"""Undo double encoding, map C1 control characters through cp1252, make no-break spaces plain.

    Example:
        >>> repair_encoding("a cafÃ©\x97at\xa0noon\x85")
        'a café—at noon…'
    """
    text = _DOUBLE_ENCODED.sub(lambda match: _decode_again(match[0]), text)
    text = _C1.sub(lambda match: match[0].encode("latin-1").decode("cp1252", errors="ignore"), text)
    return text.replace("\u00a0", " ")


def _decode_again(text: str) -> str:
    try:
        return b"".join(c.encode("latin-1" if ord(c) < 256 else "cp1252") for c in text).decode("utf-8")
    except UnicodeError:
        return text  # looked like it, and was not


def _read_rows(path: Path) -> list[tuple[int, dict[str, str], bool]]:
    """Line number, repaired values by column, and whether a repair was needed, for every row that is not blank."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        expected = ", ".join(name for name, _ in MELD_FILES.values())
        raise MsencError(
            f"{path}: no such file. Expected a folder with {expected}; set data.root to it, or copy the file there."
        ) from error
    except OSError as error:
        raise MsencError(f"{path}: cannot be read ({error.strerror}). Expected a readable CSV file.") from error
    try:
        text, is_utf8 = data.decode("utf-8-sig"), True
    except UnicodeDecodeError:
        text, is_utf8 = data.decode("latin-1"), False  # cp1252's own characters arrive as C1 controls, repaired below
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # a row longer than the header
            table = pd.read_csv(
                io.StringIO(text, newline=""),
                dtype=str,
                keep_default_na=False,
                skip_blank_lines=False,
                index_col=False,
            ).fillna("")
    except (pd.errors.EmptyDataError, pd.errors.ParserError, pd.errors.ParserWarning) as error:
        reason = str(error).splitlines()[0]
        raise MsencError(f"{path}: not a CSV table ({reason}). Expected {_header()}. Get the file again.") from error
    table.columns = table.columns.str.strip()
    _check_columns(path, [str(c) for c in table.columns])

    rows, line = [], 2  # the header is line 1
    for raw in table.to_dict("records"):
        values = {str(c): repair_encoding(v).strip() for c, v in raw.items()}
        # in a file that is not UTF-8, every character beyond ASCII was repaired
        is_repaired = any(
            repair_encoding(raw[c]) != raw[c] or not (is_utf8 or raw[c].isascii()) for c in ("Utterance", "Speaker")
        )
        if any(values.values()):
            rows.append((line, values, is_repaired))
        line += 1 + sum(len(re.findall(r"\r\n|\r|\n", v)) for v in raw.values())  # quoted fields may span lines
    if not rows:
        raise MsencError(
            f"{path}: found a header and no row. Expected one row per utterance. Put the complete file there."
        )
    return rows


def _check_columns(path: Path, columns: list[str]) -> None:
    missing = [c for c in MELD_COLUMNS if c not in columns]
    if not missing:
        return
    by_lower = {c.lower(): c for c in columns}
    nearest = [by_lower[n] for c in missing for n in difflib.get_close_matches(c.lower(), by_lower, n=1)]
    hint = f" (nearest: {', '.join(nearest)})" if nearest else ""
    raise MsencError(
        f"{path}, row 1: no column {', '.join(missing)}{hint}; found {', '.join(columns)}. Expected {_header()}. "
        "Rename or add the column."
    )


def _header() -> str:
    return f"a header with {', '.join(MELD_COLUMNS)}"


def _whole_number(value: str, column: str, path: Path, row: int) -> int:
    if not (value.isascii() and value.isdigit()):
        raise MsencError(f"{path}, row {row}: {column} is {value!r}; expected a whole number. Correct the row.")
    return int(value)


def _utterance(values: dict[str, str], id: str, clip: str, path: Path, row: int) -> Utterance:
    try:
        marks = parse_marks(values.get("Marks", ""))
    except MsencError as error:
        raise MsencError(f"{path}, row {row}: {error}") from error
    description = values.get("Description") or None
    if description is not None and ("(" in description or ")" in description):
        raise MsencError(
            f"{path}, row {row}: brackets in the voice description {description!r}. A target ends in its description "
            "in brackets, so it must hold none. Write it without."
        )
    return Utterance(
        id=id,
        speaker=values["Speaker"],
        text=values["Utterance"],
        description=description,
        start_s=_seconds(values["StartTime"]),
        end_s=_seconds(values["EndTime"]),
        clip=clip,
        marks=marks,
    )


def _seconds(time: str) -> float | None:
    match = _TIME.fullmatch(time)
    if match is None:
        return None
    hours, minutes, seconds = int(match[1]), int(match[2]), float(match[3].replace(",", "."))
    return round(3600 * hours + 60 * minutes + seconds, 6)
