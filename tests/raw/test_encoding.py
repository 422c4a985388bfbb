# ruff: noqa: RUF001 (texts in other scripts)
from pathlib import Path

import pytest

from msenc.raw.annotations import read_table
from msenc.raw.encoding import decode_table, fitting_encodings, repair_encoding
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


@pytest.mark.parametrize("turn", ["Здравствуй Zoé", "你今天过得怎么样" * 500], ids=["short", "long"])
@pytest.mark.parametrize("first", ["", "气氛,"], ids=["ASCII first", "another column first"])
@pytest.mark.parametrize(
    "encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
def test_unicode_in_other_widths_is_read(encoding, first, turn):
    text = f"{first}{HEADER}\n{first}a,d,Ana,{turn},,,train\n"
    assert decode_table(text.encode(encoding), Path("t.csv")) == (text, set())


def test_a_spreadsheet_is_refused_as_what_it_is(tmp_path):
    (tmp_path / "utterances.csv").write_bytes(b"PK\x03\x04\x14\0\6\0\x08\0\0\0!\0b\xee\x9dh")
    with pytest.raises(MsencError, match=r"utterances\.csv: this is a spreadsheet.*Save the table as CSV, in UTF-8"):
        read_table(tmp_path / "utterances.csv", "own", SPLIT)


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_other_separators_are_found(tmp_path, separator):
    path = tmp_path / "utterances.csv"
    rows = [HEADER, "a.wav,d,Ana,Oh;0:02,0:03.5,train".replace(";", ",")]
    path.write_text("\n".join(rows).replace(",", separator))
    (dialogue,) = read_table(path, "own", SPLIT).dialogues
    assert (dialogue.utterances[0].text, dialogue.utterances[0].start_s, dialogue.utterances[0].end_s) == ("Oh", 2, 3.5)


@pytest.mark.parametrize("begin", ["", "\n\r\n", "sep=;\n", '"sep=;"\r\n'])
def test_what_stands_before_a_header_is_no_row(tmp_path, begin):
    path = tmp_path / "utterances.csv"
    path.write_text(begin + f"{HEADER}\na.wav,d,Ana,Oh,x,y,train\n".replace(",", ";"), newline="")
    found = read_table(path, "own", SPLIT)
    assert texts_of(found) == ["Oh"]
    assert found.rejections[0].row == 2 + begin.count("\n")


def test_a_misspelt_column_is_named_whatever_separates_them(tmp_path):
    path = tmp_path / "utterances.csv"
    path.write_text(f"{HEADER}\n".replace(",", ";").replace("text", "txt"))
    with pytest.raises(MsencError, match=r"no column text \(nearest: txt\); found clip, dialogue,.*semicolons"):
        read_table(path, "own", SPLIT)


UNSEEN = ["\u200b\ufeff", "\x07", "\u00ad \u200d", "\x00", "\u202e\u2060", "\ufe0f", "\u3164\u115f", "\u2800", "\u034f"]


def test_texts_that_show_nothing_are_empty(tmp_path):
    found = read_table(table(tmp_path, "Oh!", *UNSEEN, "❤\ufe0f", "Yes."), "own", SPLIT)
    assert texts_of(found) == ["Oh!", "❤\ufe0f", "Yes."]
    assert [r.reason for r in found.rejections] == ["empty text"] * len(UNSEEN)


def test_control_characters_are_left_out_and_told(tmp_path):
    found = read_table(table(tmp_path, "Oh\x00 no\x1b", "two\r\nlines\tof it", "Ye\x7fs"), "own", SPLIT)
    assert texts_of(found) == ["Oh no", "two\r\nlines\tof it", "Yes"]
    assert found.repaired == ["own/train/d/utt0", "own/train/d/utt2"]


def test_names_are_one_line_and_the_same_with_marks_that_show_nothing(tmp_path):
    path = tmp_path / "utterances.csv"
    speakers = ["Ana", "Ana\u200b", "\u200eAna\ufeff", '"Ana\n"', '"Ana\nBen: Yes"', "\u0645\u06cc\u200c\u0645"]
    path.write_text("\n".join([HEADER, *(f"a.wav,d\u200b,{s},Oh,,,train" for s in speakers)]))
    (dialogue,) = read_table(path, "own", SPLIT).dialogues
    assert dialogue.id == "own/train/d"
    assert [u.speaker for u in dialogue.utterances] == [*["Ana"] * 4, "Ana Ben: Yes", "\u0645\u06cc\u200c\u0645"]


TIMES = [
    ("0:02", 2),
    ("00:00:02", 2),
    ("1:02:03,5", 3723.5),
    ("62:00", 3720),
    ("2", 2),
    ("2,5", 2.5),
    (" 0:02.25 ", 2.25),
    ("-0", 0),
]


@pytest.mark.parametrize(("written", "seconds"), TIMES)
def test_times_are_read_as_people_write_them(tmp_path, written, seconds):
    path = tmp_path / "utterances.csv"
    path.write_text(f'{HEADER}\na.wav,d,Ana,Oh,"{written}","2:00:00",train\n')
    (dialogue,) = read_table(path, "own", SPLIT).dialogues
    assert (dialogue.utterances[0].start_s, dialogue.utterances[0].end_s) == (seconds, 7200)


@pytest.mark.parametrize("written", ["1:75", "0:61.5", "1:75:00", "00:00:01:12", "1_000", "1 000", "1.234,5"])
def test_times_that_may_mean_several_are_not_read(tmp_path, written):
    path = tmp_path / "utterances.csv"
    path.write_text(f'{HEADER}\na.wav,d,Ana,Oh,"{written}","2:00:00",train\n')
    found = read_table(path, "own", SPLIT)
    assert [u.clip for d in found.dialogues for u in d.utterances] == [None]
    assert [(r.reason, r.row) for r in found.rejections] == [("no span of time", 2)]


LATIN = {
    "mac_roman": ("It’s so “nice”…", "C’est l’été, ça va ?", "Für schöne Straßen", "¿Qué tal, señor?", "Smørrebrød på"),
    "cp850": ("Ça va être génial à Zoé", "Für schöne Straßen", "¿Qué tal, señor?", "Não, coração", "Hej på dig"),
    "cp1250": ("Zażółć gęślą jaźń", "Příliš žluťoučký kůň"),
    "iso8859_2": ("Zażółć gęślą jaźń", "Příliš žluťoučký kůň"),
}


@pytest.mark.parametrize(("encoding", "text"), [(name, text) for name, texts in LATIN.items() for text in texts])
def test_latin_letters_of_other_encodings_are_no_others_in_cp1252(tmp_path, encoding, text):
    path = table(tmp_path, "plain", text.encode(encoding))
    with pytest.raises(MsencError, match=rf"utterances\.csv, row 3: .*fit .*{encoding}.*data\.encoding="):
        read_table(path, "own", SPLIT)
    assert texts_of(read_table(path, "own", SPLIT, encoding=encoding)) == ["plain", text]


CP1252 = (
    "It’s so “nice”… 5€, isn’t it?",
    "C’est l’été, ça va à l’École ?",
    "«Où est-il ?» Déjà… ÉCOLE NOËL",
    "Für schöne Straßen",
    "„Ja“, sagte er. Über 30°C",
    "¿Qué tal, señor? ¡Sí! 1ª vez, nº 5, Mª José",
    "Não, coração",
    "Hej på dig – åka dit",
    "col·lecció",
    "Þetta er í lagi, já",
    "½ cup, 2½ cups, 10 m², ©2020 Œuvre™",
    "New York–London",
    "l´été",
    "Zoé…oui",
    "ANA’S CAFÉ",
    "Ñandú",
)


@pytest.mark.parametrize("text", CP1252)
def test_texts_in_cp1252_are_read_as_such(tmp_path, text):
    assert texts_of(read_table(table(tmp_path, "plain", text.encode("cp1252")), "own", SPLIT)) == ["plain", text]


NO_TABLES = {
    b"PAR1\x15\x04\x15\xf4": "a Parquet file",
    b"\x1f\x8b\x08\x08\x8e\x9d": "a compressed file",
    b"SQLite format 3\x00\x10": "a database",
    b"<!DOCTYPE html><html>404</html>": "a web page",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": r"git lfs pull",
    b"{\\rtf1\\ansi clip}": "a text document",
    b'{"clip": "a.wav", "dialogue": "d", "text": "hi"}\n': "JSON",
    b'\xef\xbb\xbf\n[{"clip": "a.wav", "dialogue": "d"}]': "JSON",
    b"RIFF\x24\x00\x00\x00WAVEfmt ": "a media file",
}


@pytest.mark.parametrize(("data", "kind"), NO_TABLES.items())
def test_another_kind_of_file_is_refused_as_what_it_is(tmp_path, data, kind):
    (tmp_path / "utterances.csv").write_bytes(data)
    with pytest.raises(MsencError, match=rf"utterances\.csv: this is .*{kind}.*Save the table as CSV, in UTF-8"):
        read_table(tmp_path / "utterances.csv", "own", SPLIT)


COMPOSED, PARTED = "Zoë", "Zoe\u0308"


@pytest.mark.parametrize(("in_table", "on_disk"), [(COMPOSED, PARTED), (PARTED, COMPOSED), (PARTED, PARTED)])
def test_names_meet_however_their_letters_are_composed(tmp_path, in_table, on_disk):
    (tmp_path / on_disk).mkdir()
    (tmp_path / on_disk / f"{on_disk} 1.wav").touch()
    path = tmp_path / "utterances.csv"
    rows = [f"{in_table}/{in_table} 1.wav,{name},{name},Oh,0,1,train" for name in (COMPOSED, PARTED)]
    path.write_text("\n".join([HEADER, *rows]))
    (dialogue,) = read_table(path, "own", SPLIT).stored_in(tmp_path).dialogues
    assert {u.clip for u in dialogue.utterances} == {f"{on_disk}/{on_disk} 1.wav#t=0.000,1.000"}
    assert {u.speaker for u in dialogue.utterances} == {COMPOSED}


@pytest.mark.parametrize(
    ("in_table", "on_disk"),
    [
        ("cafÃ©.wav", "cafÃ©.wav"),  # as archives leave names
        ("cafÃ©.wav", "café.wav"),
        ("at\u00a0ten.wav", "at\u00a0ten.wav"),  # as macOS names recordings of the screen
        ("at\u00a0ten.wav", "at ten.wav"),
        (r"sub\one.wav", "sub/one.wav"),
        (r"sub\one.wav", r"sub\one.wav"),
        (r"..\one.wav", r"..\one.wav"),
        ("é" * 200 + ".wav", "no such file"),
    ],
)
def test_a_file_is_found_by_the_name_that_it_has_or_else_by_a_repaired_one(tmp_path, in_table, on_disk):
    (tmp_path / "raw" / "sub").mkdir(parents=True)
    (tmp_path / "raw" / on_disk).touch()
    (tmp_path / "one.wav").touch()
    path = tmp_path / "utterances.csv"
    path.write_text(f"{HEADER}\n{in_table},d,Ana,Oh,0,1,train\n")
    (dialogue,) = read_table(path, "own", SPLIT).stored_in(tmp_path / "raw").dialogues
    expected = in_table if on_disk == "no such file" else on_disk
    assert dialogue.utterances[0].clip == f"{expected}#t=0.000,1.000"


def test_of_several_files_that_a_name_may_be_none_is_guessed(tmp_path):
    for name in ("é\u0065\u0301.wav", "e\u0301é.wav", "éé"):
        (tmp_path / name).touch()
    path = tmp_path / "utterances.csv"
    rows = ["éé.wav,d,Ana,Oh,0,1,train", "é\u0065\u0301.wav,d,Ana,Ah,0,1,train", "ô.wav,d,Ana,Eh,,,train"]
    path.write_text("\n".join([HEADER, *rows]))
    found = read_table(path, "own", SPLIT).stored_in(tmp_path)
    clips = [u.clip for u in found.dialogues[0].utterances]
    assert clips == [None, "é\u0065\u0301.wav#t=0.000,1.000", "ô.wav"]
    (rejection,) = found.rejections
    assert (rejection.reason, rejection.file) == ("several files of this name", "éé.wav")
    assert rejection.found == r"'e\u0301\xe9.wav', '\xe9e\u0301.wav'"


@pytest.mark.parametrize(
    ("in_table", "on_disk"),
    [
        ("Clips/Dia1_Utt2.MP4", "clips/dia1_utt2.mp4"),
        ("ZOË.wav", "zoe\u0308.wav"),
        (r"Clips\One.wav", "clips/one.wav"),
        ("Straße.wav", "STRASSE.WAV"),
    ],
)
def test_a_file_is_found_by_other_capitals_and_that_is_told(tmp_path, in_table, on_disk):
    (tmp_path / "clips").mkdir()
    (tmp_path / on_disk).touch()
    (tmp_path / "same.wav").touch()
    path = tmp_path / "utterances.csv"
    path.write_text(f"{HEADER}\n{in_table},d,Ana,Oh,0,1,train\nsame.wav,d,Ana,Oh,,,train\ngone.wav,d,Ana,Oh,,,train\n")
    found = read_table(path, "own", SPLIT).stored_in(tmp_path)
    clips = [u.clip for u in found.dialogues[0].utterances]
    assert clips == [f"{on_disk}#t=0.000,1.000", "same.wav", "gone.wav"]
    assert found.other_case == {"own/train/d/utt0": in_table}
    assert found.rejections == []


def test_of_several_files_that_differ_in_capitals_none_is_guessed_but_the_one_of_that_name_is_taken(tmp_path):
    for name in ("one.wav", "ONE.wav", "One.wav"):
        (tmp_path / name).touch()
    path = tmp_path / "utterances.csv"
    path.write_text(f"{HEADER}\noNe.wav,d,Ana,Oh,,,train\nOne.wav,d,Ana,Ah,,,train\n")
    found = read_table(path, "own", SPLIT).stored_in(tmp_path)
    assert [u.clip for u in found.dialogues[0].utterances] == [None, "One.wav"]
    (rejection,) = found.rejections
    assert (rejection.reason, rejection.file) == ("several files of this name", "oNe.wav")
    assert rejection.found == "'ONE.wav', 'One.wav', 'one.wav'"
    assert found.other_case == {}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("Tom &amp; Ann", "Tom & Ann"),
        ("don&#39;t &#x201c;go&#x201D;", "don't “go”"),
        ("don&amp;#146;t", "don’t"),
        ("a&nbsp;b &lt;3", "a b <3"),
        ("R&D; AT&T &so; &notit;", "R&D; AT&T &so; &notit;"),
    ],
)
def test_names_of_signs_in_web_pages_are_those_signs(tmp_path, written, read):
    found = read_table(table(tmp_path, "plain", written), "own", SPLIT)
    assert texts_of(found) == ["plain", read]
    assert found.repaired == ["own/train/d/utt1"] * (written != read)


