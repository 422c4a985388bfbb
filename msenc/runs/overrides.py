"""Command lines: overrides as they are typed, and the short forms that Hydra does not know."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from msenc.config.stored import read_overrides
from msenc.runs.record import read_run
from msenc.runs.trust import check_overrides
from msenc.types import MsencError


def resumed_arguments(arguments: list[str]) -> list[str]:
    """A command line with ``resume=RUN`` -> the one that composes that run's config, and works in its folder.

    Args:
        arguments: of `train.py`; returned as they are where they name no run's folder.

    Raises:
        MsencError: the folder is no run, its command line does more than set values, or the command is a multirun.
    """
    named = [a.partition("=")[2].strip("'\"") for a in arguments if a.startswith("resume=")]
    if not named or named[-1] in ("auto", "null", ""):
        return arguments
    if {"-m", "--multirun"} & set(arguments) or any(a.startswith("sweep=") for a in arguments):
        raise MsencError(
            f"resume={named[-1]}: a multirun makes many runs, this is one. Leave out -m, or use resume=auto."
        )
    folder = Path(named[-1])
    read_run(folder, "resume")
    file = folder / ".hydra" / "overrides.yaml"
    given = [a for a in arguments if not a.startswith("resume=")]
    keys = {key_of(a) for a in given}
    own = [o for o in read_overrides(file) if key_of(o) not in keys | {"resume"}] if file.is_file() else []
    check_overrides(own, given, file)
    # A job's own overrides name its sweep, which would begin anew.
    return [*own, *given, f"resume={quoted_value(str(folder.resolve()))}", "hydra.mode=RUN"]


ALWAYS_THERE = ("r", "lora_alpha", "lora_dropout")
"""Keys of ``model.llm.lora`` wherever it is not null; an override of one that finds null stays refused."""


def spelt_out(arguments: Sequence[str]) -> list[str]:
    """Short forms as Hydra takes them.

    ``init_from=RUN`` -> ``init_from.run=RUN``: a run to take everything from. And a key of ``model.llm.lora`` that no
    YAML lists is one of PEFT's all the same, as those of ``prompt.template_arguments`` are a chat template's: they get
    the ``++`` that Hydra asks for.

    Example:
        >>> spelt_out(["init_from=runs/single/A", "seed=2", "model.llm.lora.use_dora=true"])
        ['init_from.run=runs/single/A', 'seed=2', '++model.llm.lora.use_dora=true']
    """
    found = [a.replace("init_from=", "init_from.run=", 1) if a.startswith("init_from=") else a for a in arguments]
    lora = rf"model\.llm\.lora\.(?!({'|'.join(ALWAYS_THERE)})=)"
    unlisted = re.compile(rf"({lora}|prompt\.template_arguments\.)[\w.]+=")
    return [f"++{a}" if unlisted.match(a) else a for a in found]


def key_of(override: str) -> str:
    """What an override sets, as ``modality`` in ``modality=text``."""
    return override.lstrip("+~").partition("=")[0]


def literal_arguments(arguments: Sequence[str], keys: Collection[str]) -> list[str]:
    """Command-line arguments with some values taken as they are typed: Hydra reads commas and quotes as its own.

    Args:
        arguments: of a script.
        keys: whose values are literal, but for ``null``.

    Example:
        >>> literal_arguments(["text=Well, yes!", "seed=2"], ["text"])
        ["text='Well, yes!'", 'seed=2']
    """
    parts = [argument.partition("=") for argument in arguments]
    return [
        f"{key}={quoted_value(value)}" if key in keys and value not in ("", "null") else argument
        for argument, (key, _, value) in zip(arguments, parts, strict=True)
    ]


def quoted_value(text: str) -> str:
    r"""A text as an override's value, whatever signs are in it.

    Example:
        >>> print(quoted_value(r"it's in C:\a"))
        'it\'s in C:\a'
    """
    # In quotes Hydra reads a backslash as itself, but for those that stand before a quote.
    doubled = re.sub(r"(\\+)(?='|\Z)", r"\1\1", text)
    return "'{}'".format(doubled.replace("'", "\\'"))
