"""The trained parts of a run, for use without it: adapter and connectors as safetensors, the rest as JSON.

ConversationModel, config -> export/{export.json, adapter/, llm/, connectors.safetensors} -> `load_export`
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from msenc.config.build import build, build_connector, with_current_targets
from msenc.files import hold, read_json, reason_of, whole_folder, write_json
from msenc.files.kinds import Count, Name, short
from msenc.models.connector import tie
from msenc.models.conversation import ConversationModel
from msenc.models.llm import load_llm, load_tokenizer, with_adapter
from msenc.models.pretrained import check_tensors
from msenc.models.quantize import Quantization
from msenc.prompt import DialogueTokenizer
from msenc.types import MsencError

FORMAT_VERSION = 1
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
        "base_llm": {"name": model.base_name, "fingerprint": model.base_fingerprint},
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
                "encoder": stream["encoder"],
            }
            for name, stream in config["model"]["streams"].items()
        },
        "connector": config["model"]["connector"] if model.connectors else None,
        "tie_connectors": config["model"]["tie_connectors"],
        "prompt": config["prompt"],
        "max_history_tokens": config["data"]["max_history_tokens"],
        "decoding": config["decoding"],
        **facts,
    }
    write_json(partial / "export.json", content)
    return content


class _Stream(TypedDict):
    encoder_name: Name
    dim: Count
    num_queries: Count
    encoder: dict[str, Any]


class _Base(TypedDict):
    name: str
    fingerprint: str


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


def load_export(
    folder: str | Path, base: str | None = None, unquantized: bool = False
) -> tuple[ConversationModel, DialogueTokenizer]:
    """Load what `write_export` wrote: the model, frozen and in eval mode, and the tokenizer of its prompt.

    Args:
        folder: ``export/`` of a run.
        base: hub id or folder of the base LLM, if it has moved since the run was trained.
        unquantized: put an adapter that was trained on quantized weights on the weights as they were before. Its
            replies will differ a little; it needs no bitsandbytes.

    Raises:
        MsencError: not an export, another version, different base weights than in training, or bitsandbytes is missing
            for quantized ones.
    """
    from safetensors.torch import load_model

    folder = Path(folder)
    path = folder / "export.json"
    content = read_json(path, dict[str, Any], ADVICE)
    if content.get("format_version") != FORMAT_VERSION:
        raise MsencError(
            f"{path}: format_version {short(content.get('format_version'))}, this msenc reads {FORMAT_VERSION}. Load "
            "it with the version that wrote it."
        )
    content = with_current_targets(hold(content, _Export, path, ADVICE))
    if content["streams"] and content["connector"] is None:
        raise MsencError(f"{path}, connector: found null, expected a connector, as there are streams. {ADVICE}")
    trained = content["llm"]["trained"]
    options = {k: v for k, v in content["llm"].items() if k not in ("trained", "lora")}
    if unquantized:
        options["quantization"] = None
    name = str(folder / "llm") if trained == "llm" else (base or content["base_llm"]["name"])
    with _readable(path):  # settings that no LLM takes
        llm = load_llm(name, freeze=True, **options)
    expected = content["base_llm"]["fingerprint"]
    if trained != "llm" and llm.base_fingerprint != expected:
        raise MsencError(
            f"{folder}: trained on the base weights {content['base_llm']['name']} with fingerprint {expected}, {name} "
            f"has {llm.base_fingerprint}. Give the folder of the matching LLM: load_export(folder, base=...)."
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
        return model.eval(), DialogueTokenizer(build(content["prompt"], "prompt"), load_tokenizer(name))
