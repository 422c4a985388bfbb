"""First step of the flow: a dataset's tables -> `Dialogue` objects, with what was dropped and why.

MELD's three CSV files, every folder of that shape (the demo), and a table of utterances are read here; `read_rows`
makes what any other layout states (`msenc.raw.layouts`) into the same.
"""

import csv
import difflib
import io
import math
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from msenc.files import check_regular, content_hash
from msenc.files.kinds import MAX_NAME_BYTES, is_below, short
from msenc.files.marks import parse_marks
from msenc.raw.container import StoredNames, is_same_name, part_of, split_part, with_track
from msenc.raw.encoding import clean_name, decode_table, repair_encoding
from msenc.raw.splits import split_dialogues
from msenc.raw.timestamps import clock_seconds
from msenc.store.labels import ID
from msenc.types import SPLITS, UNKNOWN_SPEAKER, Dialogue, MsencError, Rejection, Utterance

# split -> (annotation file, folder of its clips), as MELD's release names them
MELD_FILES = {
    "train": ("train_sent_emo.csv", "train_splits"),
    "val": ("dev_sent_emo.csv", "dev_splits_complete"),
    "test": ("test_sent_emo.csv", "output_repeated_splits_test"),
}
MELD_COLUMNS = ("Utterance", "Speaker", "Dialogue_ID", "Utterance_ID", "StartTime", "EndTime")
TABLE_COLUMNS = ("clip", "dialogue", "text")
TABLE_OPTIONS = ("audio", "speaker", "start", "end", "split", "description")

NO_LABELS = ("Sr No.", "Season", "Episode", "Description", "Marks")
"""Columns of MELD's tables, and of the demo's, that are read as something else or say nothing of an utterance."""

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
NAMES = ("dialogue", "speaker", "Speaker")
"""Columns of names, which are the same however their letters are composed."""
FILES = ("clip", "audio")
"""Columns of files' names, which may be mangled on the disk, too: `StoredNames` repairs what is not found there."""
VAL_SEED = 1
CLOCK_S = 0.001
"""Names of parts state times no more finely."""
_NAME = re.compile(r"[\w-]+")


@dataclass(frozen=True)
class Annotations:
    """What a dataset's tables hold.

    Args:
        dialogues: in the order of the files, train before val before test.
        rejections: one per row that was dropped.
        repaired: ids of the utterances whose text or speaker needed a repair of its encoding, dropped ones included.
        recordings: dialogue id -> the recording that its times count in, where the tables name one.
        labels: utterance id (``meld/train/dia3/utt5``) -> column -> value, of columns that are read as nothing else.
        val: the share of train's dialogues that became val; None if the annotations say which are val.
        other_case: utterance id -> its clip as the table spells it, where the disk has other capitals.
    """

    dialogues: list[Dialogue]
    rejections: list[Rejection]
    repaired: list[str]
    recordings: dict[str, str]
    labels: dict[str, dict[str, str]] = field(default_factory=dict)
    val: float | None = None
    other_case: dict[str, str] = field(default_factory=dict)

    @property
    def num_repaired(self) -> int:
        """Rows whose encoding was repaired."""
        return len(self.repaired)

    def with_track(self, track: int | None) -> "Annotations":
        """The same, with clips that name a track of their files' audio, from 1 on; None leaves them."""
        if track is None:
            return self

        def tracked(u: Utterance) -> Utterance:
            heard = u.clip_of("audio") and with_track(u.clip_of("audio"), track)
            return replace(u, audio=heard) if u.audio else replace(u, clip=heard)

        dialogues = [replace(d, utterances=tuple(map(tracked, d.utterances))) for d in self.dialogues]
        return replace(self, dialogues=dialogues)

    def with_val(self, share: float) -> "Annotations":
        """The same, with a share of train's dialogues as val: the same ones each time that the annotations are read.

        Raises:
            MsencError: there is a val already, or too little in train to draw from.
        """
        train = [d for d in self.dialogues if d.split == "train"]
        has_target = [d.num_samples > 0 for d in train]
        if any(d.split == "val" for d in self.dialogues):
            raise MsencError(
                f"data.val={share}: the annotations have a split val already. Leave data.val out, or change that split "
                "(data.recordings.split.fractions where it is drawn, else the table's column split)."
            )
        if sum(has_target) < 2:
            raise MsencError(
                f"data.val={share}: train has {sum(has_target)} dialogues with a target (a second turn); expected at "
                "least 2, to draw val from. Add some, or train without validation (data.val=null)."
            )
        fractions = {"train": 1 - share, "val": share}
        drawn = split_dialogues("random", [d.id for d in train], fractions, VAL_SEED, has_target)
        splits = {d.id: split for d, split in zip(train, drawn, strict=True)}

        def renamed(id: str) -> str:
            dataset, _, name = id.split("/", 2)
            split = splits.get("/".join(id.split("/")[:3]))
            return id if split is None else f"{dataset}/{split}/{name}"

        dialogues = [replace(d, id=renamed(d.id), split=splits.get(d.id, d.split)) for d in self.dialogues]
        return replace(
            self,
            dialogues=sorted(dialogues, key=lambda d: SPLITS.index(d.split)),
            rejections=[replace(r, id=renamed(r.id)) if r.id.count("/") > 1 else r for r in self.rejections],
            repaired=[renamed(id) for id in self.repaired],
            recordings={renamed(id): name for id, name in self.recordings.items()},
            labels={renamed(id): columns for id, columns in self.labels.items()},
            val=share,
            other_case={renamed(id): name for id, name in self.other_case.items()},
        )

    def stored_in(self, root: Path) -> "Annotations":
        """The same, with clips named as the folder spells them, where it spells their letters in another way."""
        stored = StoredNames(root)
        rejections = list(self.rejections)
        other_case: dict[str, str] = {}

        def spelled(clip: str | None, id: str) -> str | None:
            if clip is None:
                return None
            file, _ = split_part(clip)
            if len(names := stored.find(file)) > 1:
                found = ", ".join(map(ascii, names))
                rejections.append(Rejection(id, "clip", "several files of this name", file, found=found))
                return None
            if not is_same_name(file, names[0]):
                other_case[id] = file
            return names[0] + clip.removeprefix(file)

        def respelled(id: str, u: Utterance) -> Utterance:
            return replace(u, clip=spelled(u.clip, id), audio=spelled(u.audio, id))

        dialogues = [
            replace(d, utterances=tuple(respelled(f"{d.id}/utt{u.id}", u) for u in d.utterances))
            for d in self.dialogues
        ]
        return replace(self, dialogues=dialogues, rejections=rejections, other_case=other_case)


