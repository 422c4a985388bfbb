"""The trained parts of a run, for use without it: adapter and connectors as safetensors, the rest as JSON.

ConversationModel, config -> export/{export.json, adapter/, llm/, connectors.safetensors} -> `load_export`

No file of it has a path of the machine that wrote it: models of the hub are named by id and commit, and those that were
a local folder by the fingerprint of their weights alone.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, NotRequired, TypedDict

from torch import nn

from msenc.config.build import build, build_connector, with_current_targets
from msenc.files import digest, hold, read_json, reason_of, whole_folder, write_json
from msenc.files.kinds import Count, Name, short
from msenc.models.connector import tie
from msenc.models.conversation import ConversationModel
from msenc.models.encoders import Encoder
from msenc.models.llm import fingerprint, load_llm, load_tokenizer, with_adapter
from msenc.models.pretrained import check_tensors, pinned, split_revision
from msenc.models.quantize import Quantization
from msenc.prompt import DialogueTokenizer
from msenc.types import MsencError

FORMAT_VERSION = 2
READS = (1, FORMAT_VERSION)
"""Version 1 names the base LLM and the encoders by the paths of the machine that wrote it."""
ADVICE = "Expected what train.py wrote: export the run again."


def write_export(
    folder: Path, model: ConversationModel, config: Mapping[str, Any], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Write ``export.json``; the LLM's PEFT adapter to ``adapter/``, or an LLM that was trained in full to
    ``llm/``; and the connectors to ``connectors.safetensors``. A frozen LLM is not written.

    Args:
        folder: replaced if it exists.
        model: with the weights to export.
        config: the run's, as plain containers.
        facts: more about the origin of the weights; plain values.

    Returns:
        The content of ``export.json``.
    """  # noqa: D205
    with whole_folder(folder) as partial:
        return _write_parts(partial, model, config, facts)


def _write_parts(
    partial: Path, model: ConversationModel, config: Mapping[str, Any], facts: Mapping[str, Any]
) -> dict[str, Any]:
    from peft import PeftModel
    from safetensors.torch import save_model

    llm = config["model"]["llm"]
    base = pinned(model.base_name)
    if isinstance(model.llm, PeftModel):
        trained = "adapter"
        model.llm.save_pretrained(partial / trained, save_embedding_layers=False)
        (partial / trained / "README.md").unlink(missing_ok=True)  # an empty model card
    elif any(p.requires_grad for p in model.llm.parameters()):
        trained = "llm"
        model.llm.save_pretrained(partial / trained)
        load_tokenizer(model.base_name).save_pretrained(partial / trained)
    else:
        trained = None
    if model.connectors:
        save_model(model.connectors, str(partial / "connectors.safetensors"))
    content = {
        "format_version": FORMAT_VERSION,
        "base_llm": {
            "name": base,
            "fingerprint": model.base_fingerprint,
            "vocabulary": _vocabulary(load_tokenizer(model.base_name)),
            "licence": _licence(model.base_name),
        },
        "llm": {
            "trained": trained,
            "lora": llm.get("lora") if trained == "adapter" else None,
            **{k: llm[k] for k in ("dtype", "attn_implementation", "round_to") if k in llm},
            **({"quantization": model.quantization} if model.quantization else {}),
        },
        "streams": {
            name: {
                "encoder_name": stream["name"],
                "dim": stream["dim"],
                "num_queries": config["model"]["connector"]["num_queries"],
                **_reference(stream["encoder"], f"model.streams.{name}.encoder"),
            }
            for name, stream in config["model"]["streams"].items()
        },
        "connector": _without_paths(config["model"]["connector"])[0] if model.connectors else None,
        "tie_connectors": config["model"]["tie_connectors"],
        "prompt": config["prompt"],
        "max_history_tokens": config["data"]["max_history_tokens"],
        "decoding": config["decoding"],
        **facts,
    }
    write_json(partial / "export.json", content)
    name, revision = split_revision(base) if base else (None, None)
    for file in partial.glob("*/*config.json"):  # of other packages
        found = json.loads(file.read_text("utf-8"))
        named = {"base_model_name_or_path": name, "revision": revision} if file.name == "adapter_config.json" else {}
        settings, _ = _without_paths({**found, **named}, must_exist=True)
        if settings != found:
            write_json(file, settings)
    return content


def _without_paths(node: Any, place: str = "", must_exist: bool = False) -> tuple[Any, list[str]]:
    """Plain containers in which null stands for each path of this machine, and where that is.

    Args:
        node: settings.
        place: keys that led there.
        must_exist: take for a path only what is there: a template or a token may look like one.
    """
    if isinstance(node, Mapping):
        parts = {key: _without_paths(inner, f"{place}.{key}".lstrip("."), must_exist) for key, inner in node.items()}
        return {key: part for key, (part, _) in parts.items()}, [p for _, places in parts.values() for p in places]
    if isinstance(node, list):
        parts = [_without_paths(inner, f"{place}[{number}]", must_exist) for number, inner in enumerate(node)]
        return [part for part, _ in parts], [p for _, places in parts for p in places]
    is_path = isinstance(node, str) and (_is_there(node, place) or (not must_exist and _is_absolute(node)))
    return (None, [place]) if is_path else (node, [])


