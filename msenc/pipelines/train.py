"""train.py: train a run, or resume it, and evaluate it."""

import gc
import multiprocessing
import os
import signal
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch.distributed.fsdp import FSDPModule

from msenc.config.build import build
from msenc.config.checks import checked
from msenc.config.schema import EvaluateConfig, plain
from msenc.data.controls import read_controls
from msenc.data.datamodule import DialogueDataModule
from msenc.data.preferences import PreferenceDataModule
from msenc.files import write_json
from msenc.models.conversation import ConversationModel
from msenc.models.groups import describe_groups, flatten_groups, partition
from msenc.models.quantize import described
from msenc.pipelines.evaluate import evaluate_run
from msenc.pipelines.plan import add_batches, num_processes, plan_run
from msenc.pipelines.prepare import ensure_llm, ensure_prepared, prepare_command
from msenc.report.card import write_card
from msenc.runs.folder import settle_folder, write_config
from msenc.runs.identity import check_same_data, check_same_settings, data_hashes, run_identity
from msenc.runs.overrides import key_of, task_overrides
from msenc.runs.record import RunRecord, is_finished, is_first_process
from msenc.runs.sweep import is_stopping, job_folder, note_run
from msenc.runs.trust import check_urls, strings_of, values_of
from msenc.store.flags import count_left_out
from msenc.tracking.measures import Measures
from msenc.tracking.trackers import closing_trackers, open_trackers
from msenc.training.align import Labels, align_connectors, sources_of
from msenc.training.assembly import (
    GIVEN,
    build_datamodule,
    build_model,
    build_optimizer,
    calibrate_connectors,
    check_precision,
    check_weights,
    find_data,
    num_parameters,
)
from msenc.training.checkpoints import (
    BEST,
    CheckpointFiles,
    Checkpoints,
    training_outcome,
    write_checkpoint,
)
from msenc.training.export import write_export
from msenc.training.init_from import Start, read_starts, start_from
from msenc.training.module import ConversationModule
from msenc.training.monitor import findings, warnings
from msenc.training.plan import count_batches
from msenc.training.preference import PreferenceModule
from msenc.training.restore import fill_model, load_checkpoint
from msenc.training.sharding import LAST, PREVIOUS, gather, is_sharded
from msenc.types import MsencError
from msenc.work.console import console, quieten, shown
from msenc.work.group import ALONE, name_the_dead, open_group
from msenc.work.signals import STOPPED, Termination
from msenc.work.threads import settle_threads

ALIGN = "align"
"""``stage=align``: the run ends once its connectors are aligned."""

NO_VALIDATION = (
    "Trained without validation (data.val=null): nothing tells when to stop, or whether streams arrive, and the last "
    "checkpoint is taken as the best."
)
SPELT_DIALOGUES = 200
"""Number of training dialogues on which tokens per word are counted."""
SPELLING = 1.8
"""Tokens per word above which an LLM spells out words: the tiny LLMs take 1.2 in their own world, 3 in others."""


@dataclass
class _Job:
    """A run before it has a folder: what it reads, and by what it is known.

    Args:
        config: plain, of the run.
        datamodule: of the run; opened.
        labels: for aligning connectors.
        starts: parts initialized from other runs.
        data: hashes of everything it reads.
        identity: by which a repeated command finds the run.
    """

    config: dict[str, Any]
    datamodule: DialogueDataModule
    labels: Labels
    starts: Mapping[str, Start]
    data: dict[str, Any]
    identity: str


