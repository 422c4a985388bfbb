"""evaluate.py: runs and a split -> metrics and predictions."""

import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import MISSING, DictConfig
from rich.box import SIMPLE_HEAD
from rich.table import Table

from msenc.config.build import build, with_first_targets
from msenc.config.checks import checked
from msenc.config.schema import EvaluateConfig
from msenc.data.conflict import find_conflicts
from msenc.data.controls import read_controls
from msenc.data.datamodule import DialogueDataModule
from msenc.evaluation.conflict import CONFLICT, conflict_cells, evaluate_conflict, write_conflict
from msenc.evaluation.judge import judge_lines, judge_replies, read_replies
from msenc.evaluation.losses import (
    AGAIN,
    evaluate_control,
    evaluate_split,
    read_metrics,
    read_predictions,
    write_evaluation,
)
from msenc.evaluation.metrics.judge import Judge
from msenc.evaluation.metrics.sound import SOUND_METRICS
from msenc.evaluation.metrics.text import DEFAULT_METRICS, JUDGE, build_text_metrics, settings_of
from msenc.evaluation.missing import CURVES, evaluate_missing, missing_cells, read_missing, write_missing
from msenc.evaluation.spoken import check_sound_metrics, listen_to_replies, speak_replies
from msenc.evaluation.trace import ENCODER, layer_bits, read_trace, trace_split
from msenc.evaluation.trace import FILE as TRACE
from msenc.evaluation.tracked import track_evaluation
from msenc.files import digest, inside, known_to_json, read_json, write_json
from msenc.files.kinds import check_name
from msenc.models.connector import layer_weights
from msenc.models.conversation import ConversationModel
from msenc.pipelines.plan import num_processes
from msenc.prepare.describe import BINS, read_bins
from msenc.prompt import TOKEN_KINDS
from msenc.report.card import write_card
from msenc.runs.find import runs_of
from msenc.runs.identity import check_same_data, stream_hashes, task_hash
from msenc.runs.record import is_finished, read_facts, read_run
from msenc.speech.description import VOCABULARY
from msenc.store.location import RemotePath
from msenc.training.assembly import GIVEN, build_datamodule, find_data, num_parameters
from msenc.training.restore import find_checkpoint, find_device, load_trained, open_run, trains
from msenc.types import MsencError
from msenc.work.console import console, quieten, shown
from msenc.work.group import ALONE, Group, open_group
from msenc.work.threads import settle_threads

IN_TABLE_OF_RUNS = ("nll", "token_accuracy", "bleu_4", "rouge_l", "description/accuracy")
"""Metrics shown in the table of several runs."""


def evaluate(cfg: DictConfig) -> list[dict[str, Any]]:
    """Evaluate runs on a split; each run's own config determines its model and data.

    A run that fails does not stop the others: failures are named at the end, with exit status 1. Of several processes,
    the first one returns the results.
    """
    config = checked(cfg, GIVEN)
    given = [cfg.run_dir] if isinstance(cfg.run_dir, str) else list(cfg.run_dir)
    folders, left_out = find_runs(given)
    for folder, status in left_out:
        console.print(f"Not evaluated, since it has not finished ({status}): {shown(folder)}", soft_wrap=True)
    options = EvaluateConfig(**config)
    _check_options(options)
    quieten()
    measured: dict[Path, dict[str, Any]] = {}
    failed: dict[Path, Exception] = {}
    with _open_group(options) as group:
        for number, folder in enumerate(folders, start=1):
            if len(folders) > 1:
                console.rule(f"run {number} of {len(folders)}: {shown(folder)}")
            try:
                measured[folder] = evaluate_run(folder, options, group=group)
            except Exception as e:
                if len(folders) == 1:
                    raise
                if not isinstance(e, MsencError):
                    traceback.print_exc()
                failed[folder] = e
    if not group.is_first:
        return []
    if len(folders) > 1:
        _print_runs(measured, f"{len(measured)} of {len(folders)} runs evaluated on {config['split']}")
    if failed:
        console.print("Failed:", style="red")
        for folder, error in failed.items():
            console.print(f"  {shown(folder)}: {error}", soft_wrap=True)
        sys.exit(1)
    return list(measured.values())


