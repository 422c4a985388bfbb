import dataclasses

import numpy as np
import pytest
import torch
from random_dialogues import DIMS, NUM_QUERIES, draw_dialogue
from transformers import GenerationConfig

from msenc.data.collate import collate, dialogue_rows
from msenc.models.connector import Mlp, QFormer, tie
from msenc.models.conversation import ConversationModel
from msenc.models.llm import load_llm
from msenc.types import MsencError

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def build(folder, streams=("audio", "video"), freeze=False, lora=LORA, seed=0, connector="qformer", **options):
    """A model whose every part matters: random values far from zero, LoRA's included."""
    llm = load_llm(str(folder), freeze, lora, **options)
    width = llm.get_input_embeddings().embedding_dim
    torch.manual_seed(seed)
    connectors = {}
    for name in streams:
        q = NUM_QUERIES[name]
        if connector == "mlp":
            connectors[name] = Mlp(DIMS[name], width, num_queries=q, hidden_dim=8)
        else:
            small = {"num_layers": 1, "hidden_dim": 8, "num_heads": 2, "encoder_dim": 8, "dropout": 0.0}
            connectors[name] = QFormer(DIMS[name], width, num_queries=q, **small)
    for name, parameter in sorted(llm.named_parameters()):
        if parameter.dim() > 1:  # norms stay 1
            torch.nn.init.normal_(parameter, std=1.0 if "embed" in name else 0.3)
    return ConversationModel(llm, connectors)


def draw(seed, num, budget=10**6, layout="dialogue", vocab=50, padding_side="right", **options):
    """The batch of all rows, and a batch of each row alone."""
    rng = np.random.default_rng(seed)
    drawn = [draw_dialogue(rng, int(rng.integers(3, 7)), f"d{i}", vocab=vocab, **options) for i in range(num)]
    with_targets = padding_side == "right"
    rows = [dialogue_rows(d, budget, NUM_QUERIES, layout, with_targets=with_targets) for d, _ in drawn]
    batch = collate([d for d, _ in drawn], [f for _, f in drawn], rows, NUM_QUERIES, padding_side)
    alone = [
        collate([d], [f], [[row]], NUM_QUERIES, padding_side)
        for (d, f), found in zip(drawn, rows, strict=True)
        for row in found
    ]
    return batch, alone


def losses(model, batches):
    """Sum of the losses per target, and the whole gradient of their sum."""
    model.zero_grad()
    by_target = {}
    for batch in batches:
        scores = model(batch)
        scores.nll.sum().backward()
        for target, name in enumerate(batch.target_ids):
            by_target[name] = scores.nll[scores.targets == target].sum().item()
    gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return by_target, gradient


def distance(one, other):
    """Norm of the difference of two whole gradients, relative to the first."""
    assert one.keys() == other.keys()
    square = sum((one[n] - other[n]).double().square().sum() for n in one)
    return (square / sum(g.double().square().sum() for g in one.values())).sqrt().item()


def apart(one, other):
    """Largest relative difference of two targets' losses."""
    assert one.keys() == other.keys()
    return max(abs(one[n] - other[n]) / abs(one[n]) for n in one)


# ------------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize("family", FAMILIES)
def test_one_row_per_dialogue_equals_one_sample_at_a_time(tiny_models, family):
    model = build(tiny_models[family])
    num_rows = 0
    for seed, budget in enumerate((10**6, 15)):
        whole, _ = draw(seed, 2, budget)
        _, samples = draw(seed, 2, budget, layout="sample")
        assert len(whole.input_ids) < len(samples)
        num_rows += len(whole.input_ids)
        (nll, gradient), (nll_alone, gradient_alone) = losses(model, [whole]), losses(model, samples)
        assert apart(nll_alone, nll) < 1e-4
        assert distance(gradient_alone, gradient) < 1e-4
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert {n for n, g in gradient.items() if g.any()} > {n for n in trained if "lora_" in n}
    assert num_rows > 4  # the second budget cuts histories, so a dialogue takes several rows


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_a_broken_layout_is_seen(tiny_models, family):
    model = build(tiny_models[family])
    whole, _ = draw(0, 2)
    (nll, gradient) = losses(model, [whole])
    in_branch = whole.branch >= 0
    broken = {
        "positions": {"position_ids": whole.position_ids + in_branch},
        "one more token of the trunk": {"cut": torch.where(in_branch & (whole.branch == 0), whole.cut + 1, whole.cut)},
        "branches see each other": {"branch": torch.where(whole.branch == 1, 0, whole.branch)},
    }
    for what, change in broken.items():
        nll_broken, gradient_broken = losses(model, [dataclasses.replace(whole, **change)])
        assert apart(nll, nll_broken) > 1e-3, what
        assert distance(gradient, gradient_broken) > 1e-3, what


