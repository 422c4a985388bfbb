"""What a config may hold, and the checks that run before anything is loaded.

Hydra composes YAML onto the dataclasses below, so a misspelt key or a wrong type is an error wherever it stands; then
`check_targets` binds every ``_target_`` node to its constructor's signature. The configs are the only place where
omegaconf and hydra meet msenc: `pipelines` hands plain values on.
"""

import difflib
import importlib
import inspect
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.errors import MissingConfigException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, ValidationError

from msenc.groups import CONNECTOR, CONNECTORS, LLM, OWN_KEYS, flatten_groups
from msenc.prompt import SLOTS, TOKEN_KINDS
from msenc.types import MsencError

CONFIGS = Path(__file__).parent.parent / "configs"

TRUSTED_PACKAGES = ("msenc.", "torch.optim.", "lightning.")
"""What a ``_target_`` may name: a config must not be a way to run anything else."""

NEEDS_TARGET = re.compile(
    r"model\.(llm|llm_recipe|connector|streams\.\w+\.encoder)|data\.generate|data\.recordings\.(segment|recogniser|speaker_encoder)|prompt|speech|optimizer|scheduler|trainer"
    r"|(callbacks|logger)\.\w+"
)
"""Paths of the nodes that are built; one of another name is misspelt, or has lost its ``_target_``."""

TAKEN_OUT = {"optimizer": {"groups"}}
"""Path of a node -> keys that the pipelines take out before they build it (`build_optimizer`)."""

OPEN = ("optimizer.groups", "loss.weights")
"""Places of `TrainConfig` whose keys are names that no schema lists: an override adds one without a ``+``."""

MANY_NAMES = 20

EXTRAS = {"lightning.pytorch.loggers.WandbLogger": "wandb"}
"""Targets that need an extra of msenc."""


@dataclass
class StreamConfig:
    """One stream: what encodes it, and how it looks in the shards.

    Args:
        name: names the features (``audio-<name>/``); the datamodule compares it with what was prepared.
        dim: width D of the features.
        encoder: the ``_target_`` node that `prepare.py` builds.
    """

    name: str = MISSING
    dim: int = MISSING
    encoder: Any = MISSING


@dataclass
class ModelConfig:
    """The composed model.

    Args:
        llm: ``_target_`` node of the LLM.
        llm_recipe: how `prepare.py` makes the LLM's folder when it is missing; None for models that exist.
        streams: what the modality brings.
        connector: ``_target_`` node, built once per stream with its ``in_dim``; None without streams.
        tie_connectors: let all streams share one connector core (upstream does, unsaid).
        layout: ``dialogue`` (one row trains all targets that share a history) or ``sample`` (one row per target).
    """

    llm: Any = MISSING
    llm_recipe: Any = None
    streams: dict[str, StreamConfig] = field(default_factory=dict)
    connector: Any = None
    tie_connectors: bool = False
    layout: str = "dialogue"


@dataclass
class VoiceConfig:
    """How `prepare.py describe=true` describes voices; the keys of `msenc.prepare.describe.VoiceSettings`."""

    levels: int = 3
    genders: dict[str, str] = field(default_factory=dict)
    edges: dict[str, list[float]] = field(default_factory=dict)
    overwrite: bool = False
    seed: int = 1


@dataclass
class SplitConfig:
    """How dialogues that say no split get one; `msenc.data.splits.split_dialogues`."""

    rule: str = "random"
    fractions: dict[str, float] = field(default_factory=lambda: {"train": 0.8, "val": 0.1, "test": 0.1})
    seed: int = 1


@dataclass
class RecordingsConfig:
    """How recordings become utterances (docs/own-data.md).

    Args:
        segment: ``_target_`` node: when an utterance ends.
        recogniser: ``_target_`` node: sound -> words.
        speaker_encoder: ``_target_`` node: sound -> a vector that tells the voice.
        split: of the dialogues.
    """

    segment: Any = MISSING
    recogniser: Any = MISSING
    speaker_encoder: Any = MISSING
    split: SplitConfig = field(default_factory=SplitConfig)