@dataclass(frozen=True)
class Row:
    """An utterance as a file of a data set states it.

    Args:
        file: that states it.
        number: of its line, or of its entry.
        values: column -> text, as `read_table` describes them; other columns are labels. `row_of` makes them.
        is_repaired: whether the encoding of text or speaker needed a repair.
    """

    file: Path
    number: int
    values: Mapping[str, str]
    is_repaired: bool = False

    @property
    def is_header(self) -> bool:
        """Whether it says the columns' names, as in the middle of tables that were put together."""
        return all(name.casefold() == value.casefold() for name, value in self.values.items())


def row_of(
    file: Path,
    number: int,
    raw: Mapping[Any, str],
    texts: Sequence[str] = ("text", "speaker"),
    is_repaired: bool = False,
) -> Row:
    """A row with its texts cleaned: encodings repaired but for files' names, ends stripped, names composed.

    Args:
        file: see `Row`, and so on.
        number: of its line, or of its entry.
        raw: column -> text as read.
        texts: columns whose repair is counted.
        is_repaired: whether the file's own encoding needed a repair there.
    """
    values = {str(c): (v if c in FILES else repair_encoding(v)).strip() for c, v in raw.items()}
    values |= {c: clean_name(values[c]) for c in NAMES if c in values}
    return Row(file, number, values, is_repaired or any(repair_encoding(raw[c]) != raw[c] for c in texts if c in raw))


