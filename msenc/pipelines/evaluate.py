"""What evaluate.py does: a run and a split -> metrics and predictions."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig
from rich.markup import escape
from rich.table import Table

from msenc.config import build, check_targets, plain
from msenc.data.controls import read_controls
from msenc.evaluation import evaluate_control, evaluate_split, read_evaluation, write_evaluation
from msenc.metrics.text import DEFAULT_METRICS, build_text_metrics
from msenc.pipelines.parts import (
    GIVEN,
    build_datamodule,
    check_same_data,
    console,
    find_device,
    load_trained,
    open_run,
    quieten,
    shown,
    task_hash,
)
from msenc.prepare.describe import BINS, read_bins
from msenc.run import digest
from msenc.speech.description import VOCABULARY
from msenc.spoken import listen_to_replies, speak_replies
from msenc.types import MsencError


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Measure a finished run on a split; its own config says which model and data."""
    config = plain(cfg)
    check_targets(config, GIVEN)
    return evaluate_run(
        Path(cfg.run_dir),
        split=config["split"],
        checkpoint=config["checkpoint"],
        decoding=config["decoding"],
        with_replies=config["generate"],
        limit=config["limit"],
        device=config["device"],
        data_dir=config["data_dir"],
        metrics=config["metrics"],
        metric_settings=config["metric_settings"],
        speech=config["speech"],
        speech_workers=config["speech_workers"],
        speech_recogniser=config["speech_recogniser"],
        controls=config["control"],
        control_draws=config["control_draws"],
    )


def evaluate_run(
    run_dir: Path,
    split: str,
    checkpoint: str = "best",
    decoding: dict[str, Any] | None = None,
    with_replies: bool = True,
    limit: int | None = None,
    device: str = "auto",
    data_dir: str | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    metric_settings: Mapping[str, Any] | None = None,
    speech: dict[str, Any] | None = None,
    speech_workers: int = 0,
    speech_recogniser: str | None = None,
    controls: str | Sequence[str] | None = None,
    control_draws: int = 8,
) -> dict[str, Any]:
    """Load a run's weights, score every target of a split, write replies, and leave both in ``evaluation/``.

    Args:
        run_dir: the run.
        split: ``train``, ``val`` or ``test``.
        checkpoint: ``best``, ``last`` or a file; a run in which nothing trained is measured as it is.
        decoding: see ``configs/decoding``; the run's own if None.
        with_replies: False measures losses alone.
        limit: first dialogues of the split.
        device: ``auto``, ``cpu``, ``cuda`` ...
        data_dir: where data and tiny LLM lie now, if they have moved since.
        metrics: of replies, names of `metrics.text.TEXT_METRICS`.
        metric_settings: name of a metric -> its settings.
        speech: ``_target_`` node of a synthesizer that speaks the replies, or None.
        speech_workers: processes that speak; 0 works in this one.
        speech_recogniser: a Whisper that checks what was spoken, or None.
        controls: what to take from the input in evaluations beside the plain one, which is made first if it is not
            there; see `data.controls.read_controls`.
        control_draws: how often each control draws.
    """
    if controls and control_draws < 1:
        raise MsencError(f"control_draws={control_draws}: expected 1 or more.")
    if speech is not None and not with_replies:
        raise MsencError("speech: found a synthesizer and generate=false, expected replies to speak. Leave one out.")
    if limit is not None and limit < 1:
        raise MsencError(f"limit={limit}: expected the number of dialogues to measure, 1 or more, or null for all.")
    record, config = open_run(run_dir, data_dir)
    decoding = config["decoding"] if decoding is None else decoding
    quieten()
    if speech is not None:
        build(speech)  # what it refuses is said now, not after all replies are written
    scorers = build_text_metrics(metrics, metric_settings) if with_replies else {}
    L.seed_everything(config["seed"], workers=True, verbose=False)
    datamodule = build_datamodule(config, record.get("prepare_command", "python prepare.py"))
    datamodule.setup()
    check_same_data(record, config, datamodule)
    wanted = read_controls(controls, datamodule.streams)
    model = load_trained(run_dir, checkpoint, record, config).to(find_device(device))
    settings = {"checkpoint": checkpoint, "decoding": decoding if with_replies else None, "limit": limit}
    if with_replies and set(metrics) != set(DEFAULT_METRICS):
        settings["metrics"] = {name: (metric_settings or {}).get(name) for name in sorted(metrics)}
    if speech is not None:
        settings["speech"] = {**speech, "recogniser": speech_recogniser}
    facts = {"split": split, "data": config["data"]["name"], "task_hash": task_hash(config, datamodule)}
    place = run_dir / "evaluation"
    folder = _folder(place, facts, settings)
    if wanted and (folder / "metrics.json").is_file():
        found, predictions = read_evaluation(folder)
        console.print(f"Measured before, without a control: {shown(folder)}", soft_wrap=True)
    else:
        found, predictions = evaluate_split(
            model, datamodule, split, decoding if with_replies else None, config["seed"], limit, scorers
        )
        found |= {**facts, "settings": _said(settings)}
        if speech is not None:
            new = speak_replies(predictions, speech, folder, speech_workers)
            data = datamodule.folder
            bins = read_bins(data) if isinstance(data, Path) and (data / BINS).is_file() else None
            found |= listen_to_replies(predictions, folder, bins, speech_recogniser, speech_workers)
            console.print(f"Spoken: {found['speech/spoken']:,} of {len(predictions):,} replies; {new:,} files are new.")
            if bins is None:
                console.print(
                    f"The voices were not measured: no {BINS} in {data}. prepare.py describe=true writes it there."
                )
        write_evaluation(folder, found, predictions)
        _print_metrics(found, f"{config['modality']} on {config['data']['name']}, {split}")
        _print_written(folder)
    costs = []
    for control in wanted:
        settings = {"checkpoint": checkpoint, "limit": limit, "control": str(control), "draws": control_draws}
        cost, controlled = evaluate_control(model, datamodule, split, control, predictions, control_draws, limit)
        costs.append(cost | {**facts, "settings": _said(settings)})
        write_evaluation(_folder(place, facts, settings), costs[-1], controlled)
    if costs:
        _print_controls(costs, f"{config['modality']} on {config['data']['name']}, {split}: what controls cost")
        console.print(f"Written: {len(costs)} evaluations under control in {shown(place)}", soft_wrap=True)
    return found


