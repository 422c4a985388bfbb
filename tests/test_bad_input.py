"""Bad files, generated: each is used, listed or refused with a message; no traceback, no half-made or shorter data."""

import csv
import io
import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from clips import write_media

from msenc.data.datamodule import DialogueDataModule
from msenc.data.dataset import StreamSpec
from msenc.models.encoders import LogMel
from msenc.prepare.dataset import prepare_dataset
from msenc.prepare.features import StreamRecipe
from msenc.raw.annotations import MELD_FILES, read_meld, read_table
from msenc.raw.audit import audit_dataset
from msenc.raw.container import MediaError
from msenc.raw.media import read_audio, read_frames, read_properties
from msenc.raw.probe import probe_clip, probe_clips
from msenc.raw.timestamps import read_timestamps
from msenc.store.manifest import DatasetManifest, read_rejections
from msenc.types import MsencError

NUM_CSV, NUM_OWN, NUM_JSON, NUM_TIMES, NUM_MEDIA = 250, 150, 200, 50, 150
ALWAYS = 12
"""Of each kind of file; what comes after them has the marker `fuzz` (.ci/run, or make test ARGS="-m fuzz")."""
COLUMNS = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime"
TEXTS = ("Hello there, you!", 'He said "no".', "It\u2019s caf\u00e9 time\u2026", "two\nlines", "Yes.", "(laughs) Oh")
ODD_VALUES = (
    "", " ", "1.0", "-1", "nan", "NaN", "1e3", "9" * 5000, "\u0663", "x" * 5000, "\x00", "\ufeff1", "1,000", "None",
    "00:00:01,000", "99:99:99,999", "-0:00:01", "1:2", "\x85\x91\x92", "\u00e2\u20ac\u2122", "\u202e", '"', "=1+1",
)  # fmt: skip
SETTINGS = {"sample_rate": 16000, "n_fft": 512, "hop_s": 0.05, "num_mels": 8}
AUDIO = StreamRecipe("audio", "logmel", 8, partial(LogMel, **SETTINGS), SETTINGS)


def cases(number: int) -> list[Any]:
    """Seeds of generated files."""
    return [pytest.param(seed, marks=[pytest.mark.fuzz] if seed >= ALWAYS else []) for seed in range(number)]


def table(rows: list[list[str]], delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL, end: str = "\r\n") -> str:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter, quoting=quoting, lineterminator=end).writerows(rows)
    return buffer.getvalue()


def good_rows(rng: random.Random) -> list[list[str]]:
    rows = [COLUMNS.split(",")]
    for dia in range(3):
        for utt in range(rng.randint(1, 3)):
            times = [f"00:00:0{utt},000", f"00:00:0{utt + 1},500"]
            numbers = [str(dia), str(utt), "1", "1"]
            rows.append(
                [str(len(rows)), rng.choice(TEXTS), rng.choice(("Ana", "Bo")), "joy", "positive", *numbers, *times]
            )
    return rows


# ------------------------------------------------------------------------------------------------ CSV


def bad_csv(rows: list[list[str]], rng: random.Random) -> bytes:
    """A table with one to three things wrong with it."""
    for _ in range(rng.randint(0, 2)):
        row, column = rng.randrange(len(rows)), rng.randrange(len(rows[0]))
        change = rng.randrange(8)
        if change == 0:
            rows[row][column % len(rows[row])] = rng.choice(ODD_VALUES)
        elif change == 1:
            rows[row] = rows[row][: rng.randrange(len(rows[row]) + 1)]
        elif change == 2:
            rows[row] = [*rows[row], "more"]
        elif change == 3:
            rows = [[v for c, v in enumerate(r) if c != column] or [""] for r in rows]
        elif change == 4:
            rows.insert(row, list(rows[-1]))
        elif change == 5:
            for r in rows[1:]:
                r[5:7] = [f"{v}.0" for v in r[5:7]]
        elif change == 6:
            rows = rows[: rng.randrange(len(rows) + 1)]
        else:
            rng.shuffle(rows)
        rows = [r or [""] for r in rows] or [[""]]
    text = table(
        rows, rng.choice(",,,;\t|"), rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)), rng.choice(("\r\n", "\n", "\r"))
    )
    return encoded(text, rng)


def encoded(text: str, rng: random.Random) -> bytes:
    encoding = rng.choice(("utf-8", "utf-8", "utf-8-sig", "cp1252", "utf-16", "twice", "c1", "cut", "noise", "nothing"))
    if encoding == "twice":
        return text.encode("utf-8").decode("cp1252", errors="ignore").encode("utf-8")
    if encoding == "c1":
        return text.encode("cp1252", errors="replace").decode("latin-1").encode("utf-8")
    if encoding == "cut":
        return text.encode("utf-8")[: rng.randrange(len(text) + 1)]
    if encoding == "noise":
        data = bytearray(text.encode("utf-8"))
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)
    if encoding == "nothing":
        return rng.choice((b"", b"\r\n", b"\xef\xbb\xbf", b"\x00" * 100, rng.randbytes(300)))
    return text.encode(encoding, errors="replace")