def read_meld(
    root: Path, dataset: str = "meld", labels: Sequence[str] | None = None, encoding: str | None = None
) -> Annotations:
    """Read a folder with MELD's CSV files; its clips need not be there.

    The turns of a dialogue keep the order of their rows. `Utterance.clip` follows from the naming rule
    (``train_splits/dia3_utt5.mp4``), whether that file exists or not. The columns ``Description`` and ``Marks`` are
    read where they exist, and so are ``Season`` and ``Episode``, which name the recording. A row without text and a
    repeated utterance id are rejected and listed; a time that cannot be read is None.

    Args:
        root: the folder that holds the three files.
        dataset: first part of the dialogue ids.
        labels: columns to keep as labels; None keeps all that are read as nothing else.
        encoding: of the files; None finds it out (`encoding.decode_table`).

    Raises:
        MsencError: if a file is missing or not such a table, lacks a column, has no usable row, or holds an id that
            is no whole number.
    """
    dialogues: list[Dialogue] = []
    kept: dict[str, dict[str, str]] = {}
    rejections: list[Rejection] = []
    repaired: list[str] = []
    recordings: dict[str, str] = {}
    for split, (name, clip_folder) in MELD_FILES.items():
        path = Path(root) / name
        turns: dict[int, dict[int, Utterance]] = {}
        for stated in _read_table(path, MELD_COLUMNS, ("Utterance", "Speaker"), encoding=encoding):
            row, values = stated.number, stated.values
            if stated.is_header:
                rejections.append(Rejection(name, "row", "the header again", name, row))
                continue
            dia, utt = (_whole_number(values[c], c, path, row) for c in ("Dialogue_ID", "Utterance_ID"))
            utterance_id = f"{dataset}/{split}/dia{dia}/utt{utt}"
            if stated.is_repaired:
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
                kept[utterance_id] = _labels(values, (*MELD_COLUMNS, *NO_LABELS), labels, path)
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
    return Annotations(dialogues, rejections, repaired, recordings, kept)


def read_table(
    path: Path,
    dataset: str,
    split: Mapping[str, Any],
    labels: Sequence[str] | None = None,
    encoding: str | None = None,
) -> Annotations:
    """Read a table with a row per utterance; its clips need not be there.

    Columns: ``clip`` (a file below the dataset's root, may be empty), ``dialogue`` and ``text``; and, where they exist,
    ``speaker``, ``start`` and ``end`` (seconds of the file: the clip is this part of it), ``split`` and
    ``description``. The turns of a dialogue keep the order of their rows. A row without text is rejected and listed;
    a row whose times cannot be read keeps its words, loses its clip, and is listed.

    Args:
        path: the CSV file.
        dataset: first part of the dialogue ids.
        split: `split_dialogues`'s rule, fractions and seed, where the table has no column ``split``.
        labels: columns to keep as labels; None keeps all that are read as nothing else.
        encoding: of the files; None finds it out (`encoding.decode_table`).

    Raises:
        MsencError: if the file is missing or not such a table, has no usable row, names another split, or puts a
            dialogue into two.
    """
    path = Path(path)
    return read_rows(
        _read_table(path, TABLE_COLUMNS, ("text", "speaker"), TABLE_OPTIONS, encoding), path, dataset, split, labels
    )


def read_rows(
    rows: Iterable[Row],
    source: Path,
    dataset: str,
    split: Mapping[str, Any],
    labels: Sequence[str] | None = None,
) -> Annotations:
    """Rows of a table, or of what states the same, as `read_table` reads them.

    Args:
        rows: with the values of `TABLE_COLUMNS`, and any of `TABLE_OPTIONS`.
        source: what was read, for messages.
        dataset: see `read_table`.
        split: likewise.
        labels: likewise.

    Raises:
        MsencError: see `read_table`.
    """
    rejections: list[Rejection] = []
    repaired: list[str] = []
    turns: dict[str, list[Row]] = {}
    for row in rows:
        if row.is_header:
            rejections.append(Rejection(row.file.name, "row", "the header again", row.file.name, row.number))
            continue
        name, description = row.values["dialogue"], row.values.get("description", "")
        if not _is_dialogue(name):
            raise MsencError(
                f"{row.file}, row {row.number}: dialogue is {short(name)}; expected a name that all its turns share, "
                f"of letters, digits, - and _, at most {MAX_NAME_BYTES} bytes. Correct the row; remove it if it states "
                "no utterance (a total, a comment, a line below the header)."
            )
        if "(" in description or ")" in description:
            raise MsencError(_bracketed(row.file, row.number, description))
        turns.setdefault(name, []).append(row)
    splits = _splits_of(turns, split)
    dialogues: list[Dialogue] = []
    recordings: dict[str, str] = {}
    kept: dict[str, dict[str, str]] = {}
    for name, own in turns.items():
        id = f"{dataset}/{splits[name]}/{name}"
        utterances: list[Utterance] = []
        for number, row in enumerate(own):
            utterance_id = f"{id}/utt{number}"
            repaired += [utterance_id] * row.is_repaired
            if row.values["text"]:
                utterances.append(_row_utterance(row, utterance_id, rejections))
                kept[utterance_id] = _labels(row.values, (*TABLE_COLUMNS, *TABLE_OPTIONS), labels, row.file)
            else:
                rejections.append(Rejection(utterance_id, "row", "empty text", row.file.name, row.number))
        files = {split_part(u.clip)[0] for u in utterances if u.clip and u.start_s is not None}
        if len(files) == 1:
            recordings[id] = files.pop()
        if utterances:
            dialogues.append(Dialogue(id, splits[name], tuple(utterances)))
    if not dialogues:
        raise MsencError(
            f"{source}: found no row with text; expected an utterance per row. Put the complete file there."
        )
    dialogues.sort(key=lambda d: SPLITS.index(d.split))
    return Annotations(dialogues, rejections, repaired, recordings, kept)