def train(cfg: DictConfig) -> float | None:
    """Train one run, or resume it, and evaluate it; returns its best validation loss.

    In a multirun a failure is written to ``run.json`` and reported when the sweep ends, so that the other jobs run.
    """
    hydra = HydraConfig.get()
    overrides = [o for o in task_overrides(hydra) if key_of(o) not in ("resume", "paths.output_dir")]
    command = prepare_command(overrides, hydra.runtime.choices)
    is_job = hydra.mode is RunMode.MULTIRUN
    if is_job and cfg.resume is None:
        cfg.resume = "auto"  # a repeated sweep reuses its jobs, whenever they ran
    if cfg.dry_run:
        raise MsencError(
            "dry_run=true lists the jobs of a sweep, but this is a single run. For its cost, use plan=true"
        )
    if cfg.detach and not is_job:
        raise MsencError(
            "detach=true leaves the jobs of a sweep to Slurm, but this is a single run; submit it by sbatch "
            "(docs/cluster.md)."
        )
    if cfg.plan:
        return plan_run(cfg, command)
    is_elsewhere = is_job and not hydra.launcher._target_.endswith(".BasicLauncher")
    if is_elsewhere:  # one process for several jobs; the sweep's process learns the result when they return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # between jobs
        # Back to the default: joblib's start method only works in its own processes, so none could be started here.
        multiprocessing.set_start_method(None, force=True)
        if is_stopping(Path(hydra.sweep.dir)):
            return None
    record = None
    with Termination() as termination:
        try:
            job = _open(cfg, command)
            record = _settle(cfg, job, overrides, command)
            was_finished = is_finished(record.facts)
            loss = _train(job, record, termination)
            if not was_finished:
                record.add(status="finished", best_loss=loss)
            return loss
        except (KeyboardInterrupt, SystemExit) as e:  # Lightning turns the first into the second
            is_stopped = getattr(e, "code", None) == STOPPED
            by = termination.asked_by.name if is_stopped and termination.is_asked else "Ctrl-C, or by a signal"
            if record is not None:
                record.add(status="interrupted", error=f"interrupted by {by}; python train.py resume={record.folder}")
                again = "the same command" if is_job else f"python train.py resume={shown(record.folder)}"
                console.print(f"Interrupted by {by}. To continue: {again}", soft_wrap=True)
            termination.ask_for_requeue(is_first_process())
            if is_elsewhere and is_stopped:
                return None  # if raised, the launcher would kill the other jobs before they have saved
            raise
        except Exception as e:
            if is_job and record is None:  # the sweep's report also names jobs that did not start
                # in a new folder: an existing one may belong to another process
                folder = job_folder(Path(hydra.sweep.dir), hydra.job.num, task_overrides(hydra))
                record = _new_record(folder, cfg, overrides, command)
                note_run(Path(hydra.sweep.dir), hydra.job.num, record.folder, task_overrides(hydra))
            if record is not None and not is_finished(record.facts):
                record.add(status="failed", error=f"{type(e).__name__}: {e}")
            if not is_job:
                raise
            if not isinstance(e, MsencError):
                traceback.print_exc()
            console.print(f"This job failed; the sweep continues. {e}", style="red", soft_wrap=True)
            return None
        finally:
            if record is not None:
                record.close()


def _open(cfg: DictConfig, command: str) -> _Job:
    """Check the config, and open the data; missing generated data are created."""
    config = checked(cfg, GIVEN)
    _check_choices(config)
    if cfg.resume not in (None, "auto"):
        # No stored override has a URL that was not allowed (`check_overrides`), but parts may combine to one.
        check_urls(
            config,
            [*config["urls"], *values_of(task_overrides(HydraConfig.get()))],
            Path(cfg.resume) / ".hydra" / "overrides.yaml",
        )
        check_same_settings(Path(cfg.resume), cfg)
    quieten()
    L.seed_everything(config["seed"], workers=True, verbose=False)
    find_data(config, command)
    ensure_llm(config)
    datamodule = build_datamodule(config, command, for_training=True)
    ensure_prepared(config, datamodule)
    labels = Labels(config, datamodule, command)
    goes_on = cfg.resume not in (None, "auto") and _has_checkpoint(Path(cfg.resume))
    starts = {} if goes_on else read_starts(config)
    if config["objective"] and not goes_on:
        _check_start(config, starts)
    data = data_hashes(config, datamodule)
    if labels.hashes:
        data["labels"] = labels.hashes
    if starts:
        data["init_from"] = {part: start.facts["hash"] for part, start in starts.items()}
    return _Job(config, datamodule, labels, starts, data, run_identity(cfg, data))


def _check_start(config: Mapping[str, Any], starts: Mapping[str, Start]) -> None:
    """Refuse preferences to a start that has learned nothing of what the run hears and sees."""
    streams = config["model"]["streams"]
    if streams and "connectors" not in starts:
        raise MsencError(
            f"objective=dpo: found new connectors for {' and '.join(streams)}, expected a trained run to start from, "
            "which is also the reference: init_from=RUN (or init_from.connectors=RUN)."
        )


