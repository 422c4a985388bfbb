"""Loads models written by `save_pretrained` from a folder or hub, with clear errors.

Used by the encoders, the connectors and the LLM. When an LLM is divided among processes, each reads its share from the
files: folder or hub id -> StoredWeights -> fingerprint, token embeddings, rows of any tensor.
"""

import logging
import math
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from msenc.files.kinds import short
from msenc.types import MsencError

log = logging.getLogger(__name__)

ANOTHER = "Take another checkpoint, or train again."

REACH_S = 10.0
"""Seconds within which the hub has to answer at all."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def to_dtype(name: str) -> torch.dtype:
    """The torch type of that name.

    Raises:
        MsencError: for any other word.

    Example:
        >>> to_dtype("bfloat16")
        torch.bfloat16
    """
    if name not in DTYPES:
        raise MsencError(f"dtype {name!r}: expected one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def load_pretrained(cls: type, name_or_path: str, may_miss: tuple[str, ...] = (), **kwargs: Any) -> Any:
    """Call ``cls.from_pretrained`` and turn its failures into errors that say what to do.

    A model whose checkpoint lacks a tensor is refused too: transformers would fill it with random numbers and
    only log that. No code of a folder is run (transformers would ask on the terminal), nothing that is pickled is
    executed, and a name is never a URL.

    Args:
        cls: a transformers class with `from_pretrained`: config, tokenizer, processor or model, Auto or not.
        name_or_path: a folder, or a hub id, of which ``ID@REVISION`` names one commit, tag or branch.
        may_miss: endings of tensor names that the model does not need (say, those used in its pretraining alone).
        **kwargs: passed on.

    Returns:
        What `from_pretrained` returns.

    Raises:
        MsencError: with the name, what was tried, what was expected and what to do.
    """
    if "://" in str(name_or_path):
        raise MsencError(f"{cls.__name__}: {name_or_path!r} is a URL. Expected a folder or a hub id.")
    folder = Path(name_or_path).expanduser()
    name, revision = split_revision(name_or_path)
    if not folder.is_dir():
        look_for_hub()
    if revision is not None:
        kwargs["revision"] = revision
    is_model = _is_model(cls)
    if is_model:
        kwargs |= {"output_loading_info": True, "weights_only": True}
    try:
        # A download of gigabytes shows its progress; reading a folder needs none.
        with quiet(hide_bars=folder.is_dir()):
            loaded = cls.from_pretrained(name, trust_remote_code=False, **kwargs)
    except Exception as error:  # transformers raises many types of errors for folders in other formats
        raise load_error(cls.__name__, name_or_path, _reason(error)) from error
    if not is_model:
        return loaded
    model, info = loaded
    missing = sorted(key for key in info["missing_keys"] if not key.endswith(may_miss or ("\0",)))
    if missing:
        raise load_error(cls.__name__, name_or_path, f"its weights lack {len(missing)} tensors ({name_some(missing)})")
    return model


@cache
def look_for_hub() -> None:
    """Where the hub cannot be reached, take what its local cache has, in this process and those it starts.

    The hub's client would ask six times for each file of a model, for half a minute each, and print every attempt;
    in a cluster's nodes without a network, that holds for models that are in the cache, too.
    """
    from huggingface_hub import constants, get_session, is_offline_mode

    if is_offline_mode():
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=REACH_S)  # any answer will do
    except Exception as error:  # of the HTTP library, the proxy, the system
        log.warning(
            "%s cannot be reached (%s): models come from its local cache alone.",
            constants.ENDPOINT,
            type(error).__name__,
        )
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"


def split_revision(name_or_path: str | Path) -> tuple[str, str | None]:
    """A model's folder, and None; or its hub id, and the revision after ``@``, if it names one.

    Example:
        >>> split_revision("openai/whisper-base@e37978b")
        ('openai/whisper-base', 'e37978b')
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return str(folder), None
    name, _, revision = str(name_or_path).partition("@")
    return name, revision or None


