"""The attention mask of packed rows of trunks and branches, and the kernels that compute it.

Batch.segments -> Layout -> attention of every layer of the LLM

transformers allows registering a function that then computes the attention of any of its models.
`layout_attention` is that function. It gets the layout as a keyword, which the models pass to every layer; if
there is none (padded rows, generation), it is plain SDPA.

Kernels: ``split`` attends within trunks, from branches to trunks, and within branches, each by calls of the flash
kernel, so masked pairs are never computed; it is the fastest on CPUs (docs/performance.md), and `flash` does it on
GPUs. ``dense`` gives SDPA a mask of all pairs; it runs everywhere. ``flex_attention`` compiles a block mask, for GPUs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from msenc.models.flash import Calls, attend_split, in_autocast_type, plan_calls, takes, works
from msenc.types import MsencError, Segment

NAME = "msenc_layout"
"""The name of this attention in a model's config."""

_TRAINING = SimpleNamespace(training=True)

KERNELS = ("auto", "split", "dense", "flex_attention")


def register() -> str:
    """Make the attention known to transformers; returns its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, layout_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


@dataclass
class Layout:
    """Passed to the layers in a forward pass over packed rows.

    Args:
        segments: the rows.
        kernel: one of `KERNELS`, but not ``auto``.
        mask: what the kernel needs: (1, 1, L, L) bool, a BlockMask, or an empty stand-in with four axes, which keeps
            transformers from making a mask of its own.
        calls: number of layers that used it; reveals models that compute their attention differently.
    """

    segments: Sequence[Segment]
    kernel: str
    mask: Any
    calls: int = 0

    @cached_property
    def of_all_pairs(self) -> Tensor:
        """(1, 1, L, L) bool, for calls that ``split`` cannot do."""
        return layout_mask(self.segments, self.mask.device)

    @cached_property
    def on_gpu(self) -> Calls:
        """Calls of the GPU's flash kernel."""
        return plan_calls(self.segments, self.mask.device)


def make_layout(segments: Sequence[Segment], device: torch.device, kernel: str = "auto") -> Layout:
    """Choose the kernel and prepare its mask.

    Args:
        segments: the packed samples, from the first token to the last.
        device: where the line is.
        kernel: one of `KERNELS`; ``auto`` is ``split`` on a CPU, and on a GPU where that works, else ``dense``.

    Raises:
        MsencError: ``split`` on a device without a flash kernel.
    """
    if kernel in ("auto", "split"):
        # A branch that sees nothing of its trunk has no sum of exponentials there.
        has_flash = device.type == "cuda" and all(cut for s in segments for _, cut in s.branches) and works(device)
        if device.type == "cpu" or has_flash:
            return Layout(segments, "split", torch.empty(1, 1, 0, 0, device=device))
        if kernel == "split":
            raise MsencError(
                f"model.llm.attn_implementation=split: found the device {device}, on which its flash kernel does not "
                "work. Use auto, dense or flex_attention."
            )
        kernel = "dense"
    if kernel == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        tokens = token_limits(segments, device)
        length = segments[-1].stop
        mask = create_block_mask(
            lambda b, h, q, k: is_visible(tokens, q, k),
            1,
            1,
            length,
            length,
            device=device,
            _compile=device.type == "cuda",  # else it makes all L x L pairs first
        )
        return Layout(segments, kernel, mask)
    return Layout(segments, kernel, layout_mask(segments, device))


