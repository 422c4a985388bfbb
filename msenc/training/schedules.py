"""Learning rate schedules, one call signature: (optimizer, total_steps, steps_per_epoch) -> schedule per step.

If a schedule takes a ``warmup``, a parameter group may have its own: ``warmup`` in `optimizer.param_groups`.
"""

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, StepLR


def warmup_cosine(optimizer: Optimizer, total_steps: int, steps_per_epoch: int, warmup: float = 0.05) -> LRScheduler:
    """Rise linearly over the first share `warmup` of the run, then fall to zero along a cosine."""
    shares = [group.get("warmup", warmup) for group in optimizer.param_groups]
    return LambdaLR(
        optimizer, [partial(_cosine_factor, first=round(share * total_steps), total=total_steps) for share in shares]
    )


def _cosine_factor(step: int, first: int, total: int) -> float:
    """Factor of the learning rate after a number of steps: rises to 1 during warmup, falls to 0 at the end."""
    if step < first:
        return step / first
    progress = (step - first) / max(1, total - first)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def epoch_decay(optimizer: Optimizer, total_steps: int, steps_per_epoch: int, gamma: float = 0.98) -> LRScheduler:
    """Multiply the rate by `gamma` after every epoch (the paper's StepLR)."""
    return StepLR(optimizer, step_size=steps_per_epoch, gamma=gamma)
