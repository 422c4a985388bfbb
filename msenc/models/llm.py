"""Loads the LLM: any causal LM of transformers by hub id or folder, frozen, with LoRA, or trained in full.

name or folder -> PreTrainedModel or PeftModel; its tokenizer
"""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from msenc.files import read_json, reason_of
from msenc.models.attention import KERNELS, NAME, register
from msenc.models.layout import choose_attention
from msenc.models.pretrained import StoredWeights, load_pretrained, name_some, split_revision, to_dtype
from msenc.models.quantize import check_quantization, quantize
from msenc.types import MsencError

FEED_FORWARD = ("mlp", "feed_forward", "ffn", "moe", "block_sparse_moe")
"""Names of the feed-forward blocks in the families of transformers."""

FINGERPRINT_VALUES = 256
"""Number of evenly spaced values of each tensor that enter a fingerprint."""

LORA_SETTINGS = (
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "init_lora_weights"),
    *("target_modules", "exclude_modules", "target_parameters", "modules_to_save", "trainable_token_indices"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
    "ensure_weight_tying",
)
"""What of PEFT's LoraConfig is taken: numbers and names of layers, and what is trained with them is exported, resumed
and loaded as it was. Others import what they name (``megatron_core``), or read files."""

LORA_STARTS = (True, False, "gaussian", "orthogonal")
"""Ways to initialise adapters that leave the base weights as they are, and need neither data nor gradients."""

ADAPTER_FACTS = ("peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode")
"""What else an adapter's config says; nothing is read where it points to."""


