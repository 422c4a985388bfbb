"""What train.py does: one run, or its continuation, and its evaluation."""

import gc
import multiprocessing
import signal
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from msenc.config.build import build
from msenc.config.checks import checked
from msenc.config.schema import EvaluateConfig, plain
from msenc.data.controls import read_controls
from msenc.data.datamodule import DialogueDataModule
from msenc.files import write_json
from msenc.models.conversation import ConversationModel
from msenc.models.groups import describe_groups, flatten_groups, partition
from msenc.pipelines.evaluate import evaluate_run
from msenc.pipelines.plan import add_batches, num_processes, plan_run
from msenc.pipelines.prepare import ensure_llm, ensure_prepared, prepare_command
from msenc.runs.folder import settle_folder, write_config
from msenc.runs.identity import check_same_data, check_same_settings, data_hashes, run_identity
from msenc.runs.overrides import key_of
from msenc.runs.record import RunRecord, is_finished, is_first_process
from msenc.runs.sweep import is_stopping, job_folder, note_run
from msenc.runs.trust import check_urls, strings_of, values_of
from msenc.store.flags import count_left_out
from msenc.training.align import Labels, align_connectors, sources_of
from msenc.training.assembly import (
    GIVEN,
    build_datamodule,
    build_model,
    build_optimizer,
    calibrate_connectors,
    check_weights,
    num_parameters,
)
from msenc.training.checkpoints import (
    BEST,
    LAST,
    PREVIOUS,
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
from msenc.training.restore import load_checkpoint
from msenc.types import MsencError
from msenc.work.console import console, quieten, shown
from msenc.work.signals import STOPPED, Termination
from msenc.work.threads import settle_threads

ALIGN = "align"
"""``stage=align``: the run ends when its connectors are aligned."""

NO_VALIDATION = (
    "Trained without validation (data.val=null): nothing tells when to stop, or whether streams arrive, and the last "
    "checkpoint is taken as the best."
)
SPELT_DIALOGUES = 200
"""Training dialogues on which tokens per word are counted."""
SPELLING = 1.8
"""Tokens per word from which an LLM spells: the tiny LLMs take 1.2 for their own worlds and 3 for others."""

PURGING = ("msenc.training.loggers.CsvLogger", "lightning.pytorch.loggers.TensorBoardLogger")
"""Loggers that drop, when a run is resumed, what was logged after its checkpoint."""


@dataclass
class _Job:
    """A run before it has a folder: what it reads, and by what it is known.

    Args:
        config: plain, of the run.
        datamodule: of the run; opened.
        labels: that connectors are aligned to.
        starts: what is taken from other runs.
        data: hashes of all that it reads.
        identity: by which the same command finds its run again.
    """

    config: dict[str, Any]
    datamodule: DialogueDataModule
    labels: Labels
    starts: Mapping[str, Start]
    data: dict[str, Any]
    identity: str


def train(cfg: DictConfig) -> float | None:
    """Train one run, or continue it, and evaluate it; returns its best validation loss.

    In a multirun a failure is written to ``run.json`` and reported when the sweep ends, so that the other jobs run.
    """
    hydra = HydraConfig.get()
    overrides = [o for o in hydra.overrides.task if key_of(o) not in ("resume", "paths.output_dir")]
    command = prepare_command(overrides, hydra.runtime.choices)
    is_job = hydra.mode is RunMode.MULTIRUN
    if is_job and cfg.resume is None:
        cfg.resume = "auto"  # a sweep is what its jobs are, whenever they ran
    if cfg.dry_run:
        raise MsencError("dry_run=true lists the jobs of a sweep, and this is one run. See what it takes: plan=true")
    if cfg.plan:
        return plan_run(cfg, command)
    is_elsewhere = is_job and not hydra.launcher._target_.endswith(".BasicLauncher")
    if is_elsewhere:  # one process for several jobs, which the sweep's process hears when they return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # between jobs
        # Back to the platform's: joblib's is known to its own processes alone, so that no other could start from here.
        multiprocessing.set_start_method(None, force=True)
        if is_stopping(Path(hydra.sweep.dir)):
            return None
    record = None
    with Termination() as termination:
        try:
            job = _open(cfg, command)
            record = _settle(cfg, job, overrides, command)
            loss = _train(job, record, termination)
            record.add(status="finished", best_loss=loss)
            return loss
        except (KeyboardInterrupt, SystemExit) as e:  # Lightning turns the first into the second
            by = "SIGTERM" if getattr(e, "code", None) == STOPPED else "the keyboard, or by a signal"
            if record is not None:
                record.add(status="interrupted", error=f"interrupted by {by}; python train.py resume={record.folder}")
            if is_elsewhere and getattr(e, "code", None) == STOPPED:
                return None  # raised, it would have the launcher kill the others before they have saved
            raise
        except Exception as e:
            if is_job and record is None:  # the sweep's report names what did not start, too
                # in a folder of its own: one that was found may be another process's
                folder = job_folder(Path(hydra.sweep.dir), hydra.job.num)
                record = _new_record(folder, cfg, overrides, command)
                note_run(Path(hydra.sweep.dir), hydra.job.num, record.folder, hydra.overrides.task)
            if record is not None and not is_finished(record.facts):
                record.add(status="failed", error=f"{type(e).__name__}: {e}")
            if not is_job:
                raise
            if not isinstance(e, MsencError):
                traceback.print_exc()
            console.print(f"[red]This job failed; the sweep goes on.[/red] {e}", soft_wrap=True)
            return None
        finally:
            if record is not None:
                record.close()


def _open(cfg: DictConfig, command: str) -> _Job:
    """Check the config, and open the data; what is missing of the generated ones is made."""
    config = checked(cfg, GIVEN)
    _check_choices(config)
    if cfg.resume not in (None, "auto"):
        # No stored override holds an address that was not named (`check_overrides`), but parts may add up to one.
        typed = OmegaConf.to_container(HydraConfig.get().overrides.task)  # as it is: an iteration would resolve it
        check_urls(config, [*config["urls"], *values_of(typed)], Path(cfg.resume) / ".hydra" / "overrides.yaml")
        check_same_settings(Path(cfg.resume), cfg)
    quieten()
    L.seed_everything(config["seed"], workers=True, verbose=False)
    ensure_llm(config)
    datamodule = build_datamodule(config, command)
    ensure_prepared(config, datamodule)
    labels = Labels(config, datamodule, command)
    goes_on = cfg.resume not in (None, "auto") and _has_checkpoint(Path(cfg.resume))
    starts = {} if goes_on else read_starts(config)
    data = data_hashes(config, datamodule)
    if labels.hashes:
        data["labels"] = labels.hashes
    if starts:
        data["init_from"] = {part: start.facts["hash"] for part, start in starts.items()}
    return _Job(config, datamodule, labels, starts, data, run_identity(cfg, data))


def _settle(cfg: DictConfig, job: _Job, overrides: list[str], command: str) -> RunRecord:
    """The record of a new run, in a folder that is made now, or of the one that `resume` continues."""
    hydra = HydraConfig.get()
    folder = settle_folder(cfg, hydra, job.identity, num_processes(job.config["trainer"]))
    job.config = plain(cfg)  # with the folder in it
    if cfg.resume is not None and is_first_process() and (folder / "run.json").is_file():
        if cfg.resume == "auto":
            check_same_settings(folder, cfg)
        record = RunRecord.reopen(folder)
    else:
        record = _new_record(folder, cfg, overrides, command)
    if is_first_process() and hydra.mode is RunMode.MULTIRUN:
        note_run(Path(hydra.sweep.dir), hydra.job.num, folder, hydra.overrides.task)
    return record


def _new_record(folder: Path, cfg: DictConfig, overrides: list[str], command: str) -> RunRecord:
    record = RunRecord(folder, seed=cfg.seed, modality=cfg.modality, overrides=overrides, prepare_command=command)
    if is_first_process():
        write_config(folder, cfg, overrides)
    return record


def _train(job: _Job, record: RunRecord, termination: Termination) -> float | None:
    if is_finished(record.facts):
        console.print(f"Finished already: {shown(record.folder)}", soft_wrap=True)
        return record.facts.get("best_loss")
    if record.facts["resumed"]:
        _say_resumed(record)
    config = job.config
    if "identity" in record.facts:
        check_same_data(record.facts, config, job.datamodule)
    record.add(identity=record.facts.get("identity", job.identity), data=config["data"]["name"], **job.data)
    evaluates = bool(config["evaluate"]) and not config["trainer"].get("fast_dev_run")
    _learn(job, record, termination, [config["evaluate"]] if evaluates else [])
    if not is_first_process() or config["stage"] == ALIGN:
        return record.facts.get("best_loss")
    console.print(f"Run folder: {shown(record.folder)}", soft_wrap=True)
    gc.collect()  # Lightning's parts refer to each other: optimizer and LLM would stay beside those that are measured
    if evaluates:
        device = record.facts.get("device", "auto")
        options = EvaluateConfig(
            split=config["evaluate"],
            device=device,
            control=config["control"],
            urls=[text for _, text in strings_of(config)],  # its own
        )
        evaluate_run(record.folder, options, record.facts["threads"])
    return record.facts.get("best_loss")


def _learn(job: _Job, record: RunRecord, termination: Termination, evaluated: list[str]) -> None:
    """Build the model, align it, train it, export it; `evaluated` are the splits that are measured afterwards."""
    config, datamodule = job.config, job.datamodule
    described = datamodule.described_targets("train")
    if config["prompt"]["target"] == "text_description" and not described:
        raise MsencError(
            f"prompt.target=text_description, but no turn of {config['data']['name']} has a voice description. "
            "Prepare with describe=true, or train on the words alone: prompt.target=text."
        )
    validates = config["data"]["val"] is not None
    for split in ("train", *(["val"] if validates else []), *evaluated):
        datamodule.check_split(split)
        datamodule.units(split)  # what does not fit the token budget is refused now, not after training
    read_controls(config["control"], datamodule.streams)
    loss_weights = config["loss"]["weights"]
    check_weights(loss_weights, datamodule)
    model = build_model(config)
    record.add(threads=_settle_threads(model, record))
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
    # What was drawn for what starts elsewhere must not be seen in what follows: stages by themselves, and in one
    # command, are the same.
    L.seed_everything(config["seed"], workers=True, verbose=False)
    counts = model.trainable_parameters()
    named = flatten_groups(config["optimizer"].get("groups"))
    groups = describe_groups(partition(model.trainable(), named), build_optimizer(config), _scheduler(config))
    record.add(
        llm=config["model"]["llm"]["name_or_path"],
        base_fingerprint=model.base_fingerprint,
        trainable_parameters=counts,
        parameter_groups=groups,
        loss_weights=loss_weights or None,
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
            console.print(f"optimizer.groups.{name}: nothing of it trains in this run; it is left out.")
    for note in datamodule.tokenizer.notes:
        console.print(note, soft_wrap=True)
    said = [*([] if validates else [NO_VALIDATION]), *_spelling(config, datamodule)]
    for text in said:
        _warn(text)
    if config["stage"] == ALIGN:
        return _end_with_alignment(config, model, record)
    if sum(counts.values()):
        if "stop_reason" not in record.facts:  # it was killed while it was evaluated
            _fit(config, model, datamodule, record, termination)
    else:
        record.add(stop_reason="nothing to train: the LLM is frozen and the modality has no connector")
        console.print("Nothing trains here (frozen LLM, no connector); the LLM is evaluated as it is.")
    if is_first_process() and not config["trainer"].get("fast_dev_run"):
        _export(config, model, record)
    _print_streams(record, said)
    return None


def _has_checkpoint(folder: Path) -> bool:
    return any((folder / "checkpoints" / name).is_file() for name in (LAST, PREVIOUS))


def _spelling(config: Mapping[str, Any], datamodule: DialogueDataModule) -> list[str]:
    """What to say of an LLM that was made for other data, and has to spell the words of these."""
    if config["model"]["llm_recipe"] is None:
        return []
    tokens = datamodule.tokenizer.tokens_per_word(islice(datamodule.dialogues("train"), SPELT_DIALOGUES))
    if tokens < SPELLING:
        return []
    return [
        f"The tiny LLM ({config['model']['llm']['name_or_path']}) has read a generated world alone. It spells the "
        f"words of {config['data']['name']}, {tokens:.1f} tokens per word, and knows nothing of what they mean: its "
        "losses and replies will say little of your data. Take a real one: model/llm=smollm2 prompt=chat, by its id or "
        "model.llm.name_or_path=FOLDER; or train all of this one (model.llm.lora=null), which learns to write them."
    ]


def _print_streams(record: RunRecord, said_before: list[str]) -> None:
    """What the last validation saw of the streams, and what is wrong with them."""
    found = findings(record.facts.get("metrics", {}))
    said = warnings(record.facts.get("metrics", {}))
    record.add(warnings=[*said_before, *said])
    if not found:
        return
    table = Table(title="streams, at the last validation")
    for column in ("stream", "differs between utterances", "exchanged, the loss rises by (nats per token)"):
        table.add_column(column, justify="left" if column == "stream" else "right")
    for stream, values in found.items():
        table.add_row(stream, f"{100 * values['spread']:.2f} %", f"{values['used_nats']:.4f}")
    console.print(table)
    for text in said:
        _warn(text)


def _check_choices(config: Mapping[str, Any]) -> None:
    if config["stage"] not in (None, ALIGN):
        raise MsencError(f"stage={config['stage']}: expected {ALIGN}, or null to train on dialogues, too.")
    if config["stage"] == ALIGN and not sources_of(config):
        what = "align=none" if config["align"] is None else f"modality={config['modality']} has no stream to align"
        raise MsencError(f"stage={ALIGN}: found {what}. Choose what to align to, as align=words, and a modality.")
    if config["data"]["val"] not in (None, "val"):
        raise MsencError(f"data.val={config['data']['val']}: expected val, or null to train without validation.")


def _end_with_alignment(config: Mapping[str, Any], model: ConversationModel, record: RunRecord) -> None:
    """Leave what is aligned as a run's checkpoint, for other runs to start from."""
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
    console.print(f"[yellow]{escape(text)}[/yellow]", soft_wrap=True)


def _say_resumed(record: RunRecord) -> None:
    facts = record.facts
    console.print(f"Resuming {shown(record.folder)}", soft_wrap=True)
    if facts["commit_resumed"] != facts["commit"]:
        _warn(f"The code changed: the run began with commit {facts['commit']}, this is {facts['commit_resumed']}.")


def _settle_threads(model: ConversationModel, record: RunRecord) -> int:
    """As many threads as the run had when it began, or as its model is worth; OMP_NUM_THREADS has the last word."""
    before = record.facts.get("threads")
    threads = settle_threads(num_parameters(model), before)
    if before not in (None, threads):
        _warn(
            f"OMP_NUM_THREADS={threads}: the run had {before} before. Sums are rounded in another order from here on, "
            "so it ends near the unbroken run, and not bit by bit as it."
        )
    return threads


def _fit(
    config: Mapping[str, Any],
    model: ConversationModel,
    datamodule: DialogueDataModule,
    record: RunRecord,
    termination: Termination,
) -> None:
    module = ConversationModule(
        model,
        optimizer=build_optimizer(config),
        scheduler=_scheduler(config),
        groups=flatten_groups(config["optimizer"].get("groups")),
        loss_weights=config["loss"]["weights"],
    )
    # A debug run keeps nothing, so it takes neither loggers nor checkpoints.
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
            console.print(f"Training goes on from {at}.")
        purge = {"purge_step": resume["steps_logged"] if resume else 0} if record.facts["resumed"] else {}
        loggers = [
            build(n, f"logger.{k}", **(purge if n["_target_"] in PURGING else {}))
            for k, n in config["logger"].items()
            if n
        ]
        trainer = build(
            config["trainer"] | ({"limit_val_batches": 0} if config["data"]["val"] is None else {}),
            "trainer",
            callbacks=callbacks,
            logger=[] if is_debug else loggers,
            plugins=[files],
            default_root_dir=str(record.folder),
            enable_model_summary=False,
            use_distributed_sampler=False,  # the data module shards by itself, and keeps its order
        )
        module.train()
        trainer.fit(module, datamodule=datamodule, ckpt_path=path, weights_only=True)
        outcome = training_outcome(trainer)
        datamodule.trainer = None  # through which what was trained would live as long as the data
    if is_first_process():
        write_json(record.folder / "metrics.json", outcome["metrics"])
    best = checkpoints.best_score if checkpoints and checkpoints.monitor == "val/loss" else None
    record.add(
        **outcome,
        best_loss=outcome["metrics"].get("val/loss") if best is None else best,
        threads=torch.get_num_threads(),  # Lightning shares the cores out between the processes of a run
    )


def _scheduler(config: Mapping[str, Any]) -> Any:
    return build(config["scheduler"], "scheduler") if config["scheduler"] else None


def _export(config: Mapping[str, Any], model: ConversationModel, record: RunRecord) -> None:
    folder = record.folder / "export"
    if (folder / "export.json").is_file():
        return
    trained = next((n for n in ("best", "last") if (record.folder / "checkpoints" / f"{n}.ckpt").is_file()), None)
    if trained is not None:
        load_checkpoint(ConversationModule(model), record.folder, trained)
    facts = {key: record.facts[key] for key in ("task_hash", "turns_hash", "seed", "commit")}
    write_export(folder, model, config, {"data": record.facts["data"], "checkpoint": trained, **facts})
    console.print(f"Written: {shown(folder)}", soft_wrap=True)


def _print_summary(config: Mapping[str, Any], record: RunRecord) -> None:
    facts = record.facts
    table = Table(title=f"{config['modality']} on {config['data']['name']}, seed {config['seed']}", show_header=False)
    table.add_row("LLM", f"{facts['llm']} ({facts['base_fingerprint']})")
    table.add_row(
        "trainable parameters", ", ".join(f"{part} {n:,}" for part, n in facts["trainable_parameters"].items())
    )
    for split, counts in facts["left_out"].items():
        table.add_row(f"left out of {split}", f"{counts['dialogues']:,} dialogues, {counts['utterances']:,} utterances")
    if facts["loss_weights"]:
        weights = ", ".join(f"{kind} {weight:g}" for kind, weight in facts["loss_weights"].items())
        table.add_row("loss weights", f"{weights}; 1 for other tokens")
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
    return "-" if value is None else escape(f"{value:,}" if isinstance(value, int) else str(value))
