"""What can be refused of a config before anything is loaded: arguments, groups, weights, keys that nothing reads."""

import inspect
import logging
import math
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from msenc.config.hints import nearest, no_layers
from msenc.config.schema import plain
from msenc.config.secrets import check_no_secrets
from msenc.config.stored import strings_of
from msenc.config.targets import check_packages, is_built, load_plugins, locate_target
from msenc.config.trial import try_parts
from msenc.config.values import check_value, check_values, kind_of, typed
from msenc.files.kinds import check_name
from msenc.models.groups import CONNECTOR, CONNECTORS, LLM, OWN_KEYS, flatten_groups
from msenc.prompt import SLOTS, TOKEN_KINDS
from msenc.types import MsencError

TAKEN_OUT = {"optimizer": {"groups"}}
"""Path of a node -> keys that the pipelines take out before they build it (`build_optimizer`)."""

WHOLE = ("auto", "single_device", "ddp")
"""How the names of Lightning's strategies begin under which each process has the whole LLM."""


def checked(cfg: DictConfig, given: Mapping[str, set[str]], here: bool = True) -> dict[str, Any]:
    """The config of the user's own command as plain containers, its plugins loaded, and all checked that can be.

    Args:
        cfg: as Hydra composed it; one that was read from a run's folder is no command of the user's.
        given: see `check_targets`.
        here: whether the run is to use this machine's devices.

    Raises:
        MsencError: a value is missing, none that its key takes, or refused where a cheap part is built of it.
    """
    if "paths" in cfg and not OmegaConf.is_missing(cfg.paths, "runs_dir") and cfg.paths.output_dir is None:
        cfg = cfg.copy()
        cfg.paths.output_dir = cfg.paths.runs_dir  # a run's folder is settled later; what lies in it is checked now
    if "logger" in cfg:
        check_no_secrets(OmegaConf.to_container(cfg.logger, resolve=False), "logger")
    config = plain(cfg)
    for key, text in strings_of(config):
        if text == "???":
            raise MsencError(f"{key}: no value. Give it: {key}=...")
    load_plugins(config.get("plugins", []))
    if here:  # the jobs of a sweep may run elsewhere
        check_packages(config)
    # Where it is installed, PEFT imports it, and at each start it says which kernels for CPUs could be installed, too.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    check_values(config)
    check_targets(config, given)
    _check_bounds(config)
    try_parts(config, here and not config.get("plan"))
    return config


def _check_bounds(config: Mapping[str, Any]) -> None:
    """What is right of each value, and wrong of several together."""
    model = config.get("model") or {}
    if model.get("streams") and model["connector"] is None:
        raise MsencError("model.connector: found null, expected one, as there are streams: model/connector=conv")
    trainer = config.get("trainer") or {}
    if trainer and "llm" in model:  # evaluate.py has no model of its own
        _check_quantization(model["llm"], trainer.get("strategy", "auto"))
    if config.get("objective") is not None:
        _check_objective(config)
    if trainer.get("max_epochs") == -1 and trainer.get("max_steps", -1) == -1:
        raise MsencError("trainer.max_epochs=-1: the run would never end. Give trainer.max_steps=..., too.")


def _check_objective(config: Mapping[str, Any]) -> None:
    """Refuse what preference tuning would leave without effect, or cannot keep to."""
    data = config["data"]
    for key, value, why in (
        ("data.drop", data["drop"], "the reference would read other turns"),
        ("loss.weights", config["loss"]["weights"], "a reply is preferred as a whole"),
        ("stage", config["stage"], "connectors are aligned before a run learns to reply"),
    ):
        if value:
            raise MsencError(f"{key}: found {typed(value)}, but objective=dpo takes none: {why}. Leave it out.")
    if config["model"]["layout"] == "sample" and data["max_tokens_per_batch"] is not None:
        raise MsencError(
            "model.layout=sample: found data.max_tokens_per_batch, which objective=dpo only keeps to in the layout "
            "dialogue. Set data.batch_size=4 data.max_tokens_per_batch=null."
        )


