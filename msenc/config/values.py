"""What the values of a config may be, key by key: types that no schema holds, and ranges.

Whatever command a key is typed in, its range stands here, once. What a constructor takes beyond that is said by its
signature (`kind_of`), and by the constructor itself (`msenc.config.trial`).
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from msenc.config.hints import nearest
from msenc.config.stored import strings_of
from msenc.files.kinds import Count, MisfitError, Must, Name, Split, check, short
from msenc.store.location import has_secret, is_url, local_folder
from msenc.types import MsencError


def _between(kind: type, test: Callable[[Any], bool], expected: str) -> Any:
    return Annotated[kind, Must(test, expected)]


def _folder_above(text: str) -> Path | None:
    """The nearest folder on the way to a path that need not exist; None where something else is in the way."""
    if not text.strip() or "\0" in text or any(len(os.fsencode(part)) > 255 for part in Path(text).parts):
        return None
    path = Path(text).absolute()
    found = next((place for place in (path, *path.parents) if os.path.lexists(place)), path)
    return found if found.is_dir() else None


def _may_be_made(text: str) -> bool:
    found = _folder_above(text)
    if found is None or found.parts[1:2] in (("proc",), ("sys",)):  # which let root write, as far as they say
        return False
    return os.access(found, os.W_OK | os.X_OK)


def _is_device(text: str) -> bool:
    return re.fullmatch(r"cpu|(cuda|mps|xpu|hpu|mtia|npu)(:\d{1,3})?", text) is not None


Text = _between(str, lambda text: text.strip() != "" and "\0" not in text, "a text that is not empty")
Folder = _between(str, lambda text: _folder_above(text) is not None, "a folder; none of this name can be there")
NewFolder = _between(str, _may_be_made, "a folder that can be written, or made")
Place = _between(str, lambda text: "://" in text or _folder_above(text) is not None, "a folder, or a URL")
Positive = _between(int, (1).__le__, "1 or more")
Seed = _between(int, range(2**32).__contains__, f"a whole number from 0 to {2**32 - 1}")
Workers = _between(int, range(1025).__contains__, "a number of processes from 0 to 1024")
Port = _between(int, range(1, 2**16).__contains__, "a port from 1 to 65535")
Unbounded = _between(int, lambda n: n >= 1 or n == -1, "1 or more, or -1 for no such limit")
Amount = _between(float, (0.0).__le__, "0 or more")
Above0 = _between(float, lambda n: n > 0, "more than 0")
Share = _between(float, lambda n: 0 <= n <= 1, "from 0 to 1")
ShareAbove0 = _between(float, lambda n: 0 < n <= 1, "more than 0, at most 1")
ShareBelow1 = _between(float, lambda n: 0 <= n < 1, "from 0 to below 1")
Device = _between(str, _is_device, "a device of torch's, such as cpu or cuda:0")
Dtype = Literal["float32", "bfloat16", "float16"]
Decimals = _between(int, range(7).__contains__, "from 0 to 6")
Texts = list[Text]  # type: ignore[valid-type]
Node = dict[str, object]
"""What is built, or handed on as a whole."""

VALUES: dict[str, Any] = {
    # the commands' own
    "seed": Seed,
    "threads": _between(int, range(1, 1025).__contains__, "a number of threads from 1 to 1024") | None,
    "modality": Text,
    "stage": Text | None,
    "evaluate": Split | None,
    "split": Split,
    "checkpoint": Text,
    "settings": Text | None,
    "control": Text | Texts | None,
    "control_draws": Positive,
    "conflict": bool | Text | Texts | None,
    "missing": Text | Texts | None,
    "limit": Positive | None,
    "metrics": Texts,
    "metric_settings": dict[str, dict[str, Any] | Text | None],
    "speech_metrics": Texts,
    "speech_workers": Workers,
    "prepare_workers": Workers,
    "describe": bool | Literal["measure"] | None,
    "part": Text | None,
    "resume": Text | None,
    "init_from.*": Text | None,
    "run_dir": Text | _between(Texts, len, "one or more") | None,
    "sweep_dir": Text | _between(Texts, len, "one or more"),
    "title": Text | None,
    "names": dict[str, Text],
    "decimals": Decimals | dict[str, Decimals] | None,  # type: ignore[valid-type]
    "percent": Texts,
    "spread": Literal["ci", "sd"],
    "layout": Literal["booktabs", "markdown", "csv"] | None,
    "margins": dict[str, Above0],
    "noise_floor": Text | None,
    "listen": bool | Literal["ab", "rating"] | None,
    "listen_trials": Positive,
    "listen_seed": Seed,
    "listen_consent": Text | None,
    "answers": Text | None,
    "on_data": Place | None,
    "data_dir": Place | None,
    "runs_dir": Folder,
    "out": NewFolder | None,
    "base": Text | None,
    "encoders": dict[str, Text],
    "audio": Text | None,
    "video": Text | None,
    "history": Text | None,
    "text": str | None,
    "speaker": Text | None,
    "reply_as": Text | None,
    "recogniser": Text | None,
    "num_replies": Positive,
    "max_clip_s": Above0,
    "device": _between(str, lambda name: name == "auto" or _is_device(name), "auto, cpu, or another device of torch's"),
    "host": Text,
    "port": Port | None,
    "max_upload_mb": Positive,
    "max_total_mb": Positive,
    "page_password": str | None,
    "plugins": Texts,
    "urls": Texts,
    "paths.data_dir": Place,
    "paths.cache_dir": Folder,
    "paths.cache_max_bytes": Positive | None,
    "paths.runs_dir": NewFolder,
    "paths.output_dir": NewFolder | None,
    # nodes; their keys stand below
    "prompt": Node,
    "optimizer": Node,
    "scheduler": Node | None,
    "trainer": Node | None,
    "callbacks.*": Node | None,
    "logger.*": Node | None,
    "decoding": Node,
    "speech": Node | None,
    "model.llm": Node,
    "model.llm.lora": Node | None,
    "model.llm_recipe": Node | None,
    "model.connector": Node | None,
    "model.streams.*.encoder": Node,
    "data.generate": Node | None,
    "data.layout": Node | None,
    "data.recordings.segment": Node,
    "data.recordings.recogniser": Node,
    "data.recordings.speaker_encoder": Node,
    # data
    "data.name": Name,
    "data.dir": Place,
    "data.val": Literal["val"] | _between(float, lambda n: 0 < n < 1, "val, or a share between 0 and 1") | None,
    "data.voice.loudness": Literal["relative", "absolute"],
    "data.recordings.channels": Literal["mix", "speakers"],
    "data.root": Text,
    "data.table": Text | None,
    "data.encoding": Text | None,
    "data.audio_track": Positive | None,
    "data.labels": Texts | None,
    "data.batch_size": Positive | None,
    "data.max_tokens_per_batch": Positive | None,
    "data.num_workers": Workers,
    "data.max_history_tokens": Count,
    "data.filter": Text | Texts,
    "data.control": Text | None,
    "data.drop": dict[str, ShareBelow1],
    "data.voice.levels": _between(int, (2, 3).__contains__, "2 or 3"),
    "data.voice.genders": dict[str, Literal["woman", "man"]],
    "data.voice.edges": dict[str, list[float]],
    "data.voice.seed": Seed,
    "data.voice.writer": Text | None,
    "data.voice.writer_url": Text | None,
    "data.generate.sizes": dict[Split, Positive],
    "data.generate.num_videos": Positive,
    "data.generate.dialogues_per_video": Positive,
    "data.generate.variant": Count,
    "data.generate.seed": Seed,
    "data.layout.fractions": dict[Split, Share],
    "data.layout.seed": Seed,
    "data.layout.columns": dict[str, Text],
    "data.layout.labels": dict[str, Text],
    "data.layout.splits": dict[str, Split | None],
    "data.layout.val": ShareBelow1,
    "data.layout.val_sessions": list[Positive],  # type: ignore[valid-type]
    "data.layout.test_sessions": list[Positive],  # type: ignore[valid-type]
    "data.recordings.segment.scene_threshold": Amount,
    "data.recordings.segment.speech_threshold": Share,
    "data.recordings.segment.min_pause_s": Amount,
    "data.recordings.segment.max_utterance_s": Above0,
    "data.recordings.segment.same_speaker": _between(float, lambda n: -1 <= n <= 1, "a cosine, from -1 to 1"),
    "data.recordings.*.name_or_path": Text,
    "data.recordings.*.device": Device,
    "data.recordings.recogniser.dtype": Dtype,
    "data.recordings.recogniser.language": Text | None,
    "data.recordings.split.rule": Literal["official", "by_video", "random"],
    "data.recordings.split.fractions": dict[Split, Share],
    "data.recordings.split.seed": Seed,
    # the model
    "model.layout": Literal["dialogue", "sample"],
    "model.llm.name_or_path": Text,
    "model.llm.dropout": ShareBelow1,
    "model.llm.dtype": Dtype,
    "model.llm.round_to": Dtype | None,
    "model.llm.quantization": Literal["4bit", "8bit"] | None,
    "model.llm.lora.r": Positive,
    "model.llm.lora.lora_alpha": Above0,
    "model.llm.lora.lora_dropout": ShareBelow1,
    "model.llm.lora.bias": Literal["none", "all", "lora_only"],
    "model.llm.lora.target_modules": Text | Texts | None,
    "model.llm_recipe.folder": Folder,
    "model.llm_recipe.num_dialogues": Positive,
    "model.llm_recipe.hidden_size": Positive,
    "model.llm_recipe.num_layers": Positive,
    "model.llm_recipe.num_heads": Positive,
    "model.llm_recipe.vocab_size": Positive,
    "model.llm_recipe.batch_size": Positive,
    "model.llm_recipe.learning_rate": Above0,
    "model.llm_recipe.silence": Share,
    "model.llm_recipe.attempts": Positive,
    "model.llm_recipe.seed": Seed,
    "model.streams.*.name": Name,
    "model.streams.*.dim": Positive,
    "model.streams.*.encoder.name_or_path": Text,
    "model.streams.*.encoder.sample_rate": Positive,
    "model.streams.*.encoder.n_fft": Positive,
    "model.streams.*.encoder.hop_s": Above0,
    "model.streams.*.encoder.num_mels": Positive,
    "model.streams.*.encoder.min_hz": Amount,
    "model.streams.*.encoder.max_hz": Above0 | None,
    "model.streams.*.encoder.fps": Above0,
    "model.streams.*.encoder.size": Positive,
    "model.streams.*.encoder.batch_s": Above0,
    "model.streams.*.encoder.batch_frames": Positive,
    "model.streams.*.encoder.device": Device,
    "model.streams.*.encoder.dtype": Dtype,
    "model.connector.num_queries": Positive,
    "model.connector.num_layers": Positive,
    "model.connector.hidden_dim": Positive,
    "model.connector.num_heads": Positive,
    "model.connector.intermediate_dim": Positive | None,
    "model.connector.cross_attention_frequency": Positive,
    "model.connector.encoder_dim": Positive,
    "model.connector.dropout": ShareBelow1,
    "model.connector.num_blocks": Count,
    "model.connector.kernel": Positive,
    "model.connector.init": Text | None,
    # training
    "align.labels.*.source": Literal["description", "column", "transcript"],
    "align.labels.*.column": Text | None,
    "align.labels.*.attributes": Texts,
    "align.template": _between(str, lambda text: "{words}" in text, "a text with {words} in it"),
    "align.objective": Literal["embeddings", "contrastive", "llm"],
    "align.keep": Amount,
    "align.steps": Positive,
    "align.batch_size": Positive,
    "align.lr": Above0,
    "align.warmup_steps": Count,
    "align.weight_decay": Amount,
    "align.temperature": Above0,
    "align.seed": Seed,
    "objective.beta": Above0,
    "objective.label_smoothing": _between(float, lambda n: 0 <= n < 0.5, "from 0 to below 0.5"),
    "objective.rpo_alpha": Amount,
    "objective.pairs": _between(
        str,
        lambda text: text in ("conflict", "wrong") or text.lower().endswith(".csv"),
        "conflict, wrong or a CSV file",
    ),
    "objective.labels": Texts | None,
    "optimizer.lr": Amount,
    "scheduler.warmup": Share,
    "scheduler.gamma": ShareAbove0,
    "trainer.num_nodes": Positive,
    "trainer.max_epochs": Unbounded | None,
    "trainer.min_epochs": Count | None,
    "trainer.max_steps": Unbounded,
    "trainer.min_steps": Count | None,
    "trainer.fast_dev_run": bool | Count,
    "trainer.limit_train_batches": Positive | ShareAbove0 | None,
    "trainer.limit_val_batches": Count | Share | None,
    "trainer.overfit_batches": Count | Share,
    "trainer.val_check_interval": Positive | ShareAbove0 | Text | dict[str, int] | None,
    "trainer.check_val_every_n_epoch": Positive | None,
    "trainer.num_sanity_val_steps": _between(int, (-1).__le__, "0 or more, or -1 for all") | None,
    "trainer.log_every_n_steps": Positive | None,
    "trainer.accumulate_grad_batches": Positive,
    "trainer.gradient_clip_val": Amount | None,
    "trainer.reload_dataloaders_every_n_epochs": Count,
    "callbacks.*.dirpath": Text,
    "callbacks.*.every_minutes": Above0 | None,
    "callbacks.*.every_n_steps": Positive | None,
    "callbacks.*.mode": Literal["min", "max"],
    "callbacks.*.targets": Positive,
    "callbacks.*.eta": Amount,
    "callbacks.*.patience": Count,
    "callbacks.*.refresh_rate": Count,
    "callbacks.*.max_depth": _between(int, (-1).__le__, "0 or more, or -1 for all"),
    "logger.*.save_dir": Text,
    "logger.*.name": Text | None,
    "logger.*.version": Text | Count | None,
    "logger.*.flush_logs_every_n_steps": Positive,
    # replies
    "decoding.batch_size": Positive,
    "decoding.do_sample": bool | None,
    "decoding.max_new_tokens": Positive,
    "decoding.min_new_tokens": Count | None,
    "decoding.num_beams": Positive | None,
    "decoding.length_penalty": float | None,
    "decoding.early_stopping": bool | Literal["never"] | None,
    "decoding.repetition_penalty": Above0 | None,
    "decoding.no_repeat_ngram_size": Count | None,
    "decoding.temperature": Above0 | None,
    "decoding.top_k": Count | None,
    "decoding.top_p": ShareAbove0 | None,
    "decoding.min_p": Share | None,
    "decoding.typical_p": ShareAbove0 | None,
    "speech.language": Text,
    "speech.folder": Text,
    "speech.num_threads": Positive,
    "speech.base_url": Text,
    "speech.model": Text,
    "speech.timeout_s": Above0,
    "speech.max_retries": Count,
}
"""Key (``*``: any name) -> what its value must be, as a kind of `msenc.files.kinds`."""


def check_values(config: Mapping[str, Any]) -> None:
    """Hold a config to `VALUES`.

    Args:
        config: plain containers; a key that it lacks is not looked at.

    Raises:
        MsencError: the first value that does not fit, its key, and what would; a URL with a password, which would be
            written to run.json and logs, and so is not shown.
    """
    # Folders first: others are below them.
    for key, text in sorted(strings_of(config), key=lambda found: not found[0].startswith("paths.")):
        if has_secret(text):
            raise MsencError(
                f"{key}: found a URL with a password or key in it, which run.json and logs would keep. Give the URL "
                "alone, and the password where its protocol looks for one: AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY for s3://, HF_TOKEN for hf://, ~/.netrc for https:// (docs/storage.md)."
            )
    for pattern, kind in VALUES.items():
        for key, value in _found(config, pattern.split(".")):
            check_value(key, value, kind)


def check_value(key: str, value: Any, kind: Any) -> None:
    """Hold one value to a kind.

    Raises:
        MsencError: it names the key, and the place in the value.
    """
    if isinstance(value, str) and is_url(value) and {Folder, NewFolder} & {kind, *get_args(kind)}:
        local_folder(value, key)
    try:
        check(value, kind)
    except MisfitError as misfit:
        place = ".".join([key, *reversed(misfit.place)]).replace(".[", "[")
        hint = nearest(misfit.found, _names(kind)).partition(" Valid")[0] if isinstance(misfit.found, str) else ""
        raise MsencError(f"{place}: found {typed(misfit.found)}, expected {misfit.expected}.{hint}") from misfit


def _names(kind: Any) -> list[str]:
    """The names among which a kind chooses."""
    if get_origin(kind) is Literal:
        return [name for name in get_args(kind) if isinstance(name, str)]
    return [name for part in get_args(kind) for name in _names(part)]


def typed(value: Any) -> str:
    """A value as a command line has it."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    return short(value) if isinstance(value, str) or len(repr(value)) > 60 else repr(value)


