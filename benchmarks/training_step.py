"""Seconds of a training step, forward and backward: the dialogue layout, its rivals, and the floor.

    python benchmarks/training_step.py [--quick] [--repetitions N] [--json FILE] [--sizes small,medium]
    python benchmarks/training_step.py --device cuda --dtype bfloat16 --sizes 1b

All variants train the same targets of the same dialogues (MELD's lengths, see meld.py), with the same weights; that
their losses are equal is checked. LoRA (r 8) on a random Llama, a Q-Former per stream.

- ``dialogue``: model.layout=dialogue, all dialogues packed on one line.
- ``packed``: one row per target, all on one line, each attending to itself alone: the strongest rival.
- ``padded``: model.layout=sample, one row per target, padded to the longest.
- ``upstream``: as the system that msenc rebuilds does it: the connector once per utterance in a loop, for every target
  again; four targets per forward; logits of all tokens. Its history is not cut here, so that the losses agree.
- ``floor``: connector and LLM on as many real tokens and frames as ``dialogue``, without padding, every dialogue one
  causal sequence, logits for as many tokens. It trains nothing sensible.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from measure import interleave, parser, print_table, summarise, time_rows, write_json
from meld import DIMS, meld_dialogues, random_tokens
from torch.nn.functional import cross_entropy

from msenc.data.collate import collate, dialogue_rows
from msenc.models.attention import KERNELS, register
from msenc.models.connector import QFormer
from msenc.models.conversation import ConversationModel
from msenc.types import Batch, Segment

NO_BUDGET = 10**9
UPSTREAM_BATCH = 4


@dataclass(frozen=True)
class Size:
    """A model and the number of dialogues of a step.

    Args:
        layers: of the LLM.
        hidden: its width H.
        heads: its attention heads.
        vocab: its vocabulary V.
        qformer_layers: of each connector, with cross-attention in every second one.
        qformer_hidden: their width.
        queries: Q per utterance and stream.
        dialogues: per step.
    """

    layers: int
    hidden: int
    heads: int
    vocab: int
    qformer_layers: int
    qformer_hidden: int
    queries: int
    dialogues: int


SIZES = {
    "small": Size(8, 512, 8, 8192, 2, 256, 8, 3),
    "medium": Size(12, 768, 12, 16384, 2, 384, 8, 2),
    "1b": Size(16, 2048, 32, 32768, 12, 768, 32, 16),
}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--sizes", default="small,medium", help=f"of {', '.join(SIZES)}; default: %(default)s")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="by autocast")
    arguments.add_argument("--kernel", default="auto", choices=KERNELS, help="of the attention; default: %(default)s")
    given = arguments.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    results = {}
    for name in given.sizes.split(","):
        size = SIZES[name]
        if given.quick:
            size = replace(size, layers=2, qformer_layers=1, dialogues=2)
        results[name] = measure(name, size, given)
    first = next(iter(results.values()))
    write_json(given.json, {"ratios": first["ratios"], "sizes": results}, given.device)


def measure(name: str, size: Size, given: Any) -> dict[str, Any]:
    device = torch.device(given.device)
    model = make_model(size, given.kernel).to(device).train()
    rng = np.random.default_rng(0)
    drawn = [random_tokens(d, rng, size.vocab) for d in meld_dialogues(size.dialogues)]
    queries = dict.fromkeys(DIMS, size.queries)

    def batch_of(layout: str, pack: bool, chosen: list = drawn, turns: list[int] | None = None) -> Batch:
        rows = [dialogue_rows(tokens, NO_BUDGET, queries, layout, turns) for tokens, _ in chosen]
        batch = collate([t for t, _ in chosen], [f for _, f in chosen], rows, queries, pack)
        return to_device(batch, device)

    dialogue = batch_of("dialogue", pack=True)
    samples = [batch_of("sample", False, [d], [turn]) for d in drawn for turn in range(1, len(d[0].turns))]
    floor = floor_batch(dialogue)
    cast = torch.autocast(device.type, torch.bfloat16, enabled=given.dtype == "bfloat16")

    def step(run: Callable[[], torch.Tensor]) -> Callable[[], float]:
        def call() -> float:
            model.zero_grad(set_to_none=True)
            with cast:
                loss = run()
            return loss.item()  # on a GPU it waits for the backward pass as well

        return call

    def train(batch: Batch) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            loss = model(batch).nll.sum()
            loss.backward()
            return loss.detach()

        return run

    variants = {
        "dialogue": step(train(dialogue)),
        "packed": step(train(batch_of("sample", pack=True))),
        "padded": step(train(batch_of("sample", pack=False))),
        "upstream": step(lambda: upstream_step(model, samples)),
        "floor": step(train(floor)),
    }
    losses = {variant: run() for variant, run in variants.items()}
    for variant, loss in losses.items():
        if variant != "floor":
            bound = 1e-4 if given.dtype == "float32" else 2e-2
            assert abs(loss / losses["dialogue"] - 1) < bound, f"{variant}: loss {loss}, dialogue {losses['dialogue']}"
    seconds = interleave(variants, given.repetitions, warm_up=False)
    results = summarise(seconds, "dialogue")
    counts = {
        "targets": len(dialogue.target_ids),
        "tokens": dialogue.input_ids.numel(),
        "tokens of single samples": sum(s.input_ids.numel() for s in samples),
        "frames": sum(int(n.sum()) for s in dialogue.streams.values() for n in s.lengths),
    }
    flops = matmul_flops(model, size, dialogue)
    peak = matmul_peak(device, given.dtype)
    share = flops / results["seconds"]["dialogue"]["median"] / peak
    floor_share = flops / results["seconds"]["floor"]["median"] / peak
    facts = ", ".join(f"{value:,} {what}" for what, value in counts.items())
    print_table(
        f"A training step, {name}: {size.layers} layers of {size.hidden}, {given.dtype}; {facts}",
        ["variant", "median s", "fastest", "slowest", "x dialogue"],
        time_rows(results, "dialogue"),
        given.device,
    )
    print(
        f"Matrix products: {flops / 1e9:,.0f} GFLOP a step; {peak / 1e9:,.0f} GFLOP/s measured alone; share of it: "
        f"dialogue {share:.2f}, floor {floor_share:.2f}"
    )
    return {**results, "counts": counts, "losses": losses, "peak_share": share, "floor_peak_share": floor_share}


def make_model(size: Size, kernel: str = "auto") -> ConversationModel:
    """A random Llama with LoRA as the paper's, but without dropout, and a Q-Former per stream."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=round(size.hidden * 8 / 3 / 64) * 64,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        attn_implementation=register(),
    )
    llm = get_peft_model(LlamaForCausalLM(config), LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32))
    llm.base_name, llm.base_fingerprint, llm.attention_kernel = "random", "random", kernel
    connectors = {
        stream: QFormer(
            dim,
            size.hidden,
            num_queries=size.queries,
            num_layers=size.qformer_layers,
            hidden_dim=size.qformer_hidden,
            num_heads=size.qformer_hidden // 64,
            encoder_dim=size.qformer_hidden,
            dropout=0.0,
        )
        for stream, dim in DIMS.items()
    }
    return ConversationModel(llm, connectors)