def _check_quantization(llm: Mapping[str, Any], strategy: Any) -> None:
    quantization = llm.get("quantization")
    if quantization is None:
        return
    from msenc.models.quantize import check_quantization

    check_quantization(quantization, llm.get("freeze", False), llm.get("lora"))
    name = strategy.get("_target_") if isinstance(strategy, Mapping) else strategy
    if not str(name).startswith(WHOLE):
        raise MsencError(
            f"model.llm.quantization={quantization}: trainer.strategy={name} divides the LLM's weights among "
            "processes, and quantized ones cannot be. Take trainer=gpu or ddp, or model.llm.quantization=null."
        )


def check_targets(node: Any, given: Mapping[str, set[str]] | None = None, path: str = "") -> int:
    """Bind every ``_target_`` node below `node` to its signature, without building anything.

    Args:
        node: plain containers (``OmegaConf.to_container``).
        given: dotted path of a node -> arguments that the pipeline adds when it builds that node.
        path: the dotted path of `node` itself.

    Returns:
        The number of nodes that were bound.

    Raises:
        MsencError: a target that may not be built there, or does not take the node's keys (it names the
            nearest argument), or their types; groups of parameters or weights of the loss that cannot be meant.
    """
    if isinstance(node, list):
        return sum(check_targets(v, given, f"{path}[{i}]") for i, v in enumerate(node))
    if not isinstance(node, dict):
        return 0
    count = sum(check_targets(v, given, f"{path}.{k}".lstrip(".")) for k, v in node.items())
    if not path:
        _check_names(node)
        _check_groups(node)
        _check_loss(node)
    target = node.get("_target_")
    if target is None:
        _check_without_target(node, path)
        return count
    located = locate_target(target, path)
    keys = {k for k in node if not k.startswith("_")} - TAKEN_OUT.get(path, set())
    added = (given or {}).get(path, set())
    missing = [k for k in keys if node[k] == "???"]
    if missing:
        raise MsencError(f"{path}.{missing[0]}: no value. Give it: {path}.{missing[0]}=...")
    signature = _signature(located)
    parameters = signature.parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in sorted(keys - set(parameters)):
        if key == "layers" and path.endswith(".encoder"):
            raise MsencError(no_layers(f"{path}.{key}", target))
        if not takes_any:
            raise MsencError(f"{path}.{key}: {target} takes no such argument.{nearest(key, parameters)}")
    nodes = {key for key in keys if isinstance(node[key], dict) and is_built(f"{path}.{key}")}
    for key in sorted(keys & set(parameters) - nodes):
        check_value(f"{path}.{key}", node[key], _kind(parameters[key]))
    if not node.get("_partial_"):
        try:
            signature.bind(**dict.fromkeys(keys | added))
        except TypeError as e:
            raise MsencError(f"{path}: {target}: {e}.") from e
    return count + 1


def _check_names(config: Mapping[str, Any]) -> None:
    """What becomes a part of paths: of the data set, and of its streams."""
    data, streams = config.get("data"), (config.get("model") or {}).get("streams")
    if data and "name" in data:
        check_name(data["name"], "data.name")
    for stream, settings in (streams or {}).items():
        check_name(stream, "model.streams")
        check_name(f"{stream}-{settings['name']}", f"model.streams.{stream}.name")


def _check_groups(config: Mapping[str, Any]) -> None:
    """Names and settings of `optimizer.groups`; what they match is known when the model is there."""
    optimizer = config.get("optimizer") or {}
    groups = flatten_groups(optimizer.get("groups"))
    if not groups:
        return
    # Parts that this run lacks are no mistake: a sweep's rows share their groups.
    parts = [LLM, CONNECTORS, *(f"{CONNECTOR}.{stream}" for stream in SLOTS)]
    taken = inspect.signature(locate_target(optimizer["_target_"], "optimizer")).parameters
    valid = {*taken, *OWN_KEYS} - {"params"}
    scheduler = config.get("scheduler")
    has_warmup = (
        scheduler and "warmup" in inspect.signature(locate_target(scheduler["_target_"], "scheduler")).parameters
    )
    for name, settings in groups.items():
        path = f"optimizer.groups.{name}"
        if not isinstance(settings, Mapping):
            raise MsencError(f"{path}: found {typed(settings)}, expected settings, such as {path}.lr=3e-4")
        is_pattern = name not in parts and "pattern" in settings
        if not is_pattern and name not in parts:
            raise MsencError(_no_such_group(name, parts))
        if name in parts and "pattern" in settings:
            raise MsencError(f"{path}.pattern: {name} is a part of the model. Give the group another name.")
        for key, value in settings.items():
            if key not in valid:
                raise MsencError(f"{path}.{key}: no such setting.{nearest(str(key), valid)}")
            if key == "pattern":
                if not isinstance(value, str):
                    raise MsencError(f"{path}.pattern: found {value!r}, expected a pattern of names, such as '*.bias'.")
            elif key == "warmup" or _is_number(taken[key]):
                _check_amount(f"{path}.{key}", value, most=1 if key == "warmup" else math.inf)
        if "warmup" in settings and not has_warmup:
            chosen = scheduler["_target_"] if scheduler else "none"
            raise MsencError(
                f"{path}.warmup: the scheduler ({chosen}) has no warm-up. Choose one that has: scheduler=warmup_cosine"
            )