def _is_dialogue(name: str) -> bool:
    plain = "".join(c for c in name if unicodedata.category(c)[0] != "M")
    is_short = len(name.encode("utf-8", "surrogatepass")) <= MAX_NAME_BYTES
    return bool(_NAME.fullmatch(plain)) and any(c.isalnum() for c in plain) and is_short


def _labels(
    values: Mapping[str, str], taken: Sequence[str], wanted: Sequence[str] | None, path: Path
) -> dict[str, str]:
    """The row's labels: the columns that are wanted, or all that are not taken; empty ones say nothing."""
    for column in wanted or ():
        if column == ID:
            raise MsencError(
                f"{path}: data.labels names the column {ID!r}, as which labels name their utterance. Rename the column."
            )
        if column not in values:
            others = ", ".join(c for c in values if c not in taken)
            raise MsencError(
                f"{path}: data.labels names the column {column!r}, which is not there; found "
                f"{others or 'no column beside those that are read anyway'}. Correct data.labels, or leave it out."
            )
    names = wanted if wanted is not None else [c for c in values if c not in taken and c != ID]
    return {column: values[column] for column in names if values[column]}


def _splits_of(turns: Mapping[str, Sequence[Row]], split: Mapping[str, Any]) -> dict[str, str]:
    """Dialogue -> split."""
    first_rows = [rows[0].values for rows in turns.values()]
    if first_rows and "split" not in first_rows[0]:
        files = [split_part(values["clip"])[0] for values in first_rows]
        has_target = [sum(bool(row.values["text"]) for row in rows) > 1 for rows in turns.values()]
        return dict(zip(turns, split_dialogues(videos=files, has_target=has_target, **split), strict=True))
    for name, rows in turns.items():
        first = rows[0].values["split"]
        for row in rows:
            found = row.values["split"]
            if found not in SPLITS:
                raise MsencError(
                    f"{row.file}, row {row.number}: split is {found!r}; expected {', '.join(SPLITS)}. Correct the row, "
                    "or leave the column out to have the dialogues split."
                )
            if found != first:
                raise MsencError(
                    f"{row.file}: dialogue {name} is in {first} (row {rows[0].number}) and in {found} "
                    f"(row {row.number}). Expected all its rows in one split."
                )
    return {name: rows[0].values["split"] for name, rows in turns.items()}


def _row_utterance(row: Row, id: str, rejections: list[Rejection]) -> Utterance:
    values = row.values
    clips = {column: values.get(column) or None for column in ("clip", "audio")}
    for column, clip in clips.items():
        if clip is not None and not is_below(clip):
            raise MsencError(
                f"{row.file}, row {row.number}: {column} is {clip!r}; expected a path below the folder of the "
                "recordings (data.root)."
            )
    times = [values.get("start", ""), values.get("end", "")]
    has_times = any(times)
    named = {clip: part for clip in clips.values() if clip and (part := split_part(clip)[1])}
    span = [_table_seconds(t) for t in times] if has_times else named.get(clips["clip"], (None, None))
    fault = None
    if any(None in part or not part[0] < part[1] for part in (*[span] * has_times, *named.values())):
        fault = "no span of time"
    elif has_times and any(abs(a - b) > CLOCK_S for part in named.values() for a, b in zip(span, part, strict=True)):
        fault = "two spans of time"
    if fault is not None:
        found = " beside ".join([f"{times[0]!r} to {times[1]!r}"] * has_times + [repr(clip) for clip in named])
        rejections.append(Rejection(id, "clip", fault, row.file.name, row.number, found))
        clips = dict.fromkeys(clips)
        span = (None, None)
    elif has_times:
        clips = {column: clip and part_of(clip, *span) for column, clip in clips.items()}
    return Utterance(
        id=id.rpartition("/utt")[2],
        speaker=values.get("speaker") or UNKNOWN_SPEAKER,
        text=values["text"],
        description=values.get("description") or None,
        start_s=span[0],
        end_s=span[1],
        **clips,
    )


