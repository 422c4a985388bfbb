"""What the scripts do: config -> parts -> result on disk. Wiring alone; the logic stands in the layers below."""

import logging
import math
import os
import shlex
import shutil
import sys
import traceback
import warnings
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from msenc.checkpoints import CheckpointFiles, Checkpoints, read_checkpoint, training_outcome
from msenc.config import build, check_targets, plain
from msenc.data.datamodule import DialogueDataModule, StreamSpec
from msenc.data.flags import count_left_out
from msenc.data.location import is_url, local_folder, locate
from msenc.data.manifest import DatasetManifest
from msenc.evaluation import evaluate_split, write_evaluation
from msenc.export import write_export
from msenc.models.connector import calibrate, tie
from msenc.models.conversation import ConversationModel
from msenc.models.llm import load_tokenizer
from msenc.module import ConversationModule
from msenc.plan import count_batches, largest_batch, predict_memory
from msenc.prepare.audit import Audit, audit_dataset
from msenc.prepare.dataset import StreamRecipe, folder_lock, prepare_dataset
from msenc.prepare.describe import UNITS, VoiceSettings, read_bins
from msenc.prompt import DialogueTokenizer, Prompt
from msenc.run import (
    RunRecord,
    check_same_settings,
    digest,
    find_run,
    is_finished,
    is_first_process,
    read_run,
    run_settings,
    write_json,
)
from msenc.signals import STOPPED, Termination
from msenc.types import MsencError

console = Console(quiet=rank_zero_only.rank != 0)  # of several processes, the first one speaks

GIVEN = {
    "model.connector": {"in_dim", "out_dim"},
    "data.generate": {"root", "num_workers"},
}
"""Arguments that the pipelines add to a node when they build it."""

CALIBRATION_UTTERANCES = 1000
"""Training utterances that a new connector is calibrated on: tens of thousands of frames for each mean."""

PURGING = ("msenc.loggers.CsvLogger", "lightning.pytorch.loggers.TensorBoardLogger")
"""Loggers that drop, when a run is resumed, what was logged after its checkpoint."""

RUN_FOLDER = "MSENC_RUN_FOLDER"
"""Environment variable by which the first process tells the others of its run which folder it works in."""

PREPARE_KEYS = ("data", "streams", "modality", "model/audio", "model/video", "model.streams", "paths.data_dir")


# ---------------------------------------------------------------------------------------------------- prepare


def prepare(cfg: DictConfig) -> DatasetManifest | Audit:
    """Raw material -> shards; makes the demo and its LLM where the config asks for them and they are missing.

    With ``stage=audit``: raw material -> what is wrong with it.
    """
    config = plain(cfg)
    check_targets(config, GIVEN)
    if config["stage"] not in (None, "audit"):
        raise MsencError(f"stage={config['stage']}: no such stage. Expected audit, or null for shards.")
    if config["stage"] == "audit":
        return _audit(config)
    manifest = _prepare(config)
    _print_manifest(config, manifest)
    return manifest


def _audit(config: Mapping[str, Any]) -> Audit:
    data, workers = config["data"], config["prepare_workers"]
    root, folder = local_folder(data["root"], "data.root"), local_folder(data["dir"], "data.dir")
    with folder_lock(folder):
        if data["generate"] is not None:
            build(data["generate"], root=root, num_workers=workers)
        audit = audit_dataset(data["name"], root, folder, workers)
    table = Table(title=f"{data['name']}, audited")
    for column in ("found", *audit.facts):
        table.add_column(column, justify="left" if column == "found" else "right")
    sections = {
        "not usable": audit.rejected_by_split(),
        "flagged": audit.flagged_by_split(),
        "facts": {fact: {s: v.get(fact) for s, v in audit.facts.items()} for fact in audit.facts["test"]},
    }
    for title, rows in sections.items():
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]" + ("" if rows else ": nothing"))
        for name, counts in rows.items():
            found = [counts.get(split, 0) for split in audit.facts]
            table.add_row(f"  {name}", *("" if n is None else n if isinstance(n, str) else f"{n:,}" for n in found))
    console.print(table)
    written = ", ".join(str(_shown(folder / "audit" / f)) for f in ("rejected.csv", "audit.csv", "audit.html"))
    console.print(f"Nothing was dropped; data.filter=no_<flag> leaves out what carries a flag. Written: {written}")
    return audit


