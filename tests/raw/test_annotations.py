import os
import re
from pathlib import Path

import pytest

from msenc.raw.annotations import MELD_FILES, read_meld, read_table
from msenc.raw.encoding import repair_encoding
from msenc.raw.layouts.layout import json_of
from msenc.raw.timestamps import read_timestamps
from msenc.store.labels import LABELS, read_labels, write_labels
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


# ------------------------------------------------------------------------------------------------ a table

SPLIT = {"rule": "random", "fractions": {"train": 0.5, "test": 0.5}, "seed": 1}


def table(folder: Path, text: str | bytes) -> Path:
    path = folder / "utterances.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_table_names_clips_and_parts_of_recordings(tmp_path):
    path = table(
        tmp_path,
        "clip,dialogue,speaker,text,start,end,split,description,note\n"
        "a.mp4,two,Anna,Hello!,1.5,3,test,,x\n"
        "a.mp4,one,Ben,Yes.,0:01:02,62.25,train,A man speaks.,\n"
        "b.wav,two,,Bye.,,,test,,\n"
        ",one,Ben,No clip.,,,train,,\n",
    )
    found = read_table(path, "own", SPLIT)
    assert [d.id for d in found.dialogues] == ["own/train/one", "own/test/two"]
    one, two = (d.utterances for d in found.dialogues)
    assert [(u.id, u.speaker, u.text, u.clip, u.start_s, u.end_s) for u in (*two, *one)] == [
        ("0", "Anna", "Hello!", "a.mp4#t=1.500,3.000", 1.5, 3.0),
        ("1", "-1", "Bye.", "b.wav", None, None),
        ("0", "Ben", "Yes.", "a.mp4#t=62.000,62.250", 62.0, 62.25),
        ("1", "Ben", "No clip.", None, None, None),
    ]
    assert [u.description for u in one] == ["A man speaks.", None]
    assert found.rejections == []
    assert found.recordings == {"own/train/one": "a.mp4", "own/test/two": "a.mp4"}


def test_rows_of_a_table_that_cannot_be_used_are_listed(tmp_path):
    rows = ["a.mp4,d,x,1,2", "a.mp4,d,,2,3", "a.mp4,d,y,5,4", "a.mp4,d,z,soon,4", "a.mp4,d,w,nan,4", "a.mp4,d,v,,4"]
    found = read_table(table(tmp_path, "\n".join(["clip,dialogue,text,start,end", *rows])), "own", SPLIT | ONE)
    assert [(r.id, r.what, r.reason, r.row) for r in found.rejections] == [
        ("own/train/d/utt1", "row", "empty text", 3),
        *((f"own/train/d/utt{n}", "clip", "no span of time", n + 2) for n in (2, 3, 4, 5)),
    ]
    assert found.rejections[1].found == "'5' to '4'"
    assert [(u.id, u.clip) for u in found.dialogues[0].utterances] == [
        ("0", "a.mp4#t=1.000,2.000"),
        *((str(n), None) for n in (2, 3, 4, 5)),
    ]


ONE = {"fractions": {"train": 1.0}}


def test_a_table_without_splits_is_split_by_the_config(tmp_path):
    path = table(tmp_path, "\n".join(["clip,dialogue,text", *(f"{i}.wav,d{i},Hi" for i in range(10))]))
    splits = {d.id.split("/")[2]: d.split for d in read_table(path, "own", SPLIT).dialogues}
    assert sorted(splits.values()) == ["test"] * 5 + ["train"] * 5
    path.write_text(path.read_text() + "\nx.wav,d0,More")
    assert {d.id.split("/")[2]: d.split for d in read_table(path, "own", SPLIT).dialogues} == splits


