"""Parameter groups with their own learning rate, weight decay or warmup.

`optimizer.groups` of a config -> groups of named parameters -> the optimizer's, and their gradients' norms

A group is named for a part of the model (``llm``, ``connectors``, ``connector.audio``), or has a ``pattern`` that picks
parameters by name. Parameters in no group use the optimizer's own settings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from msenc.types import MsencError

if TYPE_CHECKING:  # the checks of a config must not wait for torch
    from torch import Tensor, nn
    from torch.optim import Optimizer

LLM, CONNECTORS, CONNECTOR = "llm", "connectors", "connector"
"""Names of groups that are parts of the model; a stream's connector is ``connector.audio``."""

REST = "all others"

OWN_KEYS = ("pattern", "warmup")
"""Settings of a group that are not arguments of the optimizer."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share their settings.

    Args:
        name: as in the config; `REST` for parameters in no group.
        parameters: by their names in `ConversationModel`.
        settings: those that differ from the optimizer's own, including ``pattern`` and ``warmup``.
    """

    name: str
    parameters: Mapping[str, nn.Parameter]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def for_optimizer(self) -> dict[str, Any]:
        """In the form of torch's optimizers; schedules read the group's ``warmup`` from it."""
        own = {key: value for key, value in self.settings.items() if key != "pattern"}
        return {"params": list(self.parameters.values()), **({} if self.name == REST else {"name": self.name}), **own}


def flatten_groups(groups: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Name -> settings, of `optimizer.groups`: ``connector: {audio: ...}`` is ``connector.audio``; null is not given.

    Example:
        >>> flatten_groups({"llm": {"lr": 0.1, "eps": None}, "connector": {"audio": {"lr": 0.2}}, "connectors": None})
        {'llm': {'lr': 0.1}, 'connector.audio': {'lr': 0.2}}
    """
    named = dict(groups or {})
    streams = named.get(CONNECTOR)
    if isinstance(streams, Mapping) and "pattern" not in streams:
        del named[CONNECTOR]
        named.update({f"{CONNECTOR}.{stream}": settings for stream, settings in streams.items()})
    return {
        name: {key: value for key, value in settings.items() if value is not None}
        if isinstance(settings, Mapping)
        else settings
        for name, settings in named.items()
        if settings is not None
    }


def part_of(parameter: str) -> str:
    """The part of the model that a parameter of `ConversationModel` belongs to.

    Example:
        >>> part_of("llm.model.norm.weight"), part_of("connectors.audio.in_proj.bias")
        ('llm', 'connector.audio')
    """
    first, second = parameter.split(".", 2)[:2]
    return LLM if first == LLM else f"{CONNECTOR}.{second}"


def partition(parameters: Mapping[str, nn.Parameter], groups: Mapping[str, Mapping[str, Any]]) -> list[ParameterGroup]:
    """Assign each parameter to its group; parameters in no group come first, with the optimizer's own settings.

    Args:
        parameters: trainable ones, by name in `ConversationModel`; a shared parameter has one name.
        groups: from `flatten_groups`.

    Returns:
        The parameters in no group, and the nonempty groups. A part may be absent, so that one set of groups serves
        a whole sweep: connectors in text-only runs, the LLM in runs that freeze it.

    Raises:
        MsencError: a pattern that matches nothing, or a parameter that two groups claim.
    """
    claims = {name: _claims(name, groups) for name in parameters}
    twice = {name: found for name, found in claims.items() if len(found) > 1}
    if twice:
        name, found = next(iter(twice.items()))
        raise MsencError(
            f"optimizer.groups: {len(twice)} parameters are in several groups, e.g. {name} in "
            f"{' and '.join(found)}. Each may only be in one: narrow a pattern, or remove a group "
            f"(optimizer.groups.{found[0]}=null)."
        )
    for group, settings in groups.items():
        if "pattern" in settings and [group] not in claims.values():
            raise MsencError(
                f"optimizer.groups.{group}: {_none_match(parameters, settings['pattern'])} "
                f"Remove the group, or make some of its parameters trainable."
            )
    whole = [(REST, [], {}), *((name, [name], settings) for name, settings in groups.items())]
    found = [
        ParameterGroup(name, {n: p for n, p in parameters.items() if claims[n] == claim}, settings)
        for name, claim, settings in whole
    ]
    return [group for group in found if group.parameters]


def _claims(parameter: str, groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The groups that a parameter is in; one stream's connector is taken out of `CONNECTORS` by a group of its own."""
    found = [group for group, settings in groups.items() if _is_in(parameter, group, settings)]
    return [group for group in found if group != CONNECTORS or part_of(parameter) not in found]


def _is_in(parameter: str, group: str, settings: Mapping[str, Any]) -> bool:
    if "pattern" in settings:
        return fnmatchcase(parameter, settings["pattern"])
    part = part_of(parameter)
    return part == group or (group == CONNECTORS and part != LLM)


def _none_match(parameters: Iterable[str], pattern: str) -> str:
    of_each_part: dict[str, str] = {}
    for name in parameters:
        of_each_part.setdefault(part_of(name), name)
    return f"no trainable parameter matches {pattern!r}. Examples of names: {', '.join(of_each_part.values())}."


def describe_groups(
    groups: Sequence[ParameterGroup],
    optimizer: Callable[[Any], Optimizer],
    scheduler: Callable[..., Any] | None,
) -> list[dict[str, Any]]:
    """The settings of each group, for tables and ``run.json``.

    Args:
        groups: from `partition`.
        optimizer: parameters -> optimizer; one is built to read its resolved settings, and discarded.
        scheduler: that of the run; its ``warmup`` holds for groups that have none.

    Returns:
        Per group ``name``, ``tensors``, ``parameters``, ``lr``, ``weight_decay``, ``warmup`` (share of all steps; None
        if there is none), and the group's other settings.
    """
    if not groups:
        return []
    taken = inspect.signature(scheduler).parameters if scheduler else {}
    warmup = taken["warmup"].default if "warmup" in taken else None
    made = optimizer([group.for_optimizer() for group in groups]).param_groups
    return [
        {
            "name": group.name if len(groups) > 1 or group.name != REST else "all",
            "tensors": len(group.parameters),
            "parameters": sum(p.numel() for p in group.parameters.values()),
            "lr": float(settings["lr"]),
            "weight_decay": settings.get("weight_decay"),
            "warmup": group.settings.get("warmup", warmup),
            **{k: v for k, v in group.settings.items() if k not in ("lr", "weight_decay", "warmup")},
        }
        for group, settings in zip(groups, made, strict=True)
    ]


def gradient_norms(groups: Sequence[ParameterGroup]) -> dict[str, Tensor]:
    """Gradient norm of each part of the model, and of each group with a pattern.

    Returns:
        ``llm``, ``connector.audio`` ..., without what a pattern takes out; the pattern's group by its own name. Parts
        whose gradient is not there are left out.
    """
    from torch.nn.utils import get_total_norm

    gradients: dict[str, list[Tensor]] = {}
    for group in groups:
        for name, parameter in group.parameters.items():
            if parameter.grad is not None:
                key = group.name if "pattern" in group.settings else part_of(name)
                gradients.setdefault(key, []).append(parameter.grad)
    norms = {name: get_total_norm(found) for name, found in gradients.items()}
    # Of gradients that are shared out over processes, each has computed its part.
    return {name: norm.full_tensor() if hasattr(norm, "full_tensor") else norm for name, norm in norms.items()}
