"""What a value from a file must be, as types -> the first place in it that is something else; names of files.

A kind is ``str``, ``int``, ``float``, ``bool``, ``None``, ``list[KIND]``, ``dict[str, KIND]``, ``KIND | KIND``,
``Literal``, a tuple of kinds, a ``TypedDict`` (which may hold more plain values), a dataclass (which may not), ``Any``
(plain values) or ``object`` (unchecked); and ``Annotated[KIND, Must(...)]``. An ``int`` is no bool and fits 64 bits, a
``float`` is finite, or such an ``int``.
"""

import math
import re
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import cache, lru_cache, reduce
from operator import or_
from pathlib import PurePosixPath
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, Union, get_args, get_origin, get_type_hints

import msgspec

from msenc.types import MsencError

MAX_DEPTH = 64
"""Of containers in each other; Python's own code for copying and writing them ends at some hundreds."""
MAX_NAME_BYTES = 200
"""Of UTF-8; file systems take 255, of which what stands before and after a name takes some."""
A_NAME = f"a name: one part of a path, no / or \\ or control character, not .., at most {MAX_NAME_BYTES} bytes"

_PLAIN = re.compile(rf"[\w-]{{1,{MAX_NAME_BYTES}}}", re.ASCII)
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}


class Must(NamedTuple):
    """A condition beyond the type.

    Args:
        test: whether a value of the type fits.
        expected: what does, in words.
    """

    test: Callable[[Any], bool]
    expected: str


class MisfitError(Exception):
    """A value that is not of its kind.

    Args:
        found: the value.
        expected: in words.
    """

    def __init__(self, found: Any, expected: str) -> None:
        super().__init__(found, expected)
        self.found, self.expected = found, expected
        self.place: list[str] = []  # keys and [numbers] from the inside out

    def __str__(self) -> str:
        place = ".".join(reversed(self.place)).replace(".[", "[")
        return f"{f'{place}: ' if place else ''}found {short(self.found)}, expected {self.expected}"


# ---------------------------------------------------------------------------------------------------- names


@lru_cache(4096)  # data sets repeat them: utt0, turns.json
def is_name(text: str) -> bool:
    r"""Whether a text can be one part of a path, and no other part than itself, on every system.

    Example:
        >>> [is_name(t) for t in ("meld", "train-000000.tar", "..", "a/b", "a\0", "", "NUL", "x" * 300)]
        [True, True, False, False, False, False, False, False]
    """
    if _PLAIN.fullmatch(text):  # most are: soon said
        return len(text) > 4 or text.lower() not in _RESERVED
    return (
        0 < len(text.encode("utf-8", "surrogatepass")) <= MAX_NAME_BYTES
        and not any(c in "/\\" or unicodedata.category(c) in ("Cc", "Cs") for c in text)
        and text[-1] not in ". "
        and text.partition(".")[0].lower() not in _RESERVED
    )


def check_name(text: Any, what: str) -> str:
    """The text, if it is a name.

    Raises:
        MsencError: it is none; `what` says where it stands.
    """
    if not isinstance(text, str) or not is_name(text):
        raise MsencError(f"{what}: found {short(text)}, expected {A_NAME}.")
    return text


def is_below(path: str) -> bool:
    """Whether a path leads down from the folder that it is relative to."""
    if path[:1] in ("", "/", ".") or ".." in path:
        parts = PurePosixPath(path).parts
        return bool(parts) and "\0" not in path and parts[0][0] != "/" and ".." not in parts
    return "\0" not in path


# ---------------------------------------------------------------------------------------------------- kinds

Name = Annotated[str, Must(is_name, A_NAME)]
Count = Annotated[int, Must((0).__le__, "0 or more")]
Split = Literal["train", "val", "test"]
Sha256 = Annotated[str, Must(re.compile(r"[0-9a-f]{64}").fullmatch, "64 hexadecimal digits")]
_WORDS: dict[Any, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    NoneType: "null",
    list: "a list",
    dict: "an object",
}


