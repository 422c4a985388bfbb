"""Upstream's checkpoint -> a run's folder: python -m msenc.upstream checkpoint=FILE llm=FOLDER out=RUN [key=value ...].

FILE is a ``.tar`` with ``model_state_dict``, FOLDER (or a hub id) the LLM it was trained on, RUN a new folder for
evaluate.py. Further overrides are those of train.py, on top of experiment=paper_msenc: modality=text omits
what that modality does not read, model.connector.num_layers=2 is for a smaller Q-Former. See docs/upstream.md.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msenc.config.hints import nearest
from msenc.config.messages import CONFIGS, readable_errors
from msenc.config.schema import register_schemas
from msenc.types import MsencError

if TYPE_CHECKING:  # --help must not wait for torch
    from torch import Tensor

    from msenc.models.conversation import ConversationModel

OVERRIDES = ("experiment=paper_msenc", "+model.llm.round_to=bfloat16")
"""The overrides of a run with upstream's weights: its settings, and its LLM, which it loads in bfloat16."""

OWN = ("checkpoint", "llm", "out")

LLM_VIEWS = ("generator_model.", "lora_model.base_model.model.", "generator_mode.")
"""Prefixes under which upstream's file has copies of the LLM with its LoRA; without LoRA, only the first."""

QFORMER_VIEWS = ("video_q_former.", "audio_q_former.")
"""Prefixes of the connectors: separate linear maps around one Q-Former with one set of queries."""

CONNECTOR_NAMES = {
    "in_proj.": "feature_proj.",
    "core.query_tokens": "query",
    "core.qformer.": "qformer.",
    "out_proj.": "out_proj.",
}
"""Prefixes of `connector.QFormer`'s names, here and in upstream's file."""

MANY_NAMES = 20


def import_run(checkpoint: Path, llm: str, out: Path, overrides: list[str]) -> None:
    """Write a run's folder from upstream's checkpoint: ``run.json``, ``.hydra/config.yaml`` and ``checkpoints/``.

    Args:
        checkpoint: upstream's file.
        llm: folder or hub id of the LLM it was trained on.
        out: the folder to create.
        overrides: as of train.py, on top of `OVERRIDES`.

    Raises:
        MsencError: the folder is not empty, the file is not such a checkpoint, or it does not fit the composed model.
    """
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf, open_dict

    from msenc.config.checks import check_targets
    from msenc.config.schema import plain
    from msenc.files import write_text
    from msenc.pipelines.prepare import prepare_command
    from msenc.runs.record import RunRecord
    from msenc.training.assembly import GIVEN, build_model
    from msenc.training.module import ConversationModule
    from msenc.work.console import quieten

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MsencError(f"out={out}: is not empty. Give a new or empty folder.")
    overrides = [*OVERRIDES, *overrides]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", overrides, return_hydra_config=True)
    choices = cfg.hydra.runtime.choices
    with open_dict(cfg):
        del cfg.hydra
    cfg.model.llm.name_or_path = llm
    if "init" in (cfg.model.connector or {}):
        cfg.model.connector.init = None  # its weights come from the file
    stored = OmegaConf.to_yaml(cfg)
    cfg.paths.output_dir = str(out)
    config = plain(cfg)
    check_targets(config, GIVEN)

    quieten()
    tensors = read_tensors(checkpoint)
    check_views(tensors, checkpoint)
    model = build_model(config)
    fill(model, tensors, checkpoint)

    write_text(out / ".hydra" / "config.yaml", stored)
    save_checkpoints(ConversationModule(model), out / "checkpoints")
    record = RunRecord(
        out,
        seed=cfg.seed,
        modality=cfg.modality,
        overrides=overrides,
        prepare_command=prepare_command(overrides, choices),
    )
    record.add(
        llm=llm,
        base_fingerprint=model.base_fingerprint,
        trainable_parameters=model.trainable_parameters(),
        data=config["data"]["name"],
        task_hash=None,  # trained elsewhere: evaluate.py has no data to compare with
        streams=None,
        imported_from=checkpoint.name,
        stop_reason="imported",
        status="finished",
    )