def load_tokenizer(name_or_path: str) -> Any:
    """The LLM's tokenizer.

    Raises:
        MsencError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    return load_pretrained(AutoTokenizer, name_or_path)


def load_llm(
    name_or_path: str,
    freeze: bool = False,
    lora: Mapping[str, Any] | None = None,
    dropout: float = 0.0,
    dtype: str = "float32",
    attn_implementation: str = "auto",
    gradient_checkpointing: bool = False,
    round_to: str | None = None,
    quantization: str | None = None,
    empty: bool = False,
    by_shares: bool = False,
) -> nn.Module:
    """Load the LLM and set which parameters train.

    Args:
        name_or_path: hub id (``ID@REVISION`` pins it), or folder written by ``save_pretrained``.
        freeze: no parameter of the LLM trains, LoRA included (no adapter is added).
        lora: arguments of PEFT's ``LoraConfig`` (r, lora_alpha, ...); None with ``freeze=False`` trains the LLM in
            full.
        dropout: share of each feed-forward block's output that is zeroed in training, with the rest scaled up to
            match. These blocks memorize when an LLM trains in full. (LoRA has its own, ``lora_dropout``.)
        dtype: of the base weights; LoRA's stay float32, and compute in this type (`compute_lora_in_base_type`).
        attn_implementation: kernel of `attention.KERNELS` for packed rows (plain SDPA elsewhere), or ``eager``: the
            LLM's own attention, which ``auto`` takes where the others would not compute the same.
        gradient_checkpointing: trade time for memory: recompute activations in the backward pass.
        round_to: narrower type whose values the base weights take, to compute in `dtype` what a model of that type was
            trained to be; None leaves them as they are.
        quantization: 4bit or 8bit: the type that the base's linear layers are stored in (`quantize`), beneath adapters
            or frozen; None: `dtype`.
        empty: only shapes: the config is read but no weights; all tensors are on the meta device.
        by_shares: as `empty`, but adapters and buffers are there, and ``stored`` reads the base weights
            (`sharding.shard` fills them in).

    Returns:
        A causal LM with the attributes ``base_name``, ``base_fingerprint`` (see `fingerprint`; of the weights before
        they are quantized), ``quantization``, ``attention_kernel``.

    Raises:
        MsencError: it cannot be loaded, it is no causal LM, `check_lora` or PEFT refuses the LoRA arguments, `dropout`
            is no share or finds no block, or `check_quantization` refuses.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    if attn_implementation not in (*KERNELS, "eager"):
        raise MsencError(
            f"model.llm.attn_implementation={attn_implementation}: expected one of {', '.join(KERNELS)}, eager."
        )
    check_quantization(quantization, freeze, lora)
    register()
    config = load_pretrained(AutoConfig, name_or_path)
    if quantization is not None and getattr(config, "quantization_config", None) is not None:
        raise MsencError(
            f"model.llm.quantization={quantization}: the weights of {name_or_path} are quantized already. Name the LLM "
            "that they were made from."
        )
    fitting = choose_attention(config)
    if attn_implementation == "auto" and fitting == "eager":
        attn_implementation = "eager"
    is_eager = attn_implementation == "eager"
    if fitting == "eager" and not is_eager:
        raise MsencError(
            f"model.llm.attn_implementation={attn_implementation}: {name_or_path} ({config.model_type}) has an "
            "its own attention, which only eager computes. Use eager, or auto."
        )
    options = {"dtype": to_dtype(dtype), "attn_implementation": "eager" if is_eager else NAME}
    if empty or by_shares:
        # Buffers, such as the frequencies of rotary positions, are computed as the model is made.
        with init_empty_weights(include_buffers=empty):
            llm = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
        llm.tie_weights()
    else:
        llm = load_pretrained(AutoModelForCausalLM, name_or_path, **options)
    if by_shares:
        with suppress(OSError):  # there may be none
            name, revision = split_revision(name_or_path)
            llm.generation_config = GenerationConfig.from_pretrained(name, revision=revision)
    # What a checkpoint recommends (temperature, repetition penalty) would silently complete `decoding`.
    # Which tokens end a reply is no such setting.
    llm.generation_config = GenerationConfig(eos_token_id=llm.generation_config.eos_token_id)
    stored = StoredWeights(name_or_path, llm, dtype, round_to) if by_shares else None
    if stored is not None:
        with torch.no_grad():
            for name, buffer in llm.named_buffers():
                if stored.knows(name):
                    buffer.copy_(stored.read(name))
    elif round_to is not None and not empty:
        with torch.no_grad():
            for parameter in llm.parameters():
                parameter.copy_(parameter.to(to_dtype(round_to)))
    base = None if empty else fingerprint(llm, stored)
    if quantization is not None:
        quantize(llm, quantization)
    llm.get_output_embeddings().register_forward_pre_hook(_contiguous)
    if gradient_checkpointing:
        # transformers 5.23 renamed it; by default, both recompute without re-entering autograd.
        enable = getattr(llm, "activation_checkpointing_enable", None) or llm.gradient_checkpointing_enable
        enable()
        llm.enable_input_require_grads()
    llm.requires_grad_(not freeze and lora is None)
    if dropout and not freeze:
        _drop_out(llm, dropout)
    if not freeze and lora is not None:
        llm = _with_lora(llm, lora) if stored is None else _with_lora_by_shares(llm, lora, stored)
    llm.base_name, llm.base_fingerprint, llm.stored = name_or_path, base, stored
    llm.quantization = quantization
    llm.attention_kernel = "dense" if is_eager else attn_implementation
    return llm