def test_a_validation_split_is_drawn_among_dialogues_with_a_target_and_all_that_names_them_follows(tmp_path):
    rows = [f"{i}.wav,d{i},{text},0,1,train,x" for i in range(10) for text in ("Hi", "It\u00e2\u20ac\u2122s", "")]
    rows += [f"{i}.wav,short{i},Hi,0,1,train,x" for i in range(10)] + ["t.wav,d0t,Hi,0,1,test,x"]
    path = table(tmp_path, "\n".join(["clip,dialogue,text,start,end,split,note", *rows]))
    before, after = read_table(path, "own", SPLIT), read_table(path, "own", SPLIT).with_val(0.2)
    assert [d.split for d in after.dialogues] == ["train"] * 16 + ["val"] * 4 + ["test"]
    val = [d for d in after.dialogues if d.split == "val"]
    assert sum(d.num_samples for d in val) == 2
    moved = {d.id.replace("/val/", "/train/"): d.id for d in val}
    assert [d.id for d in before.with_val(0.2).dialogues] == [d.id for d in after.dialogues]

    def renamed(id: str) -> str:
        dialogue = "/".join(id.split("/")[:3])
        return id.replace(dialogue, moved.get(dialogue, dialogue))

    assert after.recordings == {renamed(id): file for id, file in before.recordings.items()} != before.recordings
    assert after.labels == {renamed(id): known for id, known in before.labels.items()} != before.labels
    assert after.repaired == [renamed(id) for id in before.repaired] != before.repaired
    assert [r.id for r in after.rejections] == [renamed(r.id) for r in before.rejections] != before.rejections
    with pytest.raises(MsencError, match=r"data\.val=0\.1: the annotations have a split val already"):
        after.with_val(0.1)
    few = table(tmp_path, "clip,dialogue,text\na,d,hi\na,d,yes\na,e,hi")
    with pytest.raises(MsencError, match=r"data\.val=0\.1: train has 1 dialogues with a target"):
        read_table(few, "own", {**SPLIT, **ONE}).with_val(0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clip:dialogue:text\na:b:c", r"row 1: no column clip, dialogue, text.*found clip:dialogue:text.*Rename"),
        ("clip,dialog,text\na,b,c", r"no column dialogue \(nearest: dialog\)"),
        ("clip,dialogue,text,speakers\na,b,c,d", r"no column speaker \(nearest: speakers\)"),
        ("clip,dialogue,text\na,b c,hi", r"row 2: dialogue is 'b c'; expected a name"),
        ("clip,dialogue,text\na,,hi", r"row 2: dialogue is ''"),
        ("clip,dialogue,text\n/etc/a.wav,d,hi", r"row 2: clip is '/etc/a\.wav'; expected a path below"),
        ("clip,dialogue,text\n../a.wav,d,hi", r"row 2: clip is '\.\./a\.wav'"),
        ("clip,dialogue,text,split\na,d,hi,dev", r"row 2: split is 'dev'; expected train, val, test"),
        ("clip,dialogue,text,split\na,d,hi,val\na,d,yes,test", r"d is in val \(row 2\) and in test \(row 3\)"),
        ("clip,dialogue,text,description\na,d,hi,(loud)", r"row 2: brackets in the voice description"),
        ("clip,dialogue,text\na,d,\n", r"found no row with text"),
        ("clip,dialogue,text\n", r"found a header and no row"),
        (b"", r"not a CSV table"),
    ],
)
def test_a_bad_table_is_refused(tmp_path, text, message):
    with pytest.raises(MsencError, match=message):
        read_table(table(tmp_path, text), "own", SPLIT | ONE)


def test_a_missing_table_is_refused(tmp_path):
    with pytest.raises(MsencError, match=r"none\.csv: no such file.*data\.table"):
        read_table(tmp_path / "none.csv", "own", SPLIT)


def test_a_tables_encoding_is_repaired(tmp_path):
    path = table(tmp_path, "clip,dialogue,speaker,text\na,d,Zoé,It\x92s a café".encode("latin-1"))
    found = read_table(path, "own", SPLIT | ONE)
    (utterance,) = found.dialogues[0].utterances
    assert (utterance.speaker, utterance.text) == ("Zoé", "It\u2019s a café")
    assert found.repaired == ["own/train/d/utt0"]


def test_a_column_of_ids_takes_no_label_from_its_utterance(tmp_path):
    path = table(tmp_path, "id,clip,dialogue,text,mood\n7,,d,hi,glad\n7,,d,yes,sad\n")
    found = read_table(path, "own", SPLIT | ONE)
    write_labels(tmp_path, found.labels)
    wanted = {"own/train/d/utt0": {"mood": "glad"}, "own/train/d/utt1": {"mood": "sad"}}
    assert read_labels(tmp_path, LABELS, "") == wanted
    with pytest.raises(MsencError, match=r"utterances\.csv: data\.labels names the column 'id'.*Rename"):
        read_table(path, "own", SPLIT | ONE, labels=["id", "mood"])