def _no_such_group(name: str, parts: list[str]) -> str:
    return (
        f"optimizer.groups.{name}: no such part of the model.{nearest(name, parts)} A group of another name needs a "
        f"pattern of parameter names: optimizer.groups.{name}.pattern='*.bias'"
    )


def _check_loss(config: Mapping[str, Any]) -> None:
    weights = (config.get("loss") or {}).get("weights") or {}
    for kind, weight in weights.items():
        if kind not in TOKEN_KINDS:
            raise MsencError(f"loss.weights.{kind}: no such kind of token.{nearest(kind, TOKEN_KINDS)}")
        _check_amount(f"loss.weights.{kind}", weight)
    if not any(weights.get(kind, 1) for kind in TOKEN_KINDS):
        raise MsencError("loss.weights: every kind of token weighs 0, so nothing would be learned. Raise one of them.")


def _check_amount(path: str, value: Any, most: float = math.inf) -> None:
    """A number that is 0 or more; infinity is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MsencError(f"{path}: found {value!r}, expected a number.")
    if not (0 <= value <= most and math.isfinite(value)):
        bounds = "0 or more" if most == math.inf else f"from 0 to {most}"
        raise MsencError(f"{path}={value}: expected a number that is {bounds}.")


def _signature(located: Any) -> inspect.Signature:
    try:
        return inspect.signature(located, eval_str=True)
    except NameError:  # an annotation of what is imported for type checkers alone
        return inspect.signature(located)


def _kind(parameter: inspect.Parameter) -> Any:
    """What an argument takes; whoever annotates nothing says by the default whether it is a number."""
    kind = kind_of(parameter.annotation)
    if kind is object:
        return float if _is_number(parameter) else object
    return kind | None if parameter.default is None else kind


def _is_number(parameter: inspect.Parameter) -> bool:
    """Whether an argument takes numbers alone, by what its signature says, or by its default where that is wider."""
    default = parameter.default
    return parameter.annotation in (int, float) or (isinstance(default, int | float) and not isinstance(default, bool))


def _check_without_target(node: Mapping[str, Any], path: str) -> None:
    """Keys of the nodes that are handed on as a whole, to classes that would ignore a misspelt one or say little."""
    if is_built(path):
        raise MsencError(f"{path}: no _target_ tells what to build; found the keys {', '.join(sorted(node))}.")
    if path == "decoding":
        from msenc.models.generation import DECODING_KEYS, read_decoding

        valid = set(DECODING_KEYS)
    elif path == "model.llm.lora":
        from peft import LoraConfig

        parameters = _signature(LoraConfig).parameters
        valid = set(parameters)
    else:
        return
    for key in sorted(node.keys() - valid):
        raise MsencError(f"{path}.{key}: no such setting.{nearest(key, valid)}")
    if path == "model.llm.lora":
        if "r" not in node:
            raise MsencError(
                f"{path}.{min(node, default='r')}: the chosen LLM has no adapters. Choose one that has (model/llm=), "
                f"or give all of them: '{path}={{r:8,lora_alpha:32}}'."
            )
        from msenc.models.llm import check_lora

        check_lora(node)
        for key, value in node.items():
            check_value(f"{path}.{key}", value, _kind(parameters[key]))
    if path == "decoding":
        read_decoding(node, end_id=0, pad_id=0, seed=0)
