"""Seconds to write a reply to every turn: one encoded history per dialogue, and the ways without it.

    python benchmarks/generation.py [--quick] [--repetitions N] [--json FILE] [--sizes small,smollm2]

All variants write to the same histories (MELD's lengths, see meld.py) with the same random weights, greedily, in
float32, and as many tokens to each, so that the work is equal. The replies are compared: where two differ, the two best
logits at the first different token must lie within 1e-4 (then it is counted as a tie), else the benchmark stops.

- ``shared``: model.layout=dialogue, each trunk passes the LLM once, replies of several dialogues are decoded together.
- ``padded``: model.layout=sample, each history passes the LLM by itself, left-padded, as many replies at once.
- ``single``: transformers' `generate` on one history after another, without padding.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from measure import interleave, parser, print_table, summarise, time_rows, write_json
from meld import DIMS, meld_dialogues, random_tokens
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from msenc.data.collate import collate, dialogue_rows
from msenc.evaluation.replies import write_replies
from msenc.models.attention import register
from msenc.models.connector import QFormer
from msenc.models.conversation import ConversationModel
from msenc.models.generation import read_decoding
from msenc.types import Batch

BUDGET = 1024
END = 2
TIE = 1e-4


@dataclass(frozen=True)
class Size:
    """A model, and how much it writes.

    Args:
        layers: of the LLM.
        hidden: its width H.
        inner: width of its feed-forward.
        heads: its attention heads.
        key_heads: its key and value heads.
        vocab: its vocabulary V.
        dialogues: to whose turns replies are written.
        new_tokens: of each reply.
        batch_size: replies decoded at once.
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    key_heads: int
    vocab: int
    dialogues: int
    new_tokens: int = 16
    batch_size: int = 32


SIZES = {
    "small": Size(8, 512, 1344, 8, 8, 8192, dialogues=3),
    "smollm2": Size(30, 576, 1536, 9, 3, 49152, dialogues=2),
}
QUERIES = dict.fromkeys(DIMS, 8)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--sizes", default="small,smollm2", help=f"of {', '.join(SIZES)}; default: %(default)s")
    given = arguments.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    results = {}
    for name in given.sizes.split(","):
        size = SIZES[name]
        if given.quick:
            size = replace(size, layers=2, dialogues=2, new_tokens=4)
        results[name] = measure(name, size, given.repetitions)
    first = next(iter(results.values()))
    write_json(given.json, {"ratios": first["ratios"], "sizes": results})


def measure(name: str, size: Size, repetitions: int) -> dict[str, Any]:
    model = make_model(size)
    rng = np.random.default_rng(0)
    samples = [random_tokens(d, rng, size.vocab) for d in meld_dialogues(size.dialogues, "test")]
    histories = [
        collate([tokens], [features], [[row]], QUERIES)
        for tokens, features in samples
        for row in dialogue_rows(tokens, BUDGET, QUERIES, "sample", with_targets=False)
    ]
    lengths = {"max_new_tokens": size.new_tokens, "min_new_tokens": size.new_tokens}
    decoding = read_decoding({**lengths, "batch_size": size.batch_size}, END, 0, seed=1)

    def write(layout: str) -> list[list[int]]:
        tokens = [tokens for tokens, _ in samples]
        written = write_replies(
            model, tokens, lambda i: samples[i][1], decoding, budget=BUDGET, num_queries=QUERIES, layout=layout
        )
        return [w.ids for w in written]

    plain = GenerationConfig(**lengths, eos_token_id=END, pad_token_id=0)
    variants: dict[str, Callable[[], list[list[int]]]] = {
        "shared": lambda: write("dialogue"),
        "padded": lambda: write("sample"),
        "single": lambda: [write_one(model, batch, plain) for batch in histories],
    }
    replies = {variant: run() for variant, run in variants.items()}
    ties = {
        variant: count_ties(model, histories, replies["single"], found)
        for variant, found in replies.items()
        if variant != "single"
    }
    results = summarise(interleave(variants, repetitions, warm_up=False), "shared")
    tokens = sum(batch.input_ids.numel() for batch in histories)
    print_table(
        f"Replies to {len(histories)} histories ({tokens:,} tokens) of {size.dialogues} dialogues, {size.new_tokens} "
        f"new tokens each, {size.batch_size} at once; {name}: {size.layers} layers of {size.hidden}",
        ["variant", "median s", "fastest", "slowest", "x shared"],
        time_rows(results, "shared"),
    )
    distinct = len(set(map(tuple, replies["single"])))
    print(f"{distinct} of {len(histories)} replies are distinct.")
    print(f"Replies that differ from those of single, by a tie of two logits within {TIE}: {ties}")
    return {**results, "histories": len(histories), "history_tokens": tokens, "distinct": distinct, "ties": ties}


@torch.inference_mode()
def write_one(model: ConversationModel, batch: Batch, settings: GenerationConfig) -> list[int]:
    return model.llm.generate(
        inputs_embeds=model.embed(batch), attention_mask=batch.attention_mask.long(), generation_config=settings
    )[0].tolist()


@torch.inference_mode()
def count_ties(
    model: ConversationModel,
    histories: Sequence[Batch],
    expected: Sequence[list[int]],
    found: Sequence[list[int]],
) -> int:
    """Replies that differ from the expected ones where rounding alone decides; any other difference is an error."""
    ties = 0
    for batch, one, other in zip(histories, expected, found, strict=True):
        if one == other:
            continue
        assert len(one) == len(other), f"{len(one)} and {len(other)} tokens"
        same = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
        begun = model.llm.get_input_embeddings()(torch.tensor([one[:same]], dtype=torch.long))
        logits = model.llm(inputs_embeds=torch.cat([model.embed(batch), begun], 1)).logits[0, -1]
        logits[END] = -torch.inf  # which the lengths forbid
        first, second = logits.topk(2).values.tolist()
        assert first - second <= TIE, f"replies differ at token {same}, whose best logits are {first - second} apart"
        ties += 1
    return ties


def make_model(size: Size) -> ConversationModel:
    """A random Llama, and a Q-Former per stream."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads,
        attn_implementation=register(),
    )
    llm = LlamaForCausalLM(config)
    llm.base_name = llm.base_fingerprint = "random"
    small = {"num_layers": 2, "hidden_dim": 256, "num_heads": 4, "encoder_dim": 256}
    connectors = {s: QFormer(dim, size.hidden, num_queries=QUERIES[s], **small) for s, dim in DIMS.items()}
    return ConversationModel(llm, connectors).eval()


if __name__ == "__main__":
    main()