@dataclass
class DataConfig:
    """A data set: where it lies, and how it is read.

    Args:
        name: begins every dialogue's id.
        dir: the prepared data (shards, dataset.json); `prepare.py` writes it. A path, or where it is only read a URL.
        root: the raw material; only `prepare.py` reads it.
        generate: ``_target_`` node that makes the raw material when it is missing (the demo), else None.
        table: CSV file of utterances; None: ``utterances.csv`` in `root` if there is one, else what the recordings say.
        recordings: how recordings become utterances; None: `root` is in MELD's layout.
        labels: columns of the table that `prepare.py` keeps for connectors to be aligned to; None keeps all that are
            read as nothing else.
        voice: how `prepare.py` describes voices.
        batch_size: dialogues per batch, of all processes together; None where `max_tokens_per_batch` is set.
        max_tokens_per_batch: tokens per batch, of all processes together: text, media queries and padding.
        num_workers: processes that prepare data, or load it while training.
        max_history_tokens: most text tokens of a target's history; older turns are dropped, counted and reported.
        verify: hash every shard of a split before its first use.
        filter: ``no_<flag>``, or a list of them: what carries such a flag of the audit is left out of what is read.
        control: ``noise_audio`` and the like: what stands in a stream's place, in training too (docs/controls.md).
    """

    name: str = MISSING
    dir: str = MISSING
    root: str = MISSING
    generate: Any = None
    table: str | None = None
    recordings: RecordingsConfig | None = None
    labels: list[str] | None = None
    voice: VoiceConfig = field(default_factory=VoiceConfig)
    batch_size: int | None = None
    max_tokens_per_batch: int | None = None
    num_workers: int = 0
    max_history_tokens: int = 1024
    verify: bool = True
    filter: Any = field(default_factory=list)
    control: str | None = None


@dataclass
class LabelsConfig:
    """What a stream's utterances are known by; the keys of `msenc.pipelines.align.Source`."""

    source: str = MISSING
    column: str | None = None
    attributes: list[str] = field(default_factory=lambda: ["pitch", "range"])


@dataclass
class AlignConfig:
    """How connectors are aligned before dialogues (docs/training.md).

    Args:
        labels: stream -> what its utterances are known by; a stream that is not named here is not aligned.
        template: how a label is written, around ``{words}``; transcripts stand as they are.
        objective: ``embeddings``, ``contrastive`` or ``llm``; the rest are `msenc.models.alignment.AlignmentSettings`.
    """

    labels: dict[str, LabelsConfig] = field(default_factory=dict)
    template: str = "[{words}]"
    objective: str = "embeddings"
    steps: int = 150
    batch_size: int = 64
    lr: float = 3e-3
    warmup_steps: int = 20
    weight_decay: float = 0.01
    temperature: float = 0.07
    seed: int = 1


@dataclass
class InitFromConfig:
    """What a run starts from; ``init_from=RUN`` is ``init_from.run=RUN``.

    Args:
        run: folder of the run whose connectors and adapter are taken, what of them this run has.
        connectors: folder of the run whose connectors are taken.
        adapter: folder of the run whose adapter (or LLM, where all of it was trained) is taken.
        checkpoint: ``best`` or ``last``.
    """

    run: str | None = None
    connectors: str | None = None
    adapter: str | None = None
    checkpoint: str = "best"


@dataclass
class LossConfig:
    """What training minimises: the cross entropy of the target tokens.

    Args:
        weights: kind of token (`prompt.TOKEN_KINDS`) -> its weight in the training loss, 1 for kinds that are not
            named; what is evaluated has no weights.
    """

    weights: dict[str, float] = field(default_factory=dict)


@dataclass
class PathsConfig:
    """Where things lie; relative paths are relative to the folder of the command.

    Args:
        data_dir: prepared data, raw material of the demo, and its LLM.
        cache_dir: local copies of prepared data that lies behind a URL; may be deleted at any time between runs.
        runs_dir: runs, one folder each.
        output_dir: the folder of this run.
    """

    data_dir: str = MISSING
    cache_dir: str = MISSING
    runs_dir: str = MISSING
    output_dir: str = MISSING


