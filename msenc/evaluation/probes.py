"""Linear probes: how many bits of a label can be read off vectors, on speakers (or dialogues) never seen in training.

vectors (N, D), labels, groups -> bits per example, with the same of permuted labels

A probe is a multinomial logistic regression with an L2 penalty. Each group of examples is in one fold; of five folds,
one is scored, the next chooses the penalty, and the others train. Bits are the rise of log2 p(label) over the label's
frequency in training, so a probe that finds nothing scores about 0, and a perfect one the label's entropy.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from msenc.types import MsencError

FOLDS = 5
PERMUTATIONS = 5
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Per example and squared weight, for vectors of unit variance."""
COMPONENTS = 256
"""Principal components that a probe reads at most: more than the examples of most splits can tell apart."""
PRECISION = 1e-3
"""Dimensions that vary by less than this share of the vectors' size vary below the precision that LLMs compute in."""
MAX_STEPS = 1000
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Probed:
    """What probes find in one set of vectors.

    Args:
        bits: (N,) of each example.
        permuted: mean bits of each permutation of the labels.
    """

    bits: np.ndarray
    permuted: tuple[float, ...]


def fold_groups(groups: Sequence[Hashable], seed: int = 0) -> np.ndarray:
    """Fold of each example: groups stay whole, and folds are about equally large.

    Returns:
        (N,) from 0 to `FOLDS` - 1.

    Raises:
        MsencError: there are fewer groups than folds.

    Example:
        >>> folds = fold_groups(["a", "b", "c", "d", "e", "a"]).tolist()
        >>> folds[0] == folds[-1], sorted(set(folds))
        (True, [0, 1, 2, 3, 4])
    """
    names, places, sizes = np.unique(np.array(groups, dtype=str), return_inverse=True, return_counts=True)
    if len(names) < FOLDS:
        raise MsencError(f"probes: found {len(names)} groups of examples, expected {FOLDS} or more, one for each fold.")
    order = np.random.default_rng(seed).permutation(len(names))
    loads, folds = [0] * FOLDS, np.zeros(len(names), dtype=int)
    for group in sorted(order, key=lambda group: -sizes[group]):
        folds[group] = loads.index(min(loads))
        loads[folds[group]] += sizes[group]
    return folds[places]


def probe(vectors: np.ndarray, labels: np.ndarray, folds: np.ndarray, seed: int = 0) -> Probed:
    """Probe vectors for a label.

    Args:
        vectors: (N, D).
        labels: (N,) class of each example, from 0.
        folds: (N,) from `fold_groups`.
        seed: of the permutations.
    """
    return probe_each([vectors], labels, folds, seed)[1]


def probe_each(
    sets: Sequence[np.ndarray], labels: np.ndarray, folds: np.ndarray, seed: int = 0
) -> tuple[list[Probed], Probed]:
    """Probe several sets of vectors of the same examples; what is found in each, and in the best of them.

    Which is the best is chosen as the penalty is, by the fold that is neither scored nor trained on, and for permuted
    labels likewise: so there is nothing to gain by the choice among many sets that hold nothing.

    Args:
        sets: (N, D) each, of any widths.
        labels: as in `probe`.
        folds: as in `probe`.
        seed: as in `probe`.
    """
    random = np.random.default_rng(seed)
    y = torch.from_numpy(np.stack([labels, *(random.permutation(labels) for _ in range(PERMUTATIONS))]))  # (1+P, N)
    found, fits = zip(*(_probe(vectors, y, folds) for vectors in sets), strict=True)
    best = torch.stack(fits).argmax(0)[:, folds]  # (1+P, N)
    chosen = torch.stack(found).gather(0, best[None])[0]
    return [_probed(bits) for bits in found], _probed(chosen)


def _probed(bits: Tensor) -> Probed:
    return Probed(bits[0].double().numpy(), tuple(bits[1:].mean(1).tolist()))


