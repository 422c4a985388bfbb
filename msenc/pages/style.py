"""What the HTML pages have in common. A page is one file: no request leaves it."""

import base64

STYLE = """\
:root { color-scheme: light dark; --line: #8884; --bar: #3b74b8; }
body { font: 16px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 0 1rem 3rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .5rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
small { opacity: .75; }
summary { cursor: pointer; }
"""
"""Light or dark as the reader's system is; wide tables scroll in a box of their own, never the page."""


def data_uri(kind: str, content: bytes) -> str:
    """Content as an address that holds it.

    Example:
        >>> data_uri("text/plain", b"hi")
        'data:text/plain;base64,aGk='
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
