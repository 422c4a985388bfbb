"""CPU seconds of a training step of a small bfloat16 LLM with LoRA, computed in the LLM's type and in float32.

    python benchmarks/lora_step.py [--quick] [--repetitions N] [--json FILE] [--targets all-linear|q_proj,v_proj]

A random Llama of SmolLM2-135M's shape, dialogues of MELD's lengths without media, forward and backward, on one
thread, with the same weights and targets.

- ``base type``: as msenc does it, float32 weights that are cast for each product.
- ``float32``: PEFT's own way, which casts the activations instead.
- ``frozen``: no adapters, forward and backward to the embeddings: the floor.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from measure import interleave, parser, print_table, summarise, time_rows, write_json
from meld import meld_dialogues, random_tokens
from torch import nn

from msenc.data.collate import collate, dialogue_rows
from msenc.models.attention import register
from msenc.models.conversation import ConversationModel
from msenc.models.llm import compute_lora_in_base_type
from msenc.prompt import Slot, TokenizedDialogue
from msenc.types import Batch

NO_BUDGET = 10**9
VOCABULARY = 49152


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--targets", default="all-linear", help="target_modules of LoRA; default: %(default)s")
    arguments.add_argument("--dropout", type=float, default=0.0, help="lora_dropout; default: %(default)s")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    targets = given.targets if given.targets == "all-linear" else given.targets.split(",")
    lora: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": given.dropout, "target_modules": targets}
    num_layers = 2 if given.quick else 30
    rng = np.random.default_rng(0)
    drawn = [without_media(random_tokens(d, rng, VOCABULARY)[0]) for d in meld_dialogues(2)]
    rows = [dialogue_rows(tokens, NO_BUDGET, {}) for tokens in drawn]
    batch = collate(drawn, [{} for _ in drawn], rows, {}, pack=True)
    models = {
        "base type": make_model(num_layers, lora, in_base_type=True),
        "float32": make_model(num_layers, lora, in_base_type=False),
        "frozen": make_model(num_layers, None),
    }
    losses = {name: step(model, batch)() for name, model in models.items()}
    for loss in losses.values():
        assert abs(loss / losses["float32"] - 1) < 1e-2, losses
    steps = {name: step(model, batch) for name, model in models.items()}
    seconds = interleave(steps, given.repetitions, clock=time.process_time)
    results = summarise(seconds, "base type")
    print_table(
        f"A training step: {num_layers} layers of 576, bfloat16, LoRA r 16 on {given.targets}; "
        f"{batch.input_ids.numel():,} tokens, {len(batch.labels):,} of them predicted",
        ["variant", "median CPU s", "fastest", "slowest", "x base type"],
        time_rows(results, "base type"),
    )
    write_json(given.json, {**results, "tokens": batch.input_ids.numel(), "losses": losses})


def without_media(tokens: TokenizedDialogue) -> TokenizedDialogue:
    return replace(tokens, turns=tuple(tuple(p for p in turn if not isinstance(p, Slot)) for turn in tokens.turns))


def make_model(num_layers: int, lora: dict[str, Any] | None, in_base_type: bool = True) -> ConversationModel:
    """A random Llama of SmolLM2-135M's shape in bfloat16; with LoRA whose second factor is not zero, or frozen."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=num_layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        attn_implementation=register(),
    )
    llm: nn.Module = LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
    if lora is None:
        llm.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_())
    else:
        llm = get_peft_model(llm, LoraConfig(task_type="CAUSAL_LM", **lora))
        for name, parameter in llm.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=1e-3)
        if in_base_type:
            compute_lora_in_base_type(llm)
    llm.base_name, llm.base_fingerprint, llm.attention_kernel = "random", "random", "split"
    return ConversationModel(llm, {}).train()


def step(model: ConversationModel, batch: Batch) -> Callable[[], float]:
    def call() -> float:
        model.zero_grad(set_to_none=True)
        loss = model(batch).nll.sum()
        loss.backward()
        return loss.item()

    return call


if __name__ == "__main__":
    main()