def _prepare(config: Mapping[str, Any], wait: bool = False) -> DatasetManifest:
    data, workers = config["data"], config["prepare_workers"]
    root, folder = local_folder(data["root"], "data.root"), local_folder(data["dir"], "data.dir")
    streams = [
        StreamRecipe(
            kind=kind,
            name=stream["name"],
            dim=stream["dim"],
            make_encoder=build({**stream["encoder"], "_partial_": True}),
            settings=stream["encoder"],
        )
        for kind, stream in config["model"]["streams"].items()
    ]
    with folder_lock(folder, wait):
        if data["generate"] is not None:
            build(data["generate"], root=root, num_workers=workers)
        voice = _voice_settings(config.get("describe"), data["voice"], folder)
        manifest = prepare_dataset(data["name"], root, folder, streams, workers, voice)
    if data["generate"] is not None:
        _ensure_llm(config)
    return manifest


def _voice_settings(describe: bool | None, wanted: Mapping[str, Any], folder: Path) -> VoiceSettings | None:
    """How to describe voices; without a word in the config as before, so that no later call loses descriptions."""
    if describe is not None:
        return VoiceSettings(**wanted) if describe else None
    try:
        before = DatasetManifest.read(folder).settings.get("voice")
    except MsencError:
        return None
    return VoiceSettings(**{key: before[key] for key in wanted}) if before else None


def _ensure_llm(config: Mapping[str, Any]) -> None:
    """Pre-train the LLM if the config says how; one of another name has to exist."""
    recipe = config["model"]["llm_recipe"]
    if recipe is not None and recipe["folder"] == config["model"]["llm"]["name_or_path"]:
        with folder_lock(local_folder(recipe["folder"], "model.llm_recipe.folder"), wait=True):
            build(recipe)


def _ensure_prepared(config: Mapping[str, Any], datamodule: DialogueDataModule) -> None:
    """Prepare data that the project generates itself; other data must be there."""
    try:
        datamodule.setup()
    except MsencError:
        if config["data"]["generate"] is None or is_url(config["data"]["dir"]):
            raise
        console.print("The demo is not prepared yet: preparing it (prepare.py data=demo does the same).")
        _prepare(config, wait=True)
        datamodule.setup()


def _print_manifest(config: Mapping[str, Any], manifest: DatasetManifest) -> None:
    table = Table(title=f"{manifest.name}, prepared")
    for column in ("split", "dialogues", "utterances", "samples", "hours", *manifest.streams):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, counts in manifest.splits.items():
        table.add_row(
            split,
            *(f"{n:,}" for n in (counts.dialogues, counts.utterances, counts.samples)),
            f"{counts.hours:.2f}",
            *(f"{info.utterances.get(split, 0):,}" for info in manifest.streams.values()),
        )
    console.print(table)
    folder = Path(config["data"]["dir"])
    if "voice" in manifest.settings:
        _print_bins(folder)
    if manifest.num_repaired:
        console.print(f"Text with repaired encoding: {manifest.num_repaired:,} rows.")
    for reason, count in manifest.rejected.items():
        console.print(f"Not used: {count:,} x {reason}")
    console.print(f"Written: {folder / 'dataset.json'}, {folder / 'rejected.csv'}, one folder per stream beside them.")


def _print_bins(folder: Path) -> None:
    table = Table(title="voice attributes: where the words change, from the train split")
    for column in ("attribute", "words", "unit", "clips", "10 %", "50 %", "90 %"):
        table.add_column(column, justify="left" if column in ("attribute", "words", "unit") else "right")
    for name, bin in read_bins(folder).items():
        words = bin.words[0] + "".join(f" {e:.4g} {w}" for e, w in zip(bin.edges or (), bin.words[1:], strict=False))
        table.add_row(
            name,
            words if bin.edges else f"unknown: {bin.source}",
            UNITS[name.partition("/")[0]],
            f"{bin.clips:,}",
            *(f"{p:.3g}" for p in bin.percentiles or ()),
        )
    console.print(table)
    console.print(
        f"Written: {_shown(folder / 'voice-bins.json')}, {_shown(folder / 'voice-turns.jsonl')}", soft_wrap=True
    )


