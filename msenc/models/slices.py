"""Base weights read by slices: an LLM starts without any, and each process fills in its share from the files.

folder or hub id -> StoredWeights -> fingerprint, token embeddings, rows of any tensor
"""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from msenc.models.pretrained import name_some, quiet, split_revision, to_dtype
from msenc.types import MsencError


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
