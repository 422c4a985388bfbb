import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from random_dialogues import DIMS, NUM_QUERIES, draw_dialogue
from tiny_models import build_conversation as build

from msenc.data.collate import collate, dialogue_rows
from msenc.models.attention import make_layout
from msenc.models.connector import QFormer, tie
from msenc.models.conversation import ConversationModel
from msenc.models.llm import load_llm
from msenc.types import MsencError, Segment

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def draw(seed, num, budget=10**6, layout="dialogue", vocab=50, turns=(3, 6), pack=None, **options):
    """The batch of all rows, and a batch of each row alone."""
    rng = np.random.default_rng(seed)
    low, high = turns
    drawn = [draw_dialogue(rng, int(rng.integers(low, high + 1)), f"d{i}", vocab=vocab, **options) for i in range(num)]
    rows = [dialogue_rows(d, budget, NUM_QUERIES, layout) for d, _ in drawn]
    pack = layout == "dialogue" if pack is None else pack
    batch = collate([d for d, _ in drawn], [f for _, f in drawn], rows, NUM_QUERIES, pack)
    alone = [
        collate([d], [f], [[row]], NUM_QUERIES, pack)
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
            by_target[name] = scores.nll[batch.targets == target].sum().item()
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


def in_float64(model):
    """The model in float64 throughout: norms and rotary positions too, which transformers computes in float32."""

    def norm(self, x):
        eps = getattr(self, "variance_epsilon", None) or self.eps
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    def rotary(self, x, position_ids):
        dim = 2 * self.inv_freq.shape[0]
        exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        frequencies = self.config.rope_parameters["rope_theta"] ** -exponents
        angles = position_ids[..., None].double() * frequencies  # (B, L, d/2)
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()

    model.double()
    replaced = Counter()
    for module in model.llm.modules():
        for ending, forward in (("RMSNorm", norm), ("RotaryEmbedding", rotary)):
            if type(module).__name__.endswith(ending):
                module.forward = forward.__get__(module)
                replaced[ending] += 1
    assert replaced["RMSNorm"] >= 5
    assert replaced["RotaryEmbedding"] == 1
    return model


CASES = [
    # seed, dialogues, turns of each, history budget
    (0, 2, (1, 6), 10**6),
    (1, 2, (2, 8), 15),
    (2, 1, (24, 24), 10**6),
    (3, 1, (24, 24), 60),
    (4, 3, (1, 9), 9),
]


@pytest.mark.parametrize("connector", ["qformer", "mlp"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-9), ("float32", 1e-4)])
def test_one_row_per_dialogue_equals_one_sample_at_a_time(tiny_models, family, connector, dtype, bound):
    model = build(tiny_models[family], connector=connector)
    if dtype == "float64":
        in_float64(model)
    num_rows = num_samples = 0
    for seed, num, turns, budget in CASES:
        case = {"turns": turns, "budget": budget, "present": 0.6}
        whole, _ = draw(seed, num, **case)
        _, samples = draw(seed, num, layout="sample", **case)
        num_rows += len(whole.segments)
        num_samples += len(samples)
        (nll, gradient), (nll_alone, gradient_alone) = losses(model, [whole]), losses(model, samples)
        assert apart(nll_alone, nll) < bound
        assert distance(gradient_alone, gradient) < bound
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert {n for n, g in gradient.items() if g.any()} > {n for n in trained if "lora_" in n}
    assert len(CASES) < num_rows < num_samples / 2  # some budgets cut histories, so a dialogue takes several rows


