"""Configs in runs' folders, which may be a stranger's: YAML -> a config, without what could fill the memory."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from msenc.config.build import with_current_targets
from msenc.config.schema import plain
from msenc.files import hold, read_text, reason_of
from msenc.files.kinds import MAX_DEPTH, Count, Name
from msenc.types import MsencError

MAX_BYTES = 2**18
"""Of a file; those of msenc have some kilobytes."""
MAX_SIZE = 10**7
"""Of a config, in characters, when all of its interpolations are put in."""
ADVICE = "Expected a config that train.py wrote: run that job again, or move its folder away."

_REFERENCE = re.compile(r"\$\{([^${}]*)\}")
_ALLOWED = re.compile(r"\$\{(?:[\w.\[\]-]+\}|oc\.env:MSENC_\w+[,}]|hydra:runtime\.output_dir\})")
"""What a stored config may refer to: its own keys, variables of msenc's, and the folder of the run (earlier runs)."""


class _Connector(TypedDict):
    num_queries: Count


class _Stream(TypedDict):
    name: Name
    dim: Count
    encoder: dict[str, Any]


class _Llm(TypedDict):
    name_or_path: str
    lora: NotRequired[dict[str, Any] | None]


class _Model(TypedDict):
    llm: _Llm
    streams: dict[Name, _Stream]
    llm_recipe: NotRequired[dict[str, Any] | None]
    connector: _Connector | None
    tie_connectors: bool
    layout: str


class _Data(TypedDict):
    name: Name
    dir: str
    batch_size: Count | None
    max_tokens_per_batch: Count | None
    num_workers: Count
    max_history_tokens: Count
    verify: bool
    filter: str | list[str]
    control: NotRequired[str | None]


class _Prompt(TypedDict):
    target: str


class _Paths(TypedDict):
    cache_dir: str


class _Optimizer(TypedDict):
    groups: NotRequired[dict[str, Any] | None]


class _Loss(TypedDict):
    weights: NotRequired[dict[str, float] | None]


class _Config(TypedDict):
    seed: Count
    modality: str
    model: _Model
    data: _Data
    prompt: _Prompt
    decoding: dict[str, Any]
    optimizer: NotRequired[_Optimizer]
    loss: NotRequired[_Loss]
    paths: _Paths


def read_config(path: Path) -> DictConfig:
    """The config of a run, with the names that targets have now, its interpolations as they are written.

    Raises:
        MsencError: it is missing, no YAML of one config, or holds more than any config does.
    """
    value = _read(path)
    if not isinstance(value, dict):
        raise MsencError(f"{path}: found no config. {ADVICE}")
    return OmegaConf.create(with_current_targets(value))


def read_overrides(path: Path) -> list[str]:
    """The overrides that a run was started with.

    Raises:
        MsencError: as `read_config`.
    """
    return hold(_read(path), list[str], path, ADVICE)


def settled(config: DictConfig, folder: Path) -> dict[str, Any]:
    """A run's config as plain containers, interpolations put in, and held to what every reader of it relies on.

    Args:
        config: of `read_config`.
        folder: the run's, for messages.

    Raises:
        MsencError: names the key that is something else.
    """
    path = folder / ".hydra" / "config.yaml"
    try:
        value = plain(config)
    except MsencError as error:
        raise MsencError(f"{path}: {reason_of(error).removeprefix('config: ')}. {ADVICE}") from error
    except RecursionError as error:
        raise MsencError(f"{path}: its interpolations lead back to themselves. {ADVICE}") from error
    hold(value, _Config, path, ADVICE)
    if value["model"]["streams"] and value["model"]["connector"] is None:
        raise MsencError(f"{path}, model.connector: found null, expected one, as there are streams. {ADVICE}")
    return value


def _read(path: Path) -> Any:
    try:
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes, expected at most {MAX_BYTES:,}")
        text = read_text(path, ADVICE)
        depth = 0
        for event in yaml.parse(text, Loader=yaml.CSafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if any(getattr(event, what, None) for what in ("anchor", "tag")):
                raise ValueError(f"an anchor, alias or tag in line {event.start_mark.line + 1}")
            if depth > MAX_DEPTH:
                raise ValueError(f"more than {MAX_DEPTH} lists and mappings in each other")
        value = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
        _check_size(value)
    except (ValueError, OSError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise MsencError(f"{path}: cannot be read as a config ({reason_of(error)}). {ADVICE}") from error
    for place, text in strings_of(value):
        if text.count("${") != len(_ALLOWED.findall(text)):
            raise MsencError(
                f"{path}: {place}: {text!r} refers to more than the config's own keys and MSENC_ variables. What else "
                "your environment holds is no business of a stored config: write the value in its place."
            )
    return hold(value, Any, path, ADVICE)


def strings_of(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested containers, with its place.

    Example:
        >>> list(strings_of({"a": {"b": ["c", 1]}}))
        [('a.b.0', 'c')]
    """
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from strings_of(inner, f"{place}.{key}".lstrip("."))


def _check_size(value: Any) -> None:
    """Refuse interpolations that refer to each other, twice each: thirty lines would become gigabytes.

    A reference counts as the largest of all nodes that have the name of its last part.
    """
    nodes: dict[str, list[Any]] = {}
    sizes: dict[str, int] = {}

    def note(node: Any) -> None:
        for key, inner in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            nodes.setdefault(str(key), []).append(inner)
            note(inner)

    def size_of(node: Any) -> int:
        if isinstance(node, dict | list):
            return 1 + sum(map(size_of, node.values() if isinstance(node, dict) else node))
        if not isinstance(node, str) or "${" not in node:
            return len(str(node))
        if re.search(r"\$\{[^:{}]*\$\{", node):
            raise ValueError(f"the interpolation {node[:60]!r}, whose name is interpolated")
        names = [([*re.findall(r"[\w-]+", inner)] or [""])[-1] for inner in _REFERENCE.findall(node)]
        total = len(node) + sum(map(size_of_name, names))
        if total > MAX_SIZE:
            raise ValueError(f"interpolations that make more than {MAX_SIZE:,} characters")
        return total

    def size_of_name(name: str) -> int:
        if name not in sizes:
            sizes[name] = 1  # what leads back to itself is refused when it is put in
            sizes[name] = max(map(size_of, nodes.get(name, [])), default=1)
        return sizes[name]

    note(value)
    if size_of(value) > MAX_SIZE:
        raise ValueError(f"interpolations that make more than {MAX_SIZE:,} characters")