@dataclass
class TrainConfig:
    """Schema of ``train.yaml``.

    Args:
        plan: what the run would take is printed, and nothing trains.
        dry_run: the jobs of the sweep are listed with what they would take, and none starts.
        align: how connectors are aligned first; None does not.
        init_from: what another run has trained, to start from.
        stage: ``align`` ends when the connectors are aligned; None goes on with dialogues.
        evaluate: the split that is evaluated when training ends; None for none.
        controls: of that evaluation, as ``control`` of evaluate.py.
        optimizer: ``_target_`` node: parameters -> optimizer; of it, ``groups`` says which parameters train with other
            settings (docs/training.md).
        resume: a run's folder, which is continued as it was started; or ``auto``: continue what the same command
            began and did not finish, or skip what it has finished.
    """

    plan: bool = False
    dry_run: bool = False
    seed: int = 1
    modality: str = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompt: Any = MISSING
    align: AlignConfig | None = None
    init_from: InitFromConfig = field(default_factory=InitFromConfig)
    stage: str | None = None
    optimizer: Any = field(default_factory=lambda: DictConfig({"groups": {}}))
    scheduler: Any = None
    loss: LossConfig = field(default_factory=LossConfig)
    trainer: Any = MISSING
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    decoding: Any = MISSING
    evaluate: str | None = "test"
    controls: Any = None
    prepare_workers: int = 2
    resume: str | None = None
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class PrepareConfig:
    """Schema of ``prepare.yaml``.

    Args:
        stage: None makes shards, ``audit`` looks the raw material through; ``segment``, ``transcribe`` and ``speakers``
            go no further than that with recordings.
        describe: measure the voices and describe them, as `data.voice` says; ``measure`` leaves the descriptions as
            they are; None: as the folder was prepared before, or as `align` needs it.
        align: what connectors are to be aligned to; voices that it asks for are measured.
        prepare_workers: processes that decode clips; 0 works in this one.
        part: ``3/16`` does the third of 16 parts; the last one to end makes the shards.
    """

    stage: str | None = None
    modality: str = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompt: Any = MISSING
    align: AlignConfig | None = None
    describe: Any = None
    prepare_workers: int = 2
    part: str | None = None
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class EvaluateConfig:
    """Schema of ``evaluate.yaml``.

    Args:
        run_dir: a run, a sweep's folder or another above several runs, or a list of these; each run's model and data
            are rebuilt from its own config.
        split: ``train``, ``val`` or ``test``.
        checkpoint: ``best``, ``last``, or a file.
        decoding: settings of transformers' GenerationConfig, and ``batch_size`` (replies decoded at once).
        generate: False measures losses alone.
        metrics: of replies (docs/metrics.md); the cheap ones by default.
        metric_settings: name of a metric -> its settings: ``metric_settings.embedding_similarity.name_or_path=FOLDER``.
        speech: ``_target_`` node of the synthesizer that speaks the replies; None leaves them as text.
        speech_workers: processes that speak; 0 works in this one.
        speech_recogniser: a Whisper by id or folder that the spoken replies are checked by; None leaves that out.
        speech_metrics: of the sound: ``mos``, ``speaker_similarity``.
        control: what is taken from the input in evaluations beside the plain one (docs/controls.md): a name, a list,
            or ``shuffle`` for the words of the history and for every stream of the run.
        control_draws: how often each control draws what stands in a stream's place.
        limit: first dialogues of the split; None for all.
        device: torch's name of the device; ``auto`` takes a GPU if there is one.
        data_dir: where the data and the tiny LLM lie now, if they have moved since the run.
        on_data: folder or URL of other prepared data to evaluate on; a run's own data.filter is left out there.
        overwrite: measure again what was measured before with the same settings.
    """

    run_dir: Any = MISSING
    split: str = "test"
    checkpoint: str = "best"
    decoding: Any = MISSING
    generate: bool = True
    metrics: list[str] = field(default_factory=list)
    metric_settings: dict[str, Any] = field(default_factory=dict)
    speech: Any = None
    speech_workers: int = 2
    speech_recogniser: str | None = None
    speech_metrics: list[str] = field(default_factory=list)
    control: Any = None
    control_draws: int = 8
    limit: int | None = None
    device: str = "auto"
    data_dir: str | None = None
    on_data: str | None = None
    overwrite: bool = False