def _said(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in settings.items())


def _folder(place: Path, facts: Mapping[str, Any], settings: Mapping[str, Any]) -> Path:
    return place / f"{facts['data']}-{facts['split']}-{digest(settings)}"


def _print_written(folder: Path) -> None:
    console.print(f"Written: {shown(folder) / 'metrics.json'}, {shown(folder) / 'predictions.jsonl'}", soft_wrap=True)


def _print_controls(costs: Sequence[Mapping[str, Any]], title: str) -> None:
    """What each control costs, and what that says of the stream."""
    table = Table(title=title)
    for column in ("control", "nats per token", "95 % interval", "the stream is"):
        table.add_column(column, justify="left" if column in ("control", "the stream is") else "right")
    for cost in costs:
        interval = f"[{cost['control/low']:+.4f}, {cost['control/high']:+.4f}]"
        table.add_row(cost["control"], f"{cost['control/delta']:+.4f}", escape(interval), cost["control/verdict"])
    console.print(table)


def _print_metrics(metrics: Mapping[str, Any], title: str) -> None:
    table = Table(title=title)
    table.add_column("metric")
    table.add_column("value", justify="right")
    by_attribute = [name for name in VOCABULARY if f"description/{name}/targets" in metrics]
    for name, value in metrics.items():
        if name.startswith(tuple(f"description/{attribute}/" for attribute in by_attribute)):
            continue
        if isinstance(value, float) and not math.isnan(value):
            is_share = name.endswith("/recovered")
            table.add_row(name, f"{100 * value:.1f} %" if is_share else f"{value:.4f}")
        elif isinstance(value, int):
            table.add_row(name, f"{value:,}")
    console.print(table)
    if by_attribute:
        _print_attributes(metrics, by_attribute)


def _print_attributes(metrics: Mapping[str, Any], attributes: Sequence[str]) -> None:
    """Accuracy and macro F1 of each attribute, beside those of the rules."""
    rules = [name.removeprefix("description/accuracy") for name in metrics if name.startswith("description/accuracy")]
    table = Table(title="voice descriptions: accuracy (macro F1), in %")
    table.add_column("attribute")
    for column in ("targets", *(rule.removeprefix("_") or "replies" for rule in rules)):
        table.add_column(column, justify="right")
    for attribute in attributes:
        shares = [
            "{:.1f} ({:.1f})".format(
                *(100 * metrics[f"description/{attribute}/{name}{rule}"] for name in ("accuracy", "macro_f1"))
            )
            for rule in rules
        ]
        table.add_row(attribute, f"{metrics[f'description/{attribute}/targets']:,}", *shares)
    console.print(table)