def _is_absolute(text: str) -> bool:
    return (
        PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute() or text.startswith(("~", "./", "../"))
    )


def _is_there(text: str, place: str) -> bool:
    """Whether it is a path of something: with a separator, or where a name of a model stands."""
    if "/" not in text.strip("/") and not place.endswith("name_or_path"):
        return False
    with suppress(OSError, ValueError):  # too long, or a NUL: no path
        return Path(text).expanduser().exists()
    return False


def _reference(encoder: Mapping[str, Any], place: str) -> dict[str, Any]:
    """An encoder as others find it: its settings, the id and commit of its model, the fingerprint of its weights."""
    settings, left_out = _without_paths(encoder)
    if settings.get("name_or_path") is not None:
        settings["name_or_path"] = pinned(settings["name_or_path"])
    known = None
    with suppress(MsencError):  # features may have been prepared elsewhere, and the encoder be only there
        known = _fingerprint_of(build({**encoder, **({"device": "cpu"} if "device" in encoder else {})}, place))
    return {"encoder": settings, "fingerprint": known, "left_out": left_out}


def _fingerprint_of(encoder: Encoder) -> str | None:
    """Of the weights of the modules that an encoder holds; None where it has none."""
    modules = {name: value for name, value in vars(encoder).items() if isinstance(value, nn.Module)}
    return fingerprint(nn.ModuleDict(modules)) if modules else None


def _vocabulary(tokenizer: Any) -> str:
    """A hash of a tokenizer's tokens and their ids: other ones would read other embeddings."""
    return digest(tokenizer.get_vocab(), length=16)


def _licence(name_or_path: str) -> str | None:
    """What a model's own files say of its licence: the card's ``license``, or the first line of a licence file."""
    from huggingface_hub import metadata_load, try_to_load_from_cache

    name, revision = split_revision(name_or_path)
    for file in ("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md"):
        with suppress(Exception):  # a card that others wrote
            path = Path(name) / file if Path(name).is_dir() else try_to_load_from_cache(name, file, revision=revision)
            if file == "README.md":
                found = (metadata_load(path) or {}).get("license")
            else:
                found = next(line.strip() for line in Path(path).read_text("utf-8").splitlines() if line.strip())
            if isinstance(found, str) and found:
                return found[:100]
    return None


class _Stream(TypedDict):
    encoder_name: Name
    dim: Count
    num_queries: Count
    encoder: dict[str, Any]
    fingerprint: NotRequired[str | None]
    left_out: NotRequired[list[str]]


class _Base(TypedDict):
    name: str | None
    fingerprint: str
    vocabulary: NotRequired[str]
    licence: NotRequired[str | None]


@dataclass(frozen=True)
class _Llm:
    """Refuse settings that this version of msenc does not know: they would change the model."""

    trained: Literal["adapter", "llm"] | None
    dtype: str = ""
    attn_implementation: str = ""
    round_to: str | None = None
    quantization: Quantization | None = None
    lora: dict[str, Any] | None = None


class _Export(TypedDict):
    """The parts of ``export.json`` from which `load_export` builds; `config.build` decides what may be built."""

    base_llm: _Base
    llm: _Llm
    streams: dict[Name, _Stream]
    connector: dict[str, Any] | None
    tie_connectors: bool
    prompt: dict[str, Any]
    max_history_tokens: Count
    decoding: dict[str, Any]


@contextmanager
def _readable(place: Path) -> Iterator[Path]:
    """Name the unreadable part of an export; safetensors and PEFT raise many types of errors for that."""
    try:
        yield place
    except MsencError:
        raise
    except Exception as error:
        raise MsencError(f"{place}: cannot be loaded ({reason_of(error)[:300]}). {ADVICE}") from error


def read_export(folder: Path) -> dict[str, Any]:
    """The content of ``export.json``, with targets by the names that they have now.

    Raises:
        MsencError: it is missing, damaged, or of another version.
    """
    path = folder / "export.json"
    content = read_json(path, dict[str, Any], ADVICE)
    if content.get("format_version") not in READS:
        raise MsencError(
            f"{path}: format_version {short(content.get('format_version'))}, this msenc reads "
            f"{' and '.join(map(str, READS))}. Load it with the version that wrote it."
        )
    content = with_current_targets(hold(content, _Export, path, ADVICE))
    if content["streams"] and content["connector"] is None:
        raise MsencError(f"{path}, connector: found null, expected a connector, as there are streams. {ADVICE}")
    return content


def _base_of_run(folder: Path) -> str | None:
    record = folder.absolute().parent / "run.json"
    name = read_json(record, dict[str, Any]).get("llm") if record.is_file() else None
    return name if isinstance(name, str) else None