@dataclass
class ReportConfig:
    """Schema of ``report.yaml``.

    Args:
        sweep_dir: a sweep's folder, a run's, one above several, or a list of these; the report goes into the first.
        split: whose evaluations are compared.
        settings: settings of the evaluations (or their hash), where there are several of the split.
    """

    sweep_dir: Any = MISSING
    split: str = "test"
    settings: str | None = None


@dataclass
class RespondConfig:
    """Schema of ``respond.yaml``.

    Args:
        run_dir: the run that replies; the page may do without, and then begins with the newest.
        text: what the user says; None where it is to be recognised from the sound, or the history is answered.
        audio: sound of the user's turn; that of `video` if None.
        video: picture of the user's turn.
        history: JSON file with the turns before: ``{"turns": [{"speaker": ..., "text": ..., "audio": ...}, ...]}``.
        speaker: the user's name; by default one that the run knows.
        reply_as: the agent's name.
        num_replies: alternatives; more than one needs ``decoding=sample``.
        seed: of what is drawn.
        out: folder for reply.json and reply.wav; by default a new one in the run's ``replies/``.
        speech: the synthesizer's node, or None for no sound.
        asr: Whisper (id or folder) that recognises words where none are given.
        max_clip_s: longest clip that is taken, in seconds.
        page: serve a page to talk to a run, instead of answering one turn.
        runs_dir: the runs that the page offers, beside `run_dir`.
        host: address that the page is served at.
        port: of the page; None takes the first free one from 7860 on.
        max_upload_mb: largest file that a visitor of the page may upload.
    """

    run_dir: str | None = None
    checkpoint: str = MISSING
    device: str = "auto"
    data_dir: str | None = None
    text: str | None = None
    audio: str | None = None
    video: str | None = None
    history: str | None = None
    speaker: str | None = None
    reply_as: str | None = None
    num_replies: int = 1
    seed: int = 1
    out: str | None = None
    decoding: Any = MISSING
    speech: Any = None
    asr: str = MISSING
    max_clip_s: float = 60.0
    page: bool = False
    runs_dir: str = MISSING
    host: str = "127.0.0.1"
    port: int | None = None
    max_upload_mb: int = 50


def register_schemas() -> None:
    """Put the schemas where the YAML files' defaults lists find them (``train_schema`` ...)."""
    store = ConfigStore.instance()
    train_schema = OmegaConf.structured(TrainConfig)
    for path in OPEN:
        OmegaConf.set_struct(OmegaConf.select(train_schema, path), False)
    for name, schema in {
        "train_schema": train_schema,
        "prepare_schema": PrepareConfig,
        "evaluate_schema": EvaluateConfig,
        "report_schema": ReportConfig,
        "respond_schema": RespondConfig,
    }.items():
        store.store(name=name, node=schema)


