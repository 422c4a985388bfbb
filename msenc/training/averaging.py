"""A moving average of what trains: what is validated, kept as the best, and used."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from msenc.types import MsencError

AVERAGE = "average"
"""Key of a checkpoint: name -> average (float32) of a trainable tensor, where that is not what ``state_dict`` holds."""


class AverageWeights(Checkpoint):
    """Averages the weights of past steps, later ones counting more, and validates the average in the weights' place.

    Small batches leave noise in the weights, and an LLM that trains as a whole learns by heart what no input tells;
    both differ from step to step, and an average has less of them. It reaches back over about 1 / (`eta` + 1) of the
    steps so far, however many these are. Training itself does not know of it.

    After step t, with weights w: average = (1 - a) * average + a * w, where a = (eta + 1) / (t + eta).

    (A `Checkpoint` for Lightning, which calls those last, in their order: the weights have to come back after
    `Checkpoints` has kept what was validated.)

    Args:
        eta: 0 is the plain mean of all steps; the higher, the less far back.

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
        """Begin with the weights as they are, or with the average of the run that goes on."""
        self._average = {
            name: self._average.get(name, parameter.detach()).to(parameter.device, torch.float32, copy=True)
            for name, parameter in _trainable(module).items()
        }
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        """Add the step that was taken, if one was."""
        if trainer.global_step == self._step:
            return  # gradients are being gathered
        self._step = trainer.global_step
        share = (self.eta + 1) / (self._step + self.eta)
        for name, parameter in _trainable(module).items():
            self._average[name].lerp_(parameter.float(), share)

    @torch.no_grad()
    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Put the average in the place of the weights."""
        if self._average:
            for name, parameter in _trainable(module).items():
                self._own[name] = parameter.detach().clone()
                parameter.copy_(self._average[name])

    @torch.no_grad()
    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Put the weights back; callbacks before this one still see the average."""
        for name, own in self._own.items():
            module.get_parameter(name).copy_(own)
        self._own = {}

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the average beside the weights that training goes on from."""
        checkpoint[AVERAGE] = {name: average.cpu() for name, average in self._average.items()}

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take it up again."""
        self._average = dict(checkpoint.get(AVERAGE, {}))


def _trainable(module: L.LightningModule) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def learned_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a checkpoint holds of the trained tensors, for use: the average where there is one."""
    state = dict(checkpoint["state_dict"])
    average = checkpoint.get(AVERAGE, {})
    return state | {name: tensor.to(state[name].dtype) for name, tensor in average.items()}
