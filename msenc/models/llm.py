"""Load the LLM: any causal LM of transformers by id or folder, frozen, with LoRA, or trained whole.

name or folder -> PreTrainedModel or PeftModel; its tokenizer
"""

import hashlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from msenc.models.attention import KERNELS, NAME, register
from msenc.models.layout import choose_attention
from msenc.models.pretrained import load_pretrained, to_dtype
from msenc.types import MsencError

FINGERPRINT_VALUES = 256
"""Values of each tensor that enter a fingerprint, evenly spread."""


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
    dtype: str = "float32",
    attn_implementation: str = "auto",
    gradient_checkpointing: bool = False,
    round_to: str | None = None,
    empty: bool = False,
) -> nn.Module:
    """The LLM, with what trains in it decided.

    Args:
        name_or_path: hub id, or folder written by ``save_pretrained``.
        freeze: no parameter of the LLM trains, LoRA included (no adapter is added).
        lora: arguments of PEFT's ``LoraConfig`` (r, lora_alpha, ...); None with ``freeze=False`` trains the whole LLM.
        dtype: of the base weights; LoRA's stay float32, and compute in this type (`compute_lora_in_base_type`).
        attn_implementation: kernel of `attention.KERNELS` for packed rows (plain SDPA elsewhere), or ``eager``: the
            LLM's own attention, which ``auto`` takes where the others would not compute the same.
        gradient_checkpointing: trade time for memory: activations are computed again in the backward pass.
        round_to: narrower type whose values the base weights take, to compute in `dtype` what a model of that type was
            trained to be; None leaves them as they are.
        empty: shapes alone: the config is read and no weight; all tensors are on the meta device.

    Returns:
        A causal LM with the attributes ``base_name``, ``base_fingerprint`` (see `fingerprint`), ``attention_kernel``.

    Raises:
        MsencError: it cannot be loaded, it is no causal LM, or PEFT refuses the LoRA arguments.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    if attn_implementation not in (*KERNELS, "eager"):
        raise MsencError(
            f"model.llm.attn_implementation={attn_implementation}: expected one of {', '.join(KERNELS)}, eager."
        )
    register()
    config = load_pretrained(AutoConfig, name_or_path)
    fitting = choose_attention(config)
    if attn_implementation == "auto" and fitting == "eager":
        attn_implementation = "eager"
    is_eager = attn_implementation == "eager"
    if fitting == "eager" and not is_eager:
        raise MsencError(
            f"model.llm.attn_implementation={attn_implementation}: {name_or_path} ({config.model_type}) has an "
            "attention of its own, which only eager computes. Use eager, or auto."
        )
    options = {"dtype": to_dtype(dtype), "attn_implementation": "eager" if is_eager else NAME}
    if empty:
        with torch.device("meta"):
            llm = AutoModelForCausalLM.from_config(config, **options)
    else:
        llm = load_pretrained(AutoModelForCausalLM, name_or_path, **options)
    # What a checkpoint recommends (temperature, repetition penalty) would silently complete `decoding`.
    # Which tokens end a reply is no such setting.
    llm.generation_config = GenerationConfig(eos_token_id=llm.generation_config.eos_token_id)
    if round_to is not None:
        with torch.no_grad():
            for parameter in llm.parameters():
                parameter.copy_(parameter.to(to_dtype(round_to)))
    base = None if empty else fingerprint(llm)
    if gradient_checkpointing:
        # transformers 5.23 renamed it; by default, both recompute without re-entering autograd.
        enable = getattr(llm, "activation_checkpointing_enable", None) or llm.gradient_checkpointing_enable
        enable()
        llm.enable_input_require_grads()
    llm.requires_grad_(not freeze and lora is None)
    if not freeze and lora is not None:
        llm = _with_lora(llm, lora)
    llm.base_name, llm.base_fingerprint = name_or_path, base
    llm.attention_kernel = "dense" if is_eager else attn_implementation
    return llm


LORA_KEYS = (
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "init_lora_weights"),
    *("target_modules", "exclude_modules", "target_parameters", "modules_to_save", "trainable_token_indices"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
    "ensure_weight_tying",
)
"""What of PEFT's LoraConfig is taken: what is trained with it is exported, resumed and loaded as it was."""

LORA_STARTS = (True, False, "gaussian", "orthogonal")
"""Ways to initialise adapters that leave the base weights as they are, and need neither data nor gradients."""


def check_lora(lora: Mapping[str, Any]) -> None:
    """Refuse what PEFT would take, and what would not come back from a checkpoint or an export.

    Raises:
        MsencError: it names the key.
    """
    from peft import LoraConfig

    defaults = {f.name: f.default for f in fields(LoraConfig)}
    for key, value in lora.items():
        if key in defaults and key not in LORA_KEYS and value not in (None, {}, defaults[key]):
            raise MsencError(
                f"model.llm.lora.{key}={value}: not taken, as what is trained with it would not be exported or resumed "
                f"as it was. Leave it out; taken are {', '.join(LORA_KEYS)}."
            )
    start = lora.get("init_lora_weights", True)
    if start not in LORA_STARTS:
        raise MsencError(
            f"model.llm.lora.init_lora_weights={start}: such adapters begin with a change of the base weights, or with "
            f"data, which neither checkpoint nor export would keep. Take one of {', '.join(map(str, LORA_STARTS))}."
        )


def _with_lora(llm: nn.Module, lora: Mapping[str, Any]) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    check_lora(lora)
    try:
        adapted = get_peft_model(llm, LoraConfig(task_type="CAUSAL_LM", **lora))
    except (TypeError, ValueError) as e:
        raise MsencError(f"model.llm.lora: PEFT refuses {dict(lora)}: {e}") from e
    compute_lora_in_base_type(adapted)
    return adapted


class _InputTypeLinear(nn.Linear):
    """(..., in) -> (..., out) in the input's type, whatever type the weight has."""

    def forward(self, x: Tensor) -> Tensor:
        """The weight's gradient comes back in the weight's own type."""
        return linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def compute_lora_in_base_type(llm: nn.Module) -> None:
    """Let LoRA's two products run in the type of the layers that they adapt, while its weights stay as they are.

    PEFT keeps the adapters of a bfloat16 LLM in float32, which small steps need, and casts the activations to it: with
    all linear layers adapted, these products take as long as the LLM's own. Names, weights and what is saved do not
    change, and nothing changes for a float32 LLM. Adapters that are no plain product (DoRA and the like) compute as
    PEFT does it.

    Args:
        llm: with adapters of PEFT, changed in place.
    """
    from peft.tuners.lora import Linear

    for layer in llm.modules():
        if isinstance(layer, Linear) and not layer.lora_variant:
            layer.cast_input_dtype_enabled = False
            for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
                factor.__class__ = _InputTypeLinear


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's weights: names, shapes, types, and an even sample of every tensor's values.

    It tells base weights apart (another model, another pre-training of the same model) in milliseconds, wherever
    they were loaded from. It is no protection against tampering.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        step = max(flat.numel() // FINGERPRINT_VALUES, 1)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