def _found(node: Any, names: Sequence[str], path: str = "") -> Iterator[tuple[str, Any]]:
    if not names:
        yield path, node
    elif isinstance(node, Mapping):
        for key in node if names[0] == "*" else [names[0]] if names[0] in node else []:
            yield from _found(node[key], names[1:], f"{path}.{key}".lstrip("."))


def kind_of(annotation: Any) -> Any:
    """The kind of the plain values that an annotated argument takes; ``object``, any value, where that is not said.

    Example:
        >>> kind_of(Sequence[int]), kind_of(dict[str, Path]), kind_of(Callable[[], int])
        (list[int], dict[str, str], <class 'object'>)
    """
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation in (str, int, float, bool, None, NoneType):
        return annotation
    if annotation is Path:
        return str
    if origin is Literal:
        return annotation
    if origin in (Union, UnionType):
        kinds = [kind for kind in map(kind_of, parts) if kind is not object]
        return Union[tuple(kinds)] if {*kinds} - {None, NoneType} else object  # noqa: UP007 (of a list)
    if origin is tuple and Ellipsis not in parts:
        return tuple[tuple(kind_of(part) for part in parts)]
    if origin in (list, tuple, Sequence, set):
        return list[kind_of(parts[0])]
    if origin in (dict, Mapping):
        return dict[kind_of(parts[0]), kind_of(parts[1])]
    return object