def _settle(cfg: DictConfig, job: _Job, overrides: list[str], command: str) -> RunRecord:
    """The record of a new run, in a folder created now, or of the one that `resume` continues."""
    hydra = HydraConfig.get()
    folder = settle_folder(cfg, hydra, job.identity, num_processes(job.config["trainer"]))
    job.config = plain(cfg)  # with the folder in it
    if cfg.resume is not None and is_first_process() and (folder / "run.json").is_file():
        if cfg.resume == "auto":
            check_same_settings(folder, cfg)
        # A job of a sweep may still run on behalf of a sweep's process that was killed.
        record = RunRecord.reopen(folder, wait=hydra.mode is RunMode.MULTIRUN)
    else:
        record = _new_record(folder, cfg, overrides, command)
    if is_first_process() and hydra.mode is RunMode.MULTIRUN:
        note_run(Path(hydra.sweep.dir), hydra.job.num, folder, task_overrides(hydra))
    return record


def _new_record(folder: Path, cfg: DictConfig, overrides: list[str], command: str) -> RunRecord:
    record = RunRecord(folder, seed=cfg.seed, modality=cfg.modality, overrides=overrides, prepare_command=command)
    if is_first_process():
        write_config(folder, cfg, overrides)
    return record


def _train(job: _Job, record: RunRecord, termination: Termination) -> float | None:
    if is_finished(record.facts):
        console.print(f"Already finished: {shown(record.folder)}", soft_wrap=True)
        return record.facts.get("best_loss")
    if record.facts["resumed"]:
        _say_resumed(record)
    config = job.config
    if "identity" in record.facts:
        check_same_data(record.facts, config, job.datamodule)
    record.add(
        identity=record.facts.get("identity", job.identity),
        data=config["data"]["name"],
        tracked=record.facts.get("tracked") or _new_tracked(config, record.folder),
        **job.data,
    )
    evaluates = bool(config["evaluate"]) and not config["trainer"].get("fast_dev_run")
    _learn(job, record, termination, [config["evaluate"]] if evaluates else [])
    is_whole_in_one = is_sharded(config["trainer"])  # the first process alone holds a whole LLM then
    if config["stage"] == ALIGN or (is_whole_in_one and not is_first_process()):
        return record.facts.get("best_loss")
    console.print(f"Run folder: {shown(record.folder)}", soft_wrap=True)
    gc.collect()  # reference cycles in Lightning would keep optimizer and LLM alive during evaluation
    if evaluates:
        device = record.facts.get("device", "auto")
        options = EvaluateConfig(
            split=config["evaluate"],
            device=device,
            control=config["control"],
            urls=[text for _, text in strings_of(config)],  # its own
        )
        num = 1 if is_whole_in_one else num_processes(config["trainer"])
        with open_group(config["trainer"], num) if num > 1 else ALONE as group:
            evaluate_run(record.folder, options, record.facts["threads"], group)
    return record.facts.get("best_loss")


