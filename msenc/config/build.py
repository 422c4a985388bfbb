"""Config nodes with a ``_target_`` -> objects; which names may be built, and the names they had before."""

import importlib
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

from msenc.types import MsencError, needing

TRUSTED_PACKAGES = ("msenc.", "torch.optim.", "lightning.")
"""What a ``_target_`` may name: a config must not be a way to run anything else."""


EXTRAS = {"lightning.pytorch.loggers.WandbLogger": "wandb"}
"""Targets that need an extra of msenc."""

MOVED = {
    "msenc.checkpoints.": "msenc.training.checkpoints.",
    "msenc.loggers.": "msenc.training.loggers.",
    "msenc.monitor.": "msenc.training.monitor.",
    "msenc.schedules.": "msenc.training.schedules.",
    "msenc.prepare.demo.": "msenc.demo.world.",
    "msenc.prepare.raw_demo.": "msenc.demo.raw_demo.",
    "msenc.prepare.tiny_llm.": "msenc.demo.tiny_llm.",
    "msenc.prepare.worlds.": "msenc.demo.",
    "msenc.prepare.segment.": "msenc.raw.segment.",
    "msenc.prepare.speakers.": "msenc.raw.speakers.",
}
"""Where targets of earlier runs lay -> where they lie now; such runs are read, and found by their identity."""


def build(node: Mapping[str, Any], **given: Any) -> Any:
    """Call a node's ``_target_`` with its keys and what the pipeline adds; ``_partial_`` nodes become partials.

    Hydra's ``instantiate`` would wrap a refusal in an error of its own, and turn dataclasses among the arguments into
    dictionaries. No node of msenc nests another, so this is all that is needed.
    """
    keys = {k: v for k, v in node.items() if not k.startswith("_")}
    target = node["_target_"]
    call = partial(locate_target(target, "config"), **keys, **given)
    with needing(target, EXTRAS[target]) if target in EXTRAS else nullcontext():
        return call if node.get("_partial_") else call()


def with_current_targets(node: Any) -> Any:
    """Plain containers of an earlier run, its targets by the names that they have now."""
    return _with_targets(node, MOVED)


def with_first_targets(node: Any) -> Any:
    """Plain containers with the names that targets had first, so that a run's identity outlives a move."""
    return _with_targets(node, {new: old for old, new in MOVED.items()})


def _with_targets(node: Any, renamed: Mapping[str, str]) -> Any:
    if isinstance(node, list):
        return [_with_targets(value, renamed) for value in node]
    if not isinstance(node, dict):
        return node
    node = {key: _with_targets(value, renamed) for key, value in node.items()}
    if isinstance(target := node.get("_target_"), str):
        before = max((name for name in renamed if target.startswith(name)), key=len, default=None)
        if before is not None:
            node["_target_"] = renamed[before] + target.removeprefix(before)
    return node


def locate_target(target: str, path: str) -> Any:
    """Import what a target names.

    Raises:
        MsencError: there is no such thing; `path` is the node, for the message.
    """
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise MsencError(f"{path}._target_: {target!r} cannot be imported: {e}.") from e