def find_runs(given: Sequence[str]) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Folders -> the runs to evaluate: a run's folder stands for itself, any other for the finished runs under it.

    A sweep's folder stands for the runs of its jobs, wherever they are.

    Returns:
        Runs, each once; and unfinished runs under a folder, with their status.

    Raises:
        MsencError: a folder that is not a run and contains no finished one.
    """
    found: dict[Path, None] = {}
    left_out: dict[Path, str] = {}
    for name in given:
        folder = Path(name)
        below = list(runs_of(folder))
        if folder in below or not below:
            read_run(folder)  # refuses anything else
            found[folder] = None
            continue
        facts = {run: read_facts(run / "run.json") for run in below}
        finished = [run for run in below if is_finished(facts[run])]
        left_out |= {run: facts[run]["status"] for run in below if run not in finished}
        if not finished:
            states = ", ".join(f"{run.name} ({facts[run]['status']})" for run in below[:3])
            raise MsencError(
                f"run_dir={name}: no finished run in it. Found {len(below)}: {states}. Repeat the command that "
                "started them with resume=auto, or give one run's folder to evaluate it as it is."
            )
        found |= dict.fromkeys(finished)
    return list(found), list(left_out.items())


def _open_group(options: EvaluateConfig) -> Group:
    """The processes that `options.trainer` asks for, on the kind of device that `options.device` names, if it does."""
    trainer, device = options.trainer, options.device
    num = num_processes(trainer) if trainer else 1
    if not trainer or (num == 1 and device != "auto"):
        return ALONE
    kind, _, number = device.partition(":")
    if number:
        raise MsencError(
            f"device={device}: found one device for {num} processes. Name a kind (device={kind}), and those of this "
            f"kind by trainer.devices=[{number},...]."
        )
    return open_group(trainer if kind == "auto" else {**trainer, "accelerator": find_device(kind).type}, num)


def evaluate_run(
    run_dir: Path, options: EvaluateConfig, threads: int | None = None, group: Group = ALONE
) -> dict[str, Any]:
    """Load a run's weights, score every target of a split, generate replies, and write both to ``evaluation/``.

    An evaluation with the same settings on the same data is reused, unless the checkpoint has changed since.

    Args:
        run_dir: the run.
        options: of the evaluation; without ``decoding`` the run's own, without ``metrics`` the cheap ones.
        threads: number of torch threads; None: chosen by the model's size.
        group: processes that share the work out, and get the same results as one; the first one writes and returns
            them.

    Raises:
        MsencError: in every process, if one of them has failed.
    """
    with group.all_or_none():
        found = _evaluate(run_dir, options, threads, group)
        if group.is_first:
            write_card(run_dir)
        return found


def _evaluate(run_dir: Path, options: EvaluateConfig, threads: int | None, group: Group) -> dict[str, Any]:
    record, config = open_run(run_dir, options.data_dir, options.urls)
    is_other = options.on_data is not None
    if is_other:
        # The run's filter is for its own data; other data may have no audit.
        config["data"] |= {"dir": options.on_data, "filter": []}
    decoding = config["decoding"] if options.decoding in (MISSING, None) else options.decoding
    if options.speech is not None:
        build(options.speech, "speech")  # so that errors come now, not after all replies are generated
        check_sound_metrics(options.speech_metrics)
    metrics = options.metrics or DEFAULT_METRICS
    device = str(group.device or find_device(options.device))
    scorers, judge = {}, None
    if options.generate and group.is_first:
        others_than_judge = [name for name in metrics if name != JUDGE]
        rest = {name: value for name, value in options.metric_settings.items() if name != JUDGE}
        scorers = build_text_metrics(others_than_judge, rest, device)
        judge = _build_judge(options, config, device) if JUDGE in metrics else None
    L.seed_everything(config["seed"], workers=True, verbose=False)
    datamodule = _open_data(record, config, is_other)
    controls = read_controls(options.control, datamodule.streams)
    missing = read_missing(options.missing, list(datamodule.streams))
    labels = [options.conflict] if isinstance(options.conflict, str) else options.conflict
    conflicts = []
    if labels:
        conflicts = find_conflicts(datamodule, options.split, None if labels is True else labels, options.limit)
    name = datamodule.manifest.name if is_other else config["data"]["name"]
    facts = {
        "split": options.split,
        "data": name,
        "task_hash": task_hash(config, datamodule),
        "streams": stream_hashes(datamodule),
    }
    # Names alone would mix data up.
    others = {"on_data": f"{name}-{digest([facts['task_hash'], facts['streams']])}"} if is_other else {}
    weights = find_checkpoint(run_dir, options.checkpoint) if trains(record) else None
    title = f"{config['modality']} on {name}, {options.split}"

    def place(settings: Mapping[str, Any]) -> Path:
        return inside(run_dir, "evaluation", f"{check_name(name, 'data.name')}-{options.split}-{digest(settings)}")

    def before(folder: Path) -> dict[str, Any] | None:
        return None if options.overwrite else group.told(lambda: _measured_before(folder, facts, weights))

    @cache
    def model() -> ConversationModel:
        loaded = load_trained(run_dir, options.checkpoint, record, config)
        settle_threads(num_parameters(loaded), before=threads, given=config.get("threads"))
        return loaded.to(device)

    def track(
        usual: Mapping[str, Any], metrics: Mapping[str, Any], items: list[dict[str, Any]], under: str = ""
    ) -> None:
        """Under the split's name if with the settings that a run's own evaluation has, else the folder's."""
        if options.track:
            named = options.split if settings == usual else place(settings).name
            track_evaluation(run_dir, record, config, f"evaluation/{named}{under}", metrics, items, place(settings))

    settings = {
        "checkpoint": options.checkpoint,
        "decoding": decoding if options.generate else None,
        "limit": options.limit,
        **others,
        **_settings_of_replies(options, metrics),
    }
    folder = place(settings)
    found = before(folder)
    if found is not None:
        console.print(f"Already evaluated (overwrite=true repeats it): {shown(folder)}", soft_wrap=True)
    else:
        found, predictions = evaluate_split(
            model(), datamodule, options.split, settings["decoding"], config["seed"], options.limit, scorers, group
        )
        found |= {**facts, "settings": _said(settings)}
        if judge is not None:
            against = (settings_of(JUDGE, options.metric_settings) or {}).get("against")
            replies = read_replies(Path(against), options.split, predictions) if against else None
            found |= judge_replies(judge, datamodule, options.split, predictions, replies)
        if weights_of_layers := layer_weights(model().connectors):
            found["layers"] = weights_of_layers
        if options.speech is not None:
            found |= _speak(predictions, options, folder, datamodule.folder, device, group)
        if group.is_first:
            track({"checkpoint": "best", "decoding": config["decoding"], "limit": None}, found, predictions)
            write_evaluation(folder, found, predictions)
            _print_metrics(found, title)
        files = f"{shown(folder) / 'metrics.json'}, {shown(folder) / 'predictions.jsonl'}"
        console.print(f"Written: {files}", soft_wrap=True)

    def kept(file: str, read: Callable[[Path], Any]) -> Any:
        """What an earlier command measured beside the evaluation, unless the evaluation is newer."""

        def from_file() -> Any:
            path, evaluation = folder / file, folder / "metrics.json"
            is_newer = path.is_file() and path.stat().st_mtime >= evaluation.stat().st_mtime
            return read(path) if is_newer else None

        return None if options.overwrite else group.told(from_file)

    if options.trace and not datamodule.streams:  # as of one run of a sweep
        console.print(f"Nothing to trace, since it reads text alone: {shown(run_dir)}", soft_wrap=True)
    elif options.trace:
        traced = kept(TRACE, read_trace)
        if traced is None:
            traced = {"streams": trace_split(model(), datamodule, options.split, options.limit, group)}
            if group.is_first:
                write_json(folder / TRACE, known_to_json(traced))
        if group.is_first:
            _print_trace(traced["streams"], title)
            console.print(f"Written: {shown(folder / TRACE)}", soft_wrap=True)
    costs = []
    for control in controls:
        settings = {
            "checkpoint": options.checkpoint,
            "limit": options.limit,
            "control": str(control),
            "draws": options.control_draws,
            **others,
        }
        cost = before(place(settings))
        if cost is None:
            cost, controlled = evaluate_control(
                model(),
                datamodule,
                options.split,
                control,
                read_predictions(folder) if group.is_first else [],
                options.control_draws,
                options.limit,
                group,
            )
            cost |= {**facts, "settings": _said(settings)}
            if group.is_first:
                usual = {
                    "checkpoint": "best",
                    "limit": None,
                    "control": str(control),
                    "draws": EvaluateConfig.control_draws,
                }
                track(usual, cost, controlled, f"/{control}")
                write_evaluation(place(settings), cost, controlled)
        costs.append(cost)
    if costs and group.is_first:
        _print_controls(found, costs, f"{title}: rise of the loss under controls")
        console.print(f"Written: {len(costs)} evaluations under controls in {shown(run_dir / 'evaluation')}")

    if conflicts:
        asked = "true" if labels is True else ",".join(labels)
        shares = (kept(CONFLICT, partial(_with_settings, asked)) or {}).get("shares")
        if shares is None:
            shares, rows = evaluate_conflict(model(), datamodule, options.split, conflicts, group)
            if group.is_first:
                write_conflict(folder, asked, shares, rows)
        found |= {"conflict": shares}
        if group.is_first:
            head, *cells = conflict_cells(shares)
            _print_grid(f"{title}: what the run follows, in % of the items", head, cells)
            console.print(f"Written: {shown(folder / CONFLICT)}", soft_wrap=True)
    if missing:
        asked = ",".join(missing)
        curves = (kept(CURVES, partial(_with_settings, asked)) or {}).get("curves")
        if curves is None:
            plain = read_predictions(folder) if group.is_first else []
            curves = {
                stream: evaluate_missing(model(), datamodule, options.split, stream, plain, options.limit, group)
                for stream in missing
            }
            if group.is_first:
                write_missing(folder, asked, curves)
        found |= {"missing": curves}
        if group.is_first:
            for stream, points in curves.items():
                losses, planted = missing_cells(points)
                _print_grid(f"{title}: loss by the share of turns that have {stream}", losses[0], losses[1:])
                if planted:
                    _print_grid(f"planted bits recovered, in %, by that share of {stream}", planted[0], planted[1:])
            console.print(f"Written: {shown(folder / CURVES)}", soft_wrap=True)
    return found


