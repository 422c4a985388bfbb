"""What a config may build: a table of places and names, and how a user's own code comes into it.

A config comes from elsewhere (a colleague's run, an export): a name in it must be no way to run anything else.
"""

import importlib
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, TypeVar

from msenc.config.hints import nearest
from msenc.types import MsencError

T = TypeVar("T")


def _of(module: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{module}.{name}" for name in names)


BUILDABLE = {
    "prompt": ("msenc.prompt.Prompt",),
    "model.llm": ("msenc.models.llm.load_llm",),
    "model.llm_recipe": ("msenc.demo.tiny_llm.pretrain",),
    "model.streams.audio.encoder": _of("msenc.models.encoders", "LogMel", "SpeechEncoder", "WhisperEncoder"),
    "model.streams.video.encoder": _of("msenc.models.encoders", "Pixels", "ClipVision"),
    "model.connector": _of("msenc.models.connector", "QFormer", "Mlp", "ConvConnector"),
    "data.generate": (
        "msenc.demo.world.write_demo",
        "msenc.demo.table.write_world",
        "msenc.demo.raw_demo.write_raw_demo",
    ),
    "data.layout": (
        "msenc.raw.layouts.avamerg.AvaMerg",
        "msenc.raw.layouts.dailytalk.DailyTalk",
        "msenc.raw.layouts.hub.HubDataset",
        "msenc.raw.layouts.iemocap.Iemocap",
        "msenc.raw.layouts.seamless.Seamless",
    ),
    "data.recordings.segment": ("msenc.raw.segment.SegmentSettings",),
    "data.recordings.recogniser": ("msenc.models.recognition.Recogniser",),
    "data.recordings.speaker_encoder": _of("msenc.raw.speakers", "Resemblyzer", "XVector"),
    "speech": (
        "msenc.speech.synthesizers.espeak.ESpeak",
        "msenc.speech.synthesizers.hibari.Hibari",
        "msenc.speech.synthesizers.kokoro.Kokoro",
        "msenc.speech.synthesizers.openai.OpenAISpeech",
        "msenc.speech.synthesizers.qwen.QwenSpeech",
    ),
    "optimizer": _of(
        "torch.optim",
        *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "Muon", "NAdam", "RAdam"),
        *("RMSprop", "Rprop", "SGD", "SparseAdam"),
    ),
    "scheduler": _of("msenc.training.schedules", "warmup_cosine", "epoch_decay"),
    "trainer": ("lightning.Trainer", "lightning.pytorch.Trainer"),
    "trainer.strategy": ("msenc.training.sharding.Sharded",),
    # Of Lightning's: none that calls what it is given (LambdaCallback, ModelPruning), or writes where it is told to.
    "callbacks.*": (
        "msenc.training.checkpoints.Checkpoints",
        "msenc.training.monitor.StreamMonitor",
        "msenc.training.averaging.AverageWeights",
        "msenc.training.loggers.TrainingProgress",
        *_of(
            "lightning.pytorch.callbacks",
            *("DeviceStatsMonitor", "EarlyStopping", "GradientAccumulationScheduler", "LearningRateMonitor"),
            *("ModelSummary", "RichModelSummary", "RichProgressBar", "StochasticWeightAveraging", "TQDMProgressBar"),
            *("ThroughputMonitor", "Timer"),
        ),
    ),
    "logger.*": (
        "msenc.training.loggers.CsvLogger",
        "msenc.tracking.mlflow.MlflowLogger",
        *_of(
            "lightning.pytorch.loggers",
            *("CSVLogger", "CometLogger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger"),
        ),
    ),
}
"""Place of a node in a config (``*``: any name) -> what its ``_target_`` may be."""