# ---------------------------------------------------------------------------------------------------- train


def train(cfg: DictConfig) -> float | None:
    """Train one run, or continue it, and evaluate it; returns its best validation loss.

    In a multirun a failure is written to ``run.json`` and reported when the sweep ends, so that the other jobs run.
    """
    hydra = HydraConfig.get()
    overrides = [o for o in hydra.overrides.task if not o.startswith("resume=")]
    command = prepare_command(overrides, hydra.runtime.choices)
    if cfg.plan:
        try:
            _plan(cfg, command)
        finally:
            _discard_run_folder(Path(hydra.runtime.output_dir))
        return None
    with Termination() as termination:
        record = _open_record(cfg, overrides, command)
        try:
            loss = _train(cfg, record, termination)
            record.add(status="finished", best_loss=loss)
        except (KeyboardInterrupt, SystemExit) as e:  # Lightning turns the first into the second
            by = "SIGTERM" if getattr(e, "code", None) == STOPPED else "the keyboard, or by a signal"
            record.add(status="interrupted", error=f"interrupted by {by}; python train.py resume={record.folder}")
            raise
        except Exception as e:
            if not is_finished(record.facts):
                record.add(status="failed", error=f"{type(e).__name__}: {e}")
            if hydra.mode is not RunMode.MULTIRUN:
                raise
            if not isinstance(e, MsencError):
                traceback.print_exc()
            console.print(f"[red]This job failed; the sweep goes on.[/red] {e}", soft_wrap=True)
            return None
        finally:
            record.close()
    return loss


def _open_record(cfg: DictConfig, overrides: list[str], command: str) -> RunRecord:
    """The record of a new run, or of the one in the run's folder that `resume` continues."""
    if not is_first_process() and RUN_FOLDER in os.environ:
        own, cfg.paths.output_dir = cfg.paths.output_dir, os.environ[RUN_FOLDER]
        if own != cfg.paths.output_dir:
            shutil.rmtree(own, ignore_errors=True)  # Hydra has made it again
    folder = Path(cfg.paths.output_dir)
    if cfg.resume not in (None, "auto") and Path(cfg.resume).resolve() != folder.resolve():
        raise MsencError(f"resume={cfg.resume}: only train.py itself takes a folder. Expected null or auto.")
    if cfg.resume is not None and is_first_process() and (folder / "run.json").is_file():
        check_same_settings(folder, cfg)
        return RunRecord.reopen(folder)
    return RunRecord(folder, seed=cfg.seed, modality=cfg.modality, overrides=overrides, prepare_command=command)


