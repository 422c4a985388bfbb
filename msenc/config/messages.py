"""Refusals as one sentence on the terminal: what was found, and the nearest valid name."""

import errno
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, ValidationError

from msenc.config.hints import nearest, no_layers
from msenc.config.targets import locate_target
from msenc.types import MsencError
from msenc.work.command import as_typed
from msenc.work.signals import INTERRUPTED

_installed = Path(__file__).parents[1] / "configs"
CONFIGS = _installed if _installed.is_dir() else Path(__file__).parents[2] / "configs"
"""Beside msenc in a checkout, in it where it is installed."""


OF_THE_DISK = {
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.ENAMETOOLONG, errno.EISDIR),
}
"""What a system says of folders and disks that a program cannot mend."""

OUTPUT_FULL = {errno.ENOSPC, errno.EDQUOT}
"""Of these, a system names no file where it is the standard output that takes no more."""

EXTRAS = {
    "hydra/sweeper/optuna": "search",
    "hydra/launcher/joblib": "parallel",
    "hydra/launcher/submitit_slurm": "cluster",
    "hydra/launcher/submitit_local": "cluster",
}
"""Choices that come with a plugin of Hydra's -> the extra of msenc that installs it."""

_shown_in_full: list[bool] = []
"""Of the outermost `readable_errors`: whether the user wants to see everything."""


