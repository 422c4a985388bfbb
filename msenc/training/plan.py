"""Predicts what a run takes before it starts: batches, steps and peak memory.

DialogueDataModule -> counts; shapes of model and largest batch -> bytes. Nothing is computed or loaded.
"""

import copy
import math
import statistics
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from msenc.data.datamodule import DialogueDataModule
from msenc.models.conversation import ConversationModel
from msenc.models.llm import parts_used_alone
from msenc.models.quantize import is_state, tensors_of
from msenc.training.assembly import HALVED, MIXED
from msenc.types import Batch


def batch_tokens(datamodule: DialogueDataModule, units: Sequence[int]) -> tuple[int, int]:
    """Tokens of a training batch: without and with padding."""
    rows = [n for i in units for n in datamodule.row_lengths("train", datamodule.units("train")[i])]
    return sum(rows), len(rows) * max(rows) if datamodule.layout == "sample" else sum(rows)


def count_batches(datamodule: DialogueDataModule, trainer: Mapping[str, Any]) -> dict[str, Any]:
    """The training batches of an epoch, and the steps of a run.

    Args:
        datamodule: of the run, set up.
        trainer: Lightning's arguments, of which those that limit the steps are used.

    Returns:
        Plain values; tokens per batch are for the first epoch (others differ in composition, hardly in size).
    """
    units = datamodule.units("train")
    batches = datamodule.train_batches().batches_of(0)
    real, laid_out = zip(*(batch_tokens(datamodule, batch) for batch in batches), strict=True)
    budget = datamodule.max_tokens_per_batch
    by_dialogue = Counter(unit.dialogue for unit in units)
    steps = math.ceil(len(batches) / trainer.get("accumulate_grad_batches", 1))
    bounds = [steps * epochs for epochs in (trainer.get("max_epochs"),) if epochs is not None and epochs >= 0]
    bounds += [most for most in (trainer.get("max_steps"),) if most is not None and most >= 0]
    return {
        "dialogues": len(datamodule.lengths("train")),
        "units": len(units),
        "split_dialogues": sum(n > 1 for n in by_dialogue.values()) if datamodule.layout == "dialogue" else 0,
        "batch_size": datamodule.batch_size,
        "max_tokens_per_batch": budget,
        "batches_per_epoch": len(batches),
        "steps": min(bounds, default=None),
        "tokens_per_epoch": sum(real),
        "tokens_per_batch": {
            "min": min(laid_out),
            "median": round(statistics.median(laid_out)),
            "max": max(laid_out),
        },
        "fill": None if budget is None else sum(laid_out) / (budget * len(batches)),
        "padding": 1 - sum(real) / sum(laid_out),
    }


def largest_batch(datamodule: DialogueDataModule, world_size: int) -> Batch:
    """The largest per-process share of a batch in the first epoch, as the model receives it."""
    shares = [
        units
        for rank in range(world_size)
        for units in datamodule.train_batches(rank, world_size).batches_of(0)
        if units
    ]
    largest = max(shares, key=lambda units: batch_tokens(datamodule, units)[1])
    return datamodule.train_batch(largest)


