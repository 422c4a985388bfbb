"""The processes of one run: which is the first, and how it shares its decisions with the others."""

import os
from datetime import timedelta
from typing import Any

LONGEST = timedelta(hours=1)
"""How long a process waits for the first one's value."""

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Environment variables that number a run's processes; the first that is there holds, as for Lightning."""

_stores: list[Any] = []  # served by the first process while it lives


def is_first_process() -> bool:
    """Whether this is the process that decides and writes, among those of one run."""
    from lightning_utilities.core.rank_zero import rank_zero_only

    # Lightning sets the rank when it is imported, which takes seconds. Until then, the variables that it reads say it.
    rank = getattr(rank_zero_only, "rank", None)
    return int(next((os.environ[name] for name in RANKS if name in os.environ), 0) if rank is None else rank) == 0


def told_by_the_first(name: str, value: str) -> str:
    """The first process's value, in all processes started by torchrun or srun; otherwise the value itself.

    Processes started by Lightning get it through their command line.

    Args:
        name: of the value; each is shared once.
        value: to share, if this is the first process.
    """
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    environment = next((kind() for kind in (TorchElasticEnvironment, SLURMEnvironment) if kind.detect()), None)
    if environment is None or environment.world_size() == 1:
        return value
    os.environ.setdefault("MASTER_ADDR", environment.main_address)
    os.environ.setdefault("MASTER_PORT", str(environment.main_port))
    # A store rather than a process group, which Lightning creates with the backend of its devices.
    store, *_ = next(rendezvous("env://", environment.global_rank(), environment.world_size(), timeout=LONGEST))
    _stores.append(store)
    store = PrefixStore("msenc", store)
    if is_first_process():
        store.set(name, value)
    return store.get(name).decode()