def _train(cfg: DictConfig, record: RunRecord, termination: Termination) -> float | None:
    config = plain(cfg)
    check_targets(config, GIVEN)
    quieten()
    L.seed_everything(config["seed"], workers=True, verbose=False)
    _ensure_llm(config)
    datamodule = build_datamodule(config, record.facts.get("prepare_command", "python prepare.py"))
    _ensure_prepared(config, datamodule)
    data = {
        "turns_hash": datamodule.manifest.turns_hash,
        "streams": _stream_hashes(datamodule),
        "task_hash": task_hash(config, datamodule),
    }
    identity = digest({**run_settings(cfg), **data})
    if cfg.resume == "auto" and "identity" not in record.facts:
        earlier = find_run(Path(cfg.paths.runs_dir), identity)
        if earlier is not None:
            record.move(earlier)
            cfg.paths.output_dir = str(earlier)
            config = plain(cfg)
    if is_finished(record.facts):
        console.print(f"Finished already: {_shown(record.folder)}", soft_wrap=True)
        return record.facts.get("best_loss")
    if record.facts["resumed"]:
        _say_resumed(record)
    if "identity" in record.facts:
        _check_same_data(record.facts, config, datamodule)
    record.add(identity=identity, data=config["data"]["name"], **data)
    described = datamodule.described_targets("train")
    if config["prompt"]["target"] == "text_description" and not described:
        raise MsencError(
            f"prompt.target=text_description, but no turn of {config['data']['name']} has a voice description. "
            "Train on the words alone: prompt.target=text."
        )
    evaluates = config["evaluate"] and not config["trainer"].get("fast_dev_run")
    for split in ("train", "val", config["evaluate"]) if evaluates else ("train", "val"):
        datamodule.units(split)  # what does not fit the token budget is refused now, not after training
    model = build_model(config)
    _calibrate(model, datamodule)
    counts = model.trainable_parameters()
    record.add(
        llm=config["model"]["llm"]["name_or_path"],
        base_fingerprint=model.base_fingerprint,
        trainable_parameters=counts,
        audit_hash=datamodule.manifest.audit_hash,
        left_out=count_left_out(datamodule.left_out),
        history=datamodule.dropped_turns("train"),
        described_targets=described,
        batches=count_batches(datamodule, config["trainer"]),
    )
    _print_summary(config, record)
    if sum(counts.values()):
        if "stop_reason" not in record.facts:  # it was killed while it was evaluated
            _fit(config, model, datamodule, record, termination)
    else:
        record.add(stop_reason="nothing to train: the LLM is frozen and the modality has no connector")
        console.print("Nothing trains here (frozen LLM, no connector); the LLM is evaluated as it is.")
    if is_first_process() and not config["trainer"].get("fast_dev_run"):
        _export(config, model, record)
    loss = record.facts.get("best_loss")
    del model, datamodule
    if not is_first_process():
        return loss
    console.print(f"Run folder: {_shown(record.folder)}", soft_wrap=True)
    if evaluates:
        evaluate_run(record.folder, split=config["evaluate"], device=record.facts.get("device", "auto"))
    return loss


def _warn(text: str) -> None:
    console.print(f"[yellow]{escape(text)}[/yellow]", soft_wrap=True)


def _say_resumed(record: RunRecord) -> None:
    facts = record.facts
    console.print(f"Resuming {_shown(record.folder)}", soft_wrap=True)
    if facts["commit_resumed"] != facts["commit"]:
        _warn(f"The code changed: the run began with commit {facts['commit']}, this is {facts['commit_resumed']}.")


def _fit(
    config: Mapping[str, Any],
    model: ConversationModel,
    datamodule: DialogueDataModule,
    record: RunRecord,
    termination: Termination,
) -> None:
    module = ConversationModule(
        model,
        optimizer=build(config["optimizer"]),
        scheduler=build(config["scheduler"]) if config["scheduler"] else None,
    )
    # A debug run keeps nothing, so it takes neither loggers nor checkpoints.
    is_debug = bool(config["trainer"].get("fast_dev_run"))
    callbacks = [] if is_debug else [build(node) for node in config["callbacks"].values()]
    files = CheckpointFiles()
    checkpoints = next((c for c in callbacks if isinstance(c, Checkpoints)), None)
    newest = None
    if checkpoints is not None:
        checkpoints.termination, checkpoints.on_saved = termination, record.add
        newest = files.newest(checkpoints.folder, _warn)
    path, resume = (newest[0], newest[1]["resume"]) if newest else (None, None)
    if resume:
        checkpoints.best_score = resume["best_score"]
    outcome = resume["outcome"] if resume else None
    if outcome is None:
        if record.facts["resumed"]:
            at = (
                f"step {newest[1]['global_step']:,} ({path.name})" if newest else "the start: no checkpoint was written"
            )
            console.print(f"Training goes on from {at}.")
        purge = {"purge_step": resume["steps_logged"] if resume else 0} if record.facts["resumed"] else {}
        loggers = [build(n, **(purge if n["_target_"] in PURGING else {})) for n in config["logger"].values()]
        os.environ[RUN_FOLDER] = str(record.folder)
        trainer = build(
            config["trainer"],
            callbacks=callbacks,
            logger=[] if is_debug else loggers,
            plugins=[files],
            default_root_dir=str(record.folder),
            enable_model_summary=False,
            use_distributed_sampler=False,  # the data module shards by itself, and keeps its order
        )
        module.train()
        trainer.fit(module, datamodule=datamodule, ckpt_path=path)
        outcome = training_outcome(trainer)
    if is_first_process():
        write_json(record.folder / "metrics.json", outcome["metrics"])
    best = checkpoints.best_score if checkpoints and checkpoints.monitor == "val/loss" else None
    record.add(**outcome, best_loss=outcome["metrics"].get("val/loss") if best is None else best)


