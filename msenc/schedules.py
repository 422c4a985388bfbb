"""Learning rate schedules, one call signature: (optimizer, total_steps, steps_per_epoch) -> schedule per step."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR


def warmup_cosine(optimizer: Optimizer, total_steps: int, steps_per_epoch: int, warmup: float = 0.05) -> LRScheduler:
    """Rise linearly over the first share `warmup` of the run, then fall to zero along a cosine."""
    from transformers import get_cosine_schedule_with_warmup

    return get_cosine_schedule_with_warmup(optimizer, round(warmup * total_steps), total_steps)


def epoch_decay(optimizer: Optimizer, total_steps: int, steps_per_epoch: int, gamma: float = 0.98) -> LRScheduler:
    """Multiply the rate by `gamma` after every epoch (the paper's StepLR)."""
    return StepLR(optimizer, step_size=steps_per_epoch, gamma=gamma)
