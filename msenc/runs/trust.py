"""Limits on stored configs and command lines, which are their author's data: checked before they are used."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from msenc.config.messages import CONFIGS
from msenc.config.schema import TrainConfig
from msenc.config.stored import strings_of
from msenc.types import MsencError

CHOICE = re.compile(r"\w[\w-]*(/\w[\w-]*)*")
"""A file of a group: no path that leaves ``configs/``."""

URL = re.compile(r"(?!(?:file|memory|sqlite)://)[^\s/]*://")
"""Whether it reaches another machine; these protocols only reach this machine, like paths."""


def check_urls(config: Any, named: Iterable[str], path: Path) -> None:
    """Refuse URLs in a stored config that the user has not named: contacting a server reveals something to it.

    Args:
        config: plain containers, interpolations resolved.
        named: what the user's own command line says; an address in it, and all below it, may be asked. So may those in
            the environment's ``MSENC_`` variables.
        path: where the config is stored, for the message.

    Raises:
        MsencError: names the first URL that is not allowed.
    """
    own = [*named, *(value for name, value in os.environ.items() if name.startswith("MSENC_"))]
    # A protocol alone is not a URL: it would allow everything that begins with it.
    allowed = [text.rstrip("/") for text in own if URL.match(text) and text.partition("://")[2].strip("/")]
    for place, text in strings_of(config):
        if URL.match(text) and not any(f"{text}/".startswith(f"{url}/") for url in allowed):
            raise MsencError(
                f"{path}: {place}={text}: a URL stored here is not opened unless you allow it. If you trust "
                f"it: 'urls=[{text}]'"
            )


def check_overrides(texts: Iterable[str], given: Iterable[str], path: Path) -> None:
    """Refuse overrides in a stored command line that do more than select files of ``configs/`` and set values.

    Args:
        texts: overrides.
        given: those of the user's own command line, which may name URLs (`check_urls`).
        path: where they are stored, for the message.

    Raises:
        MsencError: one names a ``_target_`` or a URL, or sets something of Hydra's or outside the schema.
    """
    parser = OverridesParser.create()
    named = list(values_of(given))
    for text in texts:
        try:
            # What argparse would take for a Hydra option is not an override to Hydra's parser either.
            override = parser.parse_override(text)
            found = _not_allowed(override)
        except HydraException:
            found = "is not an override"
        if found:
            raise MsencError(
                f"{path}: {text!r} {found}. A stored command line may only select files of configs/ and set values "
                "of the config. If it is yours, give it on your own command line, where it takes effect."
            )
        check_urls({override.key_or_group: override.value()}, named, path)


def values_of(overrides: Iterable[str]) -> Iterator[str]:
    """Every string in the values of a command line's overrides; errors are left to Hydra."""
    parser = OverridesParser.create()
    for text in overrides:
        with suppress(HydraException):
            yield from (value for _, value in strings_of(parser.parse_override(text).value()))


def _not_allowed(override: Override) -> str | None:
    """What an override does that a stored one may not; None if it is allowed."""
    key = override.key_or_group
    first, *others = re.split(r"[./]", key)
    groups = {folder.name for folder in CONFIGS.iterdir() if folder.is_dir()} - {"hydra"}
    known = groups | {field.name for field in fields(TrainConfig)}
    if first in ("plugins", "urls"):
        return "changes what is trusted"
    if first == "hydra" or override.package is not None:
        return "sets a Hydra option"
    if first not in known:
        return "sets a key that no run's config has"
    if override.is_sweep_override():
        return "is not a single value"
    value = override.value()
    if any(name.startswith("_") for name in [*others, *_keys(value)]):
        return "changes what is built"
    if "/" in key or (key in groups and isinstance(value, str | list)):
        choices = value if isinstance(value, list) else [value]
        if not all(choice is None or CHOICE.fullmatch(str(choice)) for choice in choices):
            return "is not a file of configs/"
    return None


def _keys(value: Any) -> list[str]:
    """All keys in nested containers."""
    if isinstance(value, dict):
        return [*map(str, value), *_keys(list(value.values()))]
    return [key for inner in value for key in _keys(inner)] if isinstance(value, list) else []
