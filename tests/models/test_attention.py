import random
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import create_mask
from transformers.integrations.flex_attention import WrappedFlexAttention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from msenc.models import attention, flash
from msenc.models.attention import NAME, Layout, layout_attention, layout_mask, make_layout
from msenc.models.llm import load_llm
from msenc.types import MsencError, Segment

CPU = torch.device("cpu")
LAYER = SimpleNamespace(num_key_value_groups=2, is_causal=True)


def draw_segments(seed):
    rng = random.Random(seed)
    segments, start = [], 0
    for _ in range(rng.randint(1, 4)):
        trunk = rng.randint(1, 40)
        branches = tuple((rng.randint(1, 30), rng.randint(1, trunk)) for _ in range(rng.randint(0, 5)))
        segments.append(Segment(start, trunk, branches))
        start = segments[-1].stop
    return segments


def seen_by_definition(segments):
    """Per token the set of tokens that it sees, written out from what `Segment` says."""
    seen = {}
    for segment in segments:
        trunk = range(segment.start, segment.start + segment.trunk)
        for place in trunk:
            seen[place] = set(range(segment.start, place + 1))
        at = trunk.stop
        for tokens, cut in segment.branches:
            for place in range(at, at + tokens):
                seen[place] = set(trunk[:cut]) | set(range(at, place + 1))
            at += tokens
        assert at == segment.stop
    return seen


@pytest.mark.parametrize("seed", range(20))
def test_the_mask_is_what_segments_say(seed):
    segments = draw_segments(seed)
    seen = seen_by_definition(segments)
    mask = layout_mask(segments)[0, 0]
    assert len(mask) == len(seen)
    for place, row in enumerate(mask):
        assert set(row.nonzero().flatten().tolist()) == seen[place]


@pytest.mark.parametrize("seed", range(5))
def test_the_block_mask_is_the_same(seed):
    segments = draw_segments(seed)
    length = segments[-1].stop
    block_mask = make_layout(segments, CPU, "flex_attention").mask
    assert block_mask.shape == (1, 1, length, length)
    assert torch.equal(create_mask(block_mask.mask_mod, 1, 1, length, length, device="cpu"), layout_mask(segments))


def attend(segments, kernel, dtype=torch.float64, dropout=0.0, scaling=0.3):
    """Output and gradients, with two queries per key head."""
    torch.manual_seed(0)
    length = segments[-1].stop
    query, key, value = (torch.randn(1, length, h, 8, dtype=dtype).transpose(1, 2) for h in (4, 2, 2))
    for tensor in (query, key, value):
        tensor.requires_grad_()
    layout = make_layout(segments, CPU, kernel)
    out, weights = layout_attention(LAYER, query, key, value, layout.mask, scaling, dropout, layout=layout)
    assert weights is None
    assert layout.calls == 1
    out.backward(torch.randn(out.shape, dtype=dtype))
    return out.detach(), query.grad, key.grad, value.grad


@pytest.mark.parametrize("seed", range(20))
def test_split_equals_dense(seed):
    segments = draw_segments(seed)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for one, other in zip(attend(segments, "split", dtype), attend(segments, "dense", dtype), strict=True):
            assert one.shape == other.shape
            torch.testing.assert_close(one, other, rtol=bound, atol=bound)


def rows(call):
    """(queries, keys) of each row of a call."""
    for n in range(len(call.query_starts) - 1):
        yield tuple(
            places[starts[n] : starts[n + 1]]
            for places, starts in ((call.queries, call.query_starts), (call.keys, call.key_starts))
        )


def scores_of(query, key, call, q, k, scale):
    """(heads, q, k): what the flash kernel makes of one row; a key head serves several heads."""
    repeats = query.shape[1] // key.shape[1]
    scores = scale * torch.einsum("qhd,khd->hqk", query[q], key[k].repeat_interleave(repeats, 1))
    return scores.masked_fill(~torch.ones(len(q), len(k)).tril().bool(), -torch.inf) if call.is_causal else scores


def reference_attend(query, key, value, call, scale):
    """What the GPU's flash kernel says of itself, row by row."""
    repeats = query.shape[1] // key.shape[1]
    out, sums = [], []
    for q, k in rows(call):
        assert len(q) <= call.longest_query
        assert len(k) <= call.longest_keys
        scores = scores_of(query, key, call, q, k, scale)
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[k].repeat_interleave(repeats, 1)))
        sums.append(scores.logsumexp(-1))
    return torch.cat(out), torch.cat(sums, 1)