def test_a_pipe_in_a_tables_place_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "utterances.csv")
    for read in (
        lambda path: read_table(path, "own", SPLIT),
        read_timestamps,
        lambda path: json_of(path, dict, "", ""),
    ):
        with pytest.raises(MsencError, match=r"utterances\.csv: cannot be read \(found a pipe or a device"):
            read(tmp_path / "utterances.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clip,dialogue,text,text\n,d,hi,ho", r"row 1: the column text stands there twice.*Rename or remove"),
        ("clip,dialogue,text, text\n,d,hi,ho", r"row 1: the column text stands there twice"),
        ("clip,dialogue,text,mood,mood\n,d,hi,glad,sad", r"row 1: the column mood stands there twice"),
        ("clip,dialogue,text,,\n,d,hi,,\n,d,Oh, no,", r"row 3: found 'no' behind the last column, text.*in quotes"),
    ],
)
def test_a_value_without_a_column_of_its_own_is_refused(tmp_path, text, message):
    with pytest.raises(MsencError, match=message):
        read_table(table(tmp_path, text), "own", SPLIT | ONE)


def test_columns_without_a_name_are_no_labels_and_a_name_may_end_in_a_number(tmp_path):
    found = read_table(table(tmp_path, ",clip,dialogue,text,mood,mood.1,\n0,,d,hi,glad,sad,\n"), "own", SPLIT | ONE)
    assert list(found.labels.values()) == [{"mood": "glad", "mood.1": "sad"}]


def test_a_header_in_the_middle_of_tables_that_were_put_together_is_listed_and_no_turn(tmp_path):
    header = "clip,dialogue,text,start\n"
    found = read_table(table(tmp_path, header + ",d,hi,\n" + header + ",d,text,start\n"), "own", SPLIT | ONE)
    assert [(u.id, u.text) for d in found.dialogues for u in d.utterances] == [("0", "hi"), ("1", "text")]
    again = ("utterances.csv", "row", "the header again", 3)
    assert [(r.id, r.what, r.reason, r.row) for r in found.rejections] == [
        again,
        ("own/train/d/utt1", "clip", "no span of time", 4),
    ]
    found = read_meld(write(tmp_path, [line(), HEADER, line("Bye.", utt="1")]))
    assert [u.text for u in found.dialogues[0].utterances] == ["Hello!", "Bye."]
    assert [(r.id, r.reason, r.row) for r in found.rejections] == [("train_sent_emo.csv", "the header again", 3)]


@pytest.mark.parametrize(
    ("again", "message"),
    [
        ("clip,dialogue,start,text", r"row 3: found another header, clip, dialogue, start, text; expected one header"),
        ("Text,Clip,Dialogue,Mood", r"row 3: found another header, Text, Clip, Dialogue, Mood; expected one header"),
    ],
)
def test_the_header_of_another_table_is_refused_as_its_columns_would_be_mixed_up(tmp_path, again, message):
    with pytest.raises(MsencError, match=message):
        read_table(table(tmp_path, f"clip,dialogue,text,start\n,d,hi,\n{again}\n,d,3,yes\n"), "own", SPLIT | ONE)


@pytest.mark.parametrize("mark", ["\ufeff", "\ufeff\ufeff", "ï»¿"])
def test_tables_that_were_put_together_leave_no_marks_of_their_encoding(tmp_path, mark):
    text = f"{mark}clip,dialogue,text\na.wav,d,hi\n{mark}Clip,Dialogue,Text\nb.wav,d,yes\n{mark}c.wav,d,no\n\x1a\0\0"
    found = read_table(table(tmp_path, text), "own", SPLIT | ONE)
    assert [(u.clip, u.text) for u in found.dialogues[0].utterances] == [
        ("a.wav", "hi"),
        ("b.wav", "yes"),
        ("c.wav", "no"),
    ]
    assert [(r.reason, r.row) for r in found.rejections] == [("the header again", 3)]


