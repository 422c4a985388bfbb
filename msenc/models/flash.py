"""Attention of packed rows on a GPU: trunks and branches apart, in three calls of torch's flash kernel.

The kernel takes rows of any lengths at once: all trunks; all branches, to the beginnings of trunks that they see; all
branches, to themselves. Each branch's two results are merged as on a CPU (`attention._SplitAttention`), where the same
mathematics is tested against a mask of all pairs. What a branch sees of its trunk is copied for it: memory grows with
the sum of the histories, not with the square of the batch's length.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from msenc.types import Segment

MAX_HEAD_DIM = 256
"""Widest head that the kernel takes; widths are multiples of 8."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """The rows of one call of the kernel.

    Args:
        queries: (Tq,) places of the rows' queries in the packed line, row after row.
        keys: (Tk,) likewise of their keys.
        query_starts: (N + 1,) int32, where each row's queries begin in `queries`.
        key_starts: likewise of the keys.
        longest_query: most queries of a row.
        longest_keys: most keys of a row.
        is_causal: each query sees the keys up to its own place; else all of its row.
    """

    queries: Tensor
    keys: Tensor
    query_starts: Tensor
    key_starts: Tensor
    longest_query: int
    longest_keys: int
    is_causal: bool

    @property
    def bounds(self) -> tuple[Any, ...]:
        """What the kernel takes of it, forward and backward, after the tensors; without dropout."""
        return (
            self.query_starts,
            self.key_starts,
            self.longest_query,
            self.longest_keys,
            0.0,
            self.is_causal,
        )


@dataclass(frozen=True)
class Calls:
    """The calls for packed rows; the last two are None where no row has a branch."""

    trunks: Call
    histories: Call | None
    branches: Call | None


def plan_calls(segments: Sequence[Segment], device: torch.device) -> Calls:
    """Which rows each call takes."""
    trunks, histories, branches = [], [], []
    for segment in segments:
        end = segment.start + segment.trunk
        trunks.append(range(segment.start, end))
        for tokens, cut in segment.branches:
            histories.append(range(segment.start, segment.start + cut))
            branches.append(range(end, end + tokens))
            end += tokens
    call = _call(trunks, trunks, True, device)
    if not branches:
        return Calls(call, None, None)
    return Calls(call, _call(branches, histories, False, device), _call(branches, branches, True, device))


def _call(queries: Sequence[range], keys: Sequence[range], is_causal: bool, device: torch.device) -> Call:
    def places(rows: Sequence[range]) -> Tensor:
        return torch.tensor([place for row in rows for place in row], device=device)

    def starts(rows: Sequence[range]) -> Tensor:
        return torch.tensor([0, *accumulate(map(len, rows))], dtype=torch.int32, device=device)

    longest = (max(map(len, rows)) for rows in (queries, keys))
    return Call(places(queries), places(keys), starts(queries), starts(keys), *longest, is_causal)


def in_autocast_type(*states: Tensor) -> tuple[Tensor, ...]:
    """What autocast does for torch's own attention: of a float32 LLM, rotated queries and keys are float32 again."""
    kind = states[0].device.type
    if not torch.is_autocast_enabled(kind):
        return states
    return tuple(state.to(torch.get_autocast_dtype(kind)) for state in states)