def _new_tracked(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """By what services know the run: chosen before they are asked, so that no kill leaves one that nobody knows."""
    hydra = HydraConfig.get()
    name = os.path.relpath(folder, config["paths"]["runs_dir"])
    return {
        "id": uuid4().hex[:12],
        "name": (folder.name if name.startswith("..") else name)[-100:],
        "group": Path(hydra.sweep.dir).name if hydra.mode is RunMode.MULTIRUN else None,
    }


def _learn(job: _Job, record: RunRecord, termination: Termination, evaluated: list[str]) -> None:
    """Build, align, train and export the model; `evaluated` are the splits evaluated afterwards."""
    config, datamodule = job.config, job.datamodule
    described = datamodule.described_targets("train")
    if config["prompt"]["target"] == "text_description" and not described:
        raise MsencError(
            f"prompt.target=text_description, but no turn of {config['data']['name']} has a voice description. "
            "Prepare with describe=true, or train only on the words: prompt.target=text."
        )
    validates = (val := config["data"]["val"]) is not None
    drawn = datamodule.manifest.settings.get("val")
    if isinstance(val, float) and val != drawn:
        prepared = "with another share" if drawn else "without"
        raise MsencError(
            f"data.val={val}: the data was prepared {prepared} (dataset.json: {drawn or 'none'}). Prepare again with "
            f"data.val={val}, or leave data.val out to validate on the split val that is there."
        )
    for split in ("train", *(["val"] if validates else []), *evaluated):
        datamodule.check_split(split)
        datamodule.units(split)  # targets that exceed the token budget are refused now, not after training
    read_controls(config["control"], datamodule.streams)
    loss_weights = config["loss"]["weights"]
    check_weights(loss_weights, datamodule)
    model = build_model(config, by_shares=is_sharded(config["trainer"]))
    record.add(threads=_settle_threads(model, record, config.get("threads")))
    aligned = align_connectors(config, model, datamodule, job.labels)
    calibrated = [stream for stream, fact in aligned.items() if fact["used"]]
    if "connectors" in job.starts or _has_checkpoint(record.folder):
        calibrated = list(model.connectors)
    calibrate_connectors(model, datamodule, calibrated)
    started = start_from(job.starts, config, model)
    if aligned:
        record.add(alignments=aligned)
    if started:
        record.add(starts=started)
    # Random draws for parts initialized elsewhere must not affect what follows: separate stages and a single
    # command give the same result.
    L.seed_everything(config["seed"], workers=True, verbose=False)
    counts = model.trainable_parameters()
    named = flatten_groups(config["optimizer"].get("groups"))
    groups = describe_groups(partition(model.trainable(), named), build_optimizer(config), _scheduler(config))
    record.add(
        llm=config["model"]["llm"]["name_or_path"],
        base_fingerprint=model.base_fingerprint,
        quantization=model.quantization,
        trainable_parameters=counts,
        parameter_groups=groups,
        loss_weights=loss_weights or None,
        drop=datamodule.drop or None,
        preferences=_count_preferences(datamodule, validates),
        audit_hash=datamodule.manifest.audit_hash,
        left_out=count_left_out(datamodule.left_out),
        history=datamodule.dropped_turns("train"),
        described_targets=described,
        speakers=datamodule.common_speakers("train"),
        batches=count_batches(datamodule, config["trainer"]),
    )
    _print_summary(config, record)
    asked_for = {key_of(override).removeprefix("optimizer.groups.") for override in record.facts["overrides"]}
    for name in named:
        is_asked_for = any(f"{key}.".startswith(f"{name}.") for key in asked_for)
        if is_asked_for and name not in {group["name"] for group in groups}:
            console.print(f"optimizer.groups.{name}: no part of it trains in this run, so it is ignored.")
    for note in datamodule.tokenizer.notes:
        console.print(note, soft_wrap=True)
    said = [
        *([] if validates else [NO_VALIDATION]),
        *_spelling(config, datamodule),
        *check_precision(model, config["trainer"].get("precision")),
    ]
    for text in said:
        _warn(text)
    if config["stage"] == ALIGN:
        return _end_with_alignment(config, model, record)
    if sum(counts.values()):
        if "stop_reason" not in record.facts:  # it was killed during evaluation
            _fit(config, model, datamodule, record, termination)
    else:
        record.add(stop_reason="nothing to train: the LLM is frozen and the modality has no connector")
        console.print("Nothing to train (frozen LLM, no connector); the LLM is evaluated as it is.")
        if not config["trainer"].get("fast_dev_run"):
            with closing_trackers(open_trackers(config, record.facts, record.folder, _warn, 0)):
                pass  # its settings are logged
    if not config["trainer"].get("fast_dev_run"):
        _export(config, model, record)
    _print_streams(record, said)
    return None


def _count_preferences(datamodule: DialogueDataModule, validates: bool) -> dict[str, int] | None:
    """Split -> pairs of replies; None if the run learns the data's replies."""
    if not isinstance(datamodule, PreferenceDataModule):
        return None
    return {split: datamodule.num_pairs(split) for split in ("train", *(["val"] if validates else []))}


def _has_checkpoint(folder: Path) -> bool:
    return any((folder / "checkpoints" / name).exists() for name in (LAST, PREVIOUS))


def _spelling(config: Mapping[str, Any], datamodule: DialogueDataModule) -> list[str]:
    """Warning if the LLM was made for other data, and has to spell out the words of these."""
    if config["model"]["llm_recipe"] is None:
        return []
    tokens = datamodule.tokenizer.tokens_per_word(islice(datamodule.dialogues("train"), SPELT_DIALOGUES))
    if tokens < SPELLING:
        return []
    llm = config["model"]["llm"]
    is_in_full = not llm.get("freeze") and llm.get("lora") is None
    return [
        f"The tiny LLM ({llm['name_or_path']}) was only pre-trained on a generated world. It spells the words of "
        f"{config['data']['name']}, {tokens:.1f} tokens per word, without knowing what they mean: its losses and "
        "replies will say little about your data. Use a real LLM: model/llm=smollm2 prompt=chat, by hub "
        "id or model.llm.name_or_path=FOLDER"
        + ("." if is_in_full else "; or train this one in full (model.llm.freeze=false model.llm.lora=null).")
    ]


def _print_streams(record: RunRecord, said_before: list[str]) -> None:
    """The streams at the last validation, with warnings."""
    found = findings(record.facts.get("metrics", {}))
    aligned = [stream for stream, fact in record.facts.get("alignments", {}).items() if fact["used"]]
    said = warnings(record.facts.get("metrics", {}), aligned)
    record.add(warnings=[*said_before, *said])
    if not found:
        return
    table = Table(title="streams at the last validation")
    for column in ("stream", "output differs between utterances", "rise of the loss when swapped (nats per token)"):
        table.add_column(column, justify="left" if column == "stream" else "right")
    for stream, values in found.items():
        table.add_row(stream, f"{100 * values['spread']:.2f} %", f"{values['used_nats']:.4f}")
    console.print(table)
    for text in said:
        _warn(text)


def _check_choices(config: Mapping[str, Any]) -> None:
    if config["stage"] not in (None, ALIGN):
        raise MsencError(f"stage={config['stage']}: expected {ALIGN}, or null to train on dialogues as well.")
    is_shared = is_sharded(config["trainer"])
    if is_shared and config["stage"] == ALIGN:
        raise MsencError(f"stage={ALIGN}: found trainer=fsdp2, expected one process: trainer=gpu, or trainer=cpu.")
    if is_shared and config["trainer"].get("precision") == "16-mixed":
        raise MsencError(
            "trainer.precision=16-mixed: found trainer=fsdp2, whose processes would each scale the gradients of "
            "their own share. Use bf16-mixed, or 32-true."
        )
    if config["stage"] == ALIGN and not sources_of(config):
        what = "align=none" if config["align"] is None else f"modality={config['modality']} has no stream to align"
        raise MsencError(
            f"stage={ALIGN}: found {what}. Choose labels, such as align=words, and a modality with a stream."
        )


def _end_with_alignment(config: Mapping[str, Any], model: ConversationModel, record: RunRecord) -> None:
    """Save the aligned connectors as a checkpoint for other runs to start from."""
    module = ConversationModule(model)
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "global_step": 0}
    module.on_save_checkpoint(checkpoint)
    if is_first_process():
        for name in (LAST, BEST):
            write_checkpoint(checkpoint, record.folder / "checkpoints" / name)
        _export(config, model, record)
    record.add(stop_reason="connectors aligned (stage=align)")
    console.print(
        f"Aligned. Start from it: python train.py init_from.connectors={shown(record.folder)}", soft_wrap=True
    )