@pytest.mark.parametrize("seed", cases(NUM_CSV))
def test_a_bad_table_is_used_in_full_or_refused(seed, tmp_path):
    rng = random.Random(seed)
    root, out = tmp_path / "raw", tmp_path / "out"
    root.mkdir()
    for name, _ in MELD_FILES.values():
        (root / name).write_bytes(table(good_rows(rng)).encode())
    name = rng.choice([name for name, _ in MELD_FILES.values()])
    data = bad_csv(good_rows(rng), rng)
    (root / name).write_bytes(data)
    for make in (
        lambda: prepare_dataset("meld", read_meld(root), root, out, [], num_workers=0),
        lambda: audit_dataset("meld", read_meld(root), root, out, num_workers=0),
    ):
        try:
            made = make()
        except MsencError as error:
            assert str(error).startswith(str(root / name))  # noqa: PT017 (no error is as good)
            assert not (out / "dataset.json").exists()
            assert not (out / "turns").exists()
            assert not (out / "audit" / "audit.json").exists()
        else:
            # the files that were not touched are written by this test, so what is read can be counted
            if isinstance(made, DatasetManifest):
                assert sum(c.utterances for c in made.splits.values()) + rows_dropped(out) == rows_with_something(
                    *(root / n for n, _ in MELD_FILES.values())
                )
        assert not list(out.glob("**/.*"))


def rows_dropped(out: Path) -> int:
    return sum(r.what == "row" for r in read_rejections(out / "rejected.csv"))


def rows_with_something(*paths: Path) -> int:
    count = 0
    for path in paths:
        data = path.read_bytes()
        try:
            text = data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
        except UnicodeDecodeError:
            text = data.decode("latin-1")
        delimiter = max(",;\t|", key=(text.splitlines() or [""])[0].count)
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        count += sum(any(v.strip() for v in row) for row in rows) - 1
    return count


OWN_COLUMNS = "clip,dialogue,text,speaker,start,end,split,description"


@pytest.mark.parametrize("seed", cases(NUM_OWN))
def test_a_bad_table_of_utterances_is_used_in_full_or_refused(seed, tmp_path):
    rng = random.Random(seed)
    root, out, path = tmp_path / "raw", tmp_path / "out", tmp_path / "raw" / "own.csv"
    root.mkdir()
    columns = OWN_COLUMNS.split(",")[: rng.randint(3, 8)]
    rows = [columns]
    for dia in range(3):
        for utt in range(rng.randint(1, 3)):
            split = ("train", "val", "test")[dia]
            rows.append(["a.mp4", f"d{dia}", rng.choice(TEXTS), "Ana", f"{utt}", f"{utt}.5", split, "A voice."])
    path.write_bytes(bad_csv([row[: len(columns)] for row in rows], rng))
    split = {"rule": "random", "fractions": {"train": 1.0}, "seed": 1}

    def prepare() -> DatasetManifest:
        annotations = read_table(path, "own", split)
        audit_dataset("own", annotations, root, out, num_workers=0)
        return prepare_dataset("own", annotations, root, out, [AUDIO], num_workers=0)

    try:
        manifest = prepare()
    except MsencError as error:
        assert str(error).startswith(str(path))  # noqa: PT017 (no error is as good)
        assert not (out / "dataset.json").exists()
    else:
        assert sum(c.utterances for c in manifest.splits.values()) + rows_dropped(out) == rows_with_something(path)
    assert not list(out.glob("**/.*"))


# ------------------------------------------------------------------------------------------------ JSON


