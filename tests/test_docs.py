"""Every relative link of the README and of docs/ leads somewhere, and the README links every page."""

import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from conftest import ROOT

AT_THE_TOP = ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = [*(ROOT / name for name in AT_THE_TOP), *sorted((ROOT / "docs").glob("*.md"))]


def prose(page: Path) -> str:
    """A page without its code blocks, in which nothing is a link or a heading."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[tuple[Path, str]]:
    """(file, anchor) of each relative link and image."""
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page)))
    parts = [link.partition("#") for link in found if "://" not in link]
    return [((page.parent / file).resolve() if file else page, anchor) for file, _, anchor in parts]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub derives them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    kept = ("".join(c for c in h.lower() if c in " -_" or unicodedata.category(c)[0] in "LN") for h in headings)
    return {heading.replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for file, anchor in links(page):
        assert file.exists(), file
        assert not anchor or anchor in anchors(file), f"{file.name}#{anchor}"


def test_every_page_is_linked_from_the_readme():
    reached = {file for file, _ in links(PAGES[0])}
    assert [page.name for page in PAGES[1:] if page not in reached] == []


def test_the_pages_become_a_site_that_asks_no_other_server(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is absent (extra docs)")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {page.name for page in tmp_path.glob("*.html")} - {"404.html"}
    assert len(pages) == len(PAGES)
    shown = [*tmp_path.glob("*.html"), *(tmp_path / "css").glob("*.css")]
    loaded = r"""(?:<(?:script|link|img|iframe)[^>]*|url\(|@import\s*)["']?(?:https?:)?//[^"')>]*"""
    assert [match for page in shown for match in re.findall(loaded, page.read_text("utf-8"))] == []


def test_a_link_that_leads_nowhere_stops_the_site(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is absent (extra docs)")
    for name in ("docs", "mkdocs.yml", *AT_THE_TOP):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile)(ROOT / name, tmp_path / name)
    with (tmp_path / "docs" / "talk.md").open("a", encoding="utf-8") as page:
        page.write("\n[gone](speech.md#no-such-heading)\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "no-such-heading" in done.stderr


def test_one_version_everywhere():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == version
