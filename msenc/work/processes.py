"""The processes that train one run together: which is the first, and how it tells the others what it has decided."""

import os
from datetime import timedelta
from typing import Any

LONGEST = timedelta(hours=1)
"""That a process waits for the first one's word."""

_stores: list[Any] = []  # the first process serves them, as long as it lives


def is_first_process() -> bool:
    """Whether this is the process that decides and writes, of those that train one run together."""
    from lightning.pytorch.utilities import rank_zero_only  # late: train.py's --help must not wait for it

    return rank_zero_only.rank == 0


def told_by_the_first(name: str, value: str) -> str:
    """The first process's value, in every process that torchrun or srun has started; elsewhere the value itself.

    Processes that Lightning starts are told by their command line.

    Args:
        name: of the value; each is told once.
        value: what is told, where this is the first process.
    """
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    environment = next((kind() for kind in (TorchElasticEnvironment, SLURMEnvironment) if kind.detect()), None)
    if environment is None or environment.world_size() == 1:
        return value
    os.environ.setdefault("MASTER_ADDR", environment.main_address)
    os.environ.setdefault("MASTER_PORT", str(environment.main_port))
    # A store, and no process group: the group is Lightning's to make, with the backend of its devices.
    store, *_ = next(rendezvous("env://", environment.global_rank(), environment.world_size(), timeout=LONGEST))
    _stores.append(store)
    store = PrefixStore("msenc", store)
    if is_first_process():
        store.set(name, value)
    return store.get(name).decode()
