"""Quality against the share of turns that have a stream: what a run loses where audio or video are missing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from msenc.data.datamodule import DialogueDataModule
from msenc.data.missing import check_drop
from msenc.evaluation.losses import OF_REPLIES, loss_metrics, score_all
from msenc.evaluation.statistics import paired_effect
from msenc.files import write_json
from msenc.models.conversation import ConversationModel
from msenc.work.group import ALONE, Group

CURVES = "missing.json"
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the turns that have the stream in the data."""


def read_missing(given: str | Sequence[str] | None, streams: Sequence[str]) -> list[str]:
    """The streams to measure.

    Raises:
        MsencError: the run does not read one of them.
    """
    wanted = [given] if isinstance(given, str) else list(given or ())
    check_drop(dict.fromkeys(wanted, 0.0), streams, "missing")
    return list(dict.fromkeys(wanted))


def evaluate_missing(
    model: ConversationModel,
    datamodule: DialogueDataModule,
    split: str,
    stream: str,
    plain: Sequence[Mapping[str, Any]],
    limit: int | None = None,
    group: Group = ALONE,
) -> list[dict[str, Any]]:
    """Measure the losses of the same targets while more and more turns lack a stream.

    Args:
        model: in eval mode, on its device.
        datamodule: of the run.
        split: ``train``, ``val`` or ``test``.
        stream: that turns lack; a turn that has it at one share has it at all higher ones.
        plain: predictions of the same targets with all there is; only the first process needs them.
        limit: number of dialogues, from the start of the split.
        group: processes that share the targets out.

    Returns:
        In the first process (empty in others), for each of `SHARES`: ``share``, the metrics of `loss_metrics`, and
        ``delta`` with ``low`` and ``high``, the rise of the loss above that at 1 in nats per token (95 %).
    """
    inputs = [{"drop": {stream: 1 - share}} for share in SHARES[:-1]]
    found = score_all(model, datamodule, split, limit, inputs, f"missing {stream} on {split}", group)
    if not group.is_first:
        return []
    rows = []
    for number, share in enumerate(SHARES):
        predictions = []
        for item in plain:
            facts = {key: value for key, value in item.items() if key not in OF_REPLIES}
            if share < 1:
                scores = found[number][item["dialogue"], item["turn"]]
                facts |= {"nll": scores.nll, "correct": scores.correct}
            predictions.append(facts)
        effect = paired_effect(
            [np.mean(c["nll"]) - np.mean(p["nll"]) for c, p in zip(predictions, plain, strict=True)],
            clusters=[p["dialogue"] for p in plain],
            weights=[len(p["nll"]) for p in plain],
        )
        rise = {"delta": effect.mean, "low": effect.low, "high": effect.high}
        rows.append({"share": share, **loss_metrics(predictions), **rise})
    return rows


def missing_cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[list[str]], list[list[str]]]:
    """Two grids, each a header and a row per share: loss, its rise, accuracy; and the planted bits recovered in %.

    The second is empty if nothing is planted.
    """
    losses = [
        [
            f"{100 * row['share']:.0f} %",
            f"{row['nll']:.4f}",
            "" if row["share"] == 1 else f"{row['delta']:+z.4f} [{row['low']:z.4f}, {row['high']:z.4f}]",
            f"{100 * row['token_accuracy']:.1f} %",
        ]
        for row in rows
    ]
    planted = [name for name in rows[0] if name.startswith("planted/") and name.endswith("/recovered")]
    bits = [[f"{100 * row['share']:.0f} %", *(f"{100 * row[name]:z.1f}" for name in planted)] for row in rows]
    titles = ["turns", *(name.split("/")[1] for name in planted)]
    return [["turns", "nll", "rise [95 %]", "tokens right"], *losses], [titles, *bits] if planted else []


def write_missing(folder: Path, settings: str, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write ``missing.json`` next to the evaluation's metrics."""
    write_json(folder / CURVES, {"settings": settings, "curves": {name: list(rows) for name, rows in curves.items()}})