def _warn(text: str) -> None:
    console.print(text, style="yellow", soft_wrap=True)


def _say_resumed(record: RunRecord) -> None:
    facts = record.facts
    console.print(f"Resuming {shown(record.folder)}", soft_wrap=True)
    if facts["commit_resumed"] != facts["commit"]:
        _warn(
            f"The code has changed: the run started with commit {facts['commit']}, this is {facts['commit_resumed']}."
        )


def _settle_threads(model: ConversationModel, record: RunRecord, given: int | None) -> int:
    """The number of threads the run started with, or that suits its model; OMP_NUM_THREADS and `given` override it."""
    before = record.facts.get("threads")
    threads = settle_threads(num_parameters(model), before, given)
    if before not in (None, threads):
        _warn(
            f"OMP_NUM_THREADS={threads}: the run had {before} before. Sums are rounded in a different order from "
            "here on, so the result will be close to that of an uninterrupted run, but not bit for bit equal."
        )
    return threads


def _fit(
    config: Mapping[str, Any],
    model: ConversationModel,
    datamodule: DialogueDataModule,
    record: RunRecord,
    termination: Termination,
) -> None:
    objective = config["objective"]
    kind = ConversationModule
    if objective:
        settings = {key: objective[key] for key in ("beta", "label_smoothing", "rpo_alpha")}
        kind = partial(PreferenceModule, **settings)
    module = kind(
        model,
        optimizer=build_optimizer(config),
        scheduler=_scheduler(config),
        groups=flatten_groups(config["optimizer"].get("groups")),
        loss_weights=config["loss"]["weights"],
    )
    # A debug run saves nothing, so it has neither loggers nor checkpoints.
    is_debug = bool(config["trainer"].get("fast_dev_run"))
    callbacks = [] if is_debug else [build(n, f"callbacks.{k}") for k, n in config["callbacks"].items() if n]
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
            console.print(f"Training resumes from {at}.")
        purge = (resume["steps_logged"] if resume else 0) if record.facts["resumed"] else None
        trackers = [] if is_debug else open_trackers(config, record.facts, record.folder, _warn, purge)
        trainer = build(
            config["trainer"] | ({"limit_val_batches": 0} if config["data"]["val"] is None else {}),
            "trainer",
            callbacks=[*callbacks, *([Measures()] if trackers else [])],
            logger=trackers,
            plugins=[files],
            default_root_dir=str(record.folder),
            enable_model_summary=False,
            use_distributed_sampler=False,  # the data module shards by itself, in its own order
        )
        module.train()
        name_the_dead()
        with closing_trackers(trackers):
            trainer.fit(module, datamodule=datamodule, ckpt_path=path, weights_only=True)
        outcome = training_outcome(trainer)
        record.add(processes=trainer.world_size)
        datamodule.trainer = None  # would keep the trained model alive as long as the data
    if is_first_process():
        write_json(record.folder / "metrics.json", outcome["metrics"])
    best = checkpoints.best_score if checkpoints and checkpoints.monitor == "val/loss" else None
    record.add(
        **outcome,
        best_loss=outcome["metrics"].get("val/loss") if best is None else best,
        threads=torch.get_num_threads(),  # Lightning divides the cores among the processes of a run
    )