@pytest.mark.parametrize(
    ("clips", "times", "reason", "found"),
    [
        ("a.mp4#t=1,2,", "3,4", "two spans of time", "'3' to '4' beside 'a.mp4#t=1,2'"),
        ("a.mp4#t=1,2,", "0:01,", "no span of time", "'0:01' to '' beside 'a.mp4#t=1,2'"),
        ("a.mp4#t=1,2,", "soon,2", "no span of time", "'soon' to '2' beside 'a.mp4#t=1,2'"),
        ("a.mp4,b.wav#t=1,2", "3,4", "two spans of time", "'3' to '4' beside 'b.wav#t=1,2'"),
        ("a.mp4#t=2,1,", ",", "no span of time", "'a.mp4#t=2,1'"),
        ("a.mp4#t=1,2,", "1,0:02", None, ("a.mp4#t=1.000,2.000", None)),
        ("a.mp4#t=1,2,b.wav#t=3,4", ",", None, ("a.mp4#t=1,2", "b.wav#t=3,4")),
    ],
)
def test_times_that_contradict_the_clips_own_are_listed_and_neither_is_taken(tmp_path, clips, times, reason, found):
    clips = re.sub(r"[^,]+#t=\d,\d", lambda match: f'"{match[0]}"', clips)
    read = read_table(
        table(tmp_path, f"clip,audio,dialogue,text,start,end\n{clips},d,hi,{times}\n"), "own", SPLIT | ONE
    )
    (utterance,) = read.dialogues[0].utterances
    if reason is None:
        assert (read.rejections, (utterance.clip, utterance.audio)) == ([], found)
    else:
        assert (utterance.clip, utterance.audio, utterance.start_s, utterance.end_s) == (None, None, None, None)
        (rejection,) = read.rejections
        assert (rejection.what, rejection.reason, rejection.row, rejection.found) == ("clip", reason, 2, found)


NO_ROWS = [
    ("# made by a tool\nclip,dialogue,text\n,d,hi\n", r"row 2: found 3 values, expected 1, as row 1 has: '# made by a"),
    ('clip,dialogue,text\n,d,hi\n,d,"two\nlines"\n,d,Oh, no\n', r"row 5: found 4 values, expected 3, as row 1 has:"),
    ('clip,dialogue,text\n,d,hi\n,d,"Oh\n,d,no\n', r"row 3: found a quotation mark that opens a text and has no end"),
    (
        'clip,dialogue,speaker,text\n,d,A,hi\n,d,B,"Oh\n,d,A,lost\n,d,B,"yes"\n',
        r"row 3: found a quotation mark .* no end before row 5",
    ),
    ('dialogue,text,clip\nd,"Oh,\nd,"Well",\n', r"row 2: found a quotation mark .* no end before row 3"),
]


@pytest.mark.parametrize(("text", "message"), NO_ROWS)
def test_a_row_that_is_none_is_named_and_no_quote_swallows_rows(tmp_path, text, message):
    with pytest.raises(MsencError, match=message):
        read_table(table(tmp_path, text), "own", SPLIT | ONE)


def test_a_long_text_of_several_lines_in_quotes_is_one_text(tmp_path):
    text = 'He said ""yes, no, maybe""\r\nand left'
    (dialogue,) = read_table(table(tmp_path, f'clip,dialogue,text\n,d,"{text}"\n'), "own", SPLIT | ONE).dialogues
    assert dialogue.utterances[0].text == text.replace('""', '"')


def test_spaces_behind_separators_are_no_part_of_a_value(tmp_path):
    path = table(tmp_path, 'clip, dialogue, text, start, end\n"a, b.wav", d, "Hi, you", 0, 1\n')
    (utterance,) = read_table(path, "own", SPLIT | ONE).dialogues[0].utterances
    assert (utterance.text, utterance.clip) == ("Hi, you", "a, b.wav#t=0.000,1.000")


def test_a_columns_name_is_the_same_with_marks_that_show_nothing(tmp_path):
    (dialogue,) = read_table(
        table(tmp_path, "clip\u200b,\u2060dialogue,te\u00adxt\n,d,hi\n"), "own", SPLIT | ONE
    ).dialogues
    assert dialogue.utterances[0].text == "hi"


@pytest.mark.parametrize("row", ["---,---,---", ",,12", f",{200 * 'd'}d,hi", "# the second part,,"])
def test_a_line_that_states_no_utterance_is_refused_with_what_to_do(tmp_path, row):
    with pytest.raises(
        MsencError, match=r"row 3: dialogue is .*; expected a name .*remove it if it states no utterance"
    ):
        read_table(table(tmp_path, f"clip,dialogue,text\n,d,hi\n{row}\n"), "own", SPLIT | ONE)
