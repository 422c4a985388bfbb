import pytest

from msenc.files.marks import format_marks, parse_marks
from msenc.types import Mark, MsencError


def test_marks_survive_the_text_form():
    marks = (Mark("audio", "text", 10, 17), Mark("video", "description", 0, 3, bits=0.25), Mark("both", "text", 1, 2))
    assert parse_marks(format_marks(marks)) == marks
    assert parse_marks("") == ()
    assert format_marks(()) == ""


@pytest.mark.parametrize(
    "text", ["audio:text:7-3", "audio:text:3-3", "smell:text:1-2", "audio:reply:1-2", "audio", "audio:text:1-2;;"]
)
def test_a_malformed_mark_is_refused_with_the_part_and_the_form(text):
    with pytest.raises(MsencError, match="expected kind:field:start-end"):
        parse_marks(text)
