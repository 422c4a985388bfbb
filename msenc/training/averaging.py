"""A moving average of the trained weights, which is validated, saved as the best checkpoint, and used."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from msenc.types import MsencError

AVERAGE = "average"
"""Key in a checkpoint: name -> average (float32) of a trainable tensor, if ``state_dict`` holds the raw weights."""


class AverageWeights(Checkpoint):
    """Averages the weights of past steps, weighting later ones more, and swaps the average in for validation.

    Small batches leave noise in the weights, and an LLM trained in full memorizes what no input predicts;
    both vary from step to step, and averaging reduces them. The average covers about the last 1 / (`eta` + 1) of the
    steps so far, however many these are. Training itself is not affected.

    After step t, with weights w: average = (1 - a) * average + a * w, where a = (eta + 1) / (t + eta).

    (Lightning calls `Checkpoint` callbacks last, in order: the weights have to be restored after
    `Checkpoints` has saved what was validated.)

    Args:
        eta: 0 is the plain mean of all steps; higher values average over fewer of the last steps.

    Source: polynomial-decay averaging, Shamir and Zhang (arXiv 1212.1824).
    """

    def __init__(self, eta: float = 8) -> None:
        if eta < 0:
            raise MsencError(f"callbacks.average.eta={eta}: expected 0 or more.")
        self.eta = eta
        self._step = 0
        self._average: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start from the current weights, or from the average of the resumed run."""
        self._average = {
            name: self._average.get(name, parameter.detach()).to(parameter.device, torch.float32, copy=True)
            for name, parameter in _trainable(module).items()
        }
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        """Add the step to the average, if one was taken."""
        if trainer.global_step == self._step:
            return  # gradients are being accumulated
        self._step = trainer.global_step
        share = (self.eta + 1) / (self._step + self.eta)
        for name, parameter in _trainable(module).items():
            self._average[name].lerp_(parameter.float(), share)

    @torch.no_grad()
    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Swap the average in for the weights."""
        if self._average:
            for name, parameter in _trainable(module).items():
                self._own[name] = parameter.detach().clone()
                parameter.copy_(self._average[name])

    @torch.no_grad()
    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Restore the weights; callbacks before this one still see the average."""
        for name, own in self._own.items():
            module.get_parameter(name).copy_(own)
        self._own = {}

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average next to the raw weights from which training continues."""
        checkpoint[AVERAGE] = {name: average.cpu() for name, average in self._average.items()}

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the average."""
        self._average = dict(checkpoint.get(AVERAGE, {}))


def _trainable(module: L.LightningModule) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def learned_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The trained tensors of a checkpoint, for inference: the average if there is one."""
    state = dict(checkpoint["state_dict"])
    average = checkpoint.get(AVERAGE, {})
    return state | {name: tensor.to(state[name].dtype) for name, tensor in average.items()}
