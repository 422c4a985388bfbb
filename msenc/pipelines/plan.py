"""train.py plan=true: batches, steps and predicted memory of a run, without starting it."""

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from rich.table import Table

from msenc.config.checks import checked
from msenc.data.datamodule import DialogueDataModule
from msenc.pipelines.prepare import ensure_llm, ensure_prepared
from msenc.training.assembly import GIVEN, HALVED, MIXED, build_datamodule, build_model, build_optimizer, find_data
from msenc.training.plan import count_batches, largest_batch, predict_memory
from msenc.training.sharding import is_sharded
from msenc.work.console import console, quieten


def plan_run(cfg: DictConfig, prepare_command: str) -> None:
    """Print what a run would take; builds its data module, but only the shapes of its model."""
    config = checked(cfg, GIVEN)
    quieten()
    trainer = config["trainer"]
    find_data(config, prepare_command)
    ensure_llm(config)
    datamodule = build_datamodule(config, prepare_command, for_training=True)
    ensure_prepared(config, datamodule)
    table = Table(title=f"Plan: {config['modality']} on {config['data']['name']}", show_header=False)
    batches, processes = count_batches(datamodule, trainer), num_processes(trainer)
    bytes_of = memory_of(config, datamodule)
    add_batches(table, batches, datamodule.dropped_turns("train"), datamodule.described_targets("train"))
    tokens = batches["tokens_per_batch"]
    table.add_row("tokens per epoch", f"{batches['tokens_per_epoch']:,}")
    table.add_row("tokens per batch", f"{tokens['min']:,} to {tokens['max']:,}, median {tokens['median']:,}")
    if batches["fill"] is not None:
        table.add_row("budget filled", f"{100 * batches['fill']:.1f} %")
    table.add_row("padding", f"{100 * batches['padding']:.1f} %")
    if bytes_of:
        table.add_section()
        for name, size in bytes_of.items():
            title = "predicted peak memory" if name == "peak" else name.replace("_", " ")
            table.add_row(
                title, f"{size / 2**20:,.1f} MiB" + (f" in each of {processes} processes" if processes > 1 else "")
            )
    console.print(table)
    console.print(
        "Python and its libraries (0.4 GiB) and memory that the allocator holds come on top (on a CPU, "
        "up to half as much again). Nothing was trained.",
        soft_wrap=True,
    )


def memory_of(config: Mapping[str, Any], datamodule: DialogueDataModule) -> dict[str, int]:
    """Bytes that a training step of a run takes, by category (`predict_memory`); empty if nothing trains."""
    trainer = config["trainer"]
    model = build_model(config, empty=True)
    if not sum(model.trainable_parameters().values()):
        return {}
    if model.llm.attention_kernel != "eager":
        # Shapes are traced on a CPU, with the CPU kernel that stores what the device's kernel stores. A GPU only splits
        # in half precision.
        on_gpu = trainer["accelerator"] in ("gpu", "cuda")
        on_gpu |= trainer["accelerator"] == "auto" and torch.cuda.is_available()
        is_half = str(trainer["precision"]) in (*MIXED, *HALVED)
        kept = {"flex_attention": "split", "auto": "dense" if on_gpu and not is_half else "split"}
        model.llm.attention_kernel = kept.get(model.llm.attention_kernel, model.llm.attention_kernel)
    processes = num_processes(trainer)
    batch = largest_batch(datamodule, processes)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    is_shared = is_sharded(trainer)
    found = predict_memory(model, build_optimizer(config), batch, str(trainer["precision"]), processes, is_shared)
    peak = found.pop("peak")
    copies = {
        "average_of_weights": 4 * trained if config["callbacks"].get("average") else 0,
        # the start, and in its pass the weights that it stands in for
        **({"reference": 2 * found["trainable_weights"]} if config.get("objective") else {}),
    }
    if is_shared:
        copies["average_of_weights"] //= processes
    return {**found, **copies, "peak": peak + sum(copies.values())}


def num_processes(trainer: Mapping[str, Any]) -> int:
    """Number of processes that train a run, from the trainer's config."""
    devices = trainer.get("devices", "auto")
    if isinstance(devices, list):
        num = len(devices)
    else:
        num = int(devices) if str(devices).isdigit() else max(torch.cuda.device_count(), 1)
    return num * trainer.get("num_nodes", 1)


def add_batches(table: Table, batches: Mapping[str, Any], history: Mapping[str, int], described: int) -> None:
    """Rows about the contents of an epoch."""
    budget, steps = batches["max_tokens_per_batch"], batches["steps"]
    table.add_row("dialogues", f"{batches['dialogues']:,}")
    table.add_row("targets", f"{history['targets']:,}, {described:,} of them with a voice description")
    table.add_row(
        "truncated histories",
        f"{history['targets_cut']:,} targets, {history['dropped_turns']:,} of {history['history_turns']:,} turns "
        "dropped",
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