@pytest.mark.parametrize("connector", ["qformer", "mlp"])
def test_padding_changes_nothing(tiny_models, connector):
    model = build(tiny_models["llama"], connector=connector)
    batch, alone = draw(2, 4)
    assert len({b.input_ids.shape[1] for b in alone}) > 1
    (nll, gradient), (nll_alone, gradient_alone) = losses(model, [batch]), losses(model, alone)
    assert apart(nll_alone, nll) < 1e-5
    assert distance(gradient_alone, gradient) < 1e-5


def test_padded_tokens_and_frames_are_never_read(tiny_models):
    model = build(tiny_models["llama"])
    batch, _ = draw(2, 4)
    nll, _ = losses(model, [batch])
    streams = {}
    for name, stream in batch.streams.items():
        features = stream.features.clone()
        for n, length in enumerate(stream.lengths):
            features[n, length:] = float("nan")
        assert features.isnan().any()
        streams[name] = dataclasses.replace(stream, features=features)
    is_padding = batch.branch == -2
    assert is_padding.any()
    ids = torch.where(is_padding, 7, batch.input_ids)
    nll_junk, _ = losses(model, [dataclasses.replace(batch, input_ids=ids, streams=streams)])
    assert nll_junk == nll


def test_eager_attention_equals_sdpa(tiny_models):
    batch, _ = draw(3, 3, budget=15)
    found = []
    for attention in ("sdpa", "eager"):
        model = build(tiny_models["llama"], attn_implementation=attention)
        assert model.llm.config._attn_implementation == attention
        found.append(losses(model, [batch]))
    assert apart(found[0][0], found[1][0]) < 1e-4
    assert distance(found[0][1], found[1][1]) < 1e-4


def test_a_row_beyond_a_sliding_window_is_refused(tiny_models):
    model = build(tiny_models["mistral"])
    batch, _ = draw(0, 1)
    model.llm.config.sliding_window = batch.input_ids.shape[1]
    model(batch)
    model.llm.config.sliding_window -= 1
    with pytest.raises(MsencError, match=r"sliding window of \d+ tokens, .*rows of \d+: .*data\.max_history_tokens"):
        model(batch)


# ------------------------------------------------------------------------------------------------ streams


def test_each_utterance_passes_its_connector_once(tiny_models):
    model = build(tiny_models["llama"])
    seen = []
    for name, connector in model.connectors.items():
        connector.register_forward_pre_hook(lambda _, args, name=name: seen.append((name, *args[0].shape)))
    batch, _ = draw(4, 3, budget=15, present=1.0)
    model(batch)
    num_read = sum(max(t for d, t in batch.target_ids if d == f"d{i}") for i in range(3))
    # the last turn is only a target
    assert sorted((name, n) for name, n, _, _ in seen) == [("audio", num_read), ("video", num_read)]


def test_a_stream_that_is_absent_has_no_effect(tiny_models):
    both = build(tiny_models["llama"])
    rng = np.random.default_rng(5)
    dialogue, features = draw_dialogue(rng, 5, streams=("audio",), present=0.5)
    rows = [dialogue_rows(dialogue, 10**6, NUM_QUERIES)]
    batch = collate([dialogue], [features], rows, NUM_QUERIES)
    nll, gradient = losses(both, [batch])
    assert set(batch.streams) == {"audio"}
    # Its connector gets a gradient of zero, not none: DDP waits for every parameter.
    of_video = [g for name, g in gradient.items() if "connectors.video" in name]
    assert of_video
    assert not any(g.any() for g in of_video)

    # Frames of utterances without a slot are never looked at.
    junk = {"audio": [np.full((3, 5), 9, np.float16) if f is None else f for f in features["audio"]], "video": None}
    assert any(f is None for f in features["audio"][:-1])
    assert losses(both, [collate([dialogue], [junk], rows, NUM_QUERIES)])[0] == nll

    # A model that never had the stream says the same.
    audio = ConversationModel(both.llm, {"audio": both.connectors["audio"]})
    assert losses(audio, [batch])[0] == nll