def _table_seconds(time: str) -> float | None:
    """``12.5``, or ``0:00:12.5``."""
    if (seconds := clock_seconds(time)) is not None:
        return seconds
    try:
        seconds = float(time.replace(",", "."))
    except ValueError:
        return None
    if "_" in time:  # which Python takes, and nobody writes
        return None
    return round(seconds, 6) + 0.0 if math.isfinite(seconds) and seconds >= 0 else None  # -0 is 0


def _read_table(
    path: Path,
    columns: Sequence[str],
    texts: Sequence[str],
    may_have: Sequence[str] = (),
    encoding: str | None = None,
) -> list[Row]:
    """The rows that are not blank."""
    try:
        data = check_regular(path).read_bytes()
    except FileNotFoundError as error:
        expected = "a table of utterances; set data.table to one"
        if path.name in (names := [name for name, _ in MELD_FILES.values()]):
            expected = f"a folder with {', '.join(names)}; set data.root to it"
        raise MsencError(f"{path}: no such file. Expected {expected}, or copy the file there.") from error
    except OSError as error:
        raise MsencError(f"{path}: cannot be read ({error.strerror}). Expected a readable CSV file.") from error
    text, recoded = decode_table(data, path, encoding)
    begin = _SPREADSHEET_LINE.match(text)
    text, first_line = text[begin.end() :], 1 + len(_line_ends(begin[0]))
    separator = begin[1] or _separator(text, columns)
    options = {"sep": separator, "dtype": str, "keep_default_na": False, "skip_blank_lines": False}
    options["skipinitialspace"] = all(name[:1] == " " for name in _header_of(text).split(separator)[1:])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # a row longer than the header
            header = pd.read_csv(io.StringIO(text, newline=""), header=None, nrows=1, **options).fillna("")
            table = pd.read_csv(io.StringIO(text, newline=""), index_col=False, **options).fillna("")
    except (pd.errors.EmptyDataError, pd.errors.ParserError, pd.errors.ParserWarning) as error:
        reason = str(error).splitlines()[0]
        reason = _misfit(text, separator, first_line, "EOF inside string" in reason) or reason
        raise MsencError(
            f"{path}: not a CSV table ({reason}). Expected {_header(columns)}; a text that holds the separator or a "
            "quotation mark in double quotes, and such a mark in it twice. Correct that row, or get the file again."
        ) from error
    names = [clean_name(name) for name in header.iloc[0]]  # as they stand there: pandas makes each another
    _check_columns(path, names, columns, may_have)
    table.columns = range(len(names))

    lines = re.split(r"(?<=\n)|(?<=\r)(?!\n)", text)
    rows, line = [], first_line + 1
    for raw in table.to_dict("records"):
        next_line = line + 1 + sum(len(_line_ends(v)) for v in raw.values())  # of a quoted field
        stated = {name: value for name, value in zip(names, raw.values(), strict=True) if name}
        row = row_of(path, line, stated, texts, any(number in recoded for number in range(line, next_line)))
        _check_nameless(row, names, list(raw.values()))
        if next_line > line + 1:
            _check_quotes(path, lines[line - first_line : next_line - first_line], separator, line)
        if not row.is_header:
            _check_header(row, columns, names)
        if any(row.values.values()):
            rows.append(row)
        line = next_line
    if not rows:
        raise MsencError(
            f"{path}: found a header and no row. Expected one row per utterance. Put the complete file there."
        )
    return rows


_SPREADSHEET_LINE = re.compile(r"[\r\n]*(?:\"?sep=([,;\t|])\"?[\r\n]+)?")
"""What may stand before a header: blank lines, and how spreadsheets tell each other the separator."""


def _line_ends(text: str) -> list[str]:
    return re.findall(r"\r\n|\r|\n", text)


def _header_of(text: str) -> str:
    return next(iter(text.splitlines()), "")


def _separator(text: str, columns: Sequence[str]) -> str:
    """What stands between the header's names: that which finds most of the columns, or else parts it the most."""
    header = _header_of(text)

    def fitness(separator: str) -> tuple[int, int]:
        names = [name.strip(' "') for name in header.split(separator)]
        return len({*columns} & {*names}), len(names)

    return max(SEPARATORS, key=fitness)


