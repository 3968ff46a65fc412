"""A load that several processes do together, each its own part of one model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _get_default_store

from ..errors import PolicyError
from ..model.parallel_plan import RankPlan
from .again import Again
from .alone import ALONE, Alone, RankSizes
from .exchange import MaximaExchange
from .forwards import install_forwards
from .watched import Watched


class Together(Watched):
    """The ranks of a mesh of one dimension; see `Alone` for what a load asks."""

    def __init__(self, mesh: DeviceMesh, expert_parallel: bool = False) -> None:
        self.mesh = mesh
        group = mesh.get_group()
        self._maxima = MaximaExchange(group)
        members = "-".join(map(str, dist.get_process_group_ranks(group)))
        rank, ranks = mesh.get_local_rank(), mesh.size()
        super().__init__(rank, ranks, expert_parallel, self._maxima, _get_default_store, members)

    def again(self) -> Alone:
        return Again(self.rank, self.ranks, self._expert_parallel, _get_default_store, self._members)

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        try:
            with super().loading():
                yield
        finally:
            self._maxima.expect(())

    def expect(self, observed: Sequence[Hashable]) -> None:
        self._maxima.expect(self.agree(observed))

    def loaded(self, plan: RankPlan, model: Any, sizes: RankSizes) -> list[RankSizes]:
        found = super().loaded(plan, model, sizes)
        install_forwards(model, plan, self.mesh)
        return found


def ranks_of(tp: str | None, device_mesh: DeviceMesh | None, device: torch.device, expert_parallel: bool) -> Alone:
    """The ranks that a load is one of, as the arguments of `load_quantized` say. Raises `PolicyError`."""
    if tp is None and device_mesh is None:
        raise PolicyError("expert_parallel is given without tp: give tp='auto', or a device_mesh")
    if tp not in (None, "auto"):
        raise PolicyError(f"tp is {tp!r}; give 'auto', the plan that transformers has for the model")
    if not dist.is_available() or not dist.is_initialized():
        raise PolicyError(
            "tp='auto' divides a model among the ranks of a process group, and there is none: start the program with "
            "torchrun, and call torch.distributed.init_process_group before"
        )
    mesh = device_mesh or init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("tp",))
    if mesh.ndim > 1:
        if "tp" not in (mesh.mesh_dim_names or ()):
            raise PolicyError(f"device_mesh has {mesh.ndim} dimensions, and none is called tp: give one that is")
        mesh = mesh["tp"]
    return ALONE if mesh.size() == 1 else Together(mesh, expert_parallel)


def local_device(device: torch.device) -> torch.device:
    """The device of this rank, where a kind of device was given: the one of its number on this machine."""
    if device == torch.device("cuda"):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device