def _contiguous(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # The last tokens of many rows are a view, of which torch makes a product for each row, with a copy of the weight:
    # in bfloat16 400 times slower (32 rows, 49,152 tokens).
    return tuple(tensor.contiguous() for tensor in given)


def parts_used_alone(llm: nn.Module) -> list[nn.Module]:
    """Modules of which only one computes at a time: decoder layers; embedding and output layer, unless they are tied.

    Layers are known by the names that the LLM's family gives to what may not be split over devices.

    Raises:
        MsencError: the family names none.
    """
    base = llm.get_base_model() if hasattr(llm, "get_base_model") else llm
    names = {*(base._no_split_modules or ())}
    layers = [module for module in base.modules() if type(module).__name__ in names]
    if not layers:
        raise MsencError(f"{type(base).__name__} does not say which of its modules are layers, so it cannot be shared.")
    first, last = llm.get_input_embeddings(), llm.get_output_embeddings()
    is_tied = {id(p) for p in first.parameters()} & {id(p) for p in last.parameters()}
    return layers if is_tied else [*layers, first, last]


def _drop_out(llm: nn.Module, share: float) -> None:
    if not 0 < share < 1:
        raise MsencError(f"model.llm.dropout={share}: expected a share from 0 to below 1.")
    blocks = [m for name, m in llm.named_modules() if name.rpartition(".")[2] in FEED_FORWARD]
    if not blocks:
        raise MsencError(
            f"model.llm.dropout={share}: {type(llm).__name__} has no {', '.join(FEED_FORWARD)}. Set it to "
            "0; model.llm.lora.lora_dropout serves any LLM."
        )
    for block in blocks:
        block.register_forward_hook(partial(_dropped_out, share))


def _dropped_out(share: float, block: nn.Module, _: Any, added: Any) -> Any:
    if isinstance(added, tuple):  # mixtures of experts add their routing
        return _dropped_out(share, block, _, added[0]), *added[1:]
    return torch.nn.functional.dropout(added, share, block.training)


def check_lora(lora: Mapping[str, Any]) -> None:
    """Refuse settings of PEFT that would not survive a checkpoint or an export.

    Raises:
        MsencError: names the key.
    """
    from peft import LoraConfig

    start = lora.get("init_lora_weights", True)
    if start not in LORA_STARTS:
        raise MsencError(
            f"model.llm.lora.init_lora_weights={start}: such adapters change the base weights at the start, or need "
            "data, and neither checkpoints nor exports would keep that. Take one of "
            f"{', '.join(map(str, LORA_STARTS))}."
        )
    defaults = {f.name: f.default for f in fields(LoraConfig)}
    for key, value in lora.items():
        if key not in defaults:
            raise MsencError(f"model.llm.lora.{key}: no such setting. Expected some of {', '.join(LORA_SETTINGS)}.")
        if key not in LORA_SETTINGS and value not in (None, defaults[key]):
            raise MsencError(
                f"model.llm.lora.{key}={value}: not supported, as the result could not be exported or resumed "
                f"exactly. Remove it; supported are {', '.join(LORA_SETTINGS)}."
            )


def _with_lora(llm: nn.Module, lora: Mapping[str, Any]) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    check_lora(lora)
    try:
        adapted = get_peft_model(llm, LoraConfig(task_type="CAUSAL_LM", **lora))
    except (TypeError, ValueError, RuntimeError) as e:  # the last where it would train quantized weights
        raise MsencError(f"model.llm.lora: PEFT refuses {dict(lora)}: {e}") from e
    compute_lora_in_base_type(adapted)
    return adapted


def _with_lora_by_shares(llm: nn.Module, lora: Mapping[str, Any], stored: StoredWeights) -> nn.Module:
    """Adapters with values, of base weights without.

    PEFT puts adapters where the base weights are, and on the meta device they would forget their values. Meanwhile,
    NaNs without memory stand for the base weights, which shows what is computed from them.
    """
    own = {(module, name): p for module in llm.modules() for name, p in module._parameters.items() if p is not None}
    stand_ins = {id(p): nn.Parameter(torch.full((), torch.nan, dtype=p.dtype).expand(p.shape)) for p in own.values()}
    for (module, name), parameter in own.items():
        module._parameters[name] = stand_ins[id(parameter)]
    adapted = _with_lora(llm, lora)
    for (module, name), parameter in own.items():
        module._parameters[name] = parameter.requires_grad_(stand_ins[id(parameter)].requires_grad)
    for module_name, module in adapted.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta and stored.knows(f"{module_name}.{name}"):
                module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
    computed = [name for name, p in adapted.named_parameters() if not p.is_meta and p.isnan().any()]
    if computed:
        raise MsencError(
            f"model.llm.lora: {len(computed)} tensors are computed from base weights ({name_some(computed, 2)}), which "
            "no process holds under trainer=fsdp2. Leave out use_dora and trainable_token_indices."
        )
    return adapted


def with_adapter(llm: nn.Module, folder: Path) -> nn.Module:
    """An LLM with the LoRA adapter that `save_pretrained` left in a folder, frozen.

    Raises:
        MsencError: it is no LoRA, has settings that are none of `LORA_SETTINGS`, or cannot be read.
    """
    from peft import LoraConfig, PeftModel

    stored = read_json(folder / "adapter_config.json")
    kind = stored.get("peft_type") if isinstance(stored, dict) else None
    if kind != "LORA":
        raise MsencError(f"{folder / 'adapter_config.json'}: peft_type is {kind!r}, expected 'LORA'.")
    usual = LoraConfig().to_dict()
    for key in sorted(stored.keys() - set(LORA_SETTINGS) - set(ADAPTER_FACTS)):
        if stored[key] not in (None, False, usual.get(key)):
            raise MsencError(
                f"{folder / 'adapter_config.json'}: {key}={stored[key]!r}: msenc neither writes nor loads such "
                "adapters."
            )
    if not (folder / "adapter_model.safetensors").is_file():
        raise MsencError(f"{folder}: no adapter_model.safetensors. Expected an adapter that PEFT wrote as safetensors.")
    settings = {key: stored[key] for key in LORA_SETTINGS if key in stored}
    check_lora(settings)
    try:
        adapted = PeftModel.from_pretrained(llm, str(folder), config=LoraConfig(task_type="CAUSAL_LM", **settings))
    except Exception as error:  # PEFT, torch and safetensors each raise their own
        raise MsencError(
            f"{folder}: the adapter does not fit this LLM, or is damaged ({reason_of(error)[:300]})."
        ) from error
    compute_lora_in_base_type(adapted)  # as it was trained
    return adapted


class _InputTypeLinear(nn.Linear):
    """(..., in) -> (..., out) in the input's type, whatever type the weight has."""

    def forward(self, x: Tensor) -> Tensor:
        """The weight's gradient comes back in the weight's own type."""
        return linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def compute_lora_in_base_type(llm: nn.Module) -> None:
    """Compute LoRA's two products in the type of the adapted layers, quantized or not, without changing its weights.

    PEFT keeps the adapters of a bfloat16 LLM in float32, which small steps need, and casts the activations to it: with
    all linear layers adapted, these products take as long as the LLM's own. Names, weights and what is saved do not
    change, and nothing changes for a float32 LLM. Adapters other than plain products (DoRA and the like) compute as
    in PEFT.

    Args:
        llm: with adapters of PEFT, changed in place.
    """
    from peft.tuners import lora

    # PEFT has the latter two where bitsandbytes is installed.
    kinds = tuple(getattr(lora, name) for name in ("Linear", "Linear4bit", "Linear8bitLt") if hasattr(lora, name))
    for layer in llm.modules():
        if isinstance(layer, kinds) and not layer.lora_variant:
            layer.cast_input_dtype_enabled = False
            for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
                factor.__class__ = _InputTypeLinear


def token_embeddings(llm: nn.Module) -> Tensor:
    """(V, H) of an LLM, read anew where it starts without weights."""
    weight = llm.get_input_embeddings().weight
    if not weight.is_meta:
        return weight
    return llm.stored.read(next(name for name, p in llm.named_parameters() if p is weight))


def fingerprint(model: nn.Module, stored: StoredWeights | None = None) -> str:
    """A hash of a model's weights: names, shapes, types, and an even sample of every tensor's values.

    It distinguishes base weights (another model, another pre-training of the same model) in milliseconds, wherever
    they were loaded from. It does not protect against tampering.

    Args:
        model: the weights, or their shapes.
        stored: has the values of those on the meta device.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        step = max(tensor.numel() // FINGERPRINT_VALUES, 1)
        values = stored.sample(name, step) if tensor.is_meta else tensor.detach().reshape(-1)[::step]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(values.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