def takes(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether the kernel computes attention of these (B, heads, L, d) on a GPU."""
    width = query.shape[-1]
    is_half = query.dtype in (torch.float16, torch.bfloat16) and value.dtype == query.dtype
    return is_half and not dropout and value.shape[-1] == width and width % 8 == 0 and width <= MAX_HEAD_DIM


@lru_cache
def works(device: torch.device) -> bool:
    """Whether the calls give what a mask of all pairs gives on this GPU, forward and backward; tried once."""
    from msenc.models.attention import layout_mask

    segments = [Segment(0, 40, ((9, 25), (17, 40))), Segment(66, 30, ())]
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1, heads, 96, 64, generator=generator) for heads in (4, 2, 2, 4)]
    found: list[Tensor] = []
    expected: list[Tensor] = []

    def split(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend_split(query, key, value, plan_calls(segments, device), 0.125)

    def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = layout_mask(segments, device)
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.125, enable_gqa=True)

    try:
        *inputs, grad = (tensor.to(device, torch.bfloat16) for tensor in given)
        with torch.inference_mode(False), torch.enable_grad():  # the first forward may be a validation's
            for results, attend in ((found, split), (expected, dense)):
                own = [tensor.clone().requires_grad_() for tensor in inputs]
                out = attend(*own)
                out.backward(grad)
                results += [out.detach(), *(tensor.grad for tensor in own)]
        is_same = all(torch.allclose(a, b, rtol=0.05, atol=0.05) for a, b in zip(found, expected, strict=True))
        reason = "its results are not those of the dense kernel"
    except (RuntimeError, NotImplementedError) as e:
        is_same, reason = False, str(e).splitlines()[0]
    if not is_same:
        log.warning("The flash kernel cannot be used on %s (%s): attention takes a dense mask.", device, reason)
    return is_same


def attend_split(query: Tensor, key: Tensor, value: Tensor, calls: Calls, scale: float) -> Tensor:
    """Attention of packed rows.

    Args:
        query: (1, heads, L, d) float16 or bfloat16.
        key: (1, key heads, L, d).
        value: like `key`.
        calls: from `plan_calls`.
        scale: of the scores.

    Returns:
        (1, heads, L, d).
    """
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (L, heads, d)
    return _Split.apply(query, key, value, calls, scale).transpose(0, 1)[None]


class _Split(torch.autograd.Function):
    """See `attention._SplitAttention`, whose mathematics this is."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, calls: Calls, scale: float) -> Tensor:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        sums = query.new_empty(query.shape[1], query.shape[0], dtype=torch.promote_types(query.dtype, torch.float32))
        out[calls.trunks.queries], sums[:, calls.trunks.queries] = _attend(query, key, value, calls.trunks, scale)
        if calls.branches is not None:
            seen, seen_sums = _attend(query, key, value, calls.histories, scale)
            own, own_sums = _attend(query, key, value, calls.branches, scale)
            total = torch.logaddexp(seen_sums, own_sums)  # (heads, T)
            merged = sum(
                part * (part_sums - total).exp().T[..., None]
                for part, part_sums in ((seen, seen_sums), (own, own_sums))
            )
            out[calls.branches.queries] = merged.to(out.dtype)
            sums[:, calls.branches.queries] = total
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.calls, ctx.scale = calls, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, sums = ctx.saved_tensors
        # Many branches add to the same keys: in float32, or wider.
        wide = torch.promote_types(query.dtype, torch.float32)
        gradients = [torch.zeros_like(tensor, dtype=wide) for tensor in (query, key, value)]
        for call in (ctx.calls.trunks, ctx.calls.histories, ctx.calls.branches):
            if call is None:
                continue
            parts = _attend_backward(grad, query, key, value, out, sums, call, ctx.scale)
            for gradient, part, places in zip(gradients, parts, (call.queries, call.keys, call.keys), strict=True):
                gradient.index_add_(0, places, part.to(wide))
        return *(g.to(t.dtype) for g, t in zip(gradients, (query, key, value), strict=True)), None, None


def _attend(query: Tensor, key: Tensor, value: Tensor, call: Call, scale: float) -> tuple[Tensor, Tensor]:
    """One call: output (Tq, heads, d), and the logarithm of each query's sum of exponentials (heads, Tq)."""
    out, sums, *_ = torch.ops.aten._flash_attention_forward(
        query[call.queries],
        key[call.keys],
        value[call.keys],
        *call.bounds,
        return_debug_mask=False,
        scale=scale,
    )
    return out, sums


def _attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, call: Call, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of one call's queries, keys and values, given the output and the sums of all that they see."""
    random = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of a dropout that is 0
    return torch.ops.aten._flash_attention_backward(
        grad[call.queries].contiguous(),
        query[call.queries],
        key[call.keys],
        value[call.keys],
        out[call.queries],
        sums[:, call.queries].contiguous(),
        *call.bounds,
        random,
        random.new_empty(0),
        scale=scale,
    )