def _build_judge(options: EvaluateConfig, config: Mapping[str, Any], device: str) -> Judge:
    given = settings_of(JUDGE, options.metric_settings) or {}
    if (against := given.pop("against", None)) is not None and not Path(against).is_dir():
        raise MsencError(
            f"metric_settings.judge.against={against}: no such folder. Expected a run, or an evaluation of one."
        )
    try:
        return Judge(**{"device": device, **given}, cache=Path(config["paths"]["cache_dir"]) / JUDGE)
    except TypeError as error:
        raise MsencError(f"metric_settings.judge: found {given}, but {error}.") from error


def _with_settings(settings: str, path: Path) -> dict[str, Any] | None:
    """What was measured, if with these settings."""
    value = read_json(path, dict[str, Any], AGAIN)
    return value if value.get("settings") == settings else None


def _check_options(options: EvaluateConfig) -> None:
    """Refuse options that are invalid for every run."""
    if options.speech is not None and not options.generate:
        raise MsencError(
            "speech: found a synthesizer and generate=false, so there are no replies to synthesize. Remove one of them."
        )
    unknown = [*set(options.speech_metrics) - {*SOUND_METRICS}]
    if unknown or (options.speech_metrics and options.speech is None):
        found = f"no such metric as {unknown[0]}" if unknown else "no synthesizer"
        raise MsencError(f"speech_metrics: {found}. Expected some of {', '.join(SOUND_METRICS)}, and speech=espeak.")