def _export(config: Mapping[str, Any], model: ConversationModel, record: RunRecord) -> None:
    folder = record.folder / "export"
    if (folder / "export.json").is_file():
        return
    trained = next((n for n in ("best", "last") if (record.folder / "checkpoints" / f"{n}.ckpt").is_file()), None)
    if trained is not None:
        load_checkpoint(ConversationModule(model), record.folder, trained)
    facts = {key: record.facts[key] for key in ("task_hash", "turns_hash", "seed", "commit")}
    write_export(folder, model, config, {"data": record.facts["data"], "checkpoint": trained, **facts})
    console.print(f"Written: {_shown(folder)}", soft_wrap=True)


def _print_summary(config: Mapping[str, Any], record: RunRecord) -> None:
    facts = record.facts
    table = Table(title=f"{config['modality']} on {config['data']['name']}, seed {config['seed']}", show_header=False)
    table.add_row("LLM", f"{facts['llm']} ({facts['base_fingerprint']})")
    table.add_row(
        "trainable parameters", ", ".join(f"{part} {n:,}" for part, n in facts["trainable_parameters"].items())
    )
    for split, counts in facts["left_out"].items():
        table.add_row(f"left out of {split}", f"{counts['dialogues']:,} dialogues, {counts['utterances']:,} utterances")
    _add_batches(table, facts["batches"], facts["history"], facts["described_targets"])
    console.print(table)


def _add_batches(table: Table, batches: Mapping[str, Any], history: Mapping[str, int], described: int) -> None:
    budget, steps = batches["max_tokens_per_batch"], batches["steps"]
    table.add_row("dialogues", f"{batches['dialogues']:,}")
    table.add_row("targets", f"{history['targets']:,}, {described:,} of them with a voice description")
    table.add_row(
        "history over budget",
        f"{history['targets_cut']:,} targets, {history['dropped_turns']:,} of {history['history_turns']:,} turns lost",
    )
    if budget is None:
        table.add_row("batch", f"{batches['batch_size']:,} dialogues (data.batch_size)")
    else:
        table.add_row(
            "batch",
            f"at most {budget:,} tokens (data.max_tokens_per_batch); "
            f"{batches['units']:,} units, {batches['split_dialogues']:,} dialogues split",
        )
    table.add_row("batches per epoch", f"{batches['batches_per_epoch']:,}")
    table.add_row("optimizer steps", "until stopped" if steps is None else f"{steps:,}")


