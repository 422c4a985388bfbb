"""The parts of a run, built from its config; what all scripts share."""

import logging
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from rich.console import Console
from torch.optim import Optimizer

from msenc.checkpoints import read_checkpoint
from msenc.config import build, check_targets, plain
from msenc.data.datamodule import DialogueDataModule, StreamSpec
from msenc.data.location import locate
from msenc.models.connector import calibrate, tie
from msenc.models.conversation import ConversationModel
from msenc.models.llm import load_tokenizer
from msenc.module import ConversationModule
from msenc.prompt import TOKEN_KINDS, DialogueTokenizer, Prompt
from msenc.run import digest, read_run, run_settings
from msenc.types import MsencError

console = Console(quiet=rank_zero_only.rank != 0)  # of several processes, the first one speaks

GIVEN = {
    "model.connector": {"in_dim", "out_dim"},
    "data.generate": {"root", "num_workers"},
}
"""Arguments that the pipelines add to a node when they build it."""

CALIBRATION_UTTERANCES = 1000
"""Training utterances that a new connector is calibrated on: tens of thousands of frames for each mean."""


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
        control=data.get("control"),
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


def build_optimizer(config: Mapping[str, Any]) -> Callable[..., Optimizer]:
    """What makes the optimizer of a run's config, from parameters or from groups of them."""
    return build({key: value for key, value in config["optimizer"].items() if key != "groups"})


def check_weights(weights: Mapping[str, float], datamodule: DialogueDataModule) -> None:
    """Refuse weights of the loss under which no token of the training data counts.

    Raises:
        MsencError: it names the kinds that the data has.
    """
    silent = {TOKEN_KINDS.index(kind) for kind, weight in weights.items() if weight == 0}
    dataset, found = datamodule.dataset("train"), set()
    for index in range(len(dataset)) if silent else ():
        found.update(kind for target in dataset[index][0].targets for kind in target.kinds)
        if found - silent:
            return
    if found:
        kinds = ", ".join(TOKEN_KINDS[kind] for kind in sorted(found))
        raise MsencError(
            f"loss.weights: the training data has tokens of the kinds {kinds}, and each of these weighs 0. Let one of "
            "them weigh more."
        )


def num_parameters(model: torch.nn.Module) -> int:
    """All parameters of a model, frozen ones included: what says how many threads it is worth."""
    return sum(parameter.numel() for parameter in model.parameters())


def calibrate_connectors(
    model: ConversationModel, datamodule: DialogueDataModule, others: Collection[str] = ()
) -> None:
    """Fit the ends of new connectors to training utterances and to the LLM; the same in every process.

    Args:
        model: changed in place.
        datamodule: of the run.
        others: streams whose connectors come from elsewhere, calibrated.
    """
    dataset = datamodule.dataset("train")
    embeddings = model.llm.get_input_embeddings().weight
    # Drawn from everywhere: a corpus may be sorted. Independent of the seed, as what runs share.
    order = np.random.default_rng(0).permutation(len(dataset)).tolist()
    for name, connector in model.connectors.items():
        if name in others:
            continue
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


def stream_hashes(datamodule: DialogueDataModule) -> dict[str, str]:
    """Stream -> hash of its features, or of what stands in their place."""
    hashes = {s: datamodule.manifest.streams[f"{s}-{spec.name}"].hash for s, spec in datamodule.streams.items()}
    for control in datamodule.controls:
        if control.stream in hashes:
            hashes[control.stream] = digest([hashes[control.stream], str(control)])
    return hashes


def data_hashes(config: Mapping[str, Any], datamodule: DialogueDataModule) -> dict[str, Any]:
    """What a run reads, by its hashes."""
    return {
        "turns_hash": datamodule.manifest.turns_hash,
        "streams": stream_hashes(datamodule),
        "task_hash": task_hash(config, datamodule),
    }


def run_identity(cfg: DictConfig, data: Mapping[str, Any]) -> str:
    """The hash by which a repeated command finds its run: all settings that matter, and the data."""
    return digest({**run_settings(cfg), **data})


def places_of_runs(cfg: DictConfig, hydra: DictConfig) -> list[Path]:
    """Where a repeated command looks for its run: all runs, and the sweep's folder, which may lie elsewhere."""
    places = [Path(cfg.paths.runs_dir)]
    return [*places, Path(hydra.sweep.dir)] if hydra.mode is RunMode.MULTIRUN else places


def check_same_data(record: Mapping[str, Any], config: Mapping[str, Any], datamodule: DialogueDataModule) -> None:
    """Refuse data that was prepared anew, with other content, since the run; imported weights know no data."""
    now = {"task_hash": task_hash(config, datamodule), "streams": stream_hashes(datamodule)}
    for what, found in now.items():
        if record[what] not in (found, None):
            raise MsencError(
                f"{datamodule.folder}: not the data that the run was trained on ({what} was {record[what]}, is "
                f"{found}). Prepare it as it was, or train again."
            )


def open_run(run_dir: Path, data_dir: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run's record and its config, checked, with the places where things lie now.

    Args:
        run_dir: the run.
        data_dir: where data and tiny LLM lie, if they have moved since; None: where the run found them.
    """
    record, config = read_run(run_dir)
    if "trainable_parameters" not in record or "task_hash" not in record:
        raise MsencError(
            f"{run_dir}: the run ended ({record.get('status')}) before it had a model, so there is nothing to measure "
            "or to talk to. Repeat its command."
        )
    config.paths.output_dir = str(run_dir)
    if data_dir is not None:
        config.paths.data_dir = data_dir
    own = plain(config)
    check_targets(own, GIVEN)
    return record, own


def trains(record: Mapping[str, Any]) -> bool:
    """Whether anything of a run trains; if not, it has no checkpoint."""
    return sum(record["trainable_parameters"].values()) > 0


def load_trained(
    run_dir: Path, checkpoint: str, record: Mapping[str, Any], config: Mapping[str, Any]
) -> ConversationModel:
    """The model of a run as it was trained, or as it started where nothing trains; in eval mode.

    Args:
        run_dir: the run.
        checkpoint: ``best``, ``last`` or a file.
        record: from `open_run`.
        config: from `open_run`.
    """
    model = build_model(config)
    if trains(record):
        load_checkpoint(ConversationModule(model), run_dir, checkpoint)
    return model.eval()


def find_checkpoint(run_dir: Path, checkpoint: str) -> Path:
    """The file of a run's checkpoint: ``best`` (the last one where there is no best), ``last``, or a file.

    Raises:
        MsencError: there is none.
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
    return path


def load_checkpoint(module: ConversationModule, run_dir: Path, checkpoint: str) -> None:
    """Fill a module with a run's trained tensors.

    Raises:
        MsencError: the file is missing or unreadable, or does not belong to these base weights.
    """
    saved = read_checkpoint(find_checkpoint(run_dir, checkpoint))
    module.on_load_checkpoint(saved)
    module.load_state_dict(saved["state_dict"], strict=False)


def find_device(name: str) -> torch.device:
    """The device of that name; ``auto`` takes the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise MsencError(f"device={name}: not usable here ({str(e).splitlines()[0]}). Try device=cpu.") from e


def shown(path: Path) -> Path:
    """A path as a user would type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
