import os
from pathlib import Path

import pytest

from msenc.data.annotations import MELD_FILES, read_meld, repair_encoding
from msenc.types import Mark, MsencError

HEADER = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime"


def line(text="Hello!", dia="0", utt="0", speaker="Ana", start='"00:01:02,500"', end='"0:01:04,000"'):
    return f"1,{text},{speaker},joy,positive,{dia},{utt},1,1,{start},{end}"


def write(root: Path, train: list[str] | bytes | None = None, header: str = HEADER) -> Path:
    """A whole folder; only its train file is of interest."""
    for name, _ in MELD_FILES.values():
        (root / name).write_text("\r\n".join([HEADER, line(), ""]), encoding="utf-8", newline="")
    if isinstance(train, bytes):
        (root / "train_sent_emo.csv").write_bytes(train)
    elif train is not None:
        (root / "train_sent_emo.csv").write_text("\r\n".join([header, *train, ""]), encoding="utf-8", newline="")
    return root


def test_rows_become_dialogues_in_row_order(tmp_path):
    rows = [line("Hi, you", dia="7", utt="3").replace("Hi, you", '"Hi, you"'), line("B", dia="2"), line("C", dia="7")]
    result = read_meld(write(tmp_path, rows))
    assert [d.id for d in result.dialogues] == [
        "meld/train/dia7",
        "meld/train/dia2",
        "meld/val/dia0",
        "meld/test/dia0",
    ]
    first = result.dialogues[0]
    assert [(u.id, u.text, u.clip) for u in first.utterances] == [
        ("3", "Hi, you", "train_splits/dia7_utt3.mp4"),
        ("0", "C", "train_splits/dia7_utt0.mp4"),
    ]
    assert (first.utterances[0].start_s, first.utterances[0].end_s) == (62.5, 64.0)
    clips = [d.utterances[0].clip for d in result.dialogues[2:]]
    assert clips == ["dev_splits_complete/dia0_utt0.mp4", "output_repeated_splits_test/dia0_utt0.mp4"]
    assert result.rejections == []
    assert result.num_repaired == 0


def test_words_that_look_like_missing_values_stay(tmp_path):
    result = read_meld(write(tmp_path, [line("None", speaker="NA")]))
    assert (result.dialogues[0].utterances[0].text, result.dialogues[0].utterances[0].speaker) == ("None", "NA")


def test_description_and_marks_are_read_where_they_exist(tmp_path):
    rows = [line("It is red") + ",a calm voice,audio:text:6-9", line("Yes", utt="1") + ",,"]
    result = read_meld(write(tmp_path, rows, HEADER + ",Description,Marks"), dataset="demo")
    first, second = result.dialogues[0].utterances
    assert result.dialogues[0].id == "demo/train/dia0"
    assert (first.description, first.marks) == ("a calm voice", (Mark("audio", "text", 6, 9),))
    assert (second.description, second.marks) == (None, ())


def test_a_bad_mark_names_file_and_row(tmp_path):
    with pytest.raises(MsencError, match=r"train_sent_emo.csv, row 2: Found the mark 'loud'"):
        read_meld(write(tmp_path, [line() + ",loud"], HEADER + ",Marks"))


@pytest.mark.parametrize(
    ("mangled", "text"),
    [
        ("It\x92s \x93so\x94\x85", "It\u2019s \u201cso\u201d\u2026"),
        ("heâ€™s â€œhereâ€\x9d", "he\u2019s \u201chere\u201d"),
        ("heâ\x80\x99s", "he\u2019s"),
        ("a\xa0b", "a b"),
        ("CAFÉ\u201d â, Ã, €5", "CAFÉ\u201d â, Ã, €5"),
    ],
)
def test_encoding_is_repaired(tmp_path, mangled, text):
    result = read_meld(write(tmp_path, [line(f'"{mangled}"'), line("plain é", utt="1")]))
    assert [u.text for u in result.dialogues[0].utterances] == [text, "plain é"]
    assert result.num_repaired == (mangled != text)
    assert repair_encoding(text) == text


