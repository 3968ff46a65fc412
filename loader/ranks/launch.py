"""The processes that torchrun starts: which of them this is, and the process group they make."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

from ..errors import PolicyError

_STARTED_BY = "TORCHELASTIC_RUN_ID"
_FOR_EVER = timedelta(days=365)
"""How long ranks wait for each other: those of a server until somebody asks. One that ends is noticed at once."""


@dataclass(frozen=True)
class Launched:
    """What torchrun says to a process: its rank, how many there are, and how many of them on this machine."""

    rank: int = 0
    ranks: int = 1
    local_ranks: int = 1


def launched() -> Launched:
    """Which of torchrun's processes this is; the only one, where it was started in another way."""
    said = os.environ
    if _STARTED_BY not in said:
        return Launched()
    return Launched(int(said["RANK"]), int(said["WORLD_SIZE"]), int(said["LOCAL_WORLD_SIZE"]))


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    """The process group of torchrun's processes, if there are several; `device` is as `--device` takes it."""
    if launched().ranks == 1:
        yield
        return
    import torch.distributed as dist

    from ..schemes.registry import choose_device

    if not dist.is_available():
        raise PolicyError("this build of torch has no torch.distributed, which several ranks need: start one process")
    place = choose_device(device)
    if place.type == "cuda":
        import torch

        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if place.type == "cpu" else "nccl", timeout=_FOR_EVER)
    try:
        yield
    finally:
        dist.destroy_process_group()


def of_first(value: int) -> int:
    """What the first of torchrun's processes gives, on all of them; inside of their process group."""
    if launched().ranks == 1:
        return value
    import torch.distributed as dist

    told = [value]
    dist.broadcast_object_list(told, src=0)
    return told[0]
