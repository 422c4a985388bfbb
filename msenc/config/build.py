"""Config nodes with a ``_target_`` -> objects; and the names that targets had before."""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

from msenc.config.targets import PACKAGES, is_built, is_others, locate_target
from msenc.files import reason_of
from msenc.models.layers import layers_of
from msenc.types import MsencError, needing

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
    "msenc.speech.espeak.": "msenc.speech.synthesizers.espeak.",
    "msenc.speech.hibari.": "msenc.speech.synthesizers.hibari.",
    "msenc.speech.kokoro.": "msenc.speech.synthesizers.kokoro.",
    "msenc.speech.openai.": "msenc.speech.synthesizers.openai.",
    "msenc.speech.qwen.": "msenc.speech.synthesizers.qwen.",
    "lightning.pytorch.callbacks.RichProgressBar": "msenc.training.loggers.TrainingProgress",
}
"""Where targets of earlier runs lay -> where they lie now; such runs are read, and found by their identity."""


def build(node: Any, place: str, **given: Any) -> Any:
    """Call a node's ``_target_`` with its keys and what the pipeline adds; ``_partial_`` nodes become partials.

    Hydra's ``instantiate`` would wrap a refusal in an error of its own, and turn dataclasses among the arguments into
    dictionaries. Of nodes in nodes, only a trainer's strategy is an argument, and it is built first.

    Args:
        node: plain containers.
        place: of the node in its config, such as ``model.connector``; it decides what may be built (`targets`).
        **given: more arguments.

    Raises:
        MsencError: the target may not be built there; the node has a key that the pipeline gives; or the constructor,
            where it is another package's, refuses its arguments. (What fails in msenc's own, or in the user's, is a
            bug, and stays one.)
    """
    if not isinstance(node, Mapping):
        raise MsencError(f"{place}: found {node!r}, expected a _target_ and its arguments.")
    target = node.get("_target_")
    located = locate_target(target, place)
    keys = {
        k: build(v, f"{place}.{k}") if isinstance(v, Mapping) and is_built(f"{place}.{k}") else v
        for k, v in node.items()
        if not k.startswith("_")
    }
    if taken := sorted(keys.keys() & given.keys()):
        raise MsencError(f"{place}.{taken[0]}: is set by msenc itself. Leave it out.")
    called = partial(_refusing, f"{place}: {target}", located) if is_others(target) else located
    call = partial(called, **keys, **given)
    with needing(target, PACKAGES[target][0]) if target in PACKAGES else nullcontext():
        return call if node.get("_partial_") else call()


def build_connector(node: Any, stream: Mapping[str, Any], out_dim: int) -> Any:
    """A stream's connector; of an encoder whose features hold several layers, it mixes them.

    Args:
        node: ``model.connector``.
        stream: settings of the stream: ``dim``, the width of its features (of each layer), and ``encoder``.
        out_dim: width of the LLM.

    Raises:
        MsencError: as `build` does; or a connector of the user's that cannot take layers.
    """
    connector = build(node, "model.connector", in_dim=stream["dim"], out_dim=out_dim)
    layers = layers_of(stream["encoder"])
    if len(layers) > 1:
        if not hasattr(connector, "take_layers"):
            raise MsencError(
                f"model.connector: {node['_target_']} cannot mix the encoder's layers {list(layers)}. Derive it from "
                "msenc.models.connector.Connector, or take one layer."
            )
        connector.take_layers(layers)
    return connector


def _refusing(what: str, located: Any, /, *args: Any, **keys: Any) -> Any:
    try:
        return located(*args, **keys)
    except MsencError:
        raise
    except Exception as error:  # torch, Lightning and their loggers have a dozen types for a value that they refuse
        raise MsencError(f"{what} refuses its settings: {reason_of(error)[:300]}") from error


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
