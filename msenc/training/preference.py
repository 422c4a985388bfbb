"""PreferenceModule: trains a run to prefer one reply to another (DPO).

Batch with pairs -> log probability of each reply, now and at the start -> loss per pair -> gradients per pair

Source: Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; `label_smoothing`: Chowdhury et al. 2024 (arXiv 2403.00409);
`rpo_alpha`: Pang et al. 2024 (arXiv 2404.19733), eq. 1.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from msenc.training.module import ConversationModule
from msenc.types import Batch, MsencError

REFERENCE = "reference"
"""Key in ``last.ckpt``: name -> a trainable tensor as the run started from it."""


def preference_loss(margins: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """The loss of pairs whose labels are wrong with probability `label_smoothing`.

    As of TRL's ``loss_type="robust"``, which without label smoothing is its ``"sigmoid"``.

    Args:
        margins: (P,) by how much the log ratio to the reference of the chosen reply exceeds that of the rejected one.
        beta: how much a deviation from the reference counts.
        label_smoothing: from 0 to below 0.5.

    Returns:
        (P,) losses.

    Example:
        >>> preference_loss(torch.tensor([0.0]), beta=0.1)
        tensor([0.6931])
    """
    right, flipped = -logsigmoid(beta * margins), -logsigmoid(-beta * margins)
    return ((1 - label_smoothing) * right - label_smoothing * flipped) / (1 - 2 * label_smoothing)


class PreferenceModule(ConversationModule):
    """Trains a ConversationModel on pairs of replies.

    The reference is the model as training began: a copy of what trains, put in place for a pass without gradients. For
    a new adapter that is the model without it. A step's loss is the sum over its pairs, divided as in
    `ConversationModule` by their number over all accumulated batches and processes. Nothing is dropped out: the
    rewards, which are differences from the reference, would be noise at first.

    Args:
        *args: of `ConversationModule`.
        beta: see `preference_loss`.
        label_smoothing: see `preference_loss`.
        rpo_alpha: weight of the chosen reply's own loss, the mean over its tokens, beside that of the pair; and of
            that of replies in no pair, where the data keep some.
        **kwargs: of `ConversationModule`.
    """

    measured = (
        *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
        *("logps/chosen", "logps/rejected"),
    )

    def __init__(
        self, *args: Any, beta: float = 0.1, label_smoothing: float = 0.0, rpo_alpha: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.beta, self.label_smoothing, self.rpo_alpha = beta, label_smoothing, rpo_alpha
        self._start: dict[str, Tensor] = {}
        self._validation_sums = torch.zeros(2 + len(self.measured))

    def train(self, mode: bool = True) -> "PreferenceModule":
        """Without dropout; modules that recompute their activations only do so in training mode."""
        super().train(mode)
        for module in self.model.modules():
            if module is not self.model and not getattr(module, "gradient_checkpointing", False):
                module.training = False
        return self

    def on_fit_start(self) -> None:
        """Remember the model as it starts, unless a checkpoint has."""
        super().on_fit_start()
        if not self._start:
            self._start = {name: p.detach().clone() for name, p in self.named_parameters() if p.requires_grad}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The model as it started, without gradients."""
        parameters = {name: p for name, p in self.named_parameters() if p.requires_grad}
        with torch.no_grad():
            own = {name: p.detach().clone() for name, p in parameters.items()}
            try:
                for name, parameter in parameters.items():
                    self._start[name] = self._start[name].to(parameter.device)
                    parameter.copy_(self._start[name])
                torch.clear_autocast_cache()  # it holds the weights in half precision, by parameter
                yield
            finally:
                for name, parameter in parameters.items():
                    parameter.copy_(own[name])
                torch.clear_autocast_cache()

    def scores(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of each pair and of each reply in none, what is measured of pairs, and the loss of each token.

        Returns:
            (P + R,) with a gradient; (P, M) without, in the order of `measured`; (K,).
        """
        with self.reference():
            reference = _log_probabilities(self.model(batch).nll, batch)
        nll = self.model(batch).nll
        now = _log_probabilities(nll, batch)
        pairs = batch.targets.new_zeros(0, 2) if batch.pairs is None else batch.pairs
        chosen, rejected = (now - reference)[pairs].unbind(1)
        losses = preference_loss(chosen - rejected, self.beta, self.label_smoothing)
        tokens = torch.bincount(batch.targets, minlength=len(now))
        own = -self.rpo_alpha * now / tokens
        is_kept = torch.ones_like(own, dtype=torch.bool).index_fill(0, pairs.flatten(), False)
        losses = torch.cat([losses + own[pairs[:, 0]], own[is_kept]])
        rewards = self.beta * torch.stack([chosen, rejected], dim=1).detach()
        margins = rewards[:, :1] - rewards[:, 1:]
        measured = torch.cat([rewards, (margins > 0).to(margins), margins, now.detach()[pairs]], dim=1)
        return losses, measured, nll

    def training_step(self, batch: Batch) -> Tensor:
        """Sum of the losses of the batch's pairs."""
        losses, measured, _ = self.scores(batch)
        self._step_sums = self._step_sums.to(losses.device) + _sums(losses, measured)
        return losses.sum() / self._divisor

    def on_validation_epoch_start(self) -> None:
        """Count anew."""
        self._validation_sums = torch.zeros_like(self._validation_sums)

    def validation_step(self, batch: Batch) -> dict[str, Tensor]:
        """Accumulate; every pair of the split has equal weight. Callbacks get the losses of the tokens."""
        losses, measured, nll = self.scores(batch)
        self._validation_sums = self._validation_sums + _sums(losses, measured).float().cpu()
        return {"nll": nll}

    def on_validation_epoch_end(self) -> None:
        """Loss per pair, and what is measured, over the split."""
        loss, pairs, *others = self.over_processes(self._validation_sums)
        self.log("val/loss", loss / pairs, prog_bar=True, sync_dist=True)
        for name, value in zip(self.measured, others, strict=True):
            self.log(f"val/{name}", value / pairs, prog_bar=name == "rewards/accuracies", sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the start beside what a run is continued from."""
        super().on_save_checkpoint(checkpoint)
        if "optimizer_states" in checkpoint:
            checkpoint[REFERENCE] = dict(self._start)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the start, which is not where a resumed run continues."""
        super().on_load_checkpoint(checkpoint)
        start = checkpoint.get(REFERENCE, {})
        if {name: t.shape for name, t in start.items()} != {
            name: checkpoint["state_dict"][name].shape for name in self.trainable_names()
        }:
            raise MsencError(
                f"the checkpoint has no start to compare with ({REFERENCE}): it is none of a run of objective=dpo, or "
                "damaged. Start anew with init_from=RUN."
            )
        self._start = dict(start)


def _log_probabilities(nll: Tensor, batch: Batch) -> Tensor:
    """Losses of tokens (K,) -> log probability of each target of the batch."""
    return nll.new_zeros(len(batch.target_ids)).index_add(0, batch.targets, -nll)


def _sums(losses: Tensor, measured: Tensor) -> Tensor:
    return torch.cat([losses.detach().sum()[None], losses.new_tensor([len(measured)]), measured.sum(0)])