def load_encoders(folder: Path, given: Mapping[str, str]) -> dict[str, Encoder]:
    """The encoders of an export's streams, as the run's features were made.

    Args:
        folder: ``export/`` of a run.
        given: stream -> hub id or folder of its encoder's model, where that was a local folder, or has moved.

    Raises:
        MsencError: an encoder cannot be loaded, its model was a local folder and is not given, or has other weights.
    """
    streams = read_export(folder)["streams"]
    if unknown := [name for name in given if name not in streams]:
        raise MsencError(f"encoders.{unknown[0]}: {folder} has no such stream, only {', '.join(streams) or 'text'}.")
    encoders = {}
    for name, stream in streams.items():
        settings, left_out = dict(stream["encoder"]), stream.get("left_out", [])
        key = left_out[0] if left_out else "name_or_path"
        if name in given:
            if len(left_out) > 1 or key not in settings:
                what = ", ".join(left_out) or "no model"
                raise MsencError(
                    f"encoders.{name}: sets one path of an encoder, and this one has {what}. Leave it out."
                )
            settings[key] = given[name]
        elif left_out:
            raise MsencError(
                f"{folder}: {key} of the {name} encoder {stream['encoder_name']} was a local path, which an export "
                f"does not name. Say where its model lies: encoders.{name}=FOLDER."
            )
        encoders[name] = build(settings, f"model.streams.{name}.encoder")
        expected, found = stream.get("fingerprint"), _fingerprint_of(encoders[name])
        if expected is not None and found != expected:
            raise MsencError(
                f"{folder}: its {name} features were made by {stream['encoder_name']} with the fingerprint {expected}, "
                f"{settings.get(key)} has {found}. Give the matching model: encoders.{name}=FOLDER."
            )
    return encoders


def load_export(
    folder: str | Path, base: str | None = None, unquantized: bool = False
) -> tuple[ConversationModel, DialogueTokenizer]:
    """Load what `write_export` wrote: the model, frozen and in eval mode, and the tokenizer of its prompt.

    Args:
        folder: ``export/`` of a run.
        base: hub id or folder of the base LLM, where that was a local folder, or has moved. An export that lies in its
            run's folder looks where the run found it.
        unquantized: put an adapter that was trained on quantized weights on the weights as they were before. Its
            replies will differ a little; it needs no bitsandbytes.

    Raises:
        MsencError: not an export, another version, different base weights than in training, or bitsandbytes is missing
            for quantized ones.
    """
    from safetensors.torch import load_model

    folder = Path(folder)
    path = folder / "export.json"
    content = read_export(folder)
    trained = content["llm"]["trained"]
    options = {k: v for k, v in content["llm"].items() if k not in ("trained", "lora")}
    if unquantized:
        options["quantization"] = None
    expected = content["base_llm"]["fingerprint"]
    name = str(folder / "llm") if trained == "llm" else (base or content["base_llm"]["name"] or _base_of_run(folder))
    if name is None:
        raise MsencError(
            f"{folder}: its base LLM was a local folder, which an export does not name. Say where the LLM with the "
            f"fingerprint {expected} lies: base=FOLDER."
        )
    with _readable(path):  # settings that no LLM takes
        llm = load_llm(name, freeze=True, **options)
    if trained != "llm" and llm.base_fingerprint != expected:
        raise MsencError(
            f"{folder}: trained on the base weights {content['base_llm']['name'] or 'of a local folder'} with "
            f"fingerprint {expected}, {name} has {llm.base_fingerprint}. Give the matching LLM: base=FOLDER."
        )
    tokenizer = load_tokenizer(name)
    if trained != "llm" and content["base_llm"].get("vocabulary") not in (None, _vocabulary(tokenizer)):
        raise MsencError(
            f"{folder}: {name} has the weights that it was trained on, but another vocabulary. Give the matching LLM "
            "with its own tokenizer: base=FOLDER."
        )
    if trained == "llm":
        check_tensors(llm.state_dict(), str(folder / "llm"))
    if trained == "adapter":
        facts = {k: getattr(llm, k) for k in ("base_name", "base_fingerprint", "quantization")}
        with _readable(folder / "adapter"):
            llm = with_adapter(llm, folder / "adapter")
        check_tensors({k: v for k, v in llm.state_dict().items() if "lora_" in k}, str(folder / "adapter"))
        for key, fact in facts.items():
            setattr(llm, key, fact)
    width = llm.get_input_embeddings().weight.shape[1]
    connectors = {}
    for stream, facts in content["streams"].items():
        node = {**content["connector"], **({"init": None} if "init" in content["connector"] else {})}
        with _readable(path):
            connectors[stream] = build_connector(node, facts, width)
    if content["tie_connectors"]:
        tie(connectors)
    model = ConversationModel(llm, connectors)
    if connectors:
        with _readable(folder / "connectors.safetensors") as file:
            load_model(model.connectors, str(file))
        check_tensors(model.connectors.state_dict(), str(folder / "connectors.safetensors"))
    model.requires_grad_(False)
    with _readable(path):
        return model.eval(), DialogueTokenizer(build(content["prompt"], "prompt"), tokenizer)
