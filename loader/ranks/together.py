"""A load that several processes do together, each its own part of one model."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from ..checkpoint.index import Shard
from ..checkpoint.source import FileSource, Source
from ..errors import PolicyError, RankError
from ..memory.planner import MemoryPlan
from ..model.parallel_plan import RankPlan
from ..options import LoadOptions
from .alone import ALONE, Alone, RankSizes
from .divided import Divided
from .exchange import MaximaExchange
from .forwards import install_forwards
from .watch import Watch

logger = logging.getLogger("quantload")

_loads: Counter[str] = Counter()
"""Loads of this process, by the ranks that took part in them: each has keys of its own in the store."""


class Together(Divided):
    """The ranks of a mesh of one dimension; see `Alone` for what a load asks."""

    def __init__(self, mesh: DeviceMesh, expert_parallel: bool = False) -> None:
        self.mesh, self._group = mesh, mesh.get_group()
        self._maxima = MaximaExchange(self._group)
        self._watch: Watch | None = None
        super().__init__(mesh.get_local_rank(), mesh.size(), expert_parallel, self._maxima)

    @property
    def watch(self) -> Watch:
        """Who watches the load that is going on."""
        assert self._watch is not None
        return self._watch

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        members = "-".join(map(str, dist.get_process_group_ranks(self._group)))
        _loads[members] += 1
        store = PrefixStore(f"quantload/{members}/{_loads[members]}", _get_default_store())
        watch = Watch(store, self.rank, self.ranks)
        self.cancel, self._watch = watch.cancel, watch
        try:
            with watch.explaining(), watch:
                yield
        finally:
            self._watch = None
            self._maxima.expect(())

    @contextlib.contextmanager
    def reading(
        self, source: Callable[[LoadOptions], Source], options: LoadOptions, shards: Sequence[Shard]
    ) -> Iterator[Source]:
        """As alone; ranks of one machine share its page cache, which the first clears up behind all of them."""
        is_first = self.rank == self.watch.local_ranks[0]
        own = source(options if is_first else replace(options, page_cache="keep"))
        with contextlib.ExitStack() as kept:
            if is_first and isinstance(own, FileSource):
                kept.enter_context(own.keeping())
                for shard in shards:  # now, as nobody could tell later what was cold
                    own.size(shard.path)
            self.watch.gather("begun", True)
            yield own
            self.watch.gather("read", True)

    def any(self, what: str, here: bool) -> bool:
        return any(self.watch.gather(what, here))

    @property
    def part(self) -> tuple[int, int, bool]:
        return self.rank, self.ranks, self._expert_parallel

    def expect(self, observed: Sequence[Hashable]) -> None:
        matrices = self.exchanged(observed)
        digest = hashlib.sha256("\n".join(self.called(matrices)).encode()).hexdigest()
        if len({*self.watch.gather("observed", digest)}) > 1:
            raise RankError("the ranks would read the weights in different orders, so that no scale would be common")
        self._maxima.expect(matrices)

    def of_host(self, plan: MemoryPlan) -> MemoryPlan:
        named = ("final_bytes", "staging_bytes", "slack_bytes", "peak_bytes")
        found = self.watch.gather("memory", {name: getattr(plan, name) for name in named})
        here = [found[rank] for rank in self.watch.local_ranks]
        return replace(plan, **{name: sum(each[name] for each in here) for name in named})

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        if self.rank == 0:
            yield
            return
        logger.addFilter(_is_error)
        try:
            yield
        finally:
            logger.removeFilter(_is_error)

    def loaded(self, plan: RankPlan, model: Any, sizes: RankSizes) -> list[RankSizes]:
        found = [RankSizes(*each) for each in self.watch.gather("loaded", sizes)]
        install_forwards(model, plan, self.mesh)
        return found


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


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