def check_targets(node: Any, given: Mapping[str, set[str]] | None = None, path: str = "") -> int:
    """Bind every ``_target_`` node below `node` to its signature, without building anything.

    Args:
        node: plain containers (``OmegaConf.to_container``).
        given: dotted path of a node -> arguments that the pipeline adds when it builds that node.
        path: the dotted path of `node` itself.

    Returns:
        The number of nodes that were bound.

    Raises:
        MsencError: a target that is not trusted, does not exist, or does not take the node's keys (it names the
            nearest argument), or a word where it takes a number; groups of parameters or weights of the loss that
            cannot be meant.
    """
    if isinstance(node, list):
        return sum(check_targets(v, given, f"{path}[{i}]") for i, v in enumerate(node))
    if not isinstance(node, dict):
        return 0
    count = sum(check_targets(v, given, f"{path}.{k}".lstrip(".")) for k, v in node.items())
    if not path:
        _check_groups(node)
        _check_loss(node)
    target = node.get("_target_")
    if target is None:
        _check_without_target(node, path)
        return count
    if not target.startswith(TRUSTED_PACKAGES):
        raise MsencError(f"{path}._target_: found {target!r}, expected a name in one of {TRUSTED_PACKAGES}.")
    keys = {k for k in node if not k.startswith("_")} - TAKEN_OUT.get(path, set())
    added = (given or {}).get(path, set())
    missing = [k for k in keys if node[k] == "???"]
    if missing:
        raise MsencError(f"{path}.{missing[0]}: no value. Give it: {path}.{missing[0]}=...")
    signature = inspect.signature(_locate(target, path))
    parameters = signature.parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in sorted(keys - set(parameters)):
        if not takes_any:
            raise MsencError(f"{path}.{key}: {target} takes no such argument.{nearest(key, parameters)}")
    for key in sorted(keys & set(parameters)):
        if isinstance(node[key], str) and _is_number(parameters[key]):
            raise MsencError(f"{path}.{key}: found {node[key]!r}, expected a number.")
    if not node.get("_partial_"):
        try:
            signature.bind(**dict.fromkeys(keys | added))
        except TypeError as e:
            raise MsencError(f"{path}: {target}: {e}.") from e
    return count + 1


def _check_groups(config: Mapping[str, Any]) -> None:
    """Names and settings of `optimizer.groups`; what they match is known when the model is there."""
    optimizer = config.get("optimizer") or {}
    groups = flatten_groups(optimizer.get("groups"))
    if not groups:
        return
    # Parts that this run lacks are no mistake: a sweep's rows share their groups.
    parts = [LLM, CONNECTORS, *(f"{CONNECTOR}.{stream}" for stream in SLOTS)]
    taken = inspect.signature(_locate(optimizer["_target_"], "optimizer")).parameters
    valid = {*taken, *OWN_KEYS} - {"params"}
    scheduler = config.get("scheduler")
    has_warmup = scheduler and "warmup" in inspect.signature(_locate(scheduler["_target_"], "scheduler")).parameters
    for name, settings in groups.items():
        path = f"optimizer.groups.{name}"
        if not isinstance(settings, Mapping):
            raise MsencError(f"{path}: found {settings!r}, expected settings, such as {path}.lr=3e-4")
        is_pattern = name not in parts and "pattern" in settings
        if not is_pattern and name not in parts:
            raise MsencError(_no_such_group(name, parts))
        if name in parts and "pattern" in settings:
            raise MsencError(f"{path}.pattern: {name} is a part of the model. Give the group another name.")
        for key, value in settings.items():
            if key not in valid:
                raise MsencError(f"{path}.{key}: no such setting.{nearest(str(key), valid)}")
            if key == "pattern":
                if not isinstance(value, str):
                    raise MsencError(f"{path}.pattern: found {value!r}, expected a pattern of names, such as '*.bias'.")
            elif key == "warmup" or _is_number(taken[key]):
                _check_amount(f"{path}.{key}", value, most=1 if key == "warmup" else math.inf)
        if "warmup" in settings and not has_warmup:
            chosen = scheduler["_target_"] if scheduler else "none"
            raise MsencError(
                f"{path}.warmup: the scheduler ({chosen}) has no warm-up. Choose one that has: scheduler=warmup_cosine"
            )


def _no_such_group(name: str, parts: list[str]) -> str:
    return (
        f"optimizer.groups.{name}: no such part of the model.{nearest(name, parts)} A group of another name needs a "
        f"pattern of parameter names: optimizer.groups.{name}.pattern='*.bias'"
    )