def _settings_of_replies(options: EvaluateConfig, metrics: Sequence[str]) -> dict[str, Any]:
    """Settings for scoring replies that distinguish evaluations; empty for the defaults."""
    settings: dict[str, Any] = {}
    of_metrics = {metric: settings_of(metric, options.metric_settings) for metric in sorted(metrics)}
    if options.generate and (set(metrics) != set(DEFAULT_METRICS) or any(of_metrics.values())):
        settings["metrics"] = of_metrics
    if options.speech is not None:
        settings["speech"] = {**with_first_targets(options.speech), "recogniser": options.recogniser}
        if options.speech_metrics:
            settings["speech"]["metrics"] = sorted(options.speech_metrics)
    return settings


def _speak(
    predictions: list[dict[str, Any]],
    options: EvaluateConfig,
    folder: Path,
    data: Path | RemotePath,
    device: str,
    group: Group,
) -> dict[str, Any]:
    """Synthesize the replies of an evaluation, and measure their audio."""
    new = speak_replies(predictions, options.speech, folder, options.speech_workers, group)
    bins = read_bins(data) if isinstance(data, Path) and (data / BINS).is_file() else None
    found = listen_to_replies(
        predictions, folder, bins, options.recogniser, options.speech_workers, options.speech_metrics, device, group
    )
    console.print(f"Spoken: {found['speech/spoken']:,} of {len(predictions):,} replies; {new:,} files are new.")
    if bins is None:
        console.print(f"The voices were not measured: no {BINS} in {data}. Create it with prepare.py describe=true.")
    return found


