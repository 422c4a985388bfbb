"""The number of torch threads, and how they wait for each other.

Sums that several threads share are rounded in another order, so the number follows from what does not change during a
run: the size of the model and the cores, never the current load. Busy cores are handled by how threads wait.
`docs/performance.md` has the figures.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

SMALL = 10_000_000
"""Parameters below which a model uses one thread: a second gains little on idle cores, and loses on busy ones."""

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""A container's CPU limit (cgroup v2): microseconds over all cores, per period."""


def wait_passively() -> None:
    """Let waiting threads sleep. Call it before torch is loaded: OpenMP reads the setting once.

    By default they spin, each on a core that the thread they wait for may need: with one busy process, a
    step then takes several times as long, up to a hundred. A value set by the user is kept.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def usable_cores() -> int:
    """The number of cores that the system, a scheduler or a container allows this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, quota_cores(QUOTA.read_text(encoding="ascii")) or cores) if QUOTA.is_file() else cores


def quota_cores(text: str) -> int | None:
    """The cores that a ``cpu.max`` allows, at least one; None if it sets no limit.

    Example:
        >>> quota_cores("150000 100000"), quota_cores("max 100000")
        (2, None)
    """
    quota, _, period = text.partition(" ")
    return math.ceil(int(quota) / int(period)) if quota.isdecimal() else None


def choose_threads(
    num_parameters: int,
    cores: int,
    environment: Mapping[str, str] = os.environ,
    before: int | None = None,
    given: int | None = None,
) -> int:
    """The number of threads for a model.

    Args:
        num_parameters: of the model, frozen ones included.
        cores: that may be used.
        environment: in which OMP_NUM_THREADS, if it is a number, overrides all but `given`.
        before: the number before the run was resumed, needed for a bit-for-bit equal result.
        given: the number that the run's config asks for.

    Example:
        >>> choose_threads(500_000, cores=8, environment={}), choose_threads(135_000_000, cores=8, environment={})
        (1, 8)
    """
    if given is not None:
        return given
    wanted = wanted_threads(environment)
    if wanted is not None:
        return wanted
    if before is not None:
        return before
    return 1 if num_parameters < SMALL else cores


def wanted_threads(environment: Mapping[str, str] = os.environ) -> int | None:
    """The number in OMP_NUM_THREADS; None if it is not set, or has a value that OpenMP does not accept."""
    # A list, one number per level of nesting, is OpenMP's other form.
    found = re.fullmatch(r"\s*([1-9]\d*)\s*(,.*)?", environment.get("OMP_NUM_THREADS", ""))
    return int(found[1]) if found else None


def settle_threads(num_parameters: int, before: int | None = None, given: int | None = None) -> int:
    """Set torch's threads to `choose_threads`' number; returns it."""
    import torch

    threads = choose_threads(num_parameters, usable_cores(), before=before, given=given)
    torch.set_num_threads(threads)
    return threads


@contextmanager
def one_thread() -> Iterator[None]:
    """Make torch sum in a fixed order, whatever the number of cores and other processes."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
