"""Quantizes an LLM's frozen linear layers to 4 or 8 bits by bitsandbytes, so that LoRA fits on a small GPU.

PreTrainedModel with its weights -> the same model with quantized linear layers; adapters come after it

Of what PEFT's ``prepare_model_for_kbit_training`` does, `load_llm` freezes the base, recomputes activations and lets
gradients through to their inputs. The rest, float32 for all other weights, is ``model.llm.dtype=float32``. It is not
forced on bfloat16: embeddings and output layer would take twice the memory, and norms whose output is bfloat16 give
the same bits (a product of two bfloat16 numbers is exact in float32, so it is rounded once either way).
"""

import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from msenc.types import MsencError, needing

Quantization = Literal["4bit", "8bit"]

UNFIT = (
    ("init_lora_weights", "orthogonal", ("4bit", "8bit")),
    ("use_dora", True, ("8bit",)),
    *(("bias", which, ("4bit", "8bit")) for which in ("all", "lora_only")),
)
"""Settings of LoRA, and the quantizations with which PEFT cannot compute them, or bitsandbytes would round them."""


def check_quantization(quantization: str | None, freeze: bool, lora: Mapping[str, Any] | None) -> None:
    """Refuse what cannot be quantized; nothing is loaded.

    Args:
        quantization: 4bit, 8bit, or None for none.
        freeze: as of `load_llm`.
        lora: likewise.

    Raises:
        MsencError: no such quantization, quantized weights would have to be trained, PEFT lacks what is asked for, or
            bitsandbytes is missing.
    """
    if quantization is None:
        return
    place = f"model.llm.quantization={quantization}"
    if quantization not in ("4bit", "8bit"):
        raise MsencError(f"{place}: expected 4bit, 8bit, or null for none.")
    if lora is None and not freeze:
        raise MsencError(
            f"{place}: the LLM would be trained in full, and quantized weights cannot be trained. Train an adapter "
            "(model.llm.lora={r: 16, lora_alpha: 32}), or only connectors (model.llm.freeze=true)."
        )
    for key, value, unfit in () if freeze else UNFIT:
        if lora.get(key) == value and quantization in unfit:
            raise MsencError(f"{place}: model.llm.lora.{key}={value} does not work with such weights. Leave it out.")
    with needing(place, "quantize"):
        import bitsandbytes  # noqa: F401


def quantize(llm: Any, quantization: Quantization) -> None:
    """Replace the linear layers of an LLM by quantized ones; the output layer and embeddings stay as they are.

    Weights are quantized on the CPU, or on the meta device, so that all devices get the same. In 4 bits: NF4, with
    quantized scales. In 8: LLM.int8(), whose activations are quantized too: rows of a batch may change each other's
    last digits. The layers compute in the type of their input, under autocast in its type, as unquantized ones do.

    Args:
        llm: a model of transformers, without adapters; changed in place.
        quantization: the number of bits.

    Sources: Dettmers et al., QLoRA (arXiv 2305.14314); LLM.int8() (arXiv 2208.07339).
    """
    from bitsandbytes.functional import quantize_4bit
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    # It says so of each product of 8 bits whose input is not float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    settings = (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        if quantization == "4bit"
        else {"load_in_8bit": True}
    )
    # A table that it makes on the device of the first call serves all that follow.
    quantize_4bit(torch.zeros(64), compress_statistics=True)
    weights = dict(llm.named_parameters(remove_duplicate=False))
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(**settings), pre_quantized=False)
    quantizer.preprocess_model(llm, device_map={"": "cpu"})  # puts empty layers in the place of linear ones
    for name, module in llm.named_modules():
        if not _is_quantized(module):
            continue
        weight = weights.pop(f"{name}.weight").detach()  # and so freed, one by one
        if module.source_cls is not nn.Linear:  # a Conv1D of GPT-2 holds it transposed
            weight = weight.T
        module.weight = type(module.weight)(weight, requires_grad=False, **module.weight.__dict__)
        module.weight._quantize(weight.device)
        if module.bias is not None:
            module.bias = weights[f"{name}.bias"]
        # A CPU's packed weights are no longer those that were trained, and have no gradient: never pack them.
        module.support_avx512bf16_for_cpu = False
        module.compute_dtype, module.compute_type_is_set = None, True  # the input's
        module.register_forward_pre_hook(_cast)
    quantizer.postprocess_model(llm)


def described(quantization: str | None) -> str:
    """What to call an LLM's weights.

    Example:
        >>> described("4bit"), described(None)
        ('4-bit', 'unquantized')
    """
    return "unquantized" if quantization is None else quantization.replace("bit", "-bit")


def is_state(value: Any) -> bool:
    """Whether this is what bitsandbytes keeps of a weight's scales, as attributes."""
    return type(value).__name__ == "QuantState"


def tensors_of(weight: Any) -> list[Tensor]:
    """What is stored beside a quantized weight, as attributes of it and of theirs; nothing for other weights."""
    found = []
    for value in vars(weight).values():
        found += [value] if isinstance(value, Tensor) else tensors_of(value) if is_state(value) else []
    return found


def _is_quantized(module: nn.Module) -> bool:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return isinstance(module, Linear4bit | Linear8bitLt)


def _cast(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """What autocast does to a linear layer's input, but not to that of a quantized one."""
    kind = inputs[0].device.type
    return (inputs[0].to(torch.get_autocast_dtype(kind)),) if torch.is_autocast_enabled(kind) else inputs
