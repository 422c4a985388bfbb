"""What a config may hold, as JSON schemas for editors and as lines of ``--help``.

Made of the dataclasses (`schema`), the kinds of values (`values`) and the constructors that a config may name
(`targets`), so that an editor completes and refuses what the commands take and refuse. ``msenc configs --schema``
writes them beside the configs, each of which names its own.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from msenc.config.schema import (
    EvaluateConfig,
    PrepareConfig,
    ReportConfig,
    RespondConfig,
    TrainConfig,
)
from msenc.config.targets import BUILDABLE, locate_target
from msenc.config.values import VALUES, kind_of
from msenc.types import MsencError

FOLDER = "schema"
"""Of the schemas, beside the configs."""
COMMANDS = {
    "train": TrainConfig,
    "prepare": PrepareConfig,
    "evaluate": EvaluateConfig,
    "report": ReportConfig,
    "respond": RespondConfig,
}
GLOBAL = "any"
"""Schema of files that are composed into the whole config, of any command."""
OPEN = {"optimizer": ("groups",)}
"""Node -> keys beside its constructor's arguments."""
NO_VALUE_YET = {"type": "string", "pattern": r"\$\{|^\?\?\?$"}
"""An interpolation, or ``???``: what stands there is known when the config is composed."""
_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null"}
_PACKAGE = re.compile(r"^# @package (\S+)$", re.MULTILINE)
MODELINE = re.compile(r"^# yaml-language-server: \$schema=(\S+)$", re.MULTILINE)


def docs_of(thing: Any) -> dict[str, str]:
    """Argument -> what its docstring says of it, up to the first full stop, on one line.

    Example:
        >>> docs_of(TrainConfig)["resume"][:21]
        "a run's folder, which"
    """
    texts = [inspect.getdoc(thing) or "", inspect.getdoc(getattr(thing, "__init__", None)) or ""]
    found: dict[str, str] = {}
    for text in texts:
        _, _, args = text.partition("Args:\n")
        for entry in re.split(r"\n(?=    \S)", args.partition("\n\n\n")[0]):
            match = re.match(r"\s+\*{0,2}(\w+)(?: \([^\n]*?\))?: (.*)", entry, re.DOTALL)
            if match:
                line = " ".join(match[2].partition("\n\n")[0].split())
                found.setdefault(match[1], re.split(r"(?<=[a-z)`])\.(?: |$)", line)[0])
    return found


def help_of(command: str) -> Iterator[tuple[str, str]]:
    """Each key of a command, and what it is, in their order; of nodes that are built, only the node."""
    for key, text in _help(COMMANDS[command], ""):
        yield key, re.sub(r"\bNone\b", "null", text.replace("`", "")).removesuffix(".")


def _help(schema: Any, path: str) -> Iterator[tuple[str, str]]:
    said, hints = docs_of(schema), get_type_hints(schema)
    for field in fields(schema):
        name = f"{path}{field.name}"
        yield name, said.get(field.name, "")
        inner = [kind for kind in (hints[field.name], *get_args(hints[field.name])) if is_dataclass(kind)]
        for kind in inner:
            is_named = get_origin(hints[field.name]) is dict
            yield from _help(kind, f"{name}.{'NAME.' if is_named else ''}")


# ---------------------------------------------------------------------------------------------------- schemas


def schemas_of(configs: Path) -> dict[str, dict[str, Any]]:
    """File name -> schema, of every package that a file in a folder of configs has."""
    places = {place_of(file, configs) for file in configs.rglob("*.yaml")}
    return {f"{place}.json": schema_of(place) for place in sorted(places)}


def place_of(file: Path, configs: Path) -> str:
    """Name of a file's schema: a command, `GLOBAL`, or where in the config the file goes."""
    group = file.relative_to(configs).parent
    if group == Path():
        return file.stem
    package = _PACKAGE.search(file.read_text(encoding="utf-8"))
    if package is None:
        return ".".join(group.parts)
    return GLOBAL if package[1] == "_global_" else package[1]


