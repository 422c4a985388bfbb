"""HTML pages from the templates beside this file. A page is one file: no request leaves it."""

import base64
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

PAGES = Path(__file__).parent


def render(template: str, **values: Any) -> str:
    """Fill a template; whatever the values hold is shown as text and never run."""
    return _environment().get_template(f"{template}.html.j2").render(**values)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader

    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    return Environment(loader=PackageLoader("msenc", "pages"), **options)


def data_uri(kind: str, content: bytes) -> str:
    """Content as an address that holds it.

    Example:
        >>> data_uri("text/plain", b"hi")
        'data:text/plain;base64,aGk='
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
