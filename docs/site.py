"""What mkdocs needs to show the same Markdown as a repository's pages do (mkdocs.yml)."""

import re
import unicodedata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
AT_THE_TOP = {f"{name}.md": f"{name.lower()}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")}
AT_THE_TOP["README.md"] = "index.md"


def on_config(config: Any) -> Any:
    """Name headings as GitHub does, so that links to them lead there too."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    return config


def slug(heading: str, separator: str) -> str:
    """The anchor of a heading."""
    kept = (c for c in heading.lower() if c in " -_" or unicodedata.category(c)[0] in "LN")
    return "".join(kept).replace(" ", separator)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie at the top of the repository."""
    from mkdocs.structure.files import File

    for name, place in AT_THE_TOP.items():
        files.append(File.generated(config, place, content=(ROOT / name).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links between the top and docs/ lead to each other's pages."""
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)  # every second one is code
    return "".join(part if number % 2 else _as_site(part, page) for number, part in enumerate(parts))


def _as_site(text: str, page: Any) -> str:
    if page.file.src_uri in AT_THE_TOP.values():
        text = text.replace("](docs/", "](").replace('src="docs/', 'src="')
    for name, place in AT_THE_TOP.items():
        text = re.sub(rf"\]\((?:\.\./)?{re.escape(name)}", f"]({place}", text)
    # Python's Markdown begins a list only after an empty line.
    return re.sub(r"(?m)^((?![-*|>#\s]|\d+\. ).*\S.*)\n(?=(?:[-*]|\d+\.) )", r"\1\n\n", text)