def reference_backward(grad, query, key, value, out, sums, call, scale):
    """Likewise backward: the weights come from the sums that it is given, and not from its own keys."""
    repeats = query.shape[1] // key.shape[1]
    parts = []
    for q, k in rows(call):
        weights = (scores_of(query, key, call, q, k, scale) - sums[:, q, None]).exp()
        keys, values = (tensor[k].repeat_interleave(repeats, 1) for tensor in (key, value))
        to_scores = torch.einsum("qhd,khd->hqk", grad[q], values) - (grad[q] * out[q]).sum(-1).T[..., None]
        to_scores = scale * weights * to_scores
        to_keys, to_values = (
            torch.einsum("hqk,qhd->khd", *pair).unflatten(1, (-1, repeats)).sum(2)
            for pair in ((to_scores, query[q]), (weights, grad[q]))
        )
        parts.append((torch.einsum("hqk,khd->qhd", to_scores, keys), to_keys, to_values))
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_the_three_calls_of_a_gpu_give_what_dense_gives(seed, monkeypatch):
    monkeypatch.setattr(flash, "_attend", reference_attend)
    monkeypatch.setattr(flash, "_attend_backward", reference_backward)
    segments = draw_segments(seed)
    expected = attend(segments, "dense")
    torch.manual_seed(0)
    length = segments[-1].stop
    states = [torch.randn(1, length, h, 8, dtype=torch.float64).transpose(1, 2).requires_grad_() for h in (4, 2, 2)]
    out = flash.attend_split(*states, Layout(segments, "split", torch.empty(0)).on_gpu, 0.3).transpose(1, 2)
    out.backward(torch.randn(out.shape, dtype=torch.float64))
    for one, other in zip((out, *(state.grad for state in states)), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_gpu_whose_kernel_does_not_work_takes_the_dense_mask(caplog):
    flash.works.cache_clear()
    assert not flash.works(CPU)  # which has no such kernel
    assert "takes a dense mask" in caplog.text


@pytest.mark.parametrize(
    ("heads", "width", "dtype", "dropout", "is_taken"),
    [
        (4, 64, torch.bfloat16, 0.0, True),
        (4, 64, torch.float16, 0.0, True),
        (4, 64, torch.float32, 0.0, False),
        (4, 64, torch.bfloat16, 0.1, False),
        (4, 60, torch.bfloat16, 0.0, False),
        (4, 512, torch.bfloat16, 0.0, False),
    ],
)
def test_what_the_gpus_kernel_takes(heads, width, dtype, dropout, is_taken):
    state = torch.empty(1, heads, 5, width, dtype=dtype)
    assert flash.takes(state, state, dropout) == is_taken
    assert not flash.takes(state, state[..., : width // 2], dropout)  # values narrower than keys


def test_under_autocast_the_gpus_kernel_takes_what_a_float32_llm_gives(tiny_models, monkeypatch):
    """Rotated by float32 angles, its queries and keys are float32, while its values are not."""
    states, taken = [], []

    def spy(module, query, key, value, mask, **options):
        states.append((query, key, value))
        taken.append(flash.takes(query, value, 0.0))
        lowered = flash.in_autocast_type(query, key, value)
        taken.append(flash.takes(lowered[0], lowered[2], 0.0))
        return layout_attention(module, query, key, value, mask, **options)

    llm = load_llm(str(tiny_models["llama"]), freeze=True)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, NAME, spy)
    with torch.autocast("cpu", torch.bfloat16):
        llm(torch.arange(3, 13)[None], use_cache=False)
    assert {tuple(state.dtype for state in one) for one in states} == {(torch.float32, torch.float32, torch.bfloat16)}
    assert taken == [False, True] * 2
    assert flash.in_autocast_type(*states[0]) == states[0]  # outside of it


def test_block_masks_of_a_gpu_are_made_block_by_block(monkeypatch):
    made = []
    monkeypatch.setattr(flex, "create_block_mask", lambda *sizes, **options: made.append(options))
    monkeypatch.setattr(attention, "token_limits", lambda *given: None)
    for device in ("cuda", "cpu"):
        make_layout(draw_segments(0), torch.device(device), "flex_attention")
    assert [options["_compile"] for options in made] == [True, False]  # uncompiled, it fills all L x L pairs


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_compiled_once_for_training_and_evaluation(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(function) or function)
    monkeypatch.setattr(WrappedFlexAttention, "_instance", None)
    segments = draw_segments(0)
    states = [torch.randn(1, h, segments[-1].stop, 16) for h in (4, 2, 2)]
    layer, layout = torch.nn.Module(), make_layout(segments, CPU, "flex_attention")
    with torch.no_grad():
        outs = [layout_attention(layer.train(mode), *states, None, layout=layout)[0] for mode in (True, False, True)]
    assert compiled.count(flex.flex_attention) == 1
    exact = layout_attention(LAYER, *states, None, layout=make_layout(segments, CPU, "dense"))[0]
    for out in outs:
        torch.testing.assert_close(out, exact)


def test_dropout_of_weights_takes_the_dense_kernel():
    segments = draw_segments(1)
    torch.testing.assert_close(attend(segments, "split", dropout=0.5), attend(segments, "dense", dropout=0.5))
    assert not torch.equal(attend(segments, "split", dropout=0.5)[0], attend(segments, "split")[0])


def test_on_a_cpu_auto_is_split_and_elsewhere_dense():
    segments = draw_segments(0)
    assert make_layout(segments, CPU).kernel == "split"
    assert make_layout(segments, torch.device("meta")).kernel == "dense"
    with pytest.raises(MsencError, match=r"attn_implementation=split: found the device meta, on which .* does not"):
        make_layout(segments, torch.device("meta"), "split")


@pytest.mark.parametrize("extra", ["softcap", "s_aux", "position_bias"])
def test_what_no_kernel_computes_is_refused(extra):
    segments = draw_segments(0)
    layout = make_layout(segments, CPU)
    states = [torch.randn(1, 2, segments[-1].stop, 8) for _ in range(3)]
    with pytest.raises(MsencError, match=rf"has {extra}, which .*eager, or model\.layout=sample"):
        layout_attention(LAYER, *states, layout.mask, layout=layout, **{extra: 1.0})
