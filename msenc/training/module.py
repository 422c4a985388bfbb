"""ConversationModule: trains the model. It does no maths beyond counting.

Batch -> ConversationModel -> sum of losses and number of target tokens -> gradients per target token
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from msenc.models.conversation import ConversationModel
from msenc.models.groups import ParameterGroup, gradient_norms, partition
from msenc.prompt import TOKEN_KINDS
from msenc.training.sharding import shard
from msenc.types import Batch, MsencError

FP16_DIVISOR = 1024.0
"""Of a batch's summed loss where gradients are float16: GradScaler starts at 65,536, and 65,504 is the largest number.

A power of two, and undone in float32: nothing is rounded by it.
"""


class ConversationModule(L.LightningModule):
    """Trains a ConversationModel on the cross entropy of its target tokens.

    A step's loss is the weighted SUM over target tokens; gradients are divided once, before the optimizer's step, by
    the sum of the weights of the step's target tokens over all accumulated batches and processes. So splitting a
    step into batches or processes does not change a token's weight.

    Attributes:
        measured: names of what is logged beside the loss, whose sums follow it in a step's sums.

    Args:
        model: the composed model.
        optimizer: torch parameter groups -> optimizer.
        scheduler: (optimizer, total steps, steps per epoch) -> learning rate schedule, stepped after every step.
        groups: name of a parameter group -> its settings, from `groups.flatten_groups`; if empty, one group.
        loss_weights: kind of token (`prompt.TOKEN_KINDS`) -> its weight in the training loss; 1 for other kinds.
    """

    measured: tuple[str, ...] = ()

    def __init__(
        self,
        model: ConversationModel,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer] | None = None,
        scheduler: Callable[[Optimizer, int, int], LRScheduler] | None = None,
        groups: Mapping[str, Mapping[str, Any]] | None = None,
        loss_weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.groups = groups or {}
        self._parameter_groups: list[ParameterGroup] = []
        self.strict_loading = False  # checkpoints only hold trained tensors; `on_load_checkpoint` checks the rest
        weights = loss_weights or {}
        self._kind_weights = torch.tensor([weights.get(kind, 1.0) for kind in TOKEN_KINDS])
        self._divisor = 1.0
        # weighted loss and sum of weights since the last optimizer step, and sums of what is measured beside
        self._step_sums = torch.zeros(2 + len(self.measured))
        self._validation_sums = torch.zeros(3)  # loss, correct top-1 tokens, target tokens

    def configure_model(self) -> None:
        """Share the model out over the processes of a strategy that has a mesh of them."""
        if self._device_mesh is not None:
            shard(self.model, self._device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        """Keep float16's gradients within its range."""
        self._divisor = FP16_DIVISOR if self.trainer.precision == "16-mixed" else 1.0

    def training_step(self, batch: Batch) -> Tensor:
        """Sum of the batch's token losses, each weighted by its kind."""
        loss = self.model(batch).nll
        weights = self._kind_weights.to(loss)[batch.kinds]
        loss = loss * weights
        self._step_sums = self._step_sums.to(loss.device) + torch.stack([loss.detach().sum(), weights.sum()])
        return loss.sum() / self._divisor

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turn the gradient of summed losses into the gradient per target token of the global batch.

        Logged before clipping: the training loss, the gradient norm of each part, and the groups' learning rates.
        """
        loss, weights, *others = self.over_processes(self._step_sums)
        weights = torch.where(weights > 0, weights, 1.0)  # if all tokens of a step have weight 0, its gradients are 0
        self._step_sums = torch.zeros_like(self._step_sums)
        self.log("train/loss", loss / weights, prog_bar=True)
        self.log_dict({f"train/{name}": value / weights for name, value in zip(self.measured, others, strict=True)})
        # Lightning has divided each loss by the number of accumulated batches, and DDP averaged over processes.
        scale = self._divisor * self.trainer.accumulate_grad_batches * self.trainer.world_size / weights
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
        self.log_dict({f"grad_norm/{name}": norm for name, norm in gradient_norms(self._parameter_groups).items()})
        rest = "all" if len(optimizer.param_groups) == 1 else "others"
        self.log_dict({f"lr/{group.get('name', rest)}": group["lr"] for group in optimizer.param_groups})

    def over_processes(self, sums: Tensor) -> Tensor:
        """The sum over all processes of the run."""
        sums = sums.to(self.device)
        return self.trainer.strategy.reduce(sums, reduce_op="sum") if self.trainer.world_size > 1 else sums

    def on_validation_epoch_start(self) -> None:
        """Count anew."""
        self._validation_sums = torch.zeros(3)

    def validation_step(self, batch: Batch) -> dict[str, Tensor]:
        """Accumulate; every token of the split has equal weight. Callbacks get the losses."""
        scores = self.model(batch)
        counts = [scores.nll.sum(), scores.correct.sum(), torch.tensor(scores.nll.numel())]
        self._validation_sums = self._validation_sums + torch.stack([n.float().cpu() for n in counts])
        return {"nll": scores.nll}

    def on_validation_epoch_end(self) -> None:
        """Loss per token, perplexity and token accuracy over the split.

        Summed over the processes here: Lightning's mean over processes rounds the number of tokens per process.
        """
        loss, correct, tokens = self.over_processes(self._validation_sums)
        loss = loss / tokens
        values = {"val/loss": loss, "val/token_accuracy": correct / tokens, "val/perplexity": loss.exp()}
        for name, value in values.items():
            self.log(name, value, prog_bar=name == "val/loss", sync_dist=True)

    def configure_optimizers(self) -> Any:
        """The optimizer of the trainable parameters, and its schedule."""
        groups = partition(self.model.trainable(), self.groups)
        if not groups:
            raise MsencError(
                "nothing to train: the LLM is frozen and the modality has no connector. Add a stream "
                "(modality=text_audio), or set model.llm.freeze=false."
            )
        self._parameter_groups = groups
        optimizer = self.optimizer([group.for_optimizer() for group in groups])
        if self.scheduler is None:
            return optimizer
        total = int(self.trainer.estimated_stepping_batches)
        self.trainer.fit_loop.setup_data()  # without a limit on epochs, the estimate has not counted the batches
        batches = self.trainer.num_training_batches
        per_epoch = max(math.ceil(batches / self.trainer.accumulate_grad_batches), 1)
        return [optimizer], [{"scheduler": self.scheduler(optimizer, total, per_epoch), "interval": "step"}]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save only trainable tensors; base weights are identified by their fingerprint."""
        trainable = self.trainable_names()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trainable}
        checkpoint["msenc"] = {
            "base_name": self.model.base_name,
            "base_fingerprint": self.model.base_fingerprint,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights that do not belong to this model.

        Raises:
            MsencError: other base weights, or trainable tensors missing, unknown or of another shape.
        """
        base = checkpoint.get("msenc", {})
        if base.get("base_fingerprint") != self.model.base_fingerprint:
            raise MsencError(
                f"the checkpoint was trained on base weights with fingerprint {base.get('base_fingerprint')}, the LLM "
                f"loaded here has {self.model.base_fingerprint}. Load the LLM it was trained on "
                f"({base.get('base_name')}), unchanged; loaded here: {self.model.base_name}."
            )
        saved, wanted = checkpoint["state_dict"], self.state_dict()
        trainable = self.trainable_names()
        wrong = {
            "missing": sorted(trainable - saved.keys()),
            "unknown": sorted(saved.keys() - trainable),
            "of another shape": sorted(k for k in trainable & saved.keys() if saved[k].shape != wanted[k].shape),
        }
        if any(wrong.values()):
            found = "; ".join(f"{len(keys)} {what}, e.g. {keys[0]}" for what, keys in wrong.items() if keys)
            raise MsencError(f"the checkpoint does not fit the model: trainable tensors {found}.")

    def trainable_names(self) -> set[str]:
        """Names of the trainable tensors in `state_dict`; tied tensors by their first name."""
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}