MANGLED = (
    *(
        "Straße",
        "École, où ça ?",
        "Übung",
        "Paweł i Łukasz",
        "Ağladı mı?",
        "Привет, как дела?",
        "Καλημέρα",
        "你好吗",
        "Ok 😀",
    ),
    *("CAFÉ”", "« cliché\u202f»", "AMANHÃ”", "A IRMÃ – ela", "SMÅ” och", "«É»", "naïve “façade”"),
)


@pytest.mark.parametrize("text", MANGLED)
@pytest.mark.parametrize("times", [0, 1, 2, 3])
def test_texts_that_were_saved_in_the_wrong_encoding_are_repaired_however_often_that_was(text, times):
    mangled = text
    for _ in range(times):
        mangled = "".join(bytes([b]).decode("cp1252", "ignore") or chr(b) for b in mangled.encode())
    assert repair_encoding(mangled) == text


@pytest.mark.parametrize("text", ["cliché\u00a0»", "É\u00a0»", "Ã –", "SMÅ…", "«É»", "ÉTÉ… DÉJÀ"])
def test_texts_that_nobody_mangled_stay(text):
    assert repair_encoding(text) == text.replace("\u00a0", " ")


OTHER_LATIN = {
    "cp1254": ("Bunu yanlış yaptın, değil mi?", "Kapıyı açtığını gördüm.", "İyi akşamlar!", "Ağladı mı? Hayır, güldü."),
    "cp1250": ("Mám rád černou kávu.", "Člověk neví, co říct.", "Dobrý večer, příteli.", "Už je pozdě, viď?"),
    "cp1257": (
        "Ačiū, viskas gerai.",
        "Kaip tau sekėsi šiandien?",
        "Aš nežinau, ką daryti.",
        "Žmonės šnekėjosi ilgą laiką, tačiau žvaigždės jau švietė.",
    ),
}
ICELANDIC = ("Það er ný sýn, býst ég við.", "Þú þarft að þýða þetta.", "Ertu með nýjar fréttir?", "Ég bý við sjó.")


@pytest.mark.parametrize("encoding", OTHER_LATIN)
def test_letters_of_another_language_than_cp1252_has_are_not_read_as_its_letters(tmp_path, encoding):
    texts = OTHER_LATIN[encoding]
    rows = [text.encode(encoding) for text in texts]
    match = rf"row 3: neither UTF-8 nor .*The bytes fit {encoding}.*data\.encoding={encoding}, or cp1252 if"
    with pytest.raises(MsencError, match=match):
        read_table(table(tmp_path, "plain", *rows), "own", SPLIT)
    assert texts_of(read_table(table(tmp_path, *rows), "own", SPLIT, encoding=encoding)) == [*texts]


@pytest.mark.parametrize("texts", [ICELANDIC, CP1252, CP1252[2:3] * 9, CP1252[3:4] * 9, CP1252[12:13] * 9])
def test_many_rows_in_cp1252_are_read_as_such(tmp_path, texts):
    found = read_table(table(tmp_path, *(text.encode("cp1252") for text in texts)), "own", SPLIT)
    assert texts_of(found) == [*texts]


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