@contextmanager
def readable_errors() -> Iterator[None]:
    """Show a refusal as a message and exit with status 1, without a traceback; a bug keeps its traceback.

    Hydra reports composition errors itself, without the nearest valid name; so it is asked to raise them
    (``HYDRA_FULL_ERROR``), unless the user has set that variable to see everything. Around a job inside of Hydra, too:
    what leaves it as an exception, Hydra adds a line to.
    """
    is_outermost = not _shown_in_full
    if is_outermost:
        _shown_in_full.append(os.environ.get("HYDRA_FULL_ERROR") == "1")
        before = os.environ.get("HYDRA_FULL_ERROR")
        os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    except KeyboardInterrupt:
        if not is_outermost or _shown_in_full[0]:
            raise
        print("Interrupted. To continue, repeat the command.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as e:
        if _shown_in_full[0] or (text := refusal(e)) is None:
            raise
        sys.exit(as_typed(text))
    finally:
        if is_outermost:
            _shown_in_full.clear()
            os.environ.pop("HYDRA_FULL_ERROR")
            if before is not None:
                os.environ["HYDRA_FULL_ERROR"] = before


def refusal(error: Exception) -> str | None:
    """What to say of an error that the user can mend; None of a bug."""
    if isinstance(error, MsencError):
        return f"error: {error}"
    if isinstance(error, OSError) and error.errno in OF_THE_DISK and error.filename is not None:
        return f"error: {error.filename}: {error.strerror}. Expected a place where this command may read and write."
    if isinstance(error, OSError) and error.errno in OUTPUT_FULL and error.filename is None:
        return f"error: output cannot be written ({error.strerror}). Free space where it goes, and repeat the command."
    if type(error).__module__.startswith(("joblib.externals.loky", "submitit.")):
        return (
            f"error: a job of the launcher was killed ({type(error).__name__}); running out of memory or time is the "
            "usual cause. What it finished is kept: repeat the command, which does what is left (prepare.py "
            "status=true says what that is)."
        )
    if _is_config_error(error):
        return f"config error: {_config_message(error)}"
    if (override := _override_being_applied(error)) is not None:
        key = override.partition("=")[0].lstrip("+~")
        return f"config error: {override}: cannot be set. A list is given as a whole, {key.rpartition('.')[0]}=[a,b]."
    return None


def _is_config_error(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in ("omegaconf", "hydra", "yaml")


def _override_being_applied(error: BaseException) -> str | None:
    """The override at which Hydra met an error that is of neither library, such as a name where a list has numbers."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "_apply_overrides_to_config":
            return frame.f_locals["override"].input_line
    return None


def _config_message(error: BaseException) -> str:
    """What Hydra or OmegaConf refuses, in one sentence, with the nearest valid name."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(inner)
    file = re.match(r"In '([\w/]+/[\w/]+)': ", str(error))
    where = f"{file.group(1)}.yaml: " if file else ""
    for e in chain:
        if isinstance(e, OverrideParseException):
            return _unreadable(e.override, next((str(c) for c in chain if type(c) is not type(e)), str(e)))
        if isinstance(e, (ConfigKeyError, ConfigAttributeError)) and e.full_key:
            return where + _unknown_key(e)
        if isinstance(e, ValidationError) and e.full_key:
            said = str(e).splitlines()[0].replace("incompatible with type hint 'bool'", "neither true nor false")
            return f"{where}{e.full_key}: {said}"
        if isinstance(e, MissingMandatoryValue):
            return f"{e.full_key}: no value. Give it: {e.full_key}=..."
        if isinstance(e, MissingConfigException) and e.missing_cfg_file and e.options is not None:
            group, _, choice = e.missing_cfg_file.rpartition("/")
            if extra := EXTRAS.get(e.missing_cfg_file):
                return f"{group}={choice}: its package is not installed. Install it: pip install -e '.[{extra}]'"
            return f"{group}={choice}: no such choice.{nearest(choice, e.options)}"
    texts = [str(e).strip() for e in (error, error.__cause__) if e is not None]
    if unfit := re.match(r"Error merging override (.*)", texts[0]):
        return f"{unfit[1]}: cannot be set: {_in_one_line(texts[-1])}."
    absent = re.match(r"Could not override '([\w/]+)'. No match in the defaults list", texts[0])
    if absent:
        return _absent_part(absent.group(1))
    if several := re.match(r"Ambiguous value for argument '(.*)'$", texts[0], re.MULTILINE):
        key, _, value = several[1].partition("=")
        return (
            f"{several[1]}: several values. Add -m to run each, or give a list, {key}=[{value}]; {_as_text(key, value)}"
        )
    key = getattr(error, "full_key", None)
    return where + (f"{key}: " if key else "") + _in_one_line("\n".join(dict.fromkeys(texts)))


def _in_one_line(text: str) -> str:
    """A library's message without what it says of its own classes and documentation."""
    lines = [line.strip() for line in text.splitlines()]
    classes = ("full_key:", "reference_type=", "object_type=", "provider=")
    aside = (*classes, "See https:", "Config search path", "Searched in")
    return " ".join(line for line in lines if line and not line.startswith(aside))


def _unreadable(override: str, reason: str) -> str:
    key, _, value = override.partition("=")
    reason = reason.partition(" expecting ")[0]
    return (
        f"{override}: cannot be read ({_in_one_line(reason)[:120]}). Close brackets and quotes; {_as_text(key, value)}"
    )


def _as_text(key: str, value: str) -> str:
    quoted = "'{}'".format(value.strip("'\"").replace("'", "\\'"))
    return f'a text is typed as "{key}={quoted}"'


RENAMED = {"controls": "control", "asr": "recogniser", "speech_recogniser": "recogniser"}
"""Keys of earlier versions -> what they are called now."""


def _unknown_key(error: Any) -> str:
    node, key = error.parent_node, str(error.key)
    if key in RENAMED:
        return f"{error.full_key}: is called {RENAMED[key]} now."
    if "/" in key:
        groups = sorted(str(f.parent.relative_to(CONFIGS)) for f in CONFIGS.rglob("*/*.yaml"))
        return f"{key}: no such group.{nearest(key, set(groups))}"
    names = set(node) if isinstance(node, Mapping) else set()
    whole = str(error.full_key).rpartition(".")[0]
    taken: Any = {}
    if "_target_" in names:
        with suppress(MsencError):
            taken = inspect.signature(locate_target(node["_target_"], whole)).parameters
    if key == "layers" and whole.endswith(".encoder") and key not in taken:
        return no_layers(error.full_key, node["_target_"])
    if key in taken:
        return f"{error.full_key}: not in the YAML, though {node['_target_']} takes it. Add it: +{error.full_key}=..."
    valid = {name for name in names | set(taken) if not name.startswith("_")}
    nothing = f" Nothing is there to set: {whole} is null or empty. Choose a config that fills it, or give all of it."
    return f"{error.full_key}: no such key.{nearest(key, valid) or nothing}"


def _absent_part(group: str) -> str:
    """A group that exists and that nothing chose: the modality brings the streams and their connector."""
    bringing = [f.stem for f in sorted(CONFIGS.glob("modality/*.yaml")) if f"/{group}:" in f.read_text("utf-8")]
    if not bringing:
        return f"{group}: nothing in this command has such a part."
    return f"{group}: the chosen modality has no such part. Choose one that has: modality={'|'.join(bringing)}"