def write_schemas(configs: Path) -> list[Path]:
    """Write the schemas of a folder's configs to `FOLDER` in it, and name them in files that name none.

    Returns:
        What was written. A schema that no file names any more goes.
    """
    folder = configs / FOLDER
    folder.mkdir(exist_ok=True)
    written = {
        name: json.dumps(schema, sort_keys=True, separators=(",", ":")) + "\n"
        for name, schema in schemas_of(configs).items()
    }
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8")
    for file in folder.glob("*.json"):
        if file.name not in written:
            file.unlink()
    unnamed = [f for f in sorted(configs.rglob("*.yaml")) if not MODELINE.search(f.read_text(encoding="utf-8"))]
    for file in unnamed:
        text = file.read_text(encoding="utf-8")
        package = _PACKAGE.match(text)  # Hydra looks for it in the first line alone
        at = package.end() + 1 if package else 0
        file.write_text(f"{text[:at]}{modeline(file, configs)}\n{text[at:]}", encoding="utf-8")
    return [*(folder / name for name in written), *unnamed]


def modeline(file: Path, configs: Path) -> str:
    """The line by which editors find a file's schema."""
    up = "../" * len(file.relative_to(configs).parent.parts)
    return f"# yaml-language-server: $schema={up}{FOLDER}/{place_of(file, configs)}.json"


def schema_of(place: str) -> dict[str, Any]:
    """The schema of what stands at a place of a config, or of a whole one."""
    if place == GLOBAL:
        whole = {key: value for kind in reversed(COMMANDS.values()) for key, value in _properties(kind, "").items()}
        found = _object(whole, "")
    elif place in COMMANDS:
        found = _object(_properties(COMMANDS[place], ""), "")
    else:
        found = _at(place)
    found = found.get("anyOf", [found])[0]  # a file is no null
    found["properties"] = {**found.get("properties", {}), **_OF_HYDRA}
    for rule in found.get("allOf", []):
        rule["then"]["propertyNames"]["enum"] += [*_OF_HYDRA]
    return {"$schema": "http://json-schema.org/draft-07/schema#", **found}


_OF_HYDRA: dict[str, Any] = {
    "defaults": {"type": "array", "description": "Files that this one goes on from, and choices of groups"},
    "hydra": {"type": "object", "description": "Hydra's own settings"},
}


def _at(place: str) -> dict[str, Any]:
    """Walk from a command's dataclass to a place below it."""
    if place.partition(".")[0] == "hydra":
        return {"type": "object"}
    for kind in COMMANDS.values():
        found: dict[str, Any] = _object(_properties(kind, ""), "")
        for name in place.split("."):
            inner = next((o for o in found.get("anyOf", [found]) if o.get("type") == "object"), {})
            found = inner.get("properties", {}).get(name) or inner.get("additionalProperties") or {}
        if found:
            return found
    raise MsencError(f"{place}: no place of a config. Correct the file's line # @package.")


def _object(properties: Mapping[str, Any], description: str) -> dict[str, Any]:
    found = {"type": "object", "properties": {**properties}, "additionalProperties": False}
    return {**found, "description": description} if description else found


def _properties(schema: Any, path: str) -> dict[str, Any]:
    said, hints = docs_of(schema), get_type_hints(schema)
    return {f.name: _described(_key(f"{path}{f.name}", hints[f.name]), said.get(f.name, "")) for f in fields(schema)}


def _key(path: str, annotation: Any) -> dict[str, Any]:
    """The schema of the value of a key, by what is known of its path, else by its annotation."""
    if _pattern(path, BUILDABLE) is not None:
        own = _pattern(path, VALUES)
        may_be_null = own is not None and NoneType in get_args(VALUES[own])
        node = _node(path)
        # A trainer's strategy is a name, or a node.
        return _any([node, *([_JUST_TEXT] if path == "trainer.strategy" else []), *([_NULL] if may_be_null else [])])
    options = [annotation, *get_args(annotation)] if get_origin(annotation) in (Union, UnionType) else [annotation]
    for option in options:
        if is_dataclass(option):
            found = _object(_properties(option, f"{path}."), "")
            return _any([found, *([_NULL] if len(options) > 1 else [])])
    if get_origin(annotation) is dict:
        inner = _key(f"{path}.*", get_args(annotation)[1])
        return {"type": "object", "additionalProperties": inner}
    if path == "decoding":
        return _object({key: _key(f"{path}.{key}", Any) for key in _decoding_keys()}, "")
    if path == "model.llm.lora":
        return _any([_object(_arguments(_lora(), path), ""), _NULL])
    pattern = _pattern(path, VALUES)
    return _kind(VALUES[pattern] if pattern else kind_of(annotation))


