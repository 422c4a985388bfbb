"""One LLM over several processes (torch's FSDP2): each holds a share of its weights, gradients and optimizer's state.

trainer=fsdp2 -> Sharded (Lightning's strategy) -> ConversationModule.configure_model -> shard

The weights of a decoder layer, of the embedding and of the output layer are gathered while it computes; those of
everything else (norms, connectors; tied embeddings) during a whole forward or backward pass.
"""

import json
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed import tensor as dtensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from msenc.files import hash_file, read_json, reason_of, remove, sync_folder
from msenc.models.conversation import ConversationModel
from msenc.models.llm import parts_used_alone
from msenc.models.pretrained import check_tensors, load_torch_file
from msenc.types import MsencError

T = TypeVar("T")

CALLED_OUTSIDE_FORWARD = ("embed", "connect")
"""Methods of the model that callbacks and decoding call by themselves."""


def is_sharded(trainer: Mapping[str, Any]) -> bool:
    """Whether a trainer's config shares out the model; Lightning's own strategies are named by a word."""
    return isinstance(trainer.get("strategy"), Mapping)


def shard(model: ConversationModel, mesh: DeviceMesh) -> None:
    """Share out every parameter over the processes of a mesh, in groups that are gathered one after the other.

    What an LLM of `load_llm(by_shares=True)` lacks is read from its files, by each process its own rows.

    Args:
        model: changed in place; its parameters become DTensors.
        mesh: of one dimension.

    Raises:
        MsencError: the parameters that train together have several types.
    """
    parts = parts_used_alone(model.llm)
    in_parts = {id(p) for part in parts for p in part.parameters()}
    for group in (*(part.parameters() for part in parts), [p for p in model.parameters() if id(p) not in in_parts]):
        types = sorted({str(p.dtype) for p in group if p.requires_grad})
        if len(types) > 1:
            raise MsencError(
                f"trainer=fsdp2: found trainable weights of {' and '.join(types)} that are gathered together, expected "
                "one type. Keep what trains in float32 (model.llm.dtype=float32), or train an adapter (model.llm.lora)."
            )
    # A batch without streams leaves nothing to differentiate before the first adapter: its process would exchange
    # the first layer's gradients later than the others, and be taken for another exchange.
    model.llm.enable_input_require_grads()
    absent = [name for name, parameter in model.llm.named_parameters() if parameter.is_meta]
    for part in parts:
        fully_shard(part, mesh=mesh)
    # The root, too, lets its weights go after a forward pass: what reads or saves them finds shares at any time.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    if absent:
        _fill(model, absent, mesh)
    for method in CALLED_OUTSIDE_FORWARD:
        register_fsdp_forward_method(model, method)


def _fill(model: ConversationModel, names: Sequence[str], mesh: DeviceMesh) -> None:
    """Give the LLM's shares on the meta device memory, and their values."""
    tied = defaultdict(list)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            tied[id(parameter)].append((module, name))
    device = torch.device(mesh.device_type, torch.cuda.current_device()) if mesh.device_type == "cuda" else "cpu"
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    for (first, its_name), *others in tied.values():  # each module has made its own of what they share
        for module, name in others:
            module._parameters[name] = first._parameters[its_name]
    for name in names:
        parameter = model.llm.get_parameter(name)
        rows = -(-parameter.shape[0] // mesh.size())  # as torch.chunk cuts them
        share, start = parameter.to_local(), min(rows * mesh.get_local_rank(), parameter.shape[0])
        with torch.no_grad():
            share.copy_(model.llm.stored.read(name, start, start + len(share)))


def gather(model: ConversationModel) -> dict[str, Tensor]:
    """Name -> whole tensor of what trains, on the CPU of the first process; called in all of them."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)


class Sharded(ModelParallelStrategy):
    """All processes of a run share out one model, and write its checkpoints together."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1)

    def setup_environment(self) -> None:
        """One mesh of all processes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The process's share of all weights; the module keeps those that train."""
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The process's share of the optimizer's state."""
        return Strategy.optimizer_state(self, optimizer)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each process takes its share."""
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each process takes its share."""
        Strategy.load_optimizer_state_dict(self, checkpoint)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands over what `load_checkpoint` has read."""
        return True

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a folder under a temporary name, flush it to disk, then rename it; all processes together.

        ``last.ckpt`` becomes ``previous.ckpt``, so that one of them is complete at any time.

        Raises:
            MsencError: in all processes, if the disk refuses in one.
        """
        path = Path(self.broadcast(str(filepath)))
        partial = path.with_name(f".{path.name}.partial")
        shared: dict[str, Tensor] = {}
        rest = _take_out(checkpoint, shared)
        rest[SHAPES] = {name: list(tensor.shape) for name, tensor in shared.items()}
        refusal = f"{path}: cannot be written ({{}}). Is the disk full?"
        self._agree(refusal, lambda: _make_anew(partial) if self.is_global_zero else None)
        self._agree(refusal, lambda: dcp.save(shared, storage_writer=_writer(partial)))
        hashes = self._agree(refusal, lambda: _hash_files(partial, self.global_rank, self.world_size))
        self._agree(refusal, lambda: _finish(partial, path, rest, hashes) if self.is_global_zero else None)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a folder; each process holds its share of the tensors, whatever number of processes wrote it.

        Raises:
            MsencError: in all processes, if one cannot read its share, or finds NaN or infinity in it.
        """
        path = Path(self.broadcast(str(checkpoint_path)))
        saved: dict[str, Any] = {}

        def read() -> None:
            saved.update(read_folder(path, self.device_mesh["data_parallel"]))
            for key in ("state_dict", "average", "reference"):
                check_tensors({name: t.to_local() for name, t in saved.get(key, {}).items()}, f"{path}, {key}")

        self._agree(f"{path}: cannot be read as a checkpoint ({{}}).", read)
        return saved

    def _agree(self, refusal: str, action: Callable[[], T]) -> list[T]:
        """What each process's action returns, when all are done; a failure of one is a refusal in all."""
        try:
            found: tuple[T | None, str | None] = (action(), None)
        except MsencError as error:
            found = (None, str(error))
        except CheckpointException as error:
            found = (None, refusal.format(_first_failure(error)))
        except (OSError, ValueError, RuntimeError) as error:
            found = (None, refusal.format(reason_of(error)[:300]))
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, found)
        if failed := [reason for _, reason in everyone if reason]:
            raise MsencError(failed[0])
        return [value for value, _ in everyone]


