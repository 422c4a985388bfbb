"""An evaluation -> the services that track its run: metrics, verdicts on streams, sample replies with their sound."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger

from msenc.speech.wav import from_wav
from msenc.tracking.mlflow import MlflowLogger
from msenc.tracking.trackers import closing_trackers, hyperparameters, reopen_trackers
from msenc.work.console import console
from msenc.work.processes import is_first_process

NUM_REPLIES = 8
COLUMNS = ("dialogue", "turn", "reference", "its description", "reply", "its voice description")


@dataclass(frozen=True)
class _Shown:
    """What is shown of an evaluation beside its numbers.

    Args:
        name: of the evaluation, as its metrics begin.
        step: of the run.
        settings: of the run.
        metrics: by their whole names.
        text: such as a verdict, in Markdown.
        replies: rows of `COLUMNS`.
        sounds: of the replies; None where one has none.
    """

    name: str
    step: int
    settings: Mapping[str, Any]
    metrics: Mapping[str, float]
    text: str
    replies: Sequence[tuple[str, ...]]
    sounds: Sequence[Path | None]


def track_evaluation(
    run_dir: Path,
    record: Mapping[str, Any],
    config: Mapping[str, Any],
    name: str,
    metrics: Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    folder: Path,
) -> None:
    """Add an evaluation to its run where that is tracked; a service that fails is named, and nothing else.

    Args:
        run_dir: the run's folder.
        record: its ``run.json``.
        config: plain, as stored.
        name: of the evaluation; begins the names of its metrics.
        metrics: of the evaluation; numbers are sent as such.
        predictions: with replies, of which some are shown; under a control there are none.
        folder: of the evaluation, where the replies' sound is.
    """
    if not is_first_process():
        return
    trackers = reopen_trackers(config, record, run_dir, lambda text: console.print(text, style="yellow"))
    with_replies = [p for p in predictions if "reply" in p]
    chosen = with_replies[:: max(math.ceil(len(with_replies) / NUM_REPLIES), 1)]
    shown = _Shown(
        name,
        record.get("steps", 0),
        hyperparameters(config, record),
        {
            f"{name}/{metric.removeprefix('control/')}": float(value)
            for metric, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        },
        f"{metrics['control']}: {metrics['control/verdict']}" if "control/verdict" in metrics else "",
        [_row(prediction) for prediction in chosen],
        [folder / p["speech"] if p.get("speech") else None for p in chosen],
    )
    with closing_trackers(trackers):
        for tracker in trackers:
            tracker.call(lambda logger: show(logger, shown))


def _row(prediction: Mapping[str, Any]) -> tuple[str, ...]:
    said = [prediction[side][what] or "" for side in ("reference", "reply") for what in ("text", "description")]
    return prediction["dialogue"], str(prediction["turn"]), *said


def _markdown(shown: _Shown) -> str:
    rows = [COLUMNS, ["---"] * len(COLUMNS), *shown.replies]
    lines = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join([shown.text] if shown.text else lines)


@singledispatch
def show(logger: Logger, shown: _Shown) -> None:
    """Give an evaluation to a logger."""
    raise NotImplementedError(type(logger).__name__)


@show.register
def _(logger: TensorBoardLogger, shown: _Shown) -> None:
    logger.log_hyperparams(dict(shown.settings), dict(shown.metrics), shown.step)
    logger.experiment.add_text(f"{shown.name}/replies", _markdown(shown), shown.step)
    for number, file in enumerate(shown.sounds):
        if file is not None:
            samples, rate = from_wav(file.read_bytes())
            logger.experiment.add_audio(f"{shown.name}/reply {number}", samples, shown.step, rate)


@show.register
def _(logger: WandbLogger, shown: _Shown) -> None:
    import wandb

    logger.log_metrics(dict(shown.metrics), step=shown.step)
    if shown.text:
        logger.experiment.summary[shown.name] = shown.text
    if shown.replies:
        sounds = [None if file is None else wandb.Audio(str(file)) for file in shown.sounds]
        rows = [[*row, sound] for row, sound in zip(shown.replies, sounds, strict=True)]
        logger.experiment.log({f"{shown.name}/replies": wandb.Table([*COLUMNS, "sound"], rows)})


@show.register
def _(logger: MlflowLogger, shown: _Shown) -> None:
    logger.log_metrics(shown.metrics, step=shown.step)
    logger.experiment.log_text(logger.version, _markdown(shown), f"{shown.name}/replies.md")
    for number, file in enumerate(shown.sounds):
        if file is not None:
            logger.experiment.log_artifact(logger.version, str(file), f"{shown.name}/reply {number}")