def bad_json(data: bytes, rng: random.Random) -> bytes:
    """A JSON file's bytes with something wrong: another type or value somewhere, a key less, or no JSON at all."""
    if rng.random() < 0.2:
        return rng.choice(
            (b"", b"{", b"null", b"[]", b"\xff\xfe", data[: len(data) // 2], b'{"schema_version": 1}', b"3")
        )
    value = json.loads(data)
    for _ in range(rng.randint(1, 2)):
        parent, key = value, None
        while isinstance(parent, (dict, list)) and parent:
            key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
            if not isinstance(parent[key], (dict, list)) or not parent[key] or rng.random() < 0.3:
                break
            parent = parent[key]
        if rng.random() < 0.3:
            del parent[key]
        else:
            parent[key] = rng.choice((None, -1, 10**12, 1.5, "", "x", "../../x", [], {}, True, [1], {"a": 1}))
        if not isinstance(value, dict) or not value:
            break
    return json.dumps(value).encode()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Raw material of two clips, and what preparation and audit make of it."""
    home = tmp_path_factory.mktemp("prepared")
    root = home / "raw"
    for name, clips in MELD_FILES.values():
        (root / clips).mkdir(parents=True)
        (root / name).write_bytes(table(good_rows(random.Random(0))).encode())
    write_media(root / "train_splits" / "dia0_utt0.mp4")
    write_media(root / "train_splits" / "dia1_utt0.mp4", channels="5.1")
    prepare_dataset("meld", read_meld(root), root, home / "out", [AUDIO], num_workers=0)
    audit_dataset("meld", read_meld(root), root, home / "out", num_workers=0)
    return home


@pytest.mark.parametrize("seed", cases(NUM_JSON))
def test_a_bad_json_file_is_refused_or_does_no_harm_and_is_made_anew(seed, prepared, tmp_path):
    rng = random.Random(seed)
    out = tmp_path / "out"
    shutil.copytree(prepared / "out", out)
    splits = DatasetManifest.read(out).splits
    name = rng.choice(["dataset.json", "turns/index.json", "audio-logmel/index.json", "audit/audit.json"])
    (out / name).write_bytes(bad_json((out / name).read_bytes(), rng))

    def read() -> None:
        specs = {"audio": StreamSpec("logmel", 8, 2, SETTINGS)}
        module = DialogueDataModule(out, specs, tokenizer=None, batch_size=1, filters=["no_clip_missing"])
        module.setup()
        for split in ("train", "val", "test"):
            dataset = module.dataset(split)
            for index in range(len(dataset)):
                dataset.dialogue(index)
                dataset.streams["audio"].read(dataset.ids[index])

    used(read)
    if used(
        lambda: prepare_dataset("meld", read_meld(prepared / "raw"), prepared / "raw", out, [AUDIO], num_workers=0)
    ):
        used(lambda: audit_dataset("meld", read_meld(prepared / "raw"), prepared / "raw", out, num_workers=0))
        assert DatasetManifest.read(out).splits == splits
    assert not list(out.glob("**/.*"))


@pytest.mark.parametrize("seed", cases(NUM_TIMES))
def test_bad_timestamps_are_listed_or_refused(seed, tmp_path):
    rng = random.Random(seed)
    path = tmp_path / "timestamp.json"
    spans = {f"{video}.mp4": [[10 * n, 10 * n + 9.5] for n in range(3)] for video in "abc"}
    path.write_bytes(bad_json(json.dumps(spans).encode(), rng))
    try:
        found = read_timestamps(path)
    except MsencError as error:
        assert str(error).startswith(str(path))  # noqa: PT017 (no error is as good)
    else:
        assert all(0 <= span.start_s < span.end_s for span in found.spans)
        told = [s.video for s in found.spans] + [r.id.partition(", span")[0] for r in found.rejections]
        for video, entries in json.loads(path.read_bytes()).items():
            is_one = not isinstance(entries, list) or video not in spans  # refused as a whole
            assert told.count(video) == (1 if is_one else len(entries))


def used(call: Callable[[], Any]) -> bool:
    try:
        call()
    except MsencError:
        return False
    return True


# ------------------------------------------------------------------------------------------------ media


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("clips")
    kinds: list[dict[str, Any]] = [
        {},
        {"channels": "5.1"},
        {"rate": 8000},
        {"rotation": 90},
        {"ticks": (0, 1, 7, 8, 30)},
        {"with_sound": False},
        {"with_picture": False},
        {"ticks": (0,), "seconds": 0.02},
        {"container": "matroska"},
        {"container": "wav", "with_picture": False},
    ]
    return [write_media(folder / f"{i}.bin", **kind).read_bytes() for i, kind in enumerate(kinds)]


def bad_media(data: bytes, rng: random.Random) -> bytes:
    change = rng.randrange(8)
    at, size = rng.randrange(len(data)), rng.randint(1, 400)
    if change == 0:
        return data
    if change == 1:
        return data[:at]
    if change == 2:
        return data[at:]
    if change == 3:
        return data[:at] + bytes(size) + data[at + size :]
    if change == 4:
        return data[:at] + data[at + size :]
    if change == 5:
        return rng.choice(
            (b"", b"\x00" * 5000, b"Not a clip. " * 300, rng.randbytes(3000), b"RIFF" + rng.randbytes(50))
        )
    noisy = bytearray(data)
    for _ in range(rng.choice((1, 10, 100))):
        noisy[rng.randrange(len(noisy))] = rng.randrange(256)
    return bytes(noisy)


@pytest.mark.parametrize("seed", cases(NUM_MEDIA))
def test_a_bad_clip_is_read_or_listed(seed, clips, tmp_path):
    rng = random.Random(seed)
    name = rng.choice(("a.mp4", "a.mp4", "a.wav", "a.mkv", "a", "a.MP4", "a.txt"))
    (tmp_path / name).write_bytes(bad_media(rng.choice(clips), rng))
    facts = probe_clip(tmp_path / name)
    assert probe_clips(tmp_path, [name], 0, tmp_path / "cache") == {name: facts}
    assert probe_clips(tmp_path, [name], 0, tmp_path / "cache") == {name: facts}  # as read from the cache
    for read, reason in (
        (lambda: read_audio(tmp_path / name, 8000), facts.audio),
        (lambda: read_frames(tmp_path / name, 3), facts.video),
    ):
        try:
            result = read()
        except MediaError as error:
            assert error.reason == reason  # noqa: PT017 (no error is as good)
        else:
            assert reason is None
            assert len(result) > 0
    try:
        read_properties(tmp_path / name)
    except MediaError as error:
        assert error.reason == "clip corrupt"  # noqa: PT017 (no error is as good)
        assert "clip corrupt" in (facts.audio, facts.video)
