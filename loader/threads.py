"""How many threads compute, and how they wait for work: the libraries below torch read it once, as they are loaded.

OpenMP's threads spin for some milliseconds after each product, in case there is another. On a machine that is theirs
this saves a wake-up; where others compute too, or a quota is used up, they wait on processors that the thread with the
work needs.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from functools import cache
from pathlib import Path

from .control_groups import PROC, group_folders, lines
from .kernels.system_calls import cores

logger = logging.getLogger("quantload")

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""What says in the environment how threads wait."""
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def processor_quota(proc: Path = PROC) -> float | None:
    """The processors whose time the control groups of this process allow it, such as 1.5; None: all there are."""
    quotas = (_quota(folder, version) for folder, version in group_folders("cpu", proc))
    return min((quota for quota in quotas if quota is not None), default=None)


def usable_cores(proc: Path = PROC) -> int:
    """The cores this process may use at once: by its affinity, and by its quota, rounded up."""
    quota = processor_quota(proc)
    return cores() if quota is None else max(1, min(cores(), math.ceil(quota)))


def settle_threads(count: int | None = None) -> None:
    """Say to the libraries of this process, and of those it starts, that idle threads sleep, and how many there are.

    To be called before torch is imported; after that, only a `count` changes anything. A `count` wins over what the
    environment says of it. Else what the environment says stays, and where it says nothing there are no more threads
    than the quota allows.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        if count is not None:
            torch.set_num_threads(count)
        return
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    if count is None and COUNTS[0] not in os.environ and usable_cores() < cores():
        count = usable_cores()
    if count is not None:
        os.environ.update(dict.fromkeys(COUNTS, str(count)))


@cache
def warn_of_threads() -> None:
    """Warn, once, where torch computes on more threads than this process has processors for."""
    import torch

    quota = processor_quota()
    if quota is not None and torch.get_num_threads() > math.ceil(quota):
        logger.warning(
            "torch computes on %d threads, and the control group of this process has the time of %.3g processors: they "
            "wait for each other; call torch.set_num_threads(%d), or set OMP_NUM_THREADS before torch is imported",
            torch.get_num_threads(),
            quota,
            math.ceil(quota),
        )


def _quota(folder: Path, version: int) -> float | None:
    """What one group allows."""
    if version == 2:
        words = " ".join(lines(folder / "cpu.max")).split()
    else:
        words = [*lines(folder / "cpu.cfs_quota_us"), *lines(folder / "cpu.cfs_period_us")]
    if len(words) != 2 or not all(word.isdigit() for word in words) or int(words[1]) == 0:
        return None  # `max`, or -1: no limit
    return int(words[0]) / int(words[1])