def _open_data(record: Mapping[str, Any], config: Mapping[str, Any], is_other: bool) -> DialogueDataModule:
    command = record.get("prepare_command", "python prepare.py")
    if is_other:
        command = f"python prepare.py data=... data.root=..., with the encoders of the run ({command})"
    find_data(config, command)
    datamodule = build_datamodule(config, command)
    datamodule.setup()
    if not is_other:
        check_same_data(record, config, datamodule)
    return datamodule


def _measured_before(folder: Path, facts: Mapping[str, Any], weights: Path | None) -> dict[str, Any] | None:
    """The metrics in a folder, if they belong to these data and the checkpoint has not changed since."""
    path = folder / "metrics.json"
    if not path.is_file() or not (folder / "predictions.jsonl").is_file():
        return None
    metrics = read_metrics(folder)
    is_newer = weights is None or path.stat().st_mtime >= weights.stat().st_mtime
    return metrics if is_newer and all(metrics.get(key) == value for key, value in facts.items()) else None


def _said(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in settings.items())


def _print_runs(measured: Mapping[Path, Mapping[str, Any]], title: str) -> None:
    """One line per run, with metrics that all have; the title names their common folder."""
    names = [n for metric in IN_TABLE_OF_RUNS for n in next(iter(measured.values())) if n.partition("-")[0] == metric]
    shared = [name for name in names if all(name in found for found in measured.values())]
    names = [str(shown(folder)) for folder in measured]
    if len(names) > 1:
        common = os.path.commonpath(names)
        names = [os.path.relpath(name, common) for name in names]
        title += f", in {common}" if common else ""
    mixed = ["data"] if len({found["data"] for found in measured.values()}) > 1 else []  # not to be compared
    rows = [
        [name, *(found[key] for key in mixed), *(f"{found[metric]:.4f}" for metric in shared)]
        for name, found in zip(names, measured.values(), strict=True)
    ]
    _print_grid(title, ["run", *mixed, *shared], rows)


def _print_controls(plain: Mapping[str, Any], costs: Sequence[Mapping[str, Any]], title: str) -> None:
    """Each control's rise of the loss and verdict on the stream; then the planted bits still recovered."""
    rows = [
        [
            cost["control"],
            f"{cost['control/delta']:+z.4f} [{cost['control/low']:z.4f}, {cost['control/high']:z.4f}]",
            cost["control/verdict"],
        ]
        for cost in costs
    ]
    _print_grid(title, ["control", "nats per token [95 %]", "verdict"], rows)
    planted = [kind for kind in TOKEN_KINDS if _recovered(kind) in plain]
    if planted:
        rows = [
            [found.get("control", "none"), *(f"{100 * found[_recovered(kind)]:z.1f}" for kind in planted)]
            for found in (plain, *costs)
        ]
        _print_grid("planted bits recovered under controls, in %", ["control", *map(_planted, planted)], rows)


def _print_trace(streams: Mapping[str, Any], title: str) -> None:
    """A table for each stream, with a line per label; then a verdict on each."""
    for stream, facts in streams.items():
        rows = []
        for name, label in facts["labels"].items():
            bits = {station["station"]: f"{station['mean']:z.2f}" for station in label["stations"]}
            ends = [next((s for s in reversed(bits) if s.startswith(kind)), "") for kind in ("slots", "reply")]
            cells = [bits.get(station, "") for station in (ENCODER, "connector", "slots 0", *ends)]
            rows.append([name, f"{label['entropy']:.2f}", *cells, f"{label['used']['mean']:z.2f}"])
        columns = ["label", "bits", "encoder", "connector", "LLM in", "LLM out", "reply", "used"]
        _print_grid(f"{title}, {stream}: bits that probes find", columns, rows)
        for name, label in facts["labels"].items():
            if of_layers := layer_bits(label["stations"]):
                console.print(f"  {name}: bits in the encoder's layers: {_listed(of_layers)}", soft_wrap=True)
        for unseen in dict.fromkeys(label["unseen"] for label in facts["labels"].values()):
            names = [name for name, label in facts["labels"].items() if label["unseen"] == unseen]
            console.print(f"  probes are scored on unseen {unseen}: {', '.join(names)}", soft_wrap=True)
        for label in facts["labels"].values():
            console.print(f"  {label['verdict']}", soft_wrap=True)