# ---------------------------------------------------------------------------------------------------- folders

META, CHECKSUMS = "meta.pt", "checksums.json"
"""Of a folder: everything but shared tensors; SHA-256 of its files. Its tensors are safetensors, as torch's distributed
checkpoints write them; their usual format would be pickled."""

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"

SHAPES = "shapes_of_shared_tensors"
"""Key in `META`: name in the safetensors -> shape of the whole tensor."""

PLACE = "shared tensor: "
"""Stands for a tensor in `META`, followed by its name in the safetensors."""


def _writer(folder: Path) -> HuggingFaceStorageWriter:
    return HuggingFaceStorageWriter(str(folder), save_distributed=True)


def _take_out(value: Any, shared: dict[str, Tensor], name: str = "") -> Any:
    """Plain containers with shared tensors replaced by their places; these are put into `shared`."""
    if isinstance(value, DTensor):
        shared[name] = value
        return PLACE + name
    if isinstance(value, Mapping):
        return {key: _take_out(inner, shared, f"{name}/{key}".lstrip("/")) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_take_out(inner, shared, f"{name}/{i}") for i, inner in enumerate(value))
    return value


def _put_in(value: Any, shared: Mapping[str, Tensor]) -> Any:
    if isinstance(value, str) and value.startswith(PLACE):
        return shared[value.removeprefix(PLACE)]
    if isinstance(value, dict):
        return {key: _put_in(inner, shared) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_put_in(inner, shared) for inner in value)
    return value


def _first_failure(error: CheckpointException) -> str:
    """Why the first process that failed did."""
    cause, _ = next(iter(error.failures.values()))
    return reason_of(cause)[:300]


def _make_anew(folder: Path) -> None:
    remove(folder)
    folder.mkdir(parents=True)


def _hash_files(folder: Path, rank: int, world_size: int) -> dict[str, str]:
    """SHA-256 of a process's share of the files."""
    files = sorted(file for file in folder.iterdir() if file.name != CHECKSUMS)
    return {file.name: hash_file(file) for file in files[rank::world_size]}


def _finish(partial: Path, path: Path, rest: Mapping[str, Any], hashes: Sequence[Mapping[str, str]]) -> None:
    with (partial / META).open("wb") as file:
        torch.save(rest, file)
        file.flush()
        os.fsync(file.fileno())
    known = {name: value for some in hashes for name, value in some.items()} | {META: hash_file(partial / META)}
    with (partial / CHECKSUMS).open("w", encoding="utf-8") as file:
        json.dump(known, file)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(partial)
    if path.name == LAST and path.exists():
        _exchange(path, path.with_name(PREVIOUS))
    _exchange(partial, path)
    sync_folder(path.parent)


def _exchange(new: Path, place: Path) -> None:
    """Let a folder take another's place; a folder cannot be renamed onto one that has files."""
    old = place.with_name(f".{place.name}.old")
    remove(old)
    if place.exists():
        place.rename(old)
    new.rename(place)
    remove(old)


def read_meta(folder: Path) -> dict[str, Any]:
    """Verify the checksums of a folder; its content, with places instead of the shared tensors.

    Raises:
        ValueError: it is incomplete, changed, or no such folder.
        OSError: a file cannot be read.
    """
    known = read_json(folder / CHECKSUMS, dict[str, str])
    found = {file.name for file in folder.iterdir() if file.is_file()} - {CHECKSUMS}
    if META not in known or found != known.keys():
        odd = sorted(found ^ (known.keys() | {META}))
        raise ValueError(f"its files differ from those that it names: {', '.join(odd[:3])}")
    for name in sorted(known):
        if hash_file(folder / name) != known[name]:
            raise ValueError(f"the checksum of {name} is wrong")
    return load_torch_file(folder / META, mmap=False)


def read_folder(folder: Path, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """The content of a folder whose checksums have been verified.

    Args:
        folder: a checkpoint.
        mesh: of the processes that share out the tensors; None: whole, in this process.

    Raises:
        ValueError: its files do not belong together.
        OSError: a file cannot be read.
    """
    meta = load_torch_file(folder / META, mmap=False)
    stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    tensors = {}
    for name, shape in meta.pop(SHAPES).items():
        facts = stored.get(name)
        held = sum(math.prod(chunk.sizes) for chunk in facts.chunks) if facts else 0
        if held != math.prod(shape) or list(facts.size) != shape:
            raise ValueError(f"shares of {name} are missing")
        dtype = facts.properties.dtype
        tensors[name] = (
            torch.empty(facts.size, dtype=dtype)
            if mesh is None
            else dtensor.empty(facts.size, dtype=dtype, device_mesh=mesh, placements=[dtensor.Shard(0)])
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # said of `no_dist`
        try:
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=mesh is None)
        except CheckpointException as error:  # which is no Exception
            raise ValueError(_first_failure(error)) from error
    return _put_in(meta, tensors)
