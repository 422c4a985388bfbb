"""A trained run -> its record, its config, and its model with the trained weights."""

import os
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from transformers import PreTrainedModel

from msenc.config.checks import check_targets
from msenc.config.stored import ADVICE, settled
from msenc.config.values import check_values
from msenc.files import reason_of
from msenc.models.conversation import ConversationModel
from msenc.runs.record import read_run
from msenc.runs.trust import check_urls
from msenc.training.assembly import GIVEN, HALVED, MIXED, build_model
from msenc.training.averaging import learned_state
from msenc.training.checkpoints import read_checkpoint
from msenc.training.module import ConversationModule
from msenc.types import MsencError
from msenc.work.console import console


def open_run(run_dir: Path, data_dir: str | None, urls: Collection[str] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run's validated record and config, with current paths.

    Args:
        run_dir: the run.
        data_dir: where data and tiny LLM are, if they have moved; None: where the run found them.
        urls: URLs that the run's config may name (`runs.trust.check_urls`).
    """
    record, config = read_run(run_dir)
    if not {"trainable_parameters", "task_hash", "streams"} <= record.keys():
        raise MsencError(
            f"{run_dir}: the run ended ({record.get('status')}) before it had a model, so there is nothing to evaluate "
            "or to talk to. Repeat its command."
        )
    try:
        config.paths.output_dir = str(run_dir)
        # Downloads go to this user's cache, whatever the run's config says: it may be a stranger's.
        data = data_dir or os.environ.get("MSENC_DATA", "data")
        config.paths.cache_dir = os.environ.get("MSENC_CACHE", f"{data}/cache")
        limit = os.environ.get("MSENC_CACHE_MAX_BYTES", "null")
        config.paths.cache_max_bytes = int(limit) if limit.isdecimal() else None if limit == "null" else limit
        check_values({"paths": {"cache_max_bytes": config.paths.cache_max_bytes}})
        if data_dir is not None:
            config.paths.data_dir = data_dir
    except (OmegaConfBaseException, AttributeError) as error:
        path = run_dir / ".hydra" / "config.yaml"
        raise MsencError(f"{path}: has no paths ({reason_of(error)}). {ADVICE}") from error
    own = settled(config, run_dir)
    _check_made_llm(run_dir, own)
    check_urls(own, [*urls, *([data_dir] if data_dir else [])], Path(run_dir) / ".hydra" / "config.yaml")
    check_targets(own, GIVEN)
    return record, own


def _check_made_llm(run_dir: Path, own: Mapping[str, Any]) -> None:
    """Refuse a run whose LLM was made beside its data and is not there: the hub would be asked for its folder's name.

    Raises:
        MsencError: says where it may be.
    """
    recipe, llm = own["model"].get("llm_recipe"), Path(own["model"]["llm"]["name_or_path"])
    if not recipe or recipe.get("folder") != str(llm) or llm.is_dir():
        return
    near = (parent / llm.parent for parent in run_dir.resolve().parents if (parent / llm).is_dir())
    where = "" if llm.is_absolute() else f" in {Path.cwd()}"
    raise MsencError(
        f"{llm}: no such folder{where}. Expected the LLM that was made for this run, in the folder with its data. Say "
        f"where that is: data_dir={next(near, 'FOLDER')}"
    )


def trains(record: Mapping[str, Any]) -> bool:
    """Whether a run trains anything; if not, it has no checkpoint."""
    return sum(record["trainable_parameters"].values()) > 0


def load_trained(
    run_dir: Path, checkpoint: str, record: Mapping[str, Any], config: Mapping[str, Any]
) -> ConversationModel:
    """The trained model of a run (the initial one if nothing trains), in eval mode and in its precision.

    Args:
        run_dir: the run.
        checkpoint: ``best``, ``last`` or a file.
        record: from `open_run`.
        config: from `open_run`.
    """
    model = build_model(config)
    if trains(record):
        load_checkpoint(ConversationModule(model), run_dir, checkpoint)
    precision = config["trainer"].get("precision")
    model.mixed = MIXED.get(precision)
    if precision in HALVED:
        model.to(HALVED[precision])
    return model.eval()


def find_checkpoint(run_dir: Path, checkpoint: str) -> Path:
    """The file of a run's checkpoint: ``best`` (the last one if there is no best), ``last``, or a file.

    Raises:
        MsencError: there is none.
    """
    path = Path(checkpoint)
    if checkpoint in ("best", "last"):
        path = run_dir / "checkpoints" / f"{checkpoint}.ckpt"
        last = path.with_name("last.ckpt")
        if not path.exists() and last.exists():
            _say_that_last_is_used(run_dir)
            path = last
    if not path.exists():
        found = sorted(f.name for f in (run_dir / "checkpoints").glob("*.ckpt"))
        raise MsencError(f"{path}: no such checkpoint. Found: {', '.join(found) or 'none'}. Did the run finish?")
    return path


@cache
def _say_that_last_is_used(run_dir: Path) -> None:
    """Once per process: an evaluation looks for its checkpoint several times."""
    console.print("No best checkpoint, as no validation ran or it was removed: using the last one.")


def load_checkpoint(module: ConversationModule, run_dir: Path, checkpoint: str) -> None:
    """Fill a module with a run's trained tensors.

    Raises:
        MsencError: the file is missing or unreadable, or does not belong to these base weights.
    """
    saved = read_checkpoint(find_checkpoint(run_dir, checkpoint))
    module.on_load_checkpoint(saved)
    fill_model(module.model, {name.removeprefix("model."): t for name, t in learned_state(saved).items()})


def fill_model(model: ConversationModel, trained: Mapping[str, Tensor]) -> None:
    """Give a model the tensors that train, by their names in it; one that starts without weights takes them over."""
    takes_over = model.llm.stored is not None
    model.load_state_dict(trained, strict=False, assign=takes_over)
    if takes_over and isinstance(model.llm, PreTrainedModel):
        model.llm.tie_weights()


def find_device(name: str) -> torch.device:
    """The device of that name; ``auto`` takes the GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise MsencError(f"device={name}: not usable here ({str(e).splitlines()[0]}). Try device=cpu.") from e
