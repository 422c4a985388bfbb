"""Experiments with multisensory conversational agents. In Python: `train`, `load` (docs/talk.md)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msenc.api import load, train

__all__ = ["load", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # imported here: --help must not wait for torch
        from msenc import api

        return getattr(api, name)
    raise AttributeError(f"module 'msenc' has no attribute {name!r}")
