"""Keys and passwords: none is stored in a run's folder, or sent to where runs are tracked."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from msenc.types import MsencError

HIDDEN = "***"
_NAMED = re.compile(
    r"(?:^|[^a-z])(?:(?:api|access|account|auth|encryption|private|secret|signing|subscription)[-_]?key"
    r"|auth|authorization|bearer|credentials?|passphrase|passw(?:or)?d|pwd|secret|token)(?:[-_]?id)?$"
)
"""Names of keys that hold one; not those of numbers of tokens."""
_IN_URL = re.compile(
    r"(?<=://)(?:[^\s/@]*:(?!\d+(?:/|$))\S*@|[^\s/@]+@)"
    r"|(?<=[?&])(?:[\w-]*(?:key|secret|sig|signature|token|credential))=[^\s&#]+",
    re.I,
)
"""User and password of a URL, and what signs one."""
_SHORTEST = 8
"""Characters of a variable of the environment that is looked for in other texts."""


def is_secret(name: str) -> bool:
    """Whether a key or variable of this name holds a secret.

    Example:
        >>> [is_secret(name) for name in ("api_key", "HF_TOKEN", "max_new_tokens", "key.bias")]
        [True, True, False, False]
    """
    return _NAMED.search(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()) is not None


def redacted(value: Any, name: str = "") -> Any:
    """Plain containers without secrets: those of keys named so, in URLs, and what the environment holds as one.

    Example:
        >>> redacted({"api_key": "abc", "uri": "https://me:pw@host/x", "seed": 1, "none": {"token": None}})
        {'api_key': '***', 'uri': 'https://***@host/x', 'seed': 1, 'none': {'token': None}}
        >>> redacted("s3://key:a/b+c@bucket/x and http://host:9000/a@b")
        's3://***@bucket/x and http://host:9000/a@b'
    """
    held = [text for key, text in os.environ.items() if len(text) >= _SHORTEST and is_secret(key)]
    return _without(value, name, held)


def _without(value: Any, name: str, held: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _without(inner, str(key), held) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without(inner, name, held) for inner in value]
    if not isinstance(value, str):
        return value
    if is_secret(name):
        return HIDDEN
    for text in held:
        value = value.replace(text, HIDDEN)
    return _IN_URL.sub(_hide, value)


def _hide(found: re.Match[str]) -> str:
    name, equals, _ = found[0].partition("=")
    return f"{HIDDEN}@" if found[0].endswith("@") else f"{name}{equals}{HIDDEN}"


def check_no_secrets(node: Any, place: str) -> None:
    """Refuse secrets that would be stored with a run's config.

    Args:
        node: plain containers, interpolations as they are written.
        place: its path.

    Raises:
        MsencError: names the key, not its value.
    """
    if isinstance(node, Mapping):
        for key, inner in node.items():
            check_no_secrets(inner, f"{place}.{key}")
    elif isinstance(node, list):
        for number, inner in enumerate(node):
            check_no_secrets(inner, f"{place}[{number}]")
    elif isinstance(node, str) and "${" not in node and (is_secret(place) or _IN_URL.search(node)):
        raise MsencError(
            f"{place}: a key or password given here would be stored in the run's folder. Leave it out and set the "
            "variable that its library reads (WANDB_API_KEY, COMET_API_KEY, MLFLOW_TRACKING_USERNAME and "
            f"MLFLOW_TRACKING_PASSWORD), or refer to one of your own: {place}='${{oc.env:MSENC_MY_KEY}}'"
        )