def _plan(cfg: DictConfig, prepare_command: str) -> None:
    """Print what a run would take; builds its data module, and of its model the shapes."""
    config = plain(cfg)
    check_targets(config, GIVEN)
    quieten()
    trainer = config["trainer"]
    _ensure_llm(config)
    datamodule = build_datamodule(config, prepare_command)
    _ensure_prepared(config, datamodule)
    model = build_model(config, empty=True)
    if model.llm.attention_kernel != "eager":
        # Shapes are followed on a CPU: of its kernels, the one that keeps what the device's kernel keeps.
        on_gpu = trainer["accelerator"] in ("gpu", "cuda") or torch.cuda.is_available()
        kept = {"flex_attention": "split", "auto": "dense" if on_gpu else "split"}
        model.llm.attention_kernel = kept.get(model.llm.attention_kernel, model.llm.attention_kernel)
    table = Table(title=f"Plan: {config['modality']} on {config['data']['name']}", show_header=False)
    batches, processes = count_batches(datamodule, trainer), _num_processes(trainer)
    _add_batches(table, batches, datamodule.dropped_turns("train"), datamodule.described_targets("train"))
    tokens = batches["tokens_per_batch"]
    table.add_row("tokens per epoch", f"{batches['tokens_per_epoch']:,}")
    table.add_row("tokens per batch", f"{tokens['min']:,} to {tokens['max']:,}, median {tokens['median']:,}")
    if batches["fill"] is not None:
        table.add_row("budget filled", f"{100 * batches['fill']:.1f} %")
    table.add_row("padding", f"{100 * batches['padding']:.1f} %")
    if sum(model.trainable_parameters().values()):
        batch = largest_batch(datamodule, processes)
        bytes_of = predict_memory(model, build(config["optimizer"]), batch, str(trainer["precision"]), processes)
        table.add_section()
        for name, size in bytes_of.items():
            title = "predicted peak memory" if name == "peak" else name.replace("_", " ")
            table.add_row(
                title, f"{size / 2**20:,.1f} MiB" + (f" in each of {processes} processes" if processes > 1 else "")
            )
    console.print(table)
    console.print(
        "On top of it come Python and its libraries (0.4 GiB), and what the allocator does not give back (on a CPU, "
        "up to half as much again). Nothing was trained.",
        soft_wrap=True,
    )


def _num_processes(trainer: Mapping[str, Any]) -> int:
    devices = trainer.get("devices", "auto")
    if isinstance(devices, list):
        num = len(devices)
    else:
        num = int(devices) if str(devices).isdigit() else max(torch.cuda.device_count(), 1)
    return num * trainer.get("num_nodes", 1)


def _discard_run_folder(folder: Path) -> None:
    """Remove what Hydra has written for a job that is no run; a folder that holds anything else stays."""
    if not (folder / "run.json").exists():
        shutil.rmtree(folder / ".hydra", ignore_errors=True)
        with suppress(OSError):
            folder.rmdir()


def prepare_command(overrides: list[str], choices: Mapping[str, str | None]) -> str:
    """The `prepare.py` call that makes what a `train.py` call with these overrides, and these choices, needs."""
    kept = [o for o in overrides if o.lstrip("+").split("=")[0].split("@")[0].startswith(PREPARE_KEYS)]
    given = {o.split("=")[0] for o in kept}
    # An experiment chooses too; what prepare.py would choose by itself is left out.
    chosen = [f"{group}={choices[group]}" for group in ("data", "streams") if choices[group] != "demo"]
    kept = [*(c for c in chosen if c.split("=")[0] not in given), *kept]
    if "modality" not in given:
        kept.append(f"modality={choices['modality']}")
    if choices["data"] != "demo" and "data.root" not in given:
        kept.append("data.root=FOLDER")
    kept = ["data.dir=FOLDER" if o.startswith("data.dir=") and is_url(o) else o for o in kept]
    return shlex.join(["python", "prepare.py", *kept])


def quieten() -> None:
    """Hold back what libraries say of each other, and of choices that a config makes on purpose."""
    # Lightning lists devices it does not use and advertises; what matters is printed by msenc.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    # Between libraries: PEFT asks transformers by an old name, Lightning torch by an old call.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    # Choices of the config, made on purpose: small data loads in the process itself, frozen parts are in eval mode.
    warnings.filterwarnings("ignore", message=r".*Found \d+ module\(s\) in eval mode.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings(
        "ignore", message=".*The number of training batches .* is smaller than the logging interval.*"
    )


# ---------------------------------------------------------------------------------------------------- parts


def _prompt(config: Mapping[str, Any]) -> Prompt:
    return build(config["prompt"])