def pinned(name_or_path: str) -> str | None:
    """A hub id with the commit that was loaded of it, where the hub's local cache knows that; None for a folder."""
    from huggingface_hub import try_to_load_from_cache

    name, revision = split_revision(name_or_path)
    if Path(name).is_absolute() or Path(name).is_dir():
        return None
    try:
        file = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # no id of the hub: a folder that is gone
        return None
    commit = Path(file).parent.name if isinstance(file, str) else revision
    return f"{name}@{commit}" if commit else name


def _reason(error: Exception) -> Exception | str:
    """Why loading failed; without advice to run untrusted code."""
    if "trust_remote_code" in str(error):
        return "it requires running its own code (auto_map in its config), which msenc never does"
    held = re.search(r"GLOBAL (\S+)", str(error))
    if held:
        return f"it contains {held[1]}, which is not a tensor"
    # These messages recommend loading the file with everything it would execute.
    return str(error).partition("\n")[0] if isinstance(error, pickle.UnpicklingError) else error


def load_torch_file(path: Path, mmap: bool = True) -> Any:
    """Read a file written by ``torch.save``, without executing anything that is pickled.

    Args:
        path: of the file.
        mmap: let tensors stay on disk until they are used.

    Raises:
        ValueError: not such a file, or it contains anything but tensors and plain containers.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises many types of errors for files in other formats
        found = str(_reason(error)).partition("\n")[0]
        raise ValueError(f"{path.name} cannot be read as tensors in plain containers: {found}") from error


def check_tensors(state: Mapping[Any, Any], where: str) -> None:
    """Refuse invalid weights: anything that is not a tensor, and NaN or infinity.

    Raises:
        MsencError: names the first one.
    """
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or not _is_dense(tensor):
            raise MsencError(f"{where}, {short(name)}: found a {type(tensor).__name__}, expected a tensor. {ANOTHER}")
        if tensor.is_floating_point() and not math.isfinite(tensor.sum()) and not tensor.isfinite().all():
            number = int((~tensor.isfinite()).sum())
            raise MsencError(
                f"{where}, {name}: found NaN or infinity in {number:,} of {tensor.numel():,} values: the training "
                f"diverged, or the file was changed. {ANOTHER}"
            )


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor really stores all its values: by strides, one number can fill any shape."""
    is_usual = tensor.layout is torch.strided and not tensor.is_quantized and tensor.element_size() <= 8
    return is_usual and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def load_error(what: str, name_or_path: str, reason: Exception | str) -> MsencError:
    """The error for a model that cannot be loaded.

    Args:
        what: what was to be loaded.
        name_or_path: where from.
        reason: the exception, or a clause that describes it.
    """
    text = str(reason).strip() or type(reason).__name__
    is_folder = Path(name_or_path).expanduser().is_dir()
    tried = "as a folder" if is_folder else "as a folder (there is none of this name) and as a hub id"
    return MsencError(
        f"{what}: cannot load {str(name_or_path)!r}.\n"
        f"  tried: {tried}\n"
        f"  found: {text}\n"
        "  expected: a folder written by save_pretrained (config, weights and, where needed, tokenizer or"
        " preprocessor), or a hub id that is reachable or in the local hub cache\n"
        "  do: check the name; without a network, download the model elsewhere and give its folder"
    )


def name_some(names: list[str], limit: int = 6) -> str:
    """The first names of a list, and how many more there are.

    Example:
        >>> name_some(["a", "b", "c"], limit=2)
        'a, b and 1 more'
    """
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _is_model(cls: type) -> bool:
    from transformers import PreTrainedModel
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    return issubclass(cls, (PreTrainedModel, _BaseAutoModelClass))


@contextmanager
def quiet(hide_bars: bool) -> Iterator[None]:
    """Suppress transformers' warnings (those that matter are checked here) and, optionally, its progress bars."""
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if hide_bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


# ---------------------------------------------------------------------------------------------------- by slices


