"""The weights that connectors have learned for the layers of their encoder, over the seeds of each configuration."""

import re
from collections.abc import Sequence
from math import nan
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

from msenc.evaluation.losses import AGAIN, read_metrics
from msenc.files import hold
from msenc.files.kinds import Must
from msenc.report.compare import Configuration

LAYERS = "Weights of the encoder's layers in the connector's mixture: mean over seeds, ± their standard deviation"


_Layers = dict[str, dict[Annotated[str, Must(re.compile(r"-?\d{1,3}").fullmatch, "a layer's number")], float | None]]


def layer_grid(configurations: Sequence[Configuration]) -> list[list[str]]:
    """Header and a row per layer; empty where no connector mixes layers."""
    columns: dict[str, dict[str, str]] = {}
    for configuration in configurations:
        found: dict[str, dict[str, list[float]]] = {}
        for evaluation in configuration.evaluations:
            for stream, weights in _weights(evaluation.folder).items():
                for layer, weight in weights.items():
                    found.setdefault(stream, {}).setdefault(layer, []).append(nan if weight is None else weight)
        for stream, of_layers in found.items():
            columns[f"{configuration.name}, {stream}"] = {
                layer: f"{mean(w):.3f}" + (f" ± {stdev(w):.3f}" if len(w) > 1 else "") for layer, w in of_layers.items()
            }
    layers = sorted({layer for cells in columns.values() for layer in cells}, key=_order)
    if not layers:
        return []
    return [
        ["layer", *columns],
        *([layer, *(cells.get(layer, "") for cells in columns.values())] for layer in layers),
    ]


def _weights(folder: Path) -> dict[str, dict[str, float | None]]:
    return hold(read_metrics(folder).get("layers", {}), _Layers, f"{folder / 'metrics.json'}, layers", AGAIN)


def _order(layer: str) -> tuple[bool, int]:
    """Layers counted from the last one come last."""
    return layer.startswith("-"), int(layer)
