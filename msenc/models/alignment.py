"""Before dialogue training: teach a connector to output an utterance's label in the LLM's embedding space.

(frames, label) + the LLM's token embeddings -> a connector whose query vectors resemble the label's tokens

The output of a new connector means nothing to an LLM, and hardly differs between utterances: what all utterances have
in common is learned first, and may be all that is ever learned. Labels that distinguish utterances fix this within
seconds, as the regression needs no forward pass of the LLM.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from msenc.models.connector import span_weights
from msenc.types import MsencError

OBJECTIVES = ("embeddings", "contrastive", "llm")
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class AlignmentSettings:
    """How a connector is aligned; see `fit`.

    Args:
        objective: ``embeddings`` regresses the query vectors on the label's token embeddings, ``contrastive`` tells the
            utterance's own label from the others in the batch, ``llm`` has the frozen LLM generate the label from the
            query vectors alone.
        keep: weight of the new connector's own output, less its mean, in the targets of ``embeddings``. The labels may
            say nothing of what replies need: with 0, only they remain in the output.
        steps: optimizer steps.
        batch_size: approximate number of utterances per step.
        lr: highest learning rate of AdamW: a linear rise over `warmup_steps`, then a linear fall to 0.
        warmup_steps: steps of the rise.
        weight_decay: of AdamW.
        temperature: of the contrastive objective's softmax.
        seed: of the connector's initial weights and of the batches; runs with other seeds share an alignment.
    """

    objective: str = "embeddings"
    keep: float = 0.0
    steps: int = 150
    batch_size: int = 64
    lr: float = 3e-3
    warmup_steps: int = 20
    weight_decay: float = 0.01
    temperature: float = 0.07
    seed: int = 1

    def __post_init__(self) -> None:
        """Refuse invalid settings."""
        if self.objective not in OBJECTIVES:
            raise MsencError(f"align.objective: found {self.objective!r}, expected one of {', '.join(OBJECTIVES)}.")
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise MsencError(f"align.{name}: found {getattr(self, name)}, expected 1 or more.")
        for name in ("lr", "temperature"):
            if not getattr(self, name) > 0:
                raise MsencError(f"align.{name}: found {getattr(self, name)}, expected a number above 0.")
        if not 0 <= self.keep < math.inf:
            raise MsencError(f"align.keep: found {self.keep}, expected 0 or more.")


@dataclass(frozen=True)
class Known:
    """An utterance and the token ids of its label."""

    frames: np.ndarray  # (T, D) float16
    ids: tuple[int, ...]


class EmbeddingTargets:
    """Token ids -> targets of Q query vectors: embeddings (Q, H), each with a root mean square of 1.

    With fewer tokens than queries, the last one is repeated; with more, they are averaged over equal spans.

    Args:
        embeddings: (V, H) of the LLM's tokens.
        num_queries: Q.
    """

    def __init__(self, embeddings: Tensor, num_queries: int) -> None:
        self.table = embeddings.detach().float()
        self.scale = float(self.table.square().mean().sqrt())
        self.num_queries = num_queries

    def __call__(self, ids: Sequence[int]) -> Tensor:
        """(Q, H)."""
        own = [*ids, *[ids[-1]] * (self.num_queries - len(ids))]
        vectors = self.table[torch.tensor(own, device=self.table.device)]  # (L, H)
        weights = span_weights(torch.ones(1, len(own), dtype=torch.bool, device=vectors.device), self.num_queries)
        return _unit(weights[0] @ vectors)

    def mean(self, ids: Sequence[int]) -> Tensor:
        """(H,): the mean of the words' embeddings."""
        return self.table[torch.tensor(ids, device=self.table.device)].mean(0)


def embedding_loss(outputs: Tensor, targets: Tensor, scale: float) -> Tensor:
    """Mean squared error between queries (N, Q, H) and targets (N, Q, H), relative to an embedding's mean square."""
    return (outputs.float() / scale - targets).square().mean()


def contrastive_loss(outputs: Tensor, words: Tensor, temperature: float) -> Tensor:
    """Symmetric InfoNCE between utterances (N, Q, H) and the mean embeddings of their labels (N, H).

    Both are centred in the batch, because the component common to all labels would make all pairs alike.

    Source: Radford et al., CLIP (arXiv 2103.00020).
    """
    said = outputs.float().mean(1)
    said, wanted = (normalize(x - x.mean(0), dim=-1) for x in (said, words))
    scores = said @ wanted.T / temperature  # (N, N)
    own = torch.arange(len(scores), device=scores.device)
    return (cross_entropy(scores, own) + cross_entropy(scores.T, own)) / 2


@dataclass
class AlignmentState:
    """The state of a fit: everything needed to resume it.

    Args:
        step: optimizer steps done.
        connector: state of the connector.
        optimizer: state of AdamW.
        random: state of torch's generator, used by dropout.
    """

    step: int
    connector: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    random: Tensor