def test_a_file_that_is_not_utf8_is_read_as_cp1252(tmp_path):
    rows = "\r\n".join([HEADER, line("It\u2019s café"), line("plain", utt="1")])
    result = read_meld(write(tmp_path, rows.encode("cp1252")))
    assert result.dialogues[0].utterances[0].text == "It\u2019s café"
    assert result.num_repaired == 1


def test_empty_text_and_repeated_ids_are_rejected_and_listed(tmp_path):
    rows = [line('"two\r\nlines"'), line(" "), line("again"), line("", dia="5"), "", line("kept", utt="4")]
    result = read_meld(write(tmp_path, rows))
    assert [(r.id, r.what, r.reason, r.file, r.row) for r in result.rejections] == [
        ("meld/train/dia0/utt0", "row", "empty text", "train_sent_emo.csv", 4),
        ("meld/train/dia0/utt0", "row", "duplicate utterance id", "train_sent_emo.csv", 5),
        ("meld/train/dia5/utt0", "row", "empty text", "train_sent_emo.csv", 6),
    ]
    train = [d for d in result.dialogues if d.split == "train"]
    assert [d.id for d in train] == ["meld/train/dia0"]
    assert [u.text for u in train[0].utterances] == ["two\r\nlines", "kept"]


def test_a_time_that_cannot_be_read_is_none(tmp_path):
    utterance = read_meld(write(tmp_path, [line(start="soon", end='"00:00:03,5"')])).dialogues[0].utterances[0]
    assert (utterance.start_s, utterance.end_s) == (None, 3.5)


@pytest.mark.parametrize(
    ("train", "header", "message"),
    [
        (b"", HEADER, r"train_sent_emo.csv: not a CSV table \(No columns"),
        ([], HEADER, r"train_sent_emo.csv: found a header and no row"),
        ([line("")], HEADER, r"train_sent_emo.csv: found no row with text; .*'train'"),
        ([line(), line(dia="x")], HEADER, r"train_sent_emo.csv, row 3: Dialogue_ID is 'x'; expected a whole number"),
        ([line(utt="1.0")], HEADER, r"row 2: Utterance_ID is '1.0'"),
        ([line()], HEADER.replace("Utterance,", "utterence,"), r"row 1: no column Utterance \(nearest: utterence\)"),
        ([line() + ",more,cells"], HEADER, r"train_sent_emo.csv: not a CSV table"),
        ([line(), "2,cut off"], HEADER, r"row 3: Dialogue_ID is ''"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, train, header, message):
    with pytest.raises(MsencError, match=message):
        read_meld(write(tmp_path, train, header))


def test_a_missing_or_unreadable_file_is_refused(tmp_path):
    write(tmp_path)
    (tmp_path / "dev_sent_emo.csv").unlink()
    with pytest.raises(MsencError, match=r"dev_sent_emo.csv: no such file.*train_sent_emo.csv.*data.root"):
        read_meld(tmp_path)
    (tmp_path / "dev_sent_emo.csv").mkdir()
    with pytest.raises(MsencError, match=r"dev_sent_emo.csv: cannot be read"):
        read_meld(tmp_path)


def test_real_meld_has_its_published_counts():
    if "MSENC_SHARED" not in os.environ:
        pytest.skip("MSENC_SHARED names no folder with MELD's annotations")
    result = read_meld(Path(os.environ["MSENC_SHARED"]) / "data" / "meld")
    counts = {}
    for split in MELD_FILES:
        dialogues = [d for d in result.dialogues if d.split == split]
        utterances = sum(len(d.utterances) for d in dialogues)
        counts[split] = (len(dialogues), utterances, sum(d.num_samples for d in dialogues))
    assert counts == {"train": (1038, 9989, 8951), "val": (114, 1109, 995), "test": (280, 2610, 2330)}
    assert result.rejections == []
    assert result.num_repaired == 0
    assert all(u.start_s is not None and u.end_s is not None for d in result.dialogues for u in d.utterances)
