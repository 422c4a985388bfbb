import random
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from msenc.models.attention import layout_attention, layout_mask, make_layout
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


def test_dropout_of_weights_takes_the_dense_kernel():
    segments = draw_segments(1)
    torch.testing.assert_close(attend(segments, "split", dropout=0.5), attend(segments, "dense", dropout=0.5))
    assert not torch.equal(attend(segments, "split", dropout=0.5)[0], attend(segments, "split")[0])


def test_on_a_cpu_auto_is_split_and_elsewhere_dense():
    segments = draw_segments(0)
    assert make_layout(segments, CPU).kernel == "split"
    assert make_layout(segments, torch.device("meta")).kernel == "dense"
    with pytest.raises(MsencError, match=r"attn_implementation=split runs on a CPU, found the device meta"):
        make_layout(segments, torch.device("meta"), "split")


@pytest.mark.parametrize("extra", ["softcap", "s_aux", "position_bias"])
def test_what_no_kernel_computes_is_refused(extra):
    segments = draw_segments(0)
    layout = make_layout(segments, CPU)
    states = [torch.randn(1, 2, segments[-1].stop, 8) for _ in range(3)]
    with pytest.raises(MsencError, match=rf"has {extra}, which .*eager, or model\.layout=sample"):
        layout_attention(LAYER, *states, layout.mask, layout=layout, **{extra: 1.0})