def to_device(batch: Batch, device: torch.device) -> Batch:
    from lightning.fabric.utilities import move_data_to_device

    return move_data_to_device(batch, device)


def upstream_step(model: ConversationModel, samples: list[Batch]) -> torch.Tensor:
    """Targets in fours: every utterance of each history through its connector alone, prompts padded to the longest."""
    total = torch.zeros(())
    table = model.llm.get_input_embeddings()
    for at in range(0, len(samples), UPSTREAM_BATCH):
        embeds, labels = [], []
        for sample in samples[at : at + UPSTREAM_BATCH]:
            row = table(sample.input_ids)[0]  # (L, H)
            for name, stream in sample.streams.items():
                outputs = []
                for features, lengths in zip(stream.features, stream.lengths, strict=True):
                    for frames, length in zip(features, lengths.tolist(), strict=True):
                        real = torch.ones(1, length, dtype=torch.bool, device=frames.device)
                        outputs.append(model.connectors[name](frames[None, :length].float(), real)[0])  # (Q, H)
                row = row.index_put((stream.places,), torch.cat(outputs)[stream.sources].to(row.dtype))
            label = torch.full((len(row),), -100, device=row.device)
            label[sample.predictors + 1] = sample.labels
            embeds.append(row)
            labels.append(label)
        padded = torch.nn.utils.rnn.pad_sequence(embeds, batch_first=True)  # (4, L, H)
        wanted = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones(len(e), dtype=torch.long, device=e.device) for e in embeds], batch_first=True
        )
        logits = model.llm(inputs_embeds=padded, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        loss = cross_entropy(logits.flatten(0, 1), wanted[:, 1:].flatten(), reduction="sum")
        loss.backward()
        total += loss.detach().cpu()
    return total


def floor_batch(batch: Batch) -> Batch:
    """The same number of tokens, frames and targets, without anything that the layout costs."""
    streams = {}
    for name, stream in batch.streams.items():
        groups = zip(stream.features, stream.lengths, strict=True)
        real = torch.cat([f[:n] for group in groups for f, n in zip(*group, strict=True)])  # (sum of T, D)
        number = sum(map(len, stream.lengths))
        length = len(real) // number
        features = real[: number * length].reshape(number, length, -1)
        lengths = torch.full((number,), length, device=real.device)
        streams[name] = replace(stream, features=[features], lengths=[lengths])
    segments = [Segment(s.start, s.stop - s.start) for s in batch.segments]
    return replace(batch, segments=segments, streams=streams)


def matmul_flops(model: ConversationModel, size: Size, batch: Batch) -> float:
    """Multiplications and additions of a step in the linear maps of LLM and connectors; attention is left out.

    A trained map costs three products (forward, gradients of input and weight), a frozen one two.
    """
    tokens = batch.input_ids.numel()
    total = 0.0
    for name, module in model.llm.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, torch.nn.Linear) and weight is not None:
            rows = len(batch.labels) if "lm_head" in name else tokens
            total += (3 if weight.requires_grad else 2) * 2 * rows * weight.numel()
    for stream, connector in model.connectors.items():
        found = batch.streams[stream]
        frames, utterances = (sum(int(f(n)) for n in found.lengths) for f in (torch.sum, len))
        for name, module in connector.named_modules():
            if isinstance(module, torch.nn.Linear):
                of_frames = name == "in_proj" or ("crossattention" in name and name.endswith(("key", "value")))
                total += 3 * 2 * (frames if of_frames else utterances * size.queries) * module.weight.numel()
    return total


def matmul_peak(device: torch.device, dtype: str, size: int = 2048) -> float:
    """FLOP/s of a square matrix product, the best of ten."""
    import time

    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


if __name__ == "__main__":
    main()