def test_a_stream_that_is_present_has_an_effect(tiny_models):
    model = build(tiny_models["llama"])
    batch, _ = draw(6, 1, present=1.0)
    nll, _ = losses(model, [batch])
    for name, stream in batch.streams.items():
        other = dataclasses.replace(stream, features=stream.features.flip(0))
        assert apart(nll, losses(model, [dataclasses.replace(batch, streams={**batch.streams, name: other})])[0]) > 1e-3


# ------------------------------------------------------------------------------------------------ generation


@pytest.mark.parametrize("family", FAMILIES)
def test_replies_written_together_equal_replies_written_alone(tiny_models, family):
    model = build(tiny_models[family]).eval()
    batch, alone = draw(7, 3, layout="sample", padding_side="left")
    settings = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=5, pad_token_id=0)
    together = model.generate(batch, settings)
    assert together == [model.generate(one, settings)[0] for one in alone]
    assert len({b.input_ids.shape[1] for b in alone}) > 1
    assert len({tuple(reply) for reply in together}) > 1
    assert all(5 not in reply for reply in together)

    # and greedy decoding follows the scores of a forward: the reply is the likeliest token each time
    row, reply = alone[0], together[0]
    assert len(reply) > 2
    embeds = torch.cat([model.embed(row), model.llm.get_input_embeddings()(torch.tensor([reply]))], 1)
    with torch.inference_mode():
        logits = model.llm(inputs_embeds=embeds).logits[0, -len(reply) - 1 : -1]
    assert logits.argmax(-1).tolist() == reply


def test_generation_stops_at_the_end_token(tiny_models):
    model = build(tiny_models["llama"]).eval()
    batch, _ = draw(7, 3, layout="sample", padding_side="left")
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    free = model.generate(batch, GenerationConfig(**settings, eos_token_id=5))
    end = free[0][2]
    cut = model.generate(batch, GenerationConfig(**settings, eos_token_id=end))
    assert cut == [reply[: reply.index(end)] if end in reply else reply for reply in free]
    assert cut != free


# ------------------------------------------------------------------------------------------------ what trains


def test_frozen_parts_stay_in_eval_mode(tiny_models):
    frozen = build(tiny_models["llama"], freeze=True).train()
    assert not any(m.training for m in frozen.llm.modules())
    assert all(m.training for c in frozen.connectors.values() for m in c.modules())
    assert all(m.training for m in build(tiny_models["llama"]).train().llm.modules())
    assert frozen.trainable_parameters()["llm"] == 0
    for connector in frozen.connectors.values():
        connector.requires_grad_(False)
    assert not any(m.training for m in frozen.train().llm.modules())
    assert not any(m.training for c in frozen.connectors.values() for m in c.modules())


def test_a_tied_core_is_counted_once(tiny_models):
    separate = build(tiny_models["llama"], freeze=True)
    # both streams' queries must agree to share a core
    small = {"num_layers": 1, "hidden_dim": 8, "num_heads": 2, "encoder_dim": 8, "num_queries": 2}
    connectors = {name: QFormer(DIMS[name], 16, **small) for name in ("audio", "video")}
    core = sum(p.numel() for p in connectors["audio"].core.parameters())
    before = ConversationModel(separate.llm, connectors).trainable_parameters()
    tie(connectors)
    after = ConversationModel(separate.llm, connectors).trainable_parameters()
    assert after["connector.audio"] == before["connector.audio"]
    assert after["connector.video"] == before["connector.video"] - core


def test_the_output_layer_is_whole_again_after_a_forward(tiny_models):
    model = build(tiny_models["llama"])
    batch, _ = draw(0, 1)
    model(batch)
    logits = model.llm(inputs_embeds=model.embed(batch)).logits
    assert logits.shape[:2] == batch.input_ids.shape


def test_a_frozen_llm_trains_on_a_batch_without_any_stream(tiny_models):
    model = build(tiny_models["llama"], freeze=True).train()
    dialogue, features = draw_dialogue(np.random.default_rng(1), 3, streams=(), present=0.0)
    batch = collate([dialogue], [features], [dialogue_rows(dialogue, 10**6, NUM_QUERIES)], NUM_QUERIES)
    assert not batch.streams
    model(batch).nll.sum().backward()
    assert not any(p.grad.any() for p in model.connectors.parameters())


def test_a_frozen_llm_recomputes_its_activations_where_asked(tiny_models):
    llm = load_llm(str(tiny_models["llama"]), freeze=True, gradient_checkpointing=True)
    ConversationModel(llm, {}).train()
    assert all(m.training for m in llm.modules() if getattr(m, "gradient_checkpointing", False))
    assert not any(m.training for m in llm.modules() if isinstance(m, torch.nn.Dropout))
