"""What each family of LLMs does in each layout: a table of losses and gradients against single samples.

    python benchmarks/llms.py [--quick] [--json FILE] [--markdown FILE]

For each family of transformers a tiny LLM with random weights, loaded as a run loads it. With every kernel and in both
layouts it computes a batch of dialogues, whose losses and whole gradient are compared with those of its samples one by
one: the larger of the relative differences, or the refusal. The seconds are those of the check that refuses
(`msenc.models.layout`), on a config of the family's usual size.
"""

import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lora_step import without_media
from measure import console, parser, write_json
from meld import meld_dialogues, random_tokens
from rich.table import Table

from msenc.data.collate import collate, dialogue_rows
from msenc.models.conversation import ConversationModel
from msenc.models.layout import check_layout, choose_attention
from msenc.models.llm import load_llm
from msenc.types import Batch, MsencError

KERNELS = ("auto", "split", "dense", "eager")
LAYOUTS = ("dialogue", "sample")
VOCABULARY = 64
BUDGET = 60
"""Tokens of a history, so that every sample is shorter than `WINDOW`."""
WINDOW = 512
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
}
LATENT_EXPERTS = {
    **LATENT,
    **EXPERTS,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
}
OWN_NAMES = {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 1024, "n_inner": 48}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_expand": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "mixtral": EXPERTS,
    "ministral": {"sliding_window": WINDOW},
    "qwen2": {},
    "qwen2_moe": EXPERTS,
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "qwen3_next": {**EXPERTS, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    "gemma": {},
    "gemma2": {"sliding_window": WINDOW},
    "gemma3_text": {"sliding_window": WINDOW},
    "phi": {},
    "phi3": {},
    "olmo": {},
    "olmo2": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": WINDOW},
    "cohere": {},
    "cohere2": {"sliding_window": WINDOW},
    "granite": {},
    "glm": {},
    "nemotron": {},
    "helium": {},
    "gpt_oss": {**EXPERTS, "sliding_window": WINDOW},
    "deepseek_v2": LATENT_EXPERTS,
    "deepseek_v3": LATENT_EXPERTS,
    "llama4_text": {"attention_chunk_size": WINDOW, "intermediate_size_mlp": 48, **EXPERTS},
    "gpt2": OWN_NAMES,
    "gpt_bigcode": OWN_NAMES,
    "gpt_neo": {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    "gpt_neox": {},
    "gptj": {**OWN_NAMES, "rotary_dim": 4},
    "codegen": {**OWN_NAMES, "rotary_dim": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 4, "attention_heads": 4},
    "biogpt": {},
    "falcon": {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None},
    "bloom": {"n_head": 4, "n_layer": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 1024},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1},
    "jamba": {**EXPERTS, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": WINDOW},
    "rwkv": {"attention_hidden_size": 32},
    "bert": {},
}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there as well")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    families = list(FAMILIES)[:2] if given.quick else list(FAMILIES)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for family in families:
            results[family] = measure(family, Path(folder) / family)
            console.print(family, *(c if isinstance(c, str) else f"{c:.0e}" for c in results[family]["cells"].values()))
    _print(results, given.markdown)
    write_json(given.json, results)


def measure(family: str, folder: Path) -> dict[str, Any]:
    """Layout -> kernel -> the difference, or the refusal; and what the check takes on a config of usual size."""
    import transformers
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = CONFIG_MAPPING[family](**{k: v for k, v in {**SIZES, **FAMILIES[family]}.items() if v is not None})
    llm = AutoModelForCausalLM.from_config(config)
    for _, parameter in sorted(llm.named_parameters()):
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    llm.save_pretrained(folder)
    batches = {layout: _batches(layout) for layout in LAYOUTS}
    cells = {
        f"{layout}, {kernel}": _cell(str(folder), kernel, *batches[layout]) for layout in LAYOUTS for kernel in KERNELS
    }
    return {"cells": cells, "check_s": _seconds(CONFIG_MAPPING[family]())}


def _batches(layout: str) -> tuple[Batch, list[Batch]]:
    rng = np.random.default_rng(0)
    drawn = [without_media(random_tokens(d, rng, VOCABULARY)[0]) for d in meld_dialogues(3)]
    rows = [dialogue_rows(tokens, BUDGET, {}, layout) for tokens in drawn]
    singles = [dialogue_rows(tokens, BUDGET, {}, "sample") for tokens in drawn]
    none: list[dict] = [{} for _ in drawn]
    whole = collate(drawn, none, rows, {}, pack=layout == "dialogue")
    alone = [
        collate([d], [{}], [[row]], {}, pack=False) for d, found in zip(drawn, singles, strict=True) for row in found
    ]
    return whole, alone


def _cell(folder: str, kernel: str, whole: Batch, alone: list[Batch]) -> float | str:
    try:
        model = ConversationModel(load_llm(folder, attn_implementation=kernel), {}).eval()
        found, gradient = _step(model, [whole])
        expected, expected_gradient = _step(model, alone)
    except MsencError as e:
        return str(e).replace(folder, "FOLDER")
    except Exception as e:  # what msenc does not know of, as a user would see it
        return f"CRASH: {type(e).__name__}: {e}"
    loss = max(abs(found[t] - expected[t]) / abs(expected[t]) for t in expected)
    norm = torch.stack([g.double().norm() for g in expected_gradient.values()]).norm()
    off = torch.stack([(gradient[n] - g).double().norm() for n, g in expected_gradient.items()]).norm()
    return max(loss, (off / norm).item())


def _step(model: ConversationModel, batches: list[Batch]) -> tuple[dict[Any, float], Mapping[str, torch.Tensor]]:
    """Loss of each target, and the gradient of their sum."""
    model.zero_grad()
    losses = {}
    for batch in batches:
        scores = model(batch)
        scores.nll.sum().backward()
        losses |= {t: scores.nll[batch.targets == i].sum().item() for i, t in enumerate(batch.target_ids)}
    return losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _seconds(config: Any) -> float | None:
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    try:
        attention = choose_attention(config)
        with torch.device("meta"):
            llm = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        llm.attention_kernel = "dense" if attention == "eager" else "auto"
        check_layout(llm)
    except MsencError:
        pass
    except Exception:  # some defaults are no model of their own
        return None
    return time.perf_counter() - start


def _print(results: Mapping[str, Any], markdown: Path | None) -> None:
    messages: list[str] = []

    def show(cell: float | str) -> str:
        if isinstance(cell, float):
            return f"{cell:.0e}"
        cell = re.sub(r"\w+(ForCausalLM|HeadModel)", "FAMILY", re.sub(r"=(split|dense)| \(\w+\)", "", cell))
        if cell not in messages:
            messages.append(cell)
        return f"[{messages.index(cell) + 1}]"

    head = ["family", *(f"{layout}, {kernel}" for layout in LAYOUTS for kernel in KERNELS), "check, s"]
    rows = [
        [f, *map(show, r["cells"].values()), "" if r["check_s"] is None else f"{r['check_s']:.1f}"]
        for f, r in results.items()
    ]
    table = Table(*head)
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    console.print(table)
    notes = [f"{i + 1}. {message}" for i, message in enumerate(messages)]
    console.print(*notes, sep="\n", markup=False, soft_wrap=True)
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
        markdown.write_text("\n".join([*lines, "", *notes]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