class StoredWeights:
    """The safetensors of an LLM; values are read when they are asked for, as `load_llm` would have loaded them.

    Args:
        name_or_path: hub id, or folder written by ``save_pretrained``.
        llm: its shapes, without adapters.
        dtype: see `load_llm`.
        round_to: see `load_llm`.

    Raises:
        MsencError: there are no safetensors, or they have the LLM's tensors by other names or in other shapes.
    """

    def __init__(self, name_or_path: str, llm: nn.Module, dtype: str, round_to: str | None) -> None:
        self._types = [to_dtype(name) for name in (dtype, round_to, dtype) if name is not None]
        self._places: dict[str, tuple[str, str]] = {}  # name in the LLM -> file, name in the file
        stored = {name: file for file in _find_files(name_or_path) for name in _names_in(file)}
        state = llm.state_dict(keep_vars=True)
        by_tensor = {id(tensor): name for name, tensor in state.items() if name in stored}
        missing = [name for name, tensor in state.items() if id(tensor) not in by_tensor]
        if missing:
            raise MsencError(
                f"{name_or_path}: its safetensors lack {len(missing)} tensors of {type(llm).__name__} "
                f"({name_some(missing)}), or have them by names that only its own loader knows. Load it whole "
                "(trainer=ddp), or write it anew with save_pretrained."
            )
        for name, tensor in state.items():
            own = name if name in stored else by_tensor[id(tensor)]
            self._places[name] = (stored[own], own)
            if (found := self._open(name).shape) != tensor.shape:
                raise MsencError(
                    f"{name_or_path}: {name} is {tuple(found)} in its safetensors, and {tuple(tensor.shape)} by its "
                    "config. Give the folder of one model."
                )
        for name, tensor in state.items():
            if not torch.equal(self._open(name), self._open(by_tensor[id(tensor)])):
                raise MsencError(
                    f"{name_or_path}: its config ties {name} to {by_tensor[id(tensor)]}, and its safetensors differ in "
                    "them. Set tie_word_embeddings in its config.json as it was trained."
                )

    def _open(self, name: str) -> Tensor:
        """A tensor whose values stay in the file until they are used."""
        file, stored = self._places[name]
        with safe_open(file, "pt") as tensors:
            return tensors.get_tensor(stored)

    def _as_loaded(self, tensor: Tensor) -> Tensor:
        for dtype in self._types if tensor.is_floating_point() else ():
            tensor = tensor.to(dtype)
        return tensor

    def knows(self, name: str) -> bool:
        """Whether a tensor, by its name in the LLM with or without adapters, is one of the base weights."""
        return plain_name(name) in self._places

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of a tensor, by its name in the LLM with or without adapters."""
        tensor = self._open(plain_name(name))
        return self._as_loaded(tensor[start:stop] if tensor.dim() else tensor)

    def sample(self, name: str, step: int) -> Tensor:
        """Every `step`-th value of a tensor."""
        return self._as_loaded(self._open(name).reshape(-1)[::step])


def _names_in(file: str) -> list[str]:
    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())


def _find_files(name_or_path: str) -> list[str]:
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    name, revision = split_revision(name_or_path)
    if not Path(name).is_dir():
        look_for_hub()
    of = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    with quiet(hide_bars=Path(name).is_dir()):
        single = cached_file(name, "model.safetensors", **of)
        if single is not None:
            return [single]
        index = cached_file(name, "model.safetensors.index.json", **of)
        if index is not None:
            return get_checkpoint_shard_files(name, index, revision=revision)[0]
    raise MsencError(
        f"{name_or_path}: found no model.safetensors, expected one: only of safetensors can each process read its own "
        "share. Write them with save_pretrained of transformers."
    )


def plain_name(name: str) -> str:
    """The name of a tensor in the LLM without PEFT's adapters.

    Example:
        >>> plain_name("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
        'model.layers.0.mlp.up_proj.weight'
    """
    name = name.removeprefix("base_model.model.")
    for added in (".base_layer", ".original_module", ".modules_to_save.default"):
        name = name.replace(added, "")
    return name
