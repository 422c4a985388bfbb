import re
from html.parser import HTMLParser

import pytest
from clips import write_media

from msenc.raw.audit_page import histogram, render_page
from msenc.raw.probe import probe_clip
from msenc.store.flags import Audit, Flag
from msenc.types import Dialogue, Rejection, Utterance

HOSTILE = '<script>alert(1)</script> & "it"'


class Page(HTMLParser):
    """Tags, and the addresses that they load."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]


@pytest.fixture
def page(tmp_path):
    names = ["good.mp4", "broken.mp4"]
    write_media(tmp_path / "good.mp4", rotation=90)
    (tmp_path / "broken.mp4").write_text("no clip")
    turns = tuple(
        Utterance(str(u), "Ana", HOSTILE, start_s=2.0 * u, end_s=2.0 * u + 1, clip=c) for u, c in enumerate(names)
    )
    flags = [
        Flag("demo/train/dia0/utt0", "train", "rotated", "good.mp4", "90 degrees"),
        Flag("demo/train/dia0/utt1", "train", "clip_corrupt", "broken.mp4", HOSTILE),
    ]
    rejections = [Rejection("demo/train/dia0/utt1", "audio", "clip corrupt", "broken.mp4", found=HOSTILE)]
    audit = Audit(rejections, flags, {"train": {"utterances": 2345}}, "abc123")
    facts = {name: probe_clip(tmp_path / name) for name in names}
    return render_page("demo", tmp_path, [Dialogue("demo/train/dia0", "train", turns)], facts, audit)


def test_the_page_needs_no_other_file_and_runs_nothing(page):
    read = Page(page)
    assert "script" not in read.tags
    assert HOSTILE not in page
    assert "&lt;script&gt;" in page
    assert len(read.addresses) == 1  # the thumbnail of the one clip that has a picture
    assert read.addresses[0].startswith("data:image/jpeg;base64,")
    assert "url(" not in page
    assert '<meta name="viewport"' in page


def test_the_page_shows_counts_meanings_facts_and_worst_cases(page):
    for shown in ("audio: clip corrupt", "rotated", "90 degrees", "2,345", "abc123", "the clip cannot be decoded"):
        assert shown in page
    assert page.count("<figure>") == 2
    assert len(re.findall("<svg", page)) == 3


def test_a_histogram_counts_every_value_once():
    drawn = histogram("t", [0.1, 0.1, 5.0, 99.0, -3.0], "s", (0.0, 20.0))
    counts = [int(label.rpartition(" ")[2]) for *_, label in drawn["bars"]]
    assert (sum(counts), counts[0], counts[10], counts[-1]) == (5, 3, 1, 1)
    assert (drawn["num"], drawn["beyond"], drawn["highest"]) == (5, 2, 3)
    heights = [height for _, _, _, height, _ in drawn["bars"]]
    assert (max(heights), heights[0], heights[5]) == (120, 120, 0)
    assert histogram("t", [], "s", (0.0, 1.0))["num"] == 0