def _scheduler(config: Mapping[str, Any]) -> Any:
    return build(config["scheduler"], "scheduler") if config["scheduler"] else None


def _export(config: Mapping[str, Any], model: ConversationModel, record: RunRecord) -> None:
    folder = record.folder / "export"
    trained = next((n for n in ("best", "last") if (record.folder / "checkpoints" / f"{n}.ckpt").exists()), None)
    gathered = gather(model) if isinstance(model, FSDPModule) and trained is None else {}
    if not is_first_process() or (folder / "export.json").is_file():
        return
    if model.llm.stored is not None:  # this process has a share of the weights; what trains is exported whole
        model = build_model(config, by_shares=True)
    if trained is not None:
        load_checkpoint(ConversationModule(model), record.folder, trained)
    elif gathered:
        fill_model(model, gathered)
    facts = {key: record.facts[key] for key in ("task_hash", "turns_hash", "seed", "commit", "speakers")}
    write_export(folder, model, config, {"data": record.facts["data"], "checkpoint": trained, **facts})
    write_card(record.folder)
    console.print(f"Written: {shown(folder)}", soft_wrap=True)


def _print_summary(config: Mapping[str, Any], record: RunRecord) -> None:
    facts = record.facts
    table = Table(title=f"{config['modality']} on {config['data']['name']}, seed {config['seed']}", show_header=False)
    weights = f", {described(facts['quantization'])} weights" if facts["quantization"] else ""
    table.add_row("LLM", f"{facts['llm']} ({facts['base_fingerprint']}){weights}")
    table.add_row(
        "trainable parameters", ", ".join(f"{part} {n:,}" for part, n in facts["trainable_parameters"].items())
    )
    for split, counts in facts["left_out"].items():
        table.add_row(
            f"excluded from {split}", f"{counts['dialogues']:,} dialogues, {counts['utterances']:,} utterances"
        )
    if facts["loss_weights"]:
        weights = ", ".join(f"{kind} {weight:g}" for kind, weight in facts["loss_weights"].items())
        table.add_row("loss weights", f"{weights}; 1 for other tokens")
    if facts["drop"]:
        table.add_row("dropped in training", ", ".join(f"{share:.0%} of {s}" for s, share in facts["drop"].items()))
    if facts["preferences"]:
        pairs = ", ".join(f"{count:,} of {split}" for split, count in facts["preferences"].items())
        table.add_row("preferences", f"{pairs} ({config['objective']['pairs']}); reference: the run as it starts")
    table.add_row("threads", str(facts["threads"]))
    add_batches(table, facts["batches"], facts["history"], facts["described_targets"])
    console.print(table)
    if facts["parameter_groups"]:
        console.print(_groups_table(facts["parameter_groups"]))


def _groups_table(groups: list[dict[str, Any]]) -> Table:
    titles = {"name": "group", "lr": "rate", "weight_decay": "decay", "warmup": "warm-up"}
    table = Table(box=SIMPLE_HEAD, title="Parameter groups", pad_edge=False)
    keys = list(dict.fromkeys(key for group in groups for key in group))
    for key in keys:
        is_text = key in ("name", "pattern")
        table.add_column(
            titles.get(key, key), justify="left" if is_text else "right", no_wrap=key != "pattern", overflow="fold"
        )
    for group in groups:
        table.add_row(*(_shown_setting(group.get(key)) for key in keys))
    return table


def _shown_setting(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