def read_tensors(path: Path) -> dict[str, "Tensor"]:
    """The tensors of ``model_state_dict``, memory-mapped; no pickled code is executed.

    Raises:
        MsencError: no such file, or it contains anything but tensors and plain containers.
    """
    import torch

    from msenc.models.pretrained import load_torch_file

    if not path.is_file():
        raise MsencError(f"checkpoint={path}: no such file. Expected upstream's .tar file.")
    try:
        saved = load_torch_file(path)
    except ValueError as e:
        raise MsencError(f"checkpoint={path}: {e}. Expected upstream's file; msenc never executes code from it.") from e
    tensors = saved.get("model_state_dict") if isinstance(saved, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        found = ", ".join(map(str, saved)) if isinstance(saved, dict) else type(saved).__name__
        raise MsencError(
            f"checkpoint={path}: found {found}; expected model_state_dict, a dictionary of tensors. Is it from "
            "upstream?"
        )
    return tensors


def check_views(tensors: Mapping[str, "Tensor"], path: Path) -> None:
    """Refuse a file in which two copies of one tensor differ: it is unknown which one upstream's model used.

    Raises:
        MsencError: names the pairs.
    """
    import torch

    unequal = []
    for first, *others in (LLM_VIEWS, QFORMER_VIEWS):
        for name in (key.removeprefix(first) for key in tensors if key.startswith(first)):
            if first in QFORMER_VIEWS and not name.startswith(("query", "qformer.")):
                continue
            for other in others:
                twin = tensors.get(other + name)
                if twin is not None and not torch.equal(tensors[first + name], twin):
                    unequal.append(f"{first}{name} and {other}{name}")
    if unequal:
        raise MsencError(
            f"checkpoint={path}: {len(unequal)} pairs of tensors differ that are the same tensor in upstream's model: "
            f"{_named(unequal)}. The file is damaged, or was not written by upstream's code."
        )


def fill(model: "ConversationModel", tensors: Mapping[str, "Tensor"], path: Path) -> None:
    """Copy the trained tensors into the model, and compare the base weights with the model's.

    Args:
        model: changed in place.
        tensors: of the file.
        path: the file, for messages.

    Raises:
        MsencError: names missing or unknown tensors, wrong shapes, and differing base weights.
    """
    import torch

    own = model.state_dict()
    places = {name: _places(name) for name in own}
    expected = {place: name for name, found in places.items() for place in found}
    unread = tuple(view for view in QFORMER_VIEWS if view.partition("_")[0] not in model.connectors)
    both = sorted(expected.keys() & tensors.keys())
    faults = {
        "missing there": sorted(expected.keys() - tensors.keys()),
        "unknown here": sorted(key for key in tensors.keys() - expected.keys() if not key.startswith(unread or "\0")),
        "of another shape": [
            f"{place} {tuple(tensors[place].shape)} for {tuple(own[expected[place]].shape)}"
            for place in both
            if tensors[place].shape != own[expected[place]].shape
        ],
    }
    lines = [f"{len(names)} tensors {kind}: {_named(names)}" for kind, names in faults.items() if names]
    if lines:
        raise MsencError(
            f"checkpoint={path}: does not fit the model in the config.\n"
            + "".join(f"  {line}\n" for line in lines)
            + "  do: set llm= to the LLM it was trained on, and the sizes of its parts: "
            "model.connector.num_layers=..., model.connector.intermediate_dim=..., model.streams.audio.dim=..., "
            "model.llm.lora.r=..."
        )
    trained = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    other_base = [name for name in own.keys() - trained if not _is_equal(own[name], tensors[places[name][0]])]
    if other_base:
        raise MsencError(
            f"checkpoint={path}: {len(other_base)} tensors of its base LLM differ from the LLM loaded here: "
            f"{_named(sorted(places[name][0] for name in other_base))}. Set llm= to the LLM it was trained on."
        )
    with torch.no_grad():
        for name in trained:
            own[name].copy_(tensors[places[name][0]])


def _places(name: str) -> list[str]:
    """The names in upstream's file of a tensor of `ConversationModel`."""
    part, _, rest = name.partition(".")
    if part == "llm":
        has_lora = rest.startswith("base_model.model.")
        return [view + rest.removeprefix("base_model.model.") for view in (LLM_VIEWS if has_lora else LLM_VIEWS[:1])]
    stream, _, rest = rest.partition(".")
    ours, theirs = next((pair for pair in CONNECTOR_NAMES.items() if rest.startswith(pair[0])), ("", ""))
    return [f"{stream}_q_former.{theirs}{rest.removeprefix(ours)}"]


def _is_equal(one: "Tensor", other: "Tensor") -> bool:
    """Whether values are equal at the precision of the narrower type."""
    import torch

    dtype = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(one.to(dtype), other.to(dtype))


def _named(names: list[str]) -> str:
    from msenc.models.pretrained import name_some

    return name_some(names, limit=MANY_NAMES)


def save_checkpoints(module: Any, folder: Path) -> None:
    """Write the trained tensors as train.py does, as the best and the last checkpoint."""
    import torch

    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    folder.mkdir(parents=True)
    for name in ("best", "last"):
        torch.save(checkpoint, folder / f"{name}.ckpt")


def main(arguments: list[str]) -> None:
    """Read the command line and import."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__.strip())
        return
    given = dict(a.split("=", 1) for a in arguments if a.partition("=")[0] in OWN and "=" in a)
    missing = [name for name in OWN if not given.get(name)]
    if missing:
        names = [a.partition("=")[0] for a in arguments]
        near = next((nearest(n, missing) for n in names if n not in OWN), nearest("", missing))
        raise MsencError(f"{missing[0]}: no value. Give it: {missing[0]}=...{near}")
    overrides = [a for a in arguments if a.partition("=")[0] not in OWN]
    import_run(Path(given["checkpoint"]), given["llm"], Path(given["out"]), overrides)
    print(f"Written: {given['out']}. Evaluate it: python evaluate.py run_dir={given['out']}")


if __name__ == "__main__":
    register_schemas()
    with readable_errors():
        main(sys.argv[1:])