def _check_loss(config: Mapping[str, Any]) -> None:
    weights = (config.get("loss") or {}).get("weights") or {}
    for kind, weight in weights.items():
        if kind not in TOKEN_KINDS:
            raise MsencError(f"loss.weights.{kind}: no such kind of token.{nearest(kind, TOKEN_KINDS)}")
        _check_amount(f"loss.weights.{kind}", weight)
    if not any(weights.get(kind, 1) for kind in TOKEN_KINDS):
        raise MsencError("loss.weights: every kind of token weighs 0, so nothing would be learned. Raise one of them.")


def _check_amount(path: str, value: Any, most: float = math.inf) -> None:
    """A number that is 0 or more; infinity is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MsencError(f"{path}: found {value!r}, expected a number.")
    if not (0 <= value <= most and math.isfinite(value)):
        bounds = "0 or more" if most == math.inf else f"from 0 to {most}"
        raise MsencError(f"{path}={value}: expected a number that is {bounds}.")


def _is_number(parameter: inspect.Parameter) -> bool:
    """Whether an argument takes numbers alone, by what its signature says, or by its default where that is wider."""
    default = parameter.default
    return parameter.annotation in (int, float) or (isinstance(default, int | float) and not isinstance(default, bool))


def _check_without_target(node: Mapping[str, Any], path: str) -> None:
    """Keys of the nodes that are handed on as a whole, to classes that would ignore a misspelt one or say little."""
    if NEEDS_TARGET.fullmatch(path):
        raise MsencError(f"{path}: no _target_ tells what to build; found the keys {', '.join(sorted(node))}.")
    if path == "decoding":
        from msenc.models.generation import DECODING_KEYS, read_decoding

        valid = set(DECODING_KEYS)
    elif path == "model.llm.lora":
        from peft import LoraConfig

        valid = set(inspect.signature(LoraConfig).parameters)
    else:
        return
    for key in sorted(node.keys() - valid):
        raise MsencError(f"{path}.{key}: no such setting.{nearest(key, valid)}")
    if path == "decoding":
        read_decoding(node, end_id=0, pad_id=0, seed=0)


def build(node: Mapping[str, Any], **given: Any) -> Any:
    """Call a node's ``_target_`` with its keys and what the pipeline adds; ``_partial_`` nodes become partials.

    Hydra's ``instantiate`` would wrap a refusal in an error of its own, and turn dataclasses among the arguments into
    dictionaries. No node of msenc nests another, so this is all that is needed.
    """
    keys = {k: v for k, v in node.items() if not k.startswith("_")}
    target = node["_target_"]
    call = partial(_locate(target, "config"), **keys, **given)
    try:
        return call if node.get("_partial_") else call()
    except ModuleNotFoundError as e:
        if target not in EXTRAS:
            raise
        raise MsencError(
            f"{target}: a package is missing ({e}). It comes with an extra: pip install -e '.[{EXTRAS[target]}]'"
        ) from e


def _locate(target: str, path: str) -> Any:
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise MsencError(f"{path}._target_: {target!r} cannot be imported: {e}.") from e


def nearest(name: str, valid: Any) -> str:
    """A hint for a misspelt name: the nearest valid one, and all of them unless they are many.

    Example:
        >>> nearest("freze", ["freeze", "lora"])
        " Did you mean 'freeze'? Valid: freeze, lora."
    """
    names = sorted(str(v) for v in valid)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    is_enough = not names or (close and len(names) > MANY_NAMES)
    return hint if is_enough else f"{hint} Valid: {', '.join(names)}."


def plain(node: Any) -> Any:
    """A config node as plain containers, interpolations resolved.

    Raises:
        MsencError: an interpolation that leads nowhere, or a key that no schema has: ``+key=value`` adds any.
    """
    if not OmegaConf.is_config(node):
        return node
    _check_schema(node)
    try:
        return OmegaConf.to_container(node, resolve=True)
    except Exception as e:
        if type(e).__module__.startswith("omegaconf"):
            raise MsencError(f"config: {e}") from e
        raise


def _check_schema(node: Any, path: str = "") -> None:
    if not OmegaConf.is_dict(node):
        return
    schema = OmegaConf.get_type(node)
    valid = schema.__dataclass_fields__ if is_dataclass(schema) else list(node)
    for key in node:
        name = f"{path}.{key}".lstrip(".")
        if key not in valid:
            raise MsencError(f"{name}: no such key.{nearest(str(key), valid)}")
        if not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
            _check_schema(node[key], name)


@contextmanager
def readable_errors() -> Iterator[None]:
    """Show a refusal as a message and exit with status 1, without a traceback; a bug keeps its traceback.

    Hydra reports composition errors itself, without the nearest valid name; so it is asked to raise them
    (``HYDRA_FULL_ERROR``), unless the user has set that variable to see everything.
    """
    shown_in_full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    except Exception as e:
        if shown_in_full or (text := refusal(e)) is None:
            raise
        sys.exit(text)
    finally:
        if not shown_in_full:
            del os.environ["HYDRA_FULL_ERROR"]


def refusal(error: Exception) -> str | None:
    """What to say of an error that the user can mend; None of a bug."""
    if isinstance(error, MsencError):
        return f"error: {error}"
    return f"config error: {_config_message(error)}" if _is_config_error(error) else None


def _is_config_error(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in ("omegaconf", "hydra", "yaml")


def _config_message(error: BaseException) -> str:
    """What Hydra or OmegaConf refuses, in one sentence, with the nearest valid name."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(inner)
    file = re.match(r"In '([\w/]+/[\w/]+)': ", str(error))
    where = f"{file.group(1)}.yaml: " if file else ""
    for e in chain:
        if isinstance(e, (ConfigKeyError, ConfigAttributeError)) and e.full_key:
            return where + _unknown_key(e)
        if isinstance(e, ValidationError) and e.full_key:
            return f"{where}{e.full_key}: {str(e).splitlines()[0]}"
        if isinstance(e, MissingMandatoryValue):
            return f"{e.full_key}: no value. Give it: {e.full_key}=..."
        if isinstance(e, MissingConfigException) and e.missing_cfg_file and e.options is not None:
            group, _, choice = e.missing_cfg_file.rpartition("/")
            return f"{group}={choice}: no such choice.{nearest(choice, e.options)}"
    texts = [str(e).strip() for e in (error, error.__cause__) if e is not None]
    absent = re.match(r"Could not override '([\w/]+)'. No match in the defaults list", texts[0])
    return _absent_part(absent.group(1)) if absent else "\n".join(dict.fromkeys(texts))