def predict_memory(
    model: ConversationModel,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    batch: Batch,
    precision: str = "32-true",
    world_size: int = 1,
    is_shared_out: bool = False,
) -> dict[str, int]:
    """Peak memory of a process in a training step, in bytes, by category.

    The second of two steps runs on tensors that have a shape, a type and a CPU device, but no content; allocations
    and frees are counted. Not included: Python and the libraries (0.4 GiB), temporary buffers of
    kernels, and memory that the allocator does not return: with glibc, on CPUs, 13 to 55 % of the peak.

    Args:
        model: on the meta device; it is changed.
        optimizer: parameters -> optimizer.
        batch: the largest one.
        precision: as in Lightning.
        world_size: number of processes; with several, each keeps a second copy of its gradients to exchange them.
        is_shared_out: each process holds its share of weights, gradients and optimizer state (`sharding`), and
            gathers what it computes with.

    Returns:
        Bytes of ``base_weights``, ``trainable_weights``, ``gradients``, ``optimizer_state``, ``activations`` (what is
        the rest of the peak: saved for the backward pass, logits, mask, temporaries), ``gathered_weights`` where
        they are shared out, and ``peak``, their sum.
    """
    if precision in HALVED:
        model.to(HALVED[precision])
    mode = FakeTensorMode()
    with mode:
        _give_shapes(model)
        batch = apply_to_collection(batch, Tensor, mode.from_tensor)
    trainable = [p for p in model.parameters() if p.requires_grad]
    weights = _size(trainable)
    scales = [t for parameter in model.parameters() for t in tensors_of(parameter)]
    base = _size([*model.parameters(), *model.buffers(), *scales]) - weights
    mixed: AbstractContextManager = nullcontext()
    model.train()
    memory = _Memory()
    with mode, memory:
        stepper = optimizer(trainable)
        for _ in range(2):
            memory.peak = memory.now
            if precision in MIXED:
                mixed = torch.autocast("cpu", MIXED[precision])
            with mixed:
                loss = model(batch).nll.sum()
            stepper.zero_grad()
            loss.backward()
            del loss
            stepper.step()
    gradients = _size([p.grad for p in trainable if p.grad is not None])
    state = _size([t for values in stepper.state.values() for t in values.values() if isinstance(t, Tensor)])
    activations = memory.peak - gradients - state
    parts = {
        "base_weights": base,
        "trainable_weights": weights,
        "gradients": gradients * (2 if world_size > 1 and not is_shared_out else 1),
        "optimizer_state": state,
    }
    if is_shared_out:
        parts = {name: -(-size // world_size) for name, size in parts.items()}
        parts["gathered_weights"] = _gathered(model)
    parts["activations"] = activations
    return {**parts, "peak": sum(parts.values())}


def _gathered(model: ConversationModel) -> int:
    """What one process holds in full while it computes: the largest part, what is in no part, and gradients of both.

    Received weights are copied to their places, while those of the next part arrive: three times the largest part.
    """
    parts = [[*part.parameters()] for part in parts_used_alone(model.llm)]
    in_parts = {id(parameter) for part in parts for parameter in part}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in in_parts]
    largest = max(parts, key=_size)
    return 2 * _size(rest) + 3 * _size(largest) + 2 * _size(p for p in [*rest, *largest] if p.requires_grad)


def _size(tensors: Iterable[Tensor]) -> int:
    """Total bytes of tensors; shared storage counts once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _give_shapes(model: nn.Module) -> None:
    """Replace meta tensors by tensors of the active mode; tied ones stay tied, and quantized ones keep their scales."""
    made: dict[int, Tensor] = {}
    parameters: dict[int, nn.Parameter] = {}

    def give(old: Any) -> Any:
        if isinstance(old, Tensor):
            place = old.untyped_storage()._cdata
            if place not in made:
                made[place] = torch.empty(old.shape, dtype=old.dtype, device="cpu")
            return made[place]
        if not is_state(old):
            return old
        new = copy.copy(old)
        vars(new).update({name: give(value) for name, value in vars(old).items()})
        return new

    for module in model.modules():
        for name, old in module._parameters.items():
            if old is None:
                continue
            if id(old) not in parameters:
                parameters[id(old)] = nn.Parameter(give(old), requires_grad=old.requires_grad)
                vars(parameters[id(old)]).update({name: give(value) for name, value in vars(old).items()})
            module._parameters[name] = parameters[id(old)]
        for name, old in module._buffers.items():
            module._buffers[name] = give(old)


class _Memory(TorchDispatchMode):
    """Counts live bytes allocated while it is active, and their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary(ref_type=weakref.ref)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in given and storage not in self._known:
                    self._known[storage] = None
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, storage.nbytes())
        return out

    def _free(self, size: int) -> None:
        self.now -= size
