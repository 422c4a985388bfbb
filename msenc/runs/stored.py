"""What a run's folder holds is data of whoever made it: read here, and checked before anything acts on it."""

import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from msenc.config.messages import CONFIGS
from msenc.config.schema import TrainConfig
from msenc.types import MsencError

CHOICE = re.compile(r"\w[\w-]*(/\w[\w-]*)*")
"""A file of a group: no path that leaves ``configs/``."""


def read_yaml(path: Path) -> Any:
    """A YAML file of a run as plain containers; nothing in it is resolved.

    Raises:
        MsencError: it cannot be read as a config.
    """
    try:
        return OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException, RecursionError) as e:
        reason = " ".join(str(e).split())
        raise MsencError(f"{path}: cannot be read as a config ({reason}). Expected what train.py wrote.") from e


def read_overrides(path: Path) -> list[str]:
    """The command line that a run began with, from its ``.hydra/overrides.yaml``; see `check_overrides`.

    Raises:
        MsencError: it cannot be read.
    """
    texts = read_yaml(path)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise MsencError(f"{path}: expected a list of overrides, as train.py wrote it.")
    return texts


def check_overrides(texts: Iterable[str], path: Path) -> None:
    """Refuse of a stored command line what does more than to choose files of ``configs/`` and to set values.

    Args:
        texts: overrides.
        path: where they are stored, for the message.

    Raises:
        MsencError: one names a ``_target_``, or sets something of Hydra's or outside the schema.
    """
    parser = OverridesParser.create()
    for text in texts:
        try:
            # What argparse would take for an option of Hydra's is no override to its parser either.
            found = _not_allowed(parser.parse_override(text))
        except HydraException:
            found = "is no override"
        if found:
            raise MsencError(
                f"{path}: {text!r} {found}. A stored command line may choose files of configs/ and set values of the "
                "config, and nothing else. If it is yours, give it on your own command line, where it counts."
            )


def _not_allowed(override: Override) -> str | None:
    """What an override does that a stored one may not; None where it may."""
    key = override.key_or_group
    first, *others = re.split(r"[./]", key)
    groups = {folder.name for folder in CONFIGS.iterdir() if folder.is_dir()} - {"hydra"}
    known = groups | {field.name for field in fields(TrainConfig)}
    if first == "plugins":
        return "brings code along"
    if first == "hydra" or override.package is not None:
        return "sets something of Hydra's"
    if first not in known:
        return "sets what no config of a run has"
    if override.is_sweep_override():
        return "is no single value"
    value = override.value()
    if any(name.startswith("_") for name in [*others, *_keys(value)]):
        return "says what is built"
    if "/" in key or (key in groups and isinstance(value, str | list)):
        choices = value if isinstance(value, list) else [value]
        if not all(choice is None or CHOICE.fullmatch(str(choice)) for choice in choices):
            return "is no file of configs/"
    return None


def _keys(value: Any) -> list[str]:
    """All keys in nested containers."""
    if isinstance(value, dict):
        return [*map(str, value), *_keys(list(value.values()))]
    return [key for inner in value for key in _keys(inner)] if isinstance(value, list) else []