def _misfit(text: str, separator: str, line: int, is_open: bool) -> str | None:
    """Which row is not one of the table, in words: a longer one, or the one whose quote is open to the end."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    begin, header = line, None
    try:
        for values in reader:
            header = values if header is None else header
            if len(values) > len(header):
                named = short(separator.join(header))
                return f"row {begin}: found {len(values)} values, expected {len(header)}, as row {line} has: {named}"
            last, begin = begin, line + reader.line_num
    except csv.Error:  # a field that is longer than Python's reader takes
        return None
    return f"row {last}: found a quotation mark that opens a text and has no end" if is_open else None


def _check_quotes(path: Path, lines: Sequence[str], separator: str, line: int) -> None:
    """Refuse a field of several lines that a quote of a later row ends: it holds whole rows."""
    try:
        list(csv.reader(lines, delimiter=separator, strict=True))
    except csv.Error as error:
        raise MsencError(
            f"{path}, row {line}: found a quotation mark that opens a text and has no end before row "
            f"{line + len(lines) - 1}; expected both in one field. Close it, or write a mark that is part of a text "
            "twice, within quotes."
        ) from error


def _check_header(row: Row, columns: Sequence[str], names: Sequence[str]) -> None:
    """Refuse the header of another table: what follows it would be read into the wrong columns."""
    values = [value.casefold() for value in row.values.values()]
    if all(column.casefold() in values for column in columns):
        raise MsencError(
            f"{row.file}, row {row.number}: found another header, {', '.join(row.values.values())}; expected one "
            f"header per table, {', '.join(filter(None, names))}. Put its columns into this order, or its rows into a "
            "table of their own."
        )


def _check_nameless(row: Row, names: Sequence[str], values: Sequence[str]) -> None:
    """Refuse a value behind the last column with a name: some separator before it is a part of a text."""
    last = max(place for place, name in enumerate(names) if name)
    if beyond := next((value.strip() for value in values[last + 1 :] if value.strip()), None):
        raise MsencError(
            f"{row.file}, row {row.number}: found {short(beyond)} behind the last column, {names[last]}. Expected one "
            "value per column: put a text that holds the separator in quotes, or name the column."
        )


def _check_columns(path: Path, found: list[str], columns: Sequence[str], options: Sequence[str]) -> None:
    """Refuse a table that lacks a column, has one twice, or one that looks like a misspelt one that it may have."""
    if twice := next((c for c, times in Counter(found).items() if c and times > 1), None):
        raise MsencError(
            f"{path}, row 1: the column {twice} stands there twice; expected each once. Rename or remove one of them."
        )
    missing = [c for c in columns if c not in found]
    others = {c.lower(): c for c in found if c not in (*columns, *options)}
    nearest = {
        c: others[n]
        for c in (*missing, *(c for c in options if c not in found))
        for n in difflib.get_close_matches(c.lower(), others, n=1, cutoff=0.6 if c in missing else 0.8)
    }
    if not missing and not nearest:
        return
    hint = f" (nearest: {', '.join(nearest.values())})" if nearest else ""
    also = f", and as you like {', '.join(options)}" if options else ""
    raise MsencError(
        f"{path}, row 1: no column {', '.join(missing or nearest)}{hint}; found {', '.join(found)}. Expected "
        f"{_header(columns)}{also}. Rename or add the column."
    )


def _header(columns: Sequence[str]) -> str:
    return f"a header with {', '.join(columns)}, between {', '.join(SEPARATORS.values())}"


def _bracketed(path: Path, row: int, description: str) -> str:
    return (
        f"{path}, row {row}: brackets in the voice description {description!r}. A target ends in its description "
        "in brackets, so it must hold none. Write it without."
    )


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
        raise MsencError(_bracketed(path, row, description))
    return Utterance(
        id=id,
        speaker=values["Speaker"],
        text=values["Utterance"],
        description=description,
        start_s=clock_seconds(values["StartTime"]),
        end_s=clock_seconds(values["EndTime"]),
        clip=clip,
        marks=marks,
    )


def content_digest(dialogues: Iterable[Dialogue]) -> str:
    """A hash of all that the annotations say; turns and audit carry it."""
    return content_hash(d.to_json() for d in dialogues)