def token_limits(segments: Sequence[Segment], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Per token: the number of its row, that of its branch (-1 in a trunk), and one past the last trunk token it sees.

    Returns:
        Three (L,) integer tensors. Branches are numbered over all rows.
    """
    sizes, rows, branches, limits = [], [], [], []
    number = 0
    for row, segment in enumerate(segments):
        sizes.append(segment.trunk)
        rows.append(row)
        branches.append(-1)
        limits.append(-1)
        for tokens, cut in segment.branches:
            sizes.append(tokens)
            rows.append(row)
            branches.append(number)
            limits.append(segment.start + cut)
            number += 1
    repeats = torch.tensor(sizes)
    total = sum(sizes)  # given, so that shapes alone are enough (see plan.py)
    row, branch, limit = (
        torch.tensor(values).repeat_interleave(repeats, output_size=total) for values in (rows, branches, limits)
    )
    limit = torch.where(limit < 0, torch.arange(len(limit)) + 1, limit)  # the trunk is causal
    return row.to(device), branch.to(device), limit.to(device)


def is_visible(tokens: tuple[Tensor, Tensor, Tensor], query: Tensor, key: Tensor) -> Tensor:
    """Whether the token at place `query` sees the one at place `key`; places broadcast."""
    row, branch, limit = tokens
    trunk = (branch[key] < 0) & (row[query] == row[key]) & (key < limit[query])
    own = (branch[key] >= 0) & (branch[query] == branch[key]) & (key <= query)
    return trunk | own


def layout_mask(segments: Sequence[Segment], device: torch.device | str = "cpu") -> Tensor:
    """The attention mask of packed rows.

    Returns:
        (1, 1, L, L) bool, True where the query (third axis) sees the key (last axis).

    Example:
        A trunk of two tokens, and two branches of one token; the first sees only one token of the trunk.

        >>> layout_mask([Segment(0, 2, ((1, 1), (1, 2)))])[0, 0].int()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [1, 0, 1, 0],
                [1, 1, 0, 1]], dtype=torch.int32)
    """
    tokens = token_limits(segments, torch.device(device))
    place = torch.arange(segments[-1].stop, device=device)
    return is_visible(tokens, place[:, None], place[None, :])[None, None]


def layout_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in the form that transformers' models call.

    Args:
        module: the calling layer.
        query: (B, heads, L, d).
        key: (B, key heads, L, d); each serves heads / key heads queries.
        value: like `key`.
        attention_mask: the layout's mask, or whatever SDPA takes where there is no layout.
        scaling: of the scores; 1 / sqrt(d) if None.
        dropout: of attention weights.
        layout: of packed rows.
        **kwargs: what else a model gives; a soft cap, a bias or a sink cannot be left out without a change of the
            model, so these are refused.

    Returns:
        (B, L, heads, d), and no weights.

    Raises:
        MsencError: the model wants something of its attention that no kernel here computes.
    """
    from transformers.integrations.flex_attention import flex_attention_forward
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    if layout is None:
        if attention_mask is not None and not attention_mask.numel():
            raise MsencError(
                f"{type(module).__name__} does not pass the dialogue layout to its attention. Train this LLM with "
                "model.layout=sample."
            )
        # SDPA accepts a position bias; it would silently ignore a sink.
        _refuse(["softcap", "s_aux"], kwargs, "SDPA does not compute. Set model.llm.attn_implementation=eager.")
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    layout.calls += 1
    if layout.kernel == "flex_attention":
        # Of the module it only takes whether it trains, to compile anew at each change between training and evaluation.
        return flex_attention_forward(_TRAINING, query, key, value, layout.mask, scaling, dropout=dropout, **kwargs)
    _refuse(
        ["softcap", "position_bias", "s_aux"],
        kwargs,
        f"model.llm.attn_implementation={layout.kernel} does not compute. Use eager, or model.layout=sample.",
    )
    if layout.kernel == "split" and query.is_cuda:
        states = in_autocast_type(query, key, value)
        if takes(states[0], states[2], dropout):
            out = attend_split(*states, layout.on_gpu, scaling or query.shape[-1] ** -0.5)
            return out.transpose(1, 2).contiguous(), None
    repeats = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    # The flash kernel needs values as wide as keys, unlike in latent attention.
    if layout.kernel == "split" and not (query.is_cuda or dropout) and value.shape[-1] == query.shape[-1]:
        # In bfloat16, the CPU's flash kernel repacks its operands in each of the many small calls, and is slower.
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        out = _SplitAttention.apply(
            query.to(wide), key.to(wide), value.to(wide), layout.segments, scaling or query.shape[-1] ** -0.5
        ).to(query.dtype)
    else:
        mask = layout.mask if layout.kernel == "dense" else layout.of_all_pairs
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def _refuse(names: Sequence[str], given: Mapping[str, Any], reason: str) -> None:
    special = [name for name in names if given.get(name) is not None]
    if special:
        raise MsencError(f"the LLM's attention has {', '.join(special)}, which {reason}")


def _parts(segments: Sequence[Segment]) -> list[tuple[slice, slice | None, bool]]:
    """(queries, keys, is causal) of every call; of a branch's two calls the one to the trunk comes first."""
    parts = []
    for segment in segments:
        end = segment.start + segment.trunk
        parts.append((slice(segment.start, end), slice(segment.start, end), True))
        for tokens, cut in segment.branches:
            branch = slice(end, end + tokens)
            parts += [(branch, slice(segment.start, segment.start + cut), False), (branch, branch, True)]
            end += tokens
    return parts


class _SplitAttention(torch.autograd.Function):
    """Attention over packed rows that skips masked pairs.

    A branch sees two sets of keys: a trunk's beginning, and itself. Softmax over their union is the mean of both
    softmaxes, weighted by their sums of exponentials. The flash kernel returns the logarithm of that sum. Backward, it
    computes the weights again from that logarithm: given the one of the union, and the union's output, each call gives
    its own part of the exact gradient, and the parts add up.

    Source: Dao, FlashAttention-2 (arXiv 2307.08691), section 3.1.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], scale: float):
        # Laid out as (B, L, heads, d), as the models use it next.
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        sums = query.new_empty(query.shape[0], query.shape[2], query.shape[1]).transpose(1, 2)  # (B, heads, L)
        parts = _parts(segments)
        seen: slice | None = None
        for q, k, is_causal in parts:
            own, own_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, q], key[:, :, k], value[:, :, k], 0.0, is_causal, scale=scale
            )
            if q == seen:
                total = torch.logaddexp(sums[:, :, q], own_sum)
                out[:, :, q] *= (sums[:, :, q] - total).exp()[..., None]
                out[:, :, q].addcmul_(own, (own_sum - total).exp()[..., None])
                sums[:, :, q] = total
            else:
                out[:, :, q], sums[:, :, q] = own, own_sum
            seen = q
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.parts, ctx.scale = parts, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        query, key, value, out, sums = ctx.saved_tensors
        to_query, to_key, to_value = (torch.zeros_like(tensor) for tensor in (query, key, value))
        for q, k, is_causal in ctx.parts:
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad[:, :, q],
                query[:, :, q],
                key[:, :, k],
                value[:, :, k],
                out[:, :, q],
                sums[:, :, q],
                0.0,
                is_causal,
                scale=ctx.scale,
            )
            to_query[:, :, q] += grads[0]
            to_key[:, :, k] += grads[1]
            to_value[:, :, k] += grads[2]
        return to_query, to_key, to_value, None, None