@pytest.mark.parametrize("kernel", ["split", "dense", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_a_broken_layout_is_seen(tiny_models, family, kernel):
    model = build(tiny_models[family], attn_implementation=kernel)
    whole, _ = draw(0, 2, layout="dialogue")
    (nll, gradient) = losses(model, [whole])
    first, second = whole.segments
    (tokens, cut), (next_tokens, next_cut), *others = first.branches
    in_branch = torch.ones_like(whole.position_ids, dtype=torch.bool)
    for segment in whole.segments:
        in_branch[0, segment.start : segment.start + segment.trunk] = False

    def other_branches(*branches):
        return {"segments": [first._replace(branches=(*branches, *others)), second]}

    broken = {
        "positions not those of the sample": {"position_ids": whole.position_ids + in_branch},
        "one more token of the trunk": other_branches((tokens, cut + 1), (next_tokens, next_cut)),
        "one token of the trunk too few": other_branches((tokens, cut - 1), (next_tokens, next_cut)),
        "branches see each other": other_branches((tokens + next_tokens, cut)),
        "dialogues see each other": {"segments": [Segment(0, second.stop)]},
    }
    for what, change in broken.items():
        nll_broken, gradient_broken = losses(model, [dataclasses.replace(whole, **change)])
        assert apart(nll, nll_broken) > 1e-3, what
        assert distance(gradient, gradient_broken) > 1e-3, what


@pytest.mark.parametrize("connector", ["qformer", "mlp"])
@pytest.mark.parametrize("layout", ["dialogue", "sample"])
def test_company_in_a_batch_changes_nothing(tiny_models, connector, layout):
    model = build(tiny_models["llama"], connector=connector)
    batch, alone = draw(2, 4, layout=layout)
    assert len({b.input_ids.shape[1] for b in alone}) > 1
    (nll, gradient), (nll_alone, gradient_alone) = losses(model, [batch]), losses(model, alone)
    assert apart(nll_alone, nll) < 1e-5
    assert distance(gradient_alone, gradient) < 1e-5


def test_packed_samples_equal_padded_ones(tiny_models):
    model = build(tiny_models["llama"])
    packed, padded = (losses(model, [draw(2, 3, budget=15, layout="sample", pack=pack)[0]]) for pack in (True, False))
    assert apart(packed[0], padded[0]) < 1e-5
    assert distance(packed[1], padded[1]) < 1e-5


def test_padded_tokens_and_frames_are_never_read(tiny_models):
    model = build(tiny_models["llama"])
    batch, _ = draw(2, 4, layout="sample")
    nll, _ = losses(model, [batch])
    streams, num_padded = {}, 0
    for name, stream in batch.streams.items():
        groups = [features.clone() for features in stream.features]
        for features, lengths in zip(groups, stream.lengths, strict=True):
            for n, length in enumerate(lengths):
                features[n, length:] = float("nan")
            num_padded += features.isnan().sum().item()
        streams[name] = dataclasses.replace(stream, features=groups)
    assert num_padded
    assert not batch.attention_mask.all()
    ids = torch.where(batch.attention_mask, batch.input_ids, 7)
    nll_junk, _ = losses(model, [dataclasses.replace(batch, input_ids=ids, streams=streams)])
    assert nll_junk == nll


@pytest.mark.parametrize("kernel", ["dense", "eager"])
def test_kernels_agree(tiny_models, kernel):
    batch, _ = draw(3, 3, budget=15)
    model = build(tiny_models["llama"], attn_implementation="auto")
    other = build(tiny_models["llama"], attn_implementation=kernel)
    assert make_layout(batch.segments, torch.device("cpu"), "auto").kernel == "split"
    found, wanted = losses(other, [batch]), losses(model, [batch])
    assert apart(found[0], wanted[0]) < 1e-4
    assert distance(found[1], wanted[1]) < 1e-4


def test_mixed_precision_stays_near(tiny_models):
    model = build(tiny_models["llama"])
    batch, _ = draw(3, 3)
    nll, gradient = losses(model, [batch])
    with torch.autocast("cpu", torch.bfloat16):
        nll_mixed, gradient_mixed = losses(model, [batch])
    assert 0 < apart(nll, nll_mixed) < 0.1
    assert 0 < distance(gradient, gradient_mixed) < 0.1


def test_a_sample_beyond_a_sliding_window_needs_the_layout_sample(tiny_models):
    model = build(tiny_models["mistral"])
    batch, _ = draw(0, 1)
    longest = batch.position_ids.max().item() + 1
    model.llm.config.sliding_window = longest
    ConversationModel(model.llm, model.connectors)(batch)
    model.llm.config.sliding_window = longest - 1
    model = ConversationModel(model.llm, model.connectors)
    with pytest.raises(MsencError, match=rf"sliding_window is {longest - 1} .*samples of {longest}, .*layout=sample"):
        model(batch)

    # There, the window is the LLM's own affair.
    samples, _ = draw(0, 1, layout="sample")
    inside, _ = losses(model, [samples])
    model.llm.config.sliding_window = 4
    assert apart(inside, losses(model, [samples])[0]) > 1e-3


def test_an_llm_that_does_not_attend_by_the_layout_is_refused(tiny_models):
    model = build(tiny_models["llama"])
    batch, _ = draw(0, 1)
    layer = model.llm.get_base_model().model.layers[0].self_attn
    own = layer.forward
    layer.forward = lambda *args, layout, **kwargs: own(*args, **kwargs)
    with pytest.raises(MsencError, match=r"LlamaAttention does not pass the dialogue layout.*model\.layout=sample"):
        model(batch)
    layer.forward = lambda hidden_states, **kwargs: (hidden_states, None)  # a layer that does not attend
    with pytest.raises(MsencError, match=r"only 1 of 2 layers follow .*model\.layout=sample"):
        model(batch)
    layer.forward = own
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
    count = Counter()
    for name, n, _, _ in seen:
        count[name] += n
    assert count == {"audio": num_read, "video": num_read}


def test_a_stream_that_is_absent_has_no_effect(tiny_models):
    both = build(tiny_models["llama"])
    rng = np.random.default_rng(5)
    dialogue, features = draw_dialogue(rng, 5, streams=("audio",), present=0.5)
    rows = [dialogue_rows(dialogue, 10**6, NUM_QUERIES)]
    batch = collate([dialogue], [features], rows, NUM_QUERIES, pack=True)
    nll, gradient = losses(both, [batch])
    assert set(batch.streams) == {"audio"}
    # Its connector gets a gradient of zero, not none: DDP waits for every parameter.
    of_video = [g for name, g in gradient.items() if "connectors.video" in name]
    assert of_video
    assert not any(g.any() for g in of_video)

    # Frames of utterances without a slot are never looked at.
    junk = {"audio": [np.full((3, 5), 9, np.float16) if f is None else f for f in features["audio"]], "video": None}
    assert any(f is None for f in features["audio"][:-1])
    assert losses(both, [collate([dialogue], [junk], rows, NUM_QUERIES, pack=True)])[0] == nll

    # A model that never had the stream says the same.
    audio = ConversationModel(both.llm, {"audio": both.connectors["audio"]})
    assert losses(audio, [batch])[0] == nll


def test_a_stream_that_is_present_has_an_effect(tiny_models):
    model = build(tiny_models["llama"])
    batch, _ = draw(6, 1, present=1.0)
    nll, _ = losses(model, [batch])
    for name, stream in batch.streams.items():
        other = dataclasses.replace(stream, features=[features.flip(1) + 1 for features in stream.features])
        assert apart(nll, losses(model, [dataclasses.replace(batch, streams={**batch.streams, name: other})])[0]) > 1e-3


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
    batch = collate([dialogue], [features], [dialogue_rows(dialogue, 10**6, NUM_QUERIES)], NUM_QUERIES, pack=True)
    assert not batch.streams
    model(batch).nll.sum().backward()
    assert not any(p.grad.any() for p in model.connectors.parameters())


def test_a_frozen_llm_recomputes_its_activations_where_asked(tiny_models):
    llm = load_llm(str(tiny_models["llama"]), freeze=True, gradient_checkpointing=True)
    ConversationModel(llm, {}).train()
    assert all(m.training for m in llm.modules() if getattr(m, "gradient_checkpointing", False))
    assert not any(m.training for m in llm.modules() if isinstance(m, torch.nn.Dropout))