def _unknown_key(error: Any) -> str:
    node, key = error.parent_node, str(error.key)
    if "/" in key:
        groups = sorted(str(f.parent.relative_to(CONFIGS)) for f in CONFIGS.rglob("*/*.yaml"))
        return f"{key}: no such group.{nearest(key, set(groups))}"
    names = set(node) if isinstance(node, Mapping) else set()
    taken: Any = {}
    if "_target_" in names:
        with suppress(MsencError):
            taken = inspect.signature(_locate(node["_target_"], "config")).parameters
    if key in taken:
        return f"{error.full_key}: not in the YAML, though {node['_target_']} takes it. Add it: +{error.full_key}=..."
    valid = {name for name in names | set(taken) if not name.startswith("_")}
    whole = str(error.full_key).rpartition(".")[0]
    nothing = f" Nothing is there to set: {whole} is null or empty. Choose a config that fills it, or give all of it."
    return f"{error.full_key}: no such key.{nearest(key, valid) or nothing}"


def _absent_part(group: str) -> str:
    """A group that exists and that nothing chose: the modality brings the streams and their connector."""
    bringing = [f.stem for f in sorted(CONFIGS.glob("modality/*.yaml")) if f"/{group}:" in f.read_text("utf-8")]
    if not bringing:
        return f"{group}: nothing in this command has such a part."
    return f"{group}: the chosen modality has no such part. Choose one that has: modality={'|'.join(bringing)}"
