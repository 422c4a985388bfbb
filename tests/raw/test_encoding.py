# ruff: noqa: RUF001 (texts in other scripts)
from pathlib import Path

import pytest

from msenc.raw.annotations import read_table
from msenc.raw.encoding import decode_table, fitting_encodings
from msenc.types import MsencError

HEADER = "clip,dialogue,speaker,text,start,end,split"
SPLIT = {"rule": "random"}
FOREIGN = {
    "gb18030": "你今天过得怎么样？我很好，谢谢你。",
    "shift_jis": "こんにちは、お元気ですか。",
    "cp1251": "Привет, как у тебя дела сегодня?",
    "euc_kr": "안녕하세요, 오늘 날씨가 좋네요.",
    "cp1253": "Καλημέρα, τι κάνεις σήμερα;",
}


def table(folder, *texts):
    path = folder / "utterances.csv"
    quoted = (t if isinstance(t, bytes) else t.encode() for t in texts)
    path.write_bytes(b"\n".join([HEADER.encode(), *(b'a.wav,d,Ana,"' + t + b'",,,train' for t in quoted)]))
    return path


def texts_of(annotations):
    return [u.text for d in annotations.dialogues for u in d.utterances]


def test_a_row_with_bytes_of_cp1252_is_repaired_alone(tmp_path):
    path = table(tmp_path, "Привет, Zoé", "It\u2019s Zoé\u2026".encode("cp1252"), "你好")
    found = read_table(path, "own", SPLIT)
    assert texts_of(found) == ["Привет, Zoé", "It\u2019s Zoé\u2026", "你好"]
    assert found.repaired == ["own/train/d/utt1"]


@pytest.mark.parametrize("encoding", FOREIGN)
def test_what_cannot_be_cp1252_is_refused_with_what_would_fit_and_read_when_told(tmp_path, encoding):
    text = FOREIGN[encoding]
    path = table(tmp_path, "plain", text.encode(encoding))
    with pytest.raises(
        MsencError, match=rf"utterances\.csv, row 3: neither UTF-8 nor .*fit .*{encoding}.*data\.encoding="
    ):
        read_table(path, "own", SPLIT)
    found = read_table(path, "own", SPLIT, encoding=encoding)
    assert texts_of(found) == ["plain", text]
    assert found.repaired == []


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"])
def test_unicode_in_other_widths_is_read(encoding):
    text = f"{HEADER}\na,d,Ana,Здравствуй Zoé,,,train\n"
    assert decode_table(text.encode(encoding), Path("t.csv")) == (text, set())


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_other_separators_are_found(tmp_path, separator):
    path = tmp_path / "utterances.csv"
    rows = [HEADER, "a.wav,d,Ana,Oh;0:02,0:03.5,train".replace(";", ",")]
    path.write_text("\n".join(rows).replace(",", separator))
    (dialogue,) = read_table(path, "own", SPLIT).dialogues
    assert (dialogue.utterances[0].text, dialogue.utterances[0].start_s, dialogue.utterances[0].end_s) == ("Oh", 2, 3.5)


def test_texts_that_show_nothing_are_empty(tmp_path):
    found = read_table(table(tmp_path, "Oh!", "\u200b\ufeff", "\x07", "\u00ad \u200d", "Yes."), "own", SPLIT)
    assert texts_of(found) == ["Oh!", "Yes."]
    assert [r.reason for r in found.rejections] == ["empty text"] * 3


@pytest.mark.parametrize("encoding", ["klingon", "ascii"])
def test_an_encoding_that_is_wrong_is_refused(tmp_path, encoding):
    with pytest.raises(MsencError, match=encoding):
        read_table(table(tmp_path, "Zoé"), "own", SPLIT, encoding=encoding)


@pytest.mark.parametrize("encoding", FOREIGN)
def test_the_right_encoding_comes_first(encoding):
    assert fitting_encodings([FOREIGN[encoding].encode(encoding)])[0] == encoding


@pytest.mark.parametrize(("encoding", "text"), [("cp1255", "שלום, מה שלומך היום?"), ("cp874", "สวัสดีครับ")])
def test_encodings_that_bytes_alone_do_not_tell_apart_are_all_proposed(encoding, text):
    assert encoding in fitting_encodings([text.encode(encoding)])


def test_a_short_text_has_its_encoding_among_those_proposed():
    for text in ("Да", "Нет, спасибо.", "Всё хорошо!"):
        assert "cp1251" in fitting_encodings([text.encode("cp1251")])
