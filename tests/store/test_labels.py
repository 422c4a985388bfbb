import pytest

from msenc.files import content_hash
from msenc.raw.annotations import read_meld, read_table
from msenc.store.labels import LABELS, VOICE_TURNS, columns_of, read_labels, write_labels
from msenc.types import MsencError

HEADER = "Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime\n"
ROWS = "Hi.,Ana,joy,positive,0,0,1,1,00:00:00,00:00:01\nHello.,Ben,,negative,0,1,1,1,00:00:01,00:00:02\n"


def meld(folder):
    for name in ("train_sent_emo.csv", "dev_sent_emo.csv", "test_sent_emo.csv"):
        (folder / name).write_text(HEADER + ROWS)
    return folder


def test_columns_that_are_read_as_nothing_else_are_labels_and_empty_ones_are_none(tmp_path):
    labels = read_meld(meld(tmp_path), "own").labels
    assert labels["own/train/dia0/utt0"] == {"Emotion": "joy", "Sentiment": "positive"}
    assert labels["own/val/dia0/utt1"] == {"Sentiment": "negative"}
    assert columns_of(labels) == ["Emotion", "Sentiment"]


def test_only_named_columns_are_kept(tmp_path):
    assert columns_of(read_meld(meld(tmp_path), "own", ["Emotion"]).labels) == ["Emotion"]
    with pytest.raises(MsencError, match=r"'Emotoin', which is not there; found Emotion, Sentiment"):
        read_meld(tmp_path, "own", ["Emotoin"])


def test_a_table_of_utterances_has_labels_too(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("clip,dialogue,text,mood\n,a,Hi.,glad\n,a,Yes.,sad\n")
    annotations = read_table(
        table, "own", {"rule": "random", "fractions": {"train": 1.0, "val": 0, "test": 0}, "seed": 1}
    )
    assert list(annotations.labels.values()) == [{"mood": "glad"}, {"mood": "sad"}]


def test_labels_come_back_as_they_were_written_and_go_when_there_are_none(tmp_path):
    labels = {"own/train/a/utt0": {"mood": "so\u2028so"}, "own/train/a/utt1": {}}
    write_labels(tmp_path, labels)
    assert read_labels(tmp_path, LABELS, "") == labels
    write_labels(tmp_path, {})
    with pytest.raises(MsencError, match=r"labels\.jsonl: missing\. Prepare it"):
        read_labels(tmp_path, LABELS, "Prepare it.")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("{", r": cannot be read as JSON"),
        ("[1]", r": found a list of 1, expected an object"),
        ('{"measured": {}}', r": found no id"),
        ('"word"', r": found 'word', expected an object"),
        ('{"id": "b", "measured": {"pitch": 3}}', r", measured\.pitch: found 3, expected a text"),
    ],
)
def test_a_line_that_is_no_label_is_named(tmp_path, line, found):
    (tmp_path / VOICE_TURNS).write_text('{"id": "a"}\n' + line + "\n")
    with pytest.raises(MsencError, match=r"voice-turns\.jsonl, line 2" + found):
        read_labels(tmp_path, VOICE_TURNS, "")


def test_the_hash_follows_every_label():
    words = [("a", "joy"), ("b", None)]
    assert content_hash(words) == content_hash(list(words))
    assert (
        len(
            {content_hash(words), content_hash([("a", "joy"), ("b", "joy")]), content_hash([("b", "joy"), ("a", None)])}
        )
        == 3
    )


def test_two_lines_of_one_utterance_are_refused(tmp_path):
    (tmp_path / LABELS).write_text('{"id": "7", "mood": "glad"}\n{"id": "8"}\n{"id": "7", "mood": "sad"}\n')
    with pytest.raises(MsencError, match=r"labels\.jsonl, line 3: found '7' a second time.*Prepare again"):
        read_labels(tmp_path, LABELS, "Prepare again.")
