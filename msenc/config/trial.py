"""Parts that cost nothing are built once for a trial, before anything is prepared, loaded or written.

What their constructors refuse is said at once, with the key: torch checks its optimizers' numbers when they are made
and when they step, Lightning its trainer's when it is made, which in a run is after data and model.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from msenc.config.build import build, build_connector
from msenc.config.targets import is_others
from msenc.config.values import typed
from msenc.models.groups import OWN_KEYS, flatten_groups
from msenc.models.layers import layers_of
from msenc.types import MsencError

WIDTH = 8
"""Of an LLM, where none is loaded."""
WRITING = ("lightning.pytorch.loggers.CometLogger", "lightning.pytorch.loggers.MLFlowLogger")
"""What makes something elsewhere when it is built."""


def try_parts(config: Mapping[str, Any], here: bool = True) -> None:
    """Build what is cheap of a run, and drop it.

    Args:
        config: plain containers; held to its values (`check_values`), its targets checked.
        here: whether the run is to use this machine's devices.

    Raises:
        MsencError: names the key whose value is refused, where it is a single one.
    """
    with _silence():
        if _is_ours(config.get("prompt")):
            build(config["prompt"], "prompt")
        if config.get("model"):
            _try_model(config["model"])
        if config.get("optimizer"):
            _try_optimizers(config)
        if config.get("trainer"):
            _try_trainer(config, here)


def _is_ours(node: Any) -> bool:
    """Whether a node's class is known to cost nothing: msenc's or a library's, not the user's."""
    return bool(node) and (str(node["_target_"]).startswith("msenc.") or is_others(node["_target_"]))


def _try_model(model: Mapping[str, Any]) -> None:
    import torch

    for stream, settings in model["streams"].items():
        encoder, connector = settings["encoder"], model["connector"]
        layers_of(encoder, f"model.streams.{stream}.encoder")
        if _is_ours(encoder) and "name_or_path" not in encoder:
            build(encoder, f"model.streams.{stream}.encoder")
        if _is_ours(connector):
            node = {key: value for key, value in connector.items() if key != "init"}
            with torch.device("meta"):
                build_connector(node, settings, WIDTH)


def _try_optimizers(config: Mapping[str, Any]) -> None:
    """The optimizer as it is, and with each group's settings; on a CPU one step of it, as some refuse no sooner."""
    node = {key: value for key, value in config["optimizer"].items() if key != "groups"}
    if not _is_ours(node):
        return
    settings = {"optimizer": node}
    for name, group in flatten_groups(config["optimizer"].get("groups")).items():
        settings[f"optimizer.groups.{name}"] = node | {k: v for k, v in group.items() if k not in OWN_KEYS}
    steps = bool(config.get("trainer")) and config["trainer"].get("accelerator") == "cpu"
    for place, one in settings.items():
        _try_node(one, place, lambda tried: _step(tried, config.get("scheduler"), steps))


def _step(optimizer: Mapping[str, Any], scheduler: Any, steps: bool) -> None:
    import torch

    weights = torch.nn.Parameter(torch.ones(2, 2))
    weights.grad = torch.ones(2, 2)
    if optimizer["_target_"].endswith(".SparseAdam"):
        weights.grad = weights.grad.to_sparse()
    made = build(optimizer, "optimizer")([weights])
    if _is_ours(scheduler):
        build(scheduler, "scheduler")(made, total_steps=10, steps_per_epoch=5)
    if steps:
        try:
            made.step(lambda: torch.zeros(()))
        except Exception as error:
            raise MsencError(f"optimizer: {optimizer['_target_']} cannot take a step: {error}") from error


def _try_trainer(config: Mapping[str, Any], here: bool) -> None:
    trainer = (
        config["trainer"] if here else config["trainer"] | {"accelerator": "cpu", "devices": 1, "strategy": "auto"}
    )
    is_debug = bool(trainer.get("fast_dev_run"))
    nodes = {
        f"{group}.{name}": node
        for group in ("callbacks", "logger")
        for name, node in (config.get(group) or {}).items()
        if _is_ours(node) and node["_target_"] not in WRITING
    }
    for place, node in nodes.items():
        _try_node(node, place, lambda tried, place=place: build(tried, place))
    callbacks = [build(node, place) for place, node in nodes.items() if place.startswith("callbacks.")]
    if _is_ours(trainer):
        _try_node(
            trainer,
            "trainer",
            lambda tried: build(
                tried,
                "trainer",
                callbacks=[] if is_debug else callbacks,
                logger=[],
                plugins=[],
                default_root_dir=None,
                enable_model_summary=False,
                use_distributed_sampler=False,
            ),
        )


def _try_node(node: Mapping[str, Any], place: str, attempt: Callable[[Mapping[str, Any]], Any]) -> None:
    """Build a node; where that is refused, the key is named without which it is not."""
    try:
        attempt(node)
        return
    except MsencError as error:
        refused = error
    if not is_others(node["_target_"]):
        raise refused
    for key in [key for key in node if not key.startswith("_")]:
        try:
            attempt({other: value for other, value in node.items() if other != key})
        except MsencError:
            continue
        reason = str(refused).partition("refuses its settings: ")[2] or str(refused)
        raise MsencError(f"{place}.{key}: found {typed(node[key])}, which is refused: {reason}") from refused
    raise refused


@contextmanager
def _silence() -> Iterator[None]:
    """What a trial would say, the run itself says."""
    named = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in named]
    for logger in named:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(named, levels, strict=True):
            logger.setLevel(level)
