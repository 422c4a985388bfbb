"""Command lines: overrides as typed, and short forms that Hydra does not know."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from msenc.config.hints import nearest
from msenc.config.messages import CONFIGS
from msenc.config.stored import read_overrides
from msenc.runs.record import read_run
from msenc.runs.trust import check_overrides
from msenc.types import MsencError


def resumed_arguments(arguments: list[str]) -> list[str]:
    """A command line with ``resume=RUN`` -> the one that composes that run's config, and works in its folder.

    Args:
        arguments: of `train.py`; returned unchanged if they name no run's folder.

    Raises:
        MsencError: the folder is no run, its command line does more than set values, or the command is a multirun.
    """
    named = [a.partition("=")[2].strip("'\"") for a in arguments if a.startswith("resume=")]
    if not named or named[-1] in ("auto", "null", ""):
        return arguments
    if {"-m", "--multirun"} & set(arguments) or any(a.startswith("sweep=") for a in arguments):
        raise MsencError(
            f"resume={named[-1]}: a multirun makes many runs, this is a single one. Remove -m, or use resume=auto."
        )
    folder = Path(named[-1])
    read_run(folder, "resume")
    file = folder / ".hydra" / "overrides.yaml"
    given = [a for a in arguments if not a.startswith("resume=")]
    keys = {key_of(a) for a in given}
    own = [o for o in read_overrides(file) if key_of(o) not in keys | {"resume"}] if file.is_file() else []
    check_overrides(own, given, file)
    # A job's own overrides name its sweep, which would start over.
    return [*own, *given, f"resume={quoted_value(str(folder.resolve()))}", "hydra.mode=RUN"]


ALWAYS_THERE = ("r", "lora_alpha", "lora_dropout")
"""Keys of ``model.llm.lora`` if it is not null; overriding a key of null is still refused."""


def spelt_out(arguments: Sequence[str]) -> list[str]:
    """Short forms as Hydra takes them.

    ``init_from=RUN`` -> ``init_from.run=RUN``: initialize everything from that run. And a key of ``model.llm.lora``
    that no YAML lists may still be one of PEFT's, as one of ``prompt.template_arguments`` may be a chat template's:
    they get the ``++`` that Hydra requires.

    Example:
        >>> spelt_out(["init_from=runs/single/A", "seed=2", "model.llm.lora.use_dora=true"])
        ['init_from.run=runs/single/A', 'seed=2', '++model.llm.lora.use_dora=true']
    """
    found = [a.replace("init_from=", "init_from.run=", 1) if a.startswith("init_from=") else a for a in arguments]
    lora = rf"model\.llm\.lora\.(?!({'|'.join(ALWAYS_THERE)})=)"
    unlisted = re.compile(rf"({lora}|prompt\.template_arguments\.)[\w.]+=")
    return [f"++{a}" if unlisted.match(a) else a for a in found]


def task_overrides(hydra: DictConfig) -> list[str]:
    """What a command sets of a run's config, as it was typed: to iterate over Hydra's list would resolve it."""
    found: list[str] = OmegaConf.to_container(hydra.overrides.task)
    return found


def key_of(override: str) -> str:
    """The key of an override, as ``modality`` in ``modality=text``."""
    return override.lstrip("+~").partition("=")[0]


_A_PATH = re.compile(
    r"(.+\.)?(dir|root|table|pairs|folder|init|name_or_path|save_dir|dirpath)|(paths\.)?\w+_dir|on_data|out|audio|video|history"
    r"|resume|init_from(\.(run|connectors|adapter))?|recogniser|checkpoint"
)
"""Keys whose values are paths, or may be: taken as they are typed, whatever signs Hydra would read in them."""
_MAY_BE_NULL = ("experiment", "sweep", "world")
"""Groups of which nothing is chosen by default."""


def read_arguments(arguments: Sequence[str], literal: Collection[str] = ()) -> list[str]:
    """A command line as it is typed -> as Hydra takes it.

    - ``data.root=A=B, C`` is quoted: where Hydra cannot read a path, or would see several values in it outside of a
      multirun, it is taken as it stands. ``~/`` at its beginning is the user's folder.
    - ``scheduler=null`` is ``scheduler=none``, where there is such a choice: no group takes a null from Hydra.

    Args:
        arguments: of a script.
        literal: keys whose values are always taken as they stand, but for ``null``: Hydra reads commas and quotes as
            its own.

    Raises:
        MsencError: an option that does not exist, an argument without a value, or a choice that can be none.

    Example:
        >>> read_arguments(["text=Well, yes!", "seed=2", "data.root=a=b", "data.dir='c d'", "scheduler=null"], ["text"])
        ["text='Well, yes!'", 'seed=2', "data.root='a=b'", "data.dir='c d'", 'scheduler=none']
    """
    parser = get_args_parser()
    parser.error = _refuse_option  # type: ignore[method-assign]
    options = parser.parse_args(arguments)
    is_multirun = options.multirun or any(a.startswith(("sweep=", "hydra.mode=MULTIRUN")) for a in options.overrides)
    found = []
    for argument in arguments:
        if argument not in options.overrides:
            found.append(argument)
        elif (read := _read_argument(argument, literal, is_multirun)) is not None:
            found.append(read)
    return found


def _refuse_option(message: str) -> NoReturn:
    raise MsencError(f"{message}. All options: --hydra-help; keys and their values are given as key=value.")


def _read_argument(argument: str, literal: Collection[str], is_multirun: bool) -> str | None:
    key, equals, value = argument.partition("=")
    name = key_of(argument)
    if not equals:
        if argument.startswith("~"):
            return argument
        raise MsencError(f"{argument!r}: no value. Expected key=value, such as seed=2.")
    if not name:
        raise MsencError(f"{argument!r}: no key. Expected key=value, such as seed=2.")
    if not argument.startswith("~") and (CONFIGS / name).is_dir():
        return _read_choice(argument, key, name, value, is_multirun)
    if not (name in literal or _A_PATH.fullmatch(name)) or value in ("", "null"):
        return argument
    if _A_PATH.fullmatch(name) and value.startswith("~/"):
        return f"{key}={quoted_value(str(Path(value).expanduser()))}"
    return f"{key}={quoted_value(value)}" if name in literal or _is_misread(argument, is_multirun) else argument


def _read_choice(argument: str, key: str, group: str, value: str, is_multirun: bool) -> str | None:
    """Of a group: Hydra takes names alone, and has an error of Python's for anything else."""
    choices = sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))
    given = value.split(",") if is_multirun else [value]
    if "null" in given and "none" in choices:
        return f"{key}={','.join('none' if choice == 'null' else choice for choice in given)}"
    if value == "null" and group in _MAY_BE_NULL:
        return None
    if value == "" or "null" in given or isinstance(_value_of(argument), dict | int | float | bool):
        raise MsencError(f"{argument}: no such choice.{nearest(value or 'null', choices)}")
    return argument


def _is_misread(argument: str, is_multirun: bool) -> bool:
    """Whether Hydra would take a path for something else."""
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        return True
    if override.is_sweep_override():
        return not is_multirun
    return isinstance(override.value(), int | float | bool)


def _value_of(argument: str) -> Any:
    try:
        return OverridesParser.create().parse_override(argument).value()
    except HydraException:  # it says so itself
        return None


def quoted_value(text: str) -> str:
    r"""A text as an override's value, whatever characters it has.

    Example:
        >>> print(quoted_value(r"it's in C:\a"))
        'it\'s in C:\a'
    """
    # In quotes Hydra reads a backslash as itself, but for those that stand before a quote.
    doubled = re.sub(r"(\\+)(?='|\Z)", r"\1\1", text)
    return "'{}'".format(doubled.replace("'", "\\'"))
