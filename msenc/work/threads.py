"""How many threads torch computes with, and how they wait for each other.

Sums that several threads share are rounded in another order, so the number follows from what does not change during a
run: the size of the model and the cores, never the load of a moment. That cores are busy is met by how threads wait.
`docs/performance.md` has the figures.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

SMALL = 10_000_000
"""Parameters below which a model computes on one thread: a second one gains little alone, and loses beside others."""

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""What a container may use (cgroup v2): microseconds of all cores together, per period."""


def wait_passively() -> None:
    """Let threads that wait for others sleep. It has to be called before torch is loaded: OpenMP asks once.

    By OpenMP's own way they spin, each on a core that the thread they wait for may need: beside one busy process, a
    step then takes several times as long, up to a hundred. What the user has set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def usable_cores() -> int:
    """The cores that this process may use: what the system, a scheduler or a container leaves to it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, quota_cores(QUOTA.read_text(encoding="ascii")) or cores) if QUOTA.is_file() else cores


def quota_cores(text: str) -> int | None:
    """The cores that a ``cpu.max`` allows, at least one; None where it sets no limit.

    Example:
        >>> quota_cores("150000 100000"), quota_cores("max 100000")
        (2, None)
    """
    quota, _, period = text.partition(" ")
    return math.ceil(int(quota) / int(period)) if quota.isdecimal() else None


def choose_threads(
    num_parameters: int, cores: int, environment: Mapping[str, str] = os.environ, before: int | None = None
) -> int:
    """The number of threads for a model.

    Args:
        num_parameters: of the model, frozen ones included.
        cores: that may be used.
        environment: where OMP_NUM_THREADS, if it holds a number, has the last word.
        before: what a run that is continued had; it ends as the unbroken one only with the same number.

    Example:
        >>> choose_threads(500_000, cores=8, environment={}), choose_threads(135_000_000, cores=8, environment={})
        (1, 8)
    """
    wanted = wanted_threads(environment)
    if wanted is not None:
        return wanted
    if before is not None:
        return before
    return 1 if num_parameters < SMALL else cores


def wanted_threads(environment: Mapping[str, str] = os.environ) -> int | None:
    """What OMP_NUM_THREADS asks for; None where it is not set, or holds what OpenMP does not take either."""
    # A list, one number per level of nesting, is OpenMP's other form.
    found = re.fullmatch(r"\s*([1-9]\d*)\s*(,.*)?", environment.get("OMP_NUM_THREADS", ""))
    return int(found[1]) if found else None


def settle_threads(num_parameters: int, before: int | None = None) -> int:
    """Let torch compute with `choose_threads`' number from here on; returns it."""
    import torch

    threads = choose_threads(num_parameters, usable_cores(), before=before)
    torch.set_num_threads(threads)
    return threads


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch sum in one order, whatever the number of cores and of processes beside this one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