def _listed(of_layers: Mapping[Any, float]) -> str:
    return ", ".join(f"{layer}: {value:z.2f}" for layer, value in of_layers.items())


def _planted(kind: str) -> str:
    return kind.removeprefix("planted_")


def _recovered(kind: str) -> str:
    return f"planted/{_planted(kind)}/recovered"


def _print_metrics(metrics: Mapping[str, Any], title: str) -> None:
    """All values: losses by kind of token, scores of words and of descriptions side by side, then the rest."""
    rest = {
        name: f"{value:,}" if isinstance(value, int) else f"{value:z.4f}"
        for name, value in metrics.items()
        if isinstance(value, int | float) and not math.isnan(value)
    }
    kinds = []
    for kind in TOKEN_KINDS:
        if f"nll/{kind}" in rest:
            shares = [f"planted/{_planted(kind)}/{share}" for share in ("recovered", "in_words", "in_descriptions")]
            cells = [f"{100 * metrics[name]:z.1f} %" if rest.pop(name, None) is not None else "" for name in shares]
            kinds.append([kind, rest.pop(f"nll/{kind}"), *cells])
    for stream, weights in metrics.get("layers", {}).items():
        console.print(f"{stream}: weights of the encoder's layers: {_listed(weights)}", soft_wrap=True)
    if "judge" in metrics:
        console.print(*judge_lines(metrics), sep="\n", soft_wrap=True, markup=False)
    both = [name for name in rest if f"description/{name}" in rest]
    scores = [[name, rest.pop(name), rest.pop(f"description/{name}")] for name in both]
    by_attribute = [name for name in VOCABULARY if f"description/{name}/targets" in metrics]
    if by_attribute:
        shown_below = tuple(
            f"description/{name}" for name in ("accuracy", "macro_f1", *(f"{a}/" for a in by_attribute))
        )
        rest = {name: value for name, value in rest.items() if not name.startswith(shown_below)}
    _print_grid(title, ["metric", "value"], [list(row) for row in rest.items()])
    columns = ["kind", "nll", "planted bits recovered", "in words", "in descriptions"]
    used = [column for column in range(len(columns)) if column < 2 or any(row[column] for row in kinds)]
    _print_grid("loss by kind of token", [columns[c] for c in used], [[row[c] for c in used] for row in kinds])
    if scores:
        _print_grid("replies", ["metric", "words", "description/"], scores)
    if by_attribute:
        _print_attributes(metrics, by_attribute)


def _print_attributes(metrics: Mapping[str, Any], attributes: Sequence[str]) -> None:
    """Accuracy and macro F1 of each attribute and overall, next to those of the baselines."""
    rules = [name.removeprefix("description/accuracy") for name in metrics if name.startswith("description/accuracy")]
    rows = []
    for prefix in (*(f"{attribute}/" for attribute in attributes), ""):
        shares = [
            " / ".join(f"{100 * metrics[f'description/{prefix}{name}{rule}']:.1f}" for name in ("accuracy", "macro_f1"))
            for rule in rules
        ]
        targets = f"{metrics[f'description/{prefix}targets']:,}" if prefix else ""
        rows.append([prefix.removesuffix("/") or "mean", targets, *shares])
    columns = ["attribute", "targets", *(rule.removeprefix("_") or "replies" for rule in rules)]
    _print_grid("voice descriptions: accuracy / macro F1, in %", columns, rows)


def _print_grid(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table without broken words; text left-aligned, numbers right-aligned."""
    console.print(title, style="table.title")  # a table would break it at its own width, not the terminal's
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for number, column in enumerate(columns):
        is_text = number == 0 or column in ("stream is", "data")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