_NULL: dict[str, Any] = {"type": "null"}
_JUST_TEXT: dict[str, Any] = {"type": "string"}


def _node(path: str) -> dict[str, Any]:
    """An object with the arguments of whatever may be built at a place; which of them depends on its ``_target_``."""
    targets = {target: place for place in _patterns(path, BUILDABLE) for target in BUILDABLE[place]}
    properties: dict[str, Any] = {}
    rules = []
    open_keys = [*OPEN.get(path, ())]
    for target, place in targets.items():
        try:
            located = locate_target(target, place)
        except MsencError:  # of a package that is not there: its keys are not known
            continue
        arguments = _arguments(located, path)
        if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(located).parameters.values()):
            names = sorted({*arguments, "_target_", "_partial_", *open_keys})
            rules.append(_if({"properties": {"_target_": {"const": target}}, "required": ["_target_"]}, names))
        for key, value in arguments.items():
            properties.setdefault(key, value)
    # Your own classes may be named, too; of their arguments nothing is known here.
    own = {"type": "string", "pattern": rf"^(?!({'|'.join(sorted({t.partition('.')[0] for t in targets}))})\.)"}
    properties["_target_"] = {"anyOf": [{"enum": [*targets]}, own], "description": "what is built"}
    properties["_partial_"] = {"type": "boolean"}
    properties |= {key: {"type": "object"} for key in open_keys}
    rules.append(_if({"not": {"required": ["_target_"]}}, sorted(properties)))
    return {"type": "object", "properties": properties, "allOf": rules}


def _if(condition: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {"if": condition, "then": {"propertyNames": {"enum": names}}}


def _arguments(located: Callable[..., Any], path: str) -> dict[str, Any]:
    said = docs_of(located)
    try:
        signature = inspect.signature(located, eval_str=True)
    except NameError:  # an annotation of what is imported for type checkers alone
        signature = inspect.signature(located)
    found = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or name == "self":
            continue
        kind = kind_of(parameter.annotation)
        kind = kind | None if parameter.default is None and kind not in (object, None) else kind
        found[name] = _described(_key(f"{path}.{name}", kind), said.get(name, ""))
    return found


def _described(schema: dict[str, Any], text: str) -> dict[str, Any]:
    more = schema.get("description", "")
    text = "; ".join(part for part in (text, more) if part)
    return {**schema, "description": text} if text else schema


def _any(options: list[dict[str, Any]]) -> dict[str, Any]:
    flat = [inner for option in options for inner in option.get("anyOf", [option])]
    unique = [option for number, option in enumerate(flat) if option not in flat[:number]]
    return unique[0] if len(unique) == 1 else {"anyOf": unique}


def _kind(kind: Any) -> dict[str, Any]:
    """A kind of `msenc.files.kinds` as a schema; conditions beyond the type are its description."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind in (object, Any):
        return {}
    if origin is Annotated:
        return _described(_kind(parts[0]), parts[1].expected)
    if origin is Literal:
        return _any([{"enum": [*parts]}, NO_VALUE_YET])
    if origin in (Union, UnionType):
        options = [_kind(part) for part in parts]
        said = [option.pop("description") for option in options if "description" in option]
        return _described(_any(options), " or ".join(said))
    if origin in (list, tuple):
        items = _kind(parts[0]) if parts and origin is list else {}
        return _any([{"type": "array", **({"items": items} if items else {})}, NO_VALUE_YET])
    if origin is dict:
        inner = _kind(parts[1])
        return {"type": "object", **({"additionalProperties": inner} if inner else {})}
    plain = {"type": _PLAIN[NoneType if kind is None else kind]}
    return plain if kind in (str, None, NoneType) else _any([plain, NO_VALUE_YET])


def _pattern(path: str, patterns: Mapping[str, Any]) -> str | None:
    return next(_patterns(path, patterns), None)


def _patterns(path: str, patterns: Mapping[str, Any]) -> Iterator[str]:
    """Those that a path fits; ``*`` is any name, in either."""
    names = path.split(".")
    for pattern in patterns:
        parts = pattern.split(".")
        fits = [part == name or "*" in (part, name) for part, name in zip(parts, names, strict=False)]
        if len(parts) == len(names) and all(fits):
            yield pattern


def _decoding_keys() -> list[str]:
    from msenc.models.generation import DECODING_KEYS

    return [*DECODING_KEYS]


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig
