"""`init_from` of train.py: initialize connectors, adapter or both from another run.

RUN/checkpoints -> tensors, checked against this run's encoders, connectors and base weights -> the model
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from msenc.config.stored import settled
from msenc.data.datamodule import RUN_ONLY
from msenc.models.conversation import ConversationModel
from msenc.models.pretrained import name_some
from msenc.models.quantize import described
from msenc.runs.record import read_run
from msenc.training.align import hash_of_tensors
from msenc.training.averaging import learned_state
from msenc.training.checkpoints import read_checkpoint
from msenc.training.module import ConversationModule
from msenc.training.restore import find_checkpoint
from msenc.types import MsencError
from msenc.work.console import console, shown

PREFIXES = {"connectors": "model.connectors.", "adapter": "model.llm."}
"""Part -> prefix of its tensors in a checkpoint."""

ANOTHER_TRAINING = ("init", "freeze_core", "dropout")
"""Settings in which a connector may differ from the one it is initialized from."""


@dataclass(frozen=True)
class Start:
    """One part trained by another run.

    Args:
        argument: the config key that named the run, for messages.
        run: its folder.
        state: name -> tensor, as in its checkpoint.
        config: of the run.
        base: name and fingerprint of the base weights it was trained on.
        facts: for run.json.
    """

    argument: str
    run: Path
    state: Mapping[str, Tensor]
    config: Mapping[str, Any]
    base: Mapping[str, str]
    facts: Mapping[str, Any]


def read_starts(config: Mapping[str, Any]) -> dict[str, Start]:
    """Part (`PREFIXES`) -> the run it starts from; empty without `init_from`.

    Raises:
        MsencError: no such run or checkpoint, a part named twice, or one that the run did not train.
    """
    node = config["init_from"]
    named = {part: node[part] for part in PREFIXES if node[part] is not None}
    if "connectors" in named and not config["model"]["streams"]:
        raise MsencError(
            f"init_from.connectors: modality={config['modality']} has no stream and thus no connector. Choose a "
            "modality that has one, or remove init_from."
        )
    if node["run"] is not None:
        if named:
            raise MsencError(
                f"init_from: found run={node['run']} and {next(iter(named))}={next(iter(named.values()))}. Expected "
                "either one run for all parts, or one for each part."
            )
        found = {part: _read(node["run"], "init_from", part, node["checkpoint"]) for part in PREFIXES}
        starts = {part: start for part, start in found.items() if start.state}
        if not starts:
            raise MsencError(f"init_from={node['run']}: that run trained nothing, so there is nothing to start from.")
    else:
        starts = {part: _read(run, f"init_from.{part}", part, node["checkpoint"]) for part, run in named.items()}
        for part, start in starts.items():
            if not start.state:
                has = "connectors alone" if part == "adapter" else "no connector"
                raise MsencError(f"{start.argument}={start.run}: that run trained {has}. Name another run.")
    if "connectors" in starts and config["align"] is not None and config["model"]["streams"]:
        raise MsencError(
            "init_from and align both initialize the connectors. Set align=none, or only take the adapter "
            "(init_from.adapter=RUN)."
        )
    return starts


def _read(run: str, argument: str, part: str, checkpoint: str) -> Start:
    record, config = read_run(run, argument)
    path = find_checkpoint(Path(run), checkpoint)
    saved = read_checkpoint(path)
    state = {name: tensor for name, tensor in learned_state(saved).items() if name.startswith(PREFIXES[part])}
    facts = {
        "run": str(run),
        "checkpoint": path.name,
        "identity": record.get("identity"),
        "hash": hash_of_tensors(state) if state else None,
    }
    return Start(argument, Path(run), state, settled(config, Path(run)), saved.get("msenc", {}), facts)


def start_from(
    starts: Mapping[str, Start], config: Mapping[str, Any], model: ConversationModel
) -> dict[str, dict[str, Any]]:
    """Load the parts into the model; returns the entries of run.json.

    Raises:
        MsencError: different base weights, encoders or connectors, streams that the run lacks, or tensors that do not
            fit; all of them are named.
    """
    if not starts:
        return {}
    module = ConversationModule(model)
    own, trainable = module.state_dict(), module.trainable_names()
    facts = {}
    for part, start in starts.items():
        wanted = {name for name in trainable if name.startswith(PREFIXES[part])}
        if not wanted:
            if start.argument == f"init_from.{part}":
                raise MsencError(f"{start.argument}: no part of the LLM trains in this run (model.llm.freeze=true).")
            continue  # one run for all parts, but this run has no use for this one
        if any(own[name].is_meta for name in wanted):
            raise MsencError(
                f"{start.argument}={start.run}: an LLM that trains in full is read from its own files under "
                f"trainer=fsdp2. Give that run's export instead: model.llm.name_or_path={start.run}/export/llm"
            )
        _check_base(start, model)
        state = dict(start.state)
        if part == "connectors":
            _check_streams(start, config)
            others = {name for name in start.config["model"]["streams"] if name not in config["model"]["streams"]}
            state = {n: t for n, t in state.items() if n.removeprefix(PREFIXES[part]).split(".")[0] not in others}
        else:
            _check_adapter(start, config)
        wrong = {
            "missing there": sorted(wanted - state.keys()),
            "unknown here": sorted(state.keys() - wanted),
            "of another shape": sorted(
                f"{n} {tuple(state[n].shape)} for {tuple(own[n].shape)}"
                for n in wanted & state.keys()
                if state[n].shape != own[n].shape
            ),
        }
        if any(wrong.values()):
            found = "; ".join(
                f"{len(names)} tensors {what}: {name_some(names)}" for what, names in wrong.items() if names
            )
            raise MsencError(f"{start.argument}={start.run}: its {part} do not fit this run's: {found}.")
        module.load_state_dict(state, strict=False)
        facts[part] = dict(start.facts)
        before, now = (described(m["llm"].get("quantization")) for m in (start.config["model"], config["model"]))
        differ = "" if before == now else f" They were trained on {before} weights; these are {now}."
        source = f"{shown(start.run)} ({start.facts['checkpoint']})"
        console.print(f"The {part} start from {source}.{differ}", soft_wrap=True)
    return facts


def _check_base(start: Start, model: ConversationModel) -> None:
    if start.base.get("base_fingerprint") != model.base_fingerprint:
        raise MsencError(
            f"{start.argument}={start.run}: trained on the base weights {start.base.get('base_name')} (fingerprint "
            f"{start.base.get('base_fingerprint')}), this run has {model.base_name} ({model.base_fingerprint}). "
            "Weights trained for one LLM do not fit another: choose the same model/llm=, unchanged."
        )


def _check_streams(start: Start, config: Mapping[str, Any]) -> None:
    own, other = config["model"], start.config["model"]
    missing = [name for name in own["streams"] if name not in other["streams"]]
    if missing:
        raise MsencError(
            f"{start.argument}={start.run}: that run has no connector for {', '.join(missing)}, this one has "
            f"{', '.join(own['streams'])}. Found there: {', '.join(other['streams']) or 'none'}. Start from a run of "
            f"modality={config['modality']}."
        )
    for name, stream in own["streams"].items():
        before, now = _encoder(other["streams"][name]), _encoder(stream)
        differ = [
            f"{k}={before.get(k)} there, {now.get(k)} here" for k in {**before, **now} if before.get(k) != now.get(k)
        ]
        if differ:
            raise MsencError(
                f"{start.argument}={start.run}: its {name} connector reads another encoder's features: "
                f"{'; '.join(differ[:3])}. Choose the same model/{name}=."
            )
    before, now = (
        {
            **{k: v for k, v in m["connector"].items() if k not in ANOTHER_TRAINING},
            "tie_connectors": m["tie_connectors"],
        }
        for m in (other, own)
    )
    differ = [f"{k}={before.get(k)} there, {now.get(k)} here" for k in {**before, **now} if before.get(k) != now.get(k)]
    if differ:
        raise MsencError(
            f"{start.argument}={start.run}: its connectors have different settings: {'; '.join(differ[:3])}. Choose "
            "the same model/connector=."
        )


def _encoder(stream: Mapping[str, Any]) -> dict[str, Any]:
    encoder = {f"encoder.{k}": v for k, v in stream["encoder"].items() if k not in RUN_ONLY}
    return {"name": stream["name"], "dim": stream["dim"], **encoder}


def _check_adapter(start: Start, config: Mapping[str, Any]) -> None:
    before, now = (
        {} if m["llm"]["lora"] is None else {k: v for k, v in m["llm"]["lora"].items() if k != "lora_dropout"}
        for m in (start.config["model"], config["model"])
    )
    differ = [f"{k}={before.get(k)} there, {now.get(k)} here" for k in {**before, **now} if before.get(k) != now.get(k)]
    if differ:
        raise MsencError(
            f"{start.argument}={start.run}: its LLM was trained with different settings (model.llm.lora): "
            f"{'; '.join(differ[:3])}. Choose the same, or only take the connectors: init_from.connectors=RUN."
        )