def check(value: Any, kind: Any) -> None:
    """Hold a value, as JSON or YAML gives it, to a kind.

    Raises:
        MisfitError: names the first place that does not fit.

    Example:
        >>> check({"dims": [1, 2, "3"]}, dict[str, list[int]])
        Traceback (most recent call last):
        ...
        msenc.files.kinds.MisfitError: dims[2]: found '3', expected a whole number
    """
    _checker(kind)(value)


def short(value: Any, most: int = 60) -> str:
    """A value in a message."""
    if isinstance(value, list | dict):
        return f"{_WORDS[type(value)]} of {len(value):,}"
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


@cache
def _checker(kind: Any) -> Callable[[Any], None]:
    """The check of a kind, made once: data sets hold millions of values."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return _check_plain
    if origin is NotRequired:
        return _checker(parts[0])
    if origin is Annotated:
        return _condition(_checker(parts[0]), parts[1])
    if origin is Literal:
        return _one_of(parts)
    if origin in (Union, UnionType):
        return _any_of(parts)
    if origin is list or (origin is tuple and parts[1:] == (...,)):
        return _list_of(_checker(parts[0]))
    if origin is tuple:
        return _tuple_of([_checker(part) for part in parts])
    if origin is dict:
        return _dict_of(_checker(parts[0]), _checker(parts[1]))
    if is_dataclass(kind) or hasattr(kind, "__required_keys__"):
        return _record(kind)
    if kind is object:  # nothing is looked at, where what is of another kind is refused later
        return lambda value: None
    return _plain_type(NoneType if kind is None else kind)


def fits_json(value: Any, kind: Any) -> bool:
    """Whether a value that JSON gave is of a dataclass's kind; if not, `check` says why, or that it is.

    Seven times as fast as `check`.
    """
    try:
        msgspec.convert(value, _compiled(kind))
    except (msgspec.ValidationError, UnicodeEncodeError):
        return False
    return True


@cache
def _compiled(kind: Any) -> Any:
    """A kind of plain types, tuples and dataclasses -> the type of msgspec that takes nothing else."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is int:
        return Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
    if kind is float:  # neither NaN nor infinity lies between these
        most = sys.float_info.max
        return _compiled(int) | Annotated[float, msgspec.Meta(ge=-most, le=most)]
    if origin in (Union, UnionType):
        return reduce(or_, map(_compiled, parts))
    if origin is tuple and parts[1:] == (...,):
        return list[_compiled(parts[0])]
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
        members = [
            (name, _compiled(hint)) + (() if name in needed else (msgspec.UNSET,)) for name, hint in hints.items()
        ]
        return msgspec.defstruct(kind.__name__, members, forbid_unknown_fields=True, kw_only=True)
    assert kind in (str, bool, NoneType), kind
    return kind


def _plain_type(kind: type) -> Callable[[Any], None]:
    expected = _WORDS[kind]

    def check_type(value: Any) -> None:
        if type(value) is not kind:
            raise MisfitError(value, expected)

    def check_int(value: Any) -> None:
        if type(value) is not int or not -(2**63) <= value < 2**63:
            raise MisfitError(value, expected if type(value) is not int else "a whole number of at most 64 bits")

    def check_float(value: Any) -> None:
        if type(value) is float:
            if not math.isfinite(value):
                raise MisfitError(value, "a finite number")
        elif type(value) is int:
            check_int(value)
        else:
            raise MisfitError(value, expected)

    return {int: check_int, float: check_float}.get(kind, check_type)


def _condition(check_type: Callable[[Any], None], must: Must) -> Callable[[Any], None]:
    test, expected = must

    def check_condition(value: Any) -> None:
        check_type(value)
        if not test(value):
            raise MisfitError(value, expected)

    return check_condition


def _one_of(choices: tuple[Any, ...]) -> Callable[[Any], None]:
    expected = f"one of {', '.join(map(str, choices))}"
    if all(type(choice) is str for choice in choices):
        return _condition(_plain_type(str), Must(set(choices).__contains__, expected))
    known = {(type(choice), choice) for choice in choices}  # True is no 1

    def check_choice(value: Any) -> None:
        if isinstance(value, list | dict) or (type(value), value) not in known:
            raise MisfitError(value, expected)

    return check_choice