def build_datamodule(config: Mapping[str, Any], prepare_command: str) -> DialogueDataModule:
    """The data module of a run's config; checks nothing yet."""
    data, model = config["data"], config["model"]
    return DialogueDataModule(
        folder=locate(data["dir"], config["paths"]["cache_dir"]),
        streams={
            name: StreamSpec(stream["name"], stream["dim"], model["connector"]["num_queries"], stream["encoder"])
            for name, stream in model["streams"].items()
        },
        tokenizer=DialogueTokenizer(_prompt(config), load_tokenizer(model["llm"]["name_or_path"])),
        layout=model["layout"],
        batch_size=data["batch_size"],
        max_tokens_per_batch=data["max_tokens_per_batch"],
        num_workers=data["num_workers"],
        max_history_tokens=data["max_history_tokens"],
        seed=config["seed"],
        verify=data["verify"],
        filters=[data["filter"]] if isinstance(data["filter"], str) else data["filter"],
        prepare_command=prepare_command,
    )


def build_model(config: Mapping[str, Any], empty: bool = False) -> ConversationModel:
    """The composed model of a run's config, base weights loaded, connectors as they start.

    Args:
        config: of the run.
        empty: shapes alone, on the meta device; no weight is read.
    """
    model = config["model"]
    llm = build({**model["llm"], "empty": empty})
    width = llm.get_input_embeddings().embedding_dim
    connector = model["connector"]
    if empty and connector and "init" in connector:
        connector = {**connector, "init": None}
    with torch.device("meta") if empty else nullcontext():
        connectors = {
            name: build(connector, in_dim=stream["dim"], out_dim=width) for name, stream in model["streams"].items()
        }
    if model["tie_connectors"]:
        tie(connectors)
    return ConversationModel(llm, connectors)


def _calibrate(model: ConversationModel, datamodule: DialogueDataModule) -> None:
    """Fit the ends of new connectors to training utterances and to the LLM; the same in every process."""
    dataset = datamodule.dataset("train")
    embeddings = model.llm.get_input_embeddings().weight
    # Drawn from everywhere: a corpus may be sorted. Independent of the seed, as what runs share.
    order = np.random.default_rng(0).permutation(len(dataset)).tolist()
    for name, connector in model.connectors.items():
        present = (frames for index in order for frames in dataset[index][1][name] if frames is not None)
        utterances = (torch.from_numpy(frames) for frames in islice(present, CALIBRATION_UTTERANCES))
        calibrate(connector, utterances, embeddings)


def task_hash(config: Mapping[str, Any], datamodule: DialogueDataModule) -> str:
    """What two runs must share to be compared: turns and splits, the targets' form, and the history rule."""
    task = {
        "turns": datamodule.manifest.turns_hash,
        "target": config["prompt"]["target"],
        "max_history_tokens": config["data"]["max_history_tokens"],
    }
    if datamodule.left_out:
        task["left_out"] = sorted(datamodule.left_out)
    if windows := config["prompt"].get("windows"):
        task["windows"] = windows
    return digest(task)