PACKAGES = {
    "lightning.pytorch.loggers.MLFlowLogger": ("mlflow", "mlflow"),
    "lightning.pytorch.loggers.WandbLogger": ("wandb", "wandb"),
    "msenc.speech.synthesizers.espeak.ESpeak": ("demo", "espeakng_loader"),
    "msenc.speech.synthesizers.kokoro.Kokoro": ("kokoro", "onnxruntime", "espeakng_loader"),
    "msenc.tracking.mlflow.MlflowLogger": ("mlflow", "mlflow"),
    "page=true": ("talk", "gradio"),
}
"""Target, or setting -> the extra of msenc that brings what it needs, and the packages that this is."""

_registered: dict[str, dict[str, Any]] = {}


def buildable(place: str) -> Callable[[T], T]:
    """Let a config build a class or function of one's own; a decorator.

    Args:
        place: of the nodes that may name it, as in `BUILDABLE`.

    Raises:
        MsencError: nothing is built at such a place.

    Example:
        >>> @buildable("callbacks.*")
        ... class Quiet: ...
        >>> locate_target(f"{Quiet.__module__}.Quiet", "callbacks.mine") is Quiet
        True
    """
    if place not in BUILDABLE:
        raise MsencError(f"buildable({place!r}): nothing is built there.{nearest(place, BUILDABLE)}")

    def register(thing: T) -> T:
        _registered.setdefault(place, {})[f"{thing.__module__}.{thing.__qualname__}"] = thing
        return thing

    return register


def load_plugins(modules: Sequence[str]) -> None:
    """Import modules that register what a config may build, of the user's own command line alone.

    Raises:
        MsencError: one cannot be imported.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as e:
            raise MsencError(
                f"plugins: {module!r} cannot be imported: {e}. Expected a module beside the scripts, or one that is "
                "installed."
            ) from e


def check_packages(config: Mapping[str, Any], path: str = "") -> None:
    """Refuse what needs a package that is not installed, before anything is loaded.

    Args:
        config: plain containers.
        path: the dotted path of `config` itself.

    Raises:
        MsencError: names the key, the package, and the extra that brings it.
    """
    for key, value in config.items():
        place = f"{path}.{key}".lstrip(".")
        if isinstance(value, Mapping):
            check_packages(value, place)
        what = value if key == "_target_" else f"{place}={str(value).lower()}"
        extra, *packages = PACKAGES.get(what, ("",)) if isinstance(what, str) else ("",)
        for package in packages:
            if not _is_installed(package):
                raise MsencError(
                    f"{place.removesuffix('._target_')}: {what} needs the package {package}, which is not installed. "
                    f"Install it with an extra of msenc: pip install -e '.[{extra}]'"
                )


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # a module without a spec, or None in its place
        return sys.modules.get(package) is not None


def is_built(path: str) -> bool:
    """Whether nodes at this path of a config are built."""
    return _pattern(path) is not None


def is_others(target: Any) -> bool:
    """Whether a name of the table is another package's: neither msenc's nor the user's."""
    return not str(target).startswith("msenc.") and any(target in names for names in BUILDABLE.values())


def _pattern(path: str) -> str | None:
    for pattern in BUILDABLE:
        if re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), path):
            return pattern
    return None


def locate_target(target: Any, place: str) -> Any:
    """Import what a target names; nothing is imported that may not stand there.

    Args:
        target: value of ``_target_``.
        place: of the node in its config.

    Raises:
        MsencError: the target may not be built at this place, or what it needs is not installed.
    """
    pattern = _pattern(place)
    own = _registered.get(pattern or "", {})
    names: Collection[str] = [*BUILDABLE.get(pattern or "", ()), *own]
    if not isinstance(target, str) or target not in names:
        where = f"{place}._target_: found {target!r}"
        if pattern is None:
            raise MsencError(f"{where}, but nothing is built there. Leave it out.")
        raise MsencError(
            f"{where}, which is none of those that a config may build there.{nearest(str(target), names)} If it is "
            "code of your own, register it, and name its module on the command line: plugins=[MODULE] "
            "(docs/architecture.md)."
        )
    if target in own:
        return own[target]
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise MsencError(f"{place}._target_: {target!r} cannot be imported: {e}.") from e