def _any_of(kinds: tuple[Any, ...]) -> Callable[[Any], None]:
    checks = [_checker(kind) for kind in kinds if kind not in (None, NoneType)]
    may_be_none = len(checks) < len(kinds)
    first = checks[0]

    def check_any(value: Any) -> None:
        if value is None and may_be_none:
            return None
        try:
            first(value)
        except MisfitError as misfit:
            misfits = [misfit]
            for check_one in checks[1:]:
                try:
                    return check_one(value)
                except MisfitError as another:
                    misfits.append(another)
            # What fits from the outside says more of what is wrong within.
            deepest = max(misfits, key=lambda misfit: len(misfit.place))
            if not deepest.place:
                deepest.expected = " or ".join(dict.fromkeys(m.expected for m in misfits if not m.place))
                deepest.expected += " or null" * may_be_none
            raise deepest from None

    return check_any


def _list_of(check_one: Callable[[Any], None]) -> Callable[[Any], None]:
    def check_list(value: Any) -> None:
        if type(value) is not list:
            raise MisfitError(value, "a list")
        number = 0
        try:
            for inner in value:
                check_one(inner)
                number += 1
        except MisfitError as misfit:
            misfit.place.append(f"[{number}]")
            raise

    return check_list


def _tuple_of(checks: list[Callable[[Any], None]]) -> Callable[[Any], None]:
    def check_tuple(value: Any) -> None:
        if type(value) is not list or len(value) != len(checks):
            raise MisfitError(value, f"a list of {len(checks)}")
        for number, (check_one, inner) in enumerate(zip(checks, value, strict=True)):
            try:
                check_one(inner)
            except MisfitError as misfit:
                misfit.place.append(f"[{number}]")
                raise

    return check_tuple


def _dict_of(check_key: Callable[[Any], None], check_one: Callable[[Any], None]) -> Callable[[Any], None]:
    def check_dict(value: Any) -> None:
        if type(value) is not dict:
            raise MisfitError(value, "an object")
        for key, inner in value.items():
            try:
                check_key(key)
                check_one(inner)
            except MisfitError as misfit:
                misfit.place.append(short(_Words(key)))
                raise

    return check_dict


def _record(kind: Any) -> Callable[[Any], None]:
    hints = get_type_hints(kind, include_extras=True)
    checks = {key: _checker(hint) for key, hint in hints.items()}
    if is_dataclass(kind):
        needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    else:
        needed = kind.__required_keys__
    is_closed = is_dataclass(kind)

    def check_record(value: Any) -> None:
        if type(value) is not dict:
            raise MisfitError(value, "an object")
        if not needed <= value.keys():
            missing = ", ".join(key for key in hints if key in needed - value.keys())
            there = short(_Words(", ".join(map(str, value)) or "nothing"))
            raise MisfitError(_Words(f"no {missing}"), f"it beside {there}")
        for key, inner in value.items():
            if is_closed and key not in checks:
                raise MisfitError(_Words(f"the key {short(key)}"), f"none but {', '.join(hints)}")
            try:
                checks.get(key, _check_plain)(inner)
            except MisfitError as misfit:
                misfit.place.append(key)
                raise

    return check_record


class _Words(str):
    """What was found, said already."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _check_plain(value: Any, depth: int = 0) -> None:
    if type(value) in (list, dict):
        if depth == MAX_DEPTH:
            raise MisfitError(value, f"at most {MAX_DEPTH} lists and objects in each other")
        for key, inner in value.items() if type(value) is dict else enumerate(value):
            try:
                _check_plain(inner, depth + 1)
            except MisfitError as misfit:
                misfit.place.append(short(_Words(key)) if type(value) is dict else f"[{key}]")
                raise
    elif type(value) is int:
        _checker(int)(value)
    elif type(value) is float:
        _checker(float)(value)
    elif value is not None and type(value) not in (str, bool):
        raise MisfitError(value, "a text, a number, true, false, null, a list or an object")