def _probe(vectors: np.ndarray, y: Tensor, folds: np.ndarray) -> tuple[Tensor, Tensor]:
    """Bits (1+P, N) of each labelling `y` (1+P, N), and how well its probes fit the held-out fold, (1+P, FOLDS)."""
    x, classes = torch.from_numpy(np.asarray(vectors, dtype=np.float32)), int(y.max()) + 1
    bits, fit = torch.zeros(y.shape), torch.zeros(len(y), FOLDS)
    for fold in range(FOLDS):
        scored = torch.from_numpy(folds == fold)
        held_out = torch.from_numpy(folds == (fold + 1) % FOLDS)
        train = ~(scored | held_out)
        reduced = _principal(x, train)
        each = y.repeat_interleave(len(PENALTIES), dim=0)  # ((1+P)*L, N)
        weights = fit_logistic(reduced[train], each[:, train], torch.tensor(PENALTIES).repeat(len(y)), classes)
        fits = log_p(reduced[held_out], weights, each[:, held_out]).sum(1).view(len(y), -1)  # (1+P, L)
        fit[:, fold] = fits.max(1).values
        chosen = fits.argmax(1) + len(PENALTIES) * torch.arange(len(y))
        found = log_p(reduced[scored], weights[chosen], y[:, scored])
        counts = one_hot(y[:, train], classes).sum(1) + 1.0  # (1+P, C), one more of each, so that none has p = 0
        prior = (counts / counts.sum(1, keepdim=True)).log().gather(1, y[:, scored])
        bits[:, scored] = (found - prior) / np.log(2)
    return bits, fit


def entropy(labels: np.ndarray) -> float:
    """Entropy of a label in bits.

    Example:
        >>> entropy(np.array([0, 1, 1, 0]))
        1.0
    """
    shares = np.bincount(labels) / len(labels)
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def fit_logistic(x: Tensor, y: Tensor, penalties: Tensor, classes: int) -> Tensor:
    """Fit B regressions at once; the bias is not penalized.

    Minimizes ``mean cross entropy + penalty / 2 * |W|^2`` by accelerated steps that an upper bound of the Hessian
    scales, so that no step depends on the other regressions.

    Args:
        x: (N, R), centred, of orthogonal columns (principal components).
        y: (B, N) classes.
        penalties: (B,).
        classes: C.

    Returns:
        (B, R + 1, C) weights, the bias last.

    Source: D. Bohning, Annals of the Institute of Statistical Mathematics 44 (1992) 197-200, for the bound;
    Y. Nesterov's acceleration, restarted by B. O'Donoghue and E. Candes (arXiv 1204.3982).
    """
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)  # (N, R+1)
    targets = one_hot(y.T, classes).to(x)  # (N, B, C)
    penalty = torch.cat([torch.ones(x.shape[1] - 1), torch.zeros(1)])[:, None, None] * penalties[:, None]  # (R+1, B, 1)
    bound = x.square().mean(0)[:, None, None] / 2 + penalty
    weights = torch.zeros(x.shape[1], len(y), classes)
    ahead, momentum = weights, torch.ones(1, len(y), 1)
    for _ in range(MAX_STEPS):
        errors = (x @ ahead.flatten(1)).view(targets.shape).softmax(-1) - targets  # (N, B, C)
        gradient = (x.T @ errors.flatten(1)).view(weights.shape) / len(x) + penalty * ahead
        new = ahead - gradient / bound
        step = new - weights
        restarts = (gradient * step).sum((0, 2), keepdim=True) > 0
        following = torch.where(restarts, 1.0, (1 + (1 + 4 * momentum**2).sqrt()) / 2)
        ahead = new + torch.where(restarts, 0.0, (momentum - 1) / following) * step
        weights, momentum = new, following
        if (gradient.square() / bound).sum((0, 2)).max() < TOLERANCE:
            break
    return weights.transpose(0, 1)


def log_p(x: Tensor, weights: Tensor, y: Tensor) -> Tensor:
    """(B, N) log-probability in nats of each example's class; `x` (N, R), `weights` (B, R + 1, C), `y` (B, N)."""
    logits = x @ weights[:, :-1] + weights[:, -1:]  # (B, N, C)
    return logits.log_softmax(-1).gather(2, y[..., None])[..., 0]


def _principal(x: Tensor, train: Tensor) -> Tensor:
    """(N, D) -> (N, R): standardized by the training examples, rotated to their principal components."""
    own = x[train]
    mean = own.mean(0)
    floor = PRECISION * own.square().mean().sqrt() + torch.finfo(x.dtype).tiny
    scale = own.std(0)
    # (a constant dimension adds nothing, and neither does one of rounding errors)
    kept = scale > floor
    x = (x[:, kept] - mean[kept]) / scale[kept] / max(int(kept.sum()), 1) ** 0.5
    if not kept.any():
        return x
    _, spread, axes = torch.linalg.svd(x[train], full_matrices=False)
    return x @ axes[: min(COMPONENTS, int((spread > 1e-4 * spread[0]).sum()))].T