# ---------------------------------------------------------------------------------------------------- evaluate


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
    """
    if limit is not None and limit < 1:
        raise MsencError(f"limit={limit}: expected the number of dialogues to measure, 1 or more, or null for all.")
    record, run_config = read_run(run_dir)
    run_config.paths.output_dir = str(run_dir)
    if data_dir is not None:
        run_config.paths.data_dir = data_dir
    config = plain(run_config)
    check_targets(config, GIVEN)
    decoding = config["decoding"] if decoding is None else decoding
    quieten()
    L.seed_everything(config["seed"], workers=True, verbose=False)
    datamodule = build_datamodule(config, record.get("prepare_command", "python prepare.py"))
    datamodule.setup()
    _check_same_data(record, config, datamodule)
    model = build_model(config)
    if sum(record["trainable_parameters"].values()):
        load_checkpoint(ConversationModule(model), run_dir, checkpoint)
    settings = {"checkpoint": checkpoint, "decoding": decoding if with_replies else None, "limit": limit}
    metrics, predictions = evaluate_split(
        model.to(_device(device)).eval(),
        datamodule,
        split,
        decoding if with_replies else None,
        config["seed"],
        limit,
    )
    metrics |= {
        "split": split,
        "data": config["data"]["name"],
        "task_hash": task_hash(config, datamodule),
        "settings": " ".join(f"{k}={v}" for k, v in settings.items()),
    }
    folder = run_dir / "evaluation" / f"{config['data']['name']}-{split}-{digest(settings)}"
    write_evaluation(folder, metrics, predictions)
    _print_metrics(metrics, f"{config['modality']} on {config['data']['name']}, {split}")
    shown = _shown(folder)
    console.print(f"Written: {shown / 'metrics.json'}, {shown / 'predictions.jsonl'}", soft_wrap=True)
    return metrics


def _check_same_data(record: Mapping[str, Any], config: Mapping[str, Any], datamodule: DialogueDataModule) -> None:
    """Refuse data that was prepared anew, with other content, since the run; imported weights know no data."""
    now = {"task_hash": task_hash(config, datamodule), "streams": _stream_hashes(datamodule)}
    for what, found in now.items():
        if record[what] not in (found, None):
            raise MsencError(
                f"{datamodule.folder}: not the data that the run was trained on ({what} was {record[what]}, is "
                f"{found}). Prepare it as it was, or train again."
            )


def _stream_hashes(datamodule: DialogueDataModule) -> dict[str, str]:
    return {s: datamodule.manifest.streams[f"{s}-{spec.name}"].hash for s, spec in datamodule.streams.items()}


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise MsencError(f"device={name}: not usable here ({str(e).splitlines()[0]}). Try device=cpu.") from e


def _shown(path: Path) -> Path:
    """A path as a user would type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def load_checkpoint(module: ConversationModule, run_dir: Path, checkpoint: str) -> None:
    """Fill a module with a run's trained tensors.

    Raises:
        MsencError: the file is missing or unreadable, or does not belong to these base weights.
    """
    path = Path(checkpoint)
    if checkpoint in ("best", "last"):
        path = run_dir / "checkpoints" / f"{checkpoint}.ckpt"
        last = path.with_name("last.ckpt")
        if not path.is_file() and last.is_file():
            console.print(
                "There is no best checkpoint here (no validation ran, or it was removed): the last one is taken."
            )
            path = last
    if not path.is_file():
        found = sorted(f.name for f in (run_dir / "checkpoints").glob("*.ckpt"))
        raise MsencError(f"{path}: no such checkpoint. Found: {', '.join(found) or 'none'}. Did the run finish?")
    saved = read_checkpoint(path)
    module.on_load_checkpoint(saved)
    module.load_state_dict(saved["state_dict"], strict=False)


def _print_metrics(metrics: Mapping[str, Any], title: str) -> None:
    table = Table(title=title)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        if isinstance(value, float) and not math.isnan(value):
            is_share = name.endswith("/recovered")
            table.add_row(name, f"{100 * value:.1f} %" if is_share else f"{value:.4f}")
        elif isinstance(value, int):
            table.add_row(name, f"{value:,}")
    console.print(table)


# ---------------------------------------------------------------------------------------------------- report


def report(cfg: DictConfig) -> None:
    """Print one table of all runs below a folder."""
    from msenc.report.collect import collect_runs
    from msenc.report.table import print_table, summarise, write_table

    plain(cfg)
    table = summarise(collect_runs(Path(cfg.sweep_dir)), split=cfg.split, settings=cfg.settings)
    print_table(table)
    paths = write_table(table, Path(cfg.sweep_dir))
    console.print(f"Written: {', '.join(map(str, paths))}", soft_wrap=True)


def end_sweep(sweep_dir: Path) -> None:
    """What a multirun does last: print the report, name what failed, and exit with status 1 if anything did."""
    from msenc.report.collect import collect_runs

    runs = collect_runs(sweep_dir)
    failed = [run for run in runs if run.status != "finished"]
    try:
        report(OmegaConf.create({"sweep_dir": str(sweep_dir), "split": "test", "settings": None}))
    except MsencError as e:
        console.print(f"No table: {e}", soft_wrap=True)
    if failed:
        console.print(f"[red]{len(failed)} of {len(runs)} jobs did not finish:[/red]")
        for run in failed:
            console.print(f"  {run.name}: {run.status}: {run.error}", soft_wrap=True)
        sys.exit(1)