def fit(
    connector: nn.Module,
    settings: AlignmentSettings,
    batch_of: Callable[[int], Sequence[Known]],
    loss_of: Callable[[nn.Module, Sequence[Known]], Tensor],
    state: AlignmentState | None = None,
    on_step: Callable[[int, float, Callable[[], AlignmentState]], object] = lambda *_: None,
) -> None:
    """Fit a connector, from the start or from a saved state, with the same result bit for bit on a CPU.

    Args:
        connector: changed in place, except for frozen parameters.
        settings: of the fit.
        batch_of: step -> the utterances to learn from.
        loss_of: (connector, utterances) -> loss; from `make_loss`.
        state: of an earlier fit, or None.
        on_step: called after each step with the number of steps done, the loss, and a function that returns the state.
    """
    trained = [p for p in connector.parameters() if p.requires_grad]
    if not trained:
        raise MsencError("align: the connector has no trainable parameters. Set model.connector.freeze_core=false.")
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay)
    first = 0
    if state is not None:
        connector.load_state_dict(state.connector)
        optimizer.load_state_dict(state.optimizer)
        torch.set_rng_state(state.random)
        first = state.step
    connector.train()
    for step in range(first, settings.steps):
        for group in optimizer.param_groups:
            rise = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
            group["lr"] = settings.lr * rise * (1 - step / settings.steps)
        loss = loss_of(connector, batch_of(step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
        optimizer.step()
        on_step(
            step + 1,
            loss.item(),
            lambda: AlignmentState(
                step + 1,  # noqa: B023 (called before the next step, if at all)
                {name: tensor.detach().clone() for name, tensor in connector.state_dict().items()},
                deepcopy(optimizer.state_dict()),
                torch.get_rng_state(),
            ),
        )
    connector.eval()


def make_loss(
    settings: AlignmentSettings, targets: EmbeddingTargets, new: nn.Module
) -> Callable[[nn.Module, Sequence[Known]], Tensor]:
    """The loss of the objectives that need no forward pass of the LLM.

    Args:
        settings: of the fit.
        targets: of the labels.
        new: the connector before the fit, of which a copy is kept if the targets need it.
    """
    first = deepcopy(new).eval() if settings.keep and settings.objective == "embeddings" else None

    def of_embeddings(connector: nn.Module, known: Sequence[Known]) -> Tensor:
        wanted = torch.stack([targets(k.ids) for k in known])
        if first is not None:
            with torch.no_grad():
                own = connect(first, known).float() / targets.scale
            wanted = _unit(wanted + settings.keep * (own - own.mean(0)))
        return embedding_loss(connect(connector, known), wanted, targets.scale)

    def of_contrast(connector: nn.Module, known: Sequence[Known]) -> Tensor:
        words = torch.stack([targets.mean(k.ids) for k in known])
        return contrastive_loss(connect(connector, known), words, settings.temperature)

    return of_contrast if settings.objective == "contrastive" else of_embeddings


def connect(connector: nn.Module, known: Sequence[Known]) -> Tensor:
    """The connector's output (N, Q, H) for utterances of any length."""
    parameter = next(connector.parameters())
    frames = [torch.from_numpy(k.frames) for k in known]
    features = nn.utils.rnn.pad_sequence(frames, batch_first=True).to(parameter.device, parameter.dtype)  # (N, T, D)
    lengths = torch.tensor([len(f) for f in frames], device=parameter.device)
    mask = torch.arange(features.shape[1], device=parameter.device)[None] < lengths[:, None]
    return connector(features, mask)


@torch.no_grad()
def score(
    connector: nn.Module, known: Sequence[Known], targets: EmbeddingTargets, objective: str, batch_size: int = 64
) -> dict[str, float]:
    """How well the connector's output identifies the labels of utterances.

    Args:
        connector: in eval mode.
        known: labelled utterances that it was not fitted on.
        targets: of the fit.
        objective: of the fit.
        batch_size: utterances per forward pass.

    Returns:
        ``accuracy``, how often an utterance's own label is the nearest of all distinct labels;
        ``chance``, the share of the most frequent label; ``spread``, the share of the output's power that differs
        between utterances.
    """
    outputs = torch.cat([connect(connector, known[at : at + batch_size]) for at in range(0, len(known), batch_size)])
    different = list(dict.fromkeys(k.ids for k in known))
    own = torch.tensor([different.index(k.ids) for k in known])
    if objective == "contrastive":
        said, words = outputs.float().mean(1), torch.stack([targets.mean(ids) for ids in different])
        said, words = (normalize(x - x.mean(0), dim=-1) for x in (said, words))
        nearest = (said @ words.T).argmax(1)
    else:
        words = torch.stack([targets(ids) for ids in different]).flatten(1)  # (K, Q*H)
        nearest = torch.cdist((outputs.float() / targets.scale).flatten(1), words).argmin(1)
    return {
        "accuracy": float((nearest.cpu() == own).float().mean()),
        "chance": float(own.bincount().max() / len(own)),
        "spread": spread(outputs),
    }


def spread(outputs: Tensor) -> float:
    """The share of the power of outputs (N, Q, H) that differs between utterances: 0 if all are equal.

    Example:
        >>> spread(torch.tensor([[[1.0]], [[-1.0]]])), spread(torch.tensor([[[1.0]], [[1.0]]]))
        (1.0, 0.0)
    """
    outputs = outputs.detach().float()
    power = outputs.square().mean()
    return float((outputs - outputs.mean(0)).square().mean() / power) if power > 0 else 0.0


@contextmanager
def own_random_numbers(seed: int) -> Any:
    """Random draws inside depend only on `seed`, and do not affect those outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
