"""Builds the parts of a run from its config, for all commands."""

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from msenc.config.build import build, build_connector
from msenc.data.datamodule import DialogueDataModule, preparing_hint
from msenc.data.dataset import StreamSpec
from msenc.data.preferences import PreferenceDataModule
from msenc.models.connector import Standardize, calibrate, tie
from msenc.models.conversation import ConversationModel
from msenc.models.llm import load_tokenizer, token_embeddings
from msenc.prompt import TOKEN_KINDS, DialogueTokenizer, Prompt
from msenc.store.location import Place, locate
from msenc.store.manifest import DatasetManifest
from msenc.types import MsencError

GIVEN = {
    "model.connector": {"in_dim", "out_dim"},
    "data.generate": {"root", "num_workers"},
}
"""Arguments that the pipelines add to a node when they build it."""

MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
HALVED = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
"""Values of trainer.precision under which activations, or weights too, take half the bytes."""

CALIBRATION_UTTERANCES = 1000
"""Training utterances used to calibrate a new connector: tens of thousands of frames for each mean."""


def _prompt(config: Mapping[str, Any]) -> Prompt:
    return build(config["prompt"], "prompt")


def find_data(config: Mapping[str, Any], prepare_command: str) -> Place:
    """Where the data of a run's config lie.

    Asked before anything is made or downloaded for a run: an LLM's hub takes long to fail.

    Raises:
        MsencError: they are not there, and msenc does not generate them.
    """
    folder = _place(config)
    if config["data"]["generate"] is None:
        DatasetManifest.read(folder, preparing_hint(folder, prepare_command))
    return folder


def _place(config: Mapping[str, Any]) -> Place:
    return locate(config["data"]["dir"], config["paths"]["cache_dir"], config["paths"].get("cache_max_bytes"))


def build_datamodule(config: Mapping[str, Any], prepare_command: str, for_training: bool = False) -> DialogueDataModule:
    """The data module of a run's config; the data are not checked yet.

    Args:
        config: of the run.
        prepare_command: see `DialogueDataModule`.
        for_training: its batches are those of the run's objective; otherwise, they have every target once.
    """
    data, model = config["data"], config["model"]
    objective = config.get("objective") if for_training else None
    kind: Any = DialogueDataModule
    if objective:
        chosen = {key: objective[key] for key in ("pairs", "labels")}
        kind = partial(PreferenceDataModule, **chosen, keeps=objective["rpo_alpha"] > 0)
    return kind(
        folder=_place(config),
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
        drop=data.get("drop"),
        prepare_command=prepare_command,
    )


def build_model(config: Mapping[str, Any], empty: bool = False, by_shares: bool = False) -> ConversationModel:
    """The model of a run's config, with base weights loaded and connectors initialized.

    Args:
        config: of the run.
        empty: only shapes, on the meta device; no weights are read.
        by_shares: the LLM starts without weights; see `load_llm`.
    """
    model = config["model"]
    llm = build({**model["llm"], "empty": empty, "by_shares": by_shares}, "model.llm")
    width = llm.get_input_embeddings().weight.shape[1]
    connector = model["connector"]
    if empty and connector and "init" in connector:
        connector = {**connector, "init": None}
    with torch.device("meta") if empty else nullcontext():
        connectors = {name: build_connector(connector, stream, width) for name, stream in model["streams"].items()}
    if model["tie_connectors"]:
        tie(connectors)
    built = ConversationModel(llm, connectors)
    if model["layout"] == "dialogue":
        built.check_layout()
    return built


def build_optimizer(config: Mapping[str, Any]) -> Callable[..., Optimizer]:
    """The optimizer factory of a run's config: parameters or parameter groups -> optimizer."""
    return build({key: value for key, value in config["optimizer"].items() if key != "groups"}, "optimizer")


def check_weights(weights: Mapping[str, float], datamodule: DialogueDataModule) -> None:
    """Refuse loss weights that are 0 for all tokens of the training data.

    Raises:
        MsencError: names the kinds of tokens in the data.
    """
    silent = {TOKEN_KINDS.index(kind) for kind, weight in weights.items() if weight == 0}
    dataset, found = datamodule.dataset("train"), set()
    for index in range(len(dataset)) if silent else ():
        found.update(kind for target in dataset.tokens(index).targets for kind in target.kinds)
        if found - silent:
            return
    if found:
        kinds = ", ".join(TOKEN_KINDS[kind] for kind in sorted(found))
        raise MsencError(
            f"loss.weights: the training data only has tokens of the kinds {kinds}, all with weight 0. Give one of "
            "them a weight above 0."
        )


def check_precision(model: ConversationModel, precision: str | None) -> list[str]:
    """Refuse weights that cannot be trained in their type; what can be, but badly, is returned as warnings.

    Raises:
        MsencError: float16, in which small gradients vanish and GradScaler refuses to work.
    """
    becomes = HALVED.get(precision)
    types = {name: becomes or p.dtype for name, p in model.trainable().items() if p.is_floating_point()}
    half = [name for name, dtype in types.items() if dtype == torch.float16]
    if half:
        raise MsencError(
            f"{len(half):,} trainable tensors are float16 ({half[0]}), in which gradients vanish. Keep what trains in "
            "float32 (model.llm.dtype=float32), and compute in halves: trainer.precision=16-mixed, or bf16-mixed."
        )
    rounded = [name for name, dtype in types.items() if dtype == torch.bfloat16]
    if not rounded:
        return []
    return [
        f"{len(rounded):,} trainable tensors are bfloat16 ({rounded[0]}), of 8 bits: the optimizer's steps "
        "are rounded away where they are smaller than 1/256 of a weight. Keep what trains in float32, with "
        "trainer.precision=bf16-mixed, or train an adapter: model.llm.lora={r: 16, lora_alpha: 32}."
    ]


def num_parameters(model: torch.nn.Module) -> int:
    """Number of parameters of a model, including frozen ones; it decides the number of threads."""
    return sum(parameter.numel() for parameter in model.parameters())


def num_for_calibration(connector: torch.nn.Module) -> int:
    """How many utterances calibrate a connector; fewer of several layers, which take more memory each."""
    layers = getattr(getattr(connector, "mixture", None), "layers", (0,))
    return max(CALIBRATION_UTTERANCES // len(layers), 100)


def calibrate_connectors(
    model: ConversationModel, datamodule: DialogueDataModule, others: Collection[str] = ()
) -> None:
    """Calibrate the input and output of new connectors to training utterances and the LLM; the same in every process.

    Args:
        model: changed in place.
        datamodule: of the run.
        others: streams whose connectors are already calibrated: aligned, or from a checkpoint.
    """
    known: dict[str, list[torch.Tensor]] = {
        name: []
        for name, connector in model.connectors.items()
        if name not in others and isinstance(connector.in_norm, Standardize)
    }
    wanted = {name: num_for_calibration(model.connectors[name]) for name in known}
    dataset = datamodule.dataset("train")
    # Drawn from the whole split, since a corpus may be sorted. Independent of the seed, as runs share it.
    for index in np.random.default_rng(0).permutation(len(dataset)).tolist():
        if all(len(utterances) == wanted[name] for name, utterances in known.items()):
            break
        features = dataset.features(index)  # read once for all connectors
        for name, utterances in known.items():
            new = (torch.from_numpy(frames) for frames in features[name] if frames is not None)
            utterances += islice(new, wanted[name] - len(utterances))
    for name, utterances in known.items():
        calibrate(model.connectors[name], utterances, token_embeddings(model.llm))
