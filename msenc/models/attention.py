"""Who sees whom in a dialogue's layout: the one place that turns branches into an attention mask.

Batch.branch, Batch.cut -> mask (B, 1, L, L)
"""

import torch
from torch import Tensor

from msenc.types import PADDING, TRUNK


def layout_mask(branch: Tensor, cut: Tensor) -> Tensor:
    """The attention mask of trunk-and-branch rows.

    A trunk token sees the trunk up to itself. A branch token sees the first `cut` tokens of the trunk and its own
    branch up to itself. Nothing sees padding; padding sees itself, so that no row of a softmax is empty.

    Args:
        branch: (B, L) `TRUNK`, `PADDING` or the branch's number; the trunk stands first in its row.
        cut: (B, L) tokens of the trunk that a branch token sees.

    Returns:
        (B, 1, L, L) bool, True where the query (third axis) sees the key (last axis).

    Example:
        A trunk of two tokens, and two branches of one token; the first sees only one token of the trunk.

        >>> layout_mask(torch.tensor([[-1, -1, 0, 1]]), torch.tensor([[0, 0, 1, 2]]))[0, 0].int()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [1, 0, 1, 0],
                [1, 1, 0, 1]], dtype=torch.int32)
    """
    index = torch.arange(branch.shape[1], device=branch.device)
    causal = index[None, :] <= index[:, None]  # (L, L)
    query, key = branch[:, :, None], branch[:, None, :]
    same = (query == key) & causal & (query != PADDING)
    trunk = (query >= 0) & (key == TRUNK) & (index[None, None, :] < cut[:, :, None])
    diagonal = torch.eye(branch.shape[1], dtype=torch.bool, device=branch.device)
    return (same | trunk | diagonal)[:, None]
