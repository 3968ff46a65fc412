"""Parameters that come into being when their first piece arrives."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..geometry.layout import Block, WeightLayout
from ..geometry.regions import Region, RegionTracker
from ..kernels.formats import Tensors
from ..schemes.opaque import OpaqueParameter, plain
from .observing import Finish, Observation, ScaleGroup, scales_are_shared
from .storage import FinalStorage

M = TypeVar("M", bound=nn.Module)


def materialize(module: nn.Module, name: str, storage: FinalStorage, dtype: torch.dtype | None = None) -> Tensor:
    """Replace the meta parameter or buffer `name` of `module` by a real one of the same shape; return it.

    What was attached to it, such as `weight_loader`, moves over. A tensor that is real already is returned as it is.
    """
    held: dict[str, Any] = module._parameters if module._parameters.get(name) is not None else module._buffers
    old: Tensor = held[name]
    if not old.is_meta:
        return old
    tensor = storage.empty(tuple(old.shape), dtype or plain(old).dtype)
    new: Any = tensor
    if isinstance(old, OpaqueParameter):
        new = old.around(tensor)
    else:
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(tensor, requires_grad=old.requires_grad and tensor.is_floating_point())
        new.__dict__.update(old.__dict__)
    new._is_hf_initialized = True  # transformers initializes what does not say so
    held[name] = new
    return new  # type: ignore[no-any-return]


def alive(module: weakref.ref[M]) -> M:
    """The module behind a weak reference; raises `ReferenceError` if it is gone."""
    found = module()
    if found is None:
        raise ReferenceError("the model was deleted while it was being loaded")
    return found


class QuantizedParameter:
    """The codes and scales of one parameter while they are being written, from any number of threads.

    `tensors` gives them on `device`, whenever they are asked for; `materialized_in` and `held_by` make one.
    """

    def __init__(
        self, full_name: str, layout: WeightLayout, tensors: Callable[[], Tensors], device: torch.device
    ) -> None:
        self.full_name = full_name
        self.layout = layout
        self.tracker = RegionTracker(full_name, layout.experts, layout.rows, layout.columns)
        self.tensors = tensors
        self._device = device
        self._lock = threading.Lock()
        self._observation: Observation | None = None
        self.scale_group: ScaleGroup | None = None
        """What gets its scales together with this parameter, if anything does."""
        self.scales_known: set[tuple[int | None, int]] = set()
        """Experts and numbers of shards whose scales are made."""

    def views(self, expert: int | None, block: Block) -> Tensors:
        """The codes and scales of one block of an expert's matrix, as views of the final tensors."""
        tensors = self.tensors()
        if expert is not None:
            tensors = tuple([each[expert] for each in tensors])
        return tuple([each[index] for each, index in zip(tensors, block.index, strict=True)])

    def stack(self, experts: Sequence[int | None], block: Block) -> Tensors:
        """The codes and scales of one block of several experts, a range of them, as views [experts, rows, columns]."""
        if isinstance(experts, range):
            chosen = slice(experts.start, experts.stop, experts.step)
            return tuple(each[chosen, *index] for each, index in zip(self.tensors(), block.index, strict=True))
        return tuple(each.unsqueeze(0) for each in self.views(experts[0], block))

    def scales_are_local(self, region: Region) -> bool:
        """Whether nothing outside of a region decides its scales."""
        return self.layout.whole(region) and not scales_are_shared(self.layout, self.scale_group)

    def scales_are_known(self, region: Region) -> bool:
        """Whether a region may be quantized now: nothing outside of it decides its scales, or all of that was seen."""
        shared = scales_are_shared(self.layout, self.scale_group)
        return all(
            (region.expert, block.shard) in self.scales_known
            for block in self.layout.blocks(region)
            if shared or not block.whole
        )

    @property
    def scaled_together(self) -> int:
        """Elements of one expert that may have to be seen for a scale of it: those of its matrix, or of its group."""
        return self.layout.rows * self.layout.columns if self.scale_group is None else self.scale_group.numel

    def was_observed(self, region: Region) -> bool:
        """Whether the scales of a region were made by a first pass."""
        return all((region.expert, block.shard) in self.scales_known for block in self.layout.blocks(region))

    def observation(self, finish: Finish) -> Observation:
        """The first pass of this parameter; `finish` is what the first caller gives."""
        with self._lock:
            if self._observation is None:
                self._observation = Observation(self.layout, self._device, self.scale_group, finish)
        return self._observation

    def scales(self, expert: int | None, shard: int | None) -> Tensors:
        """The scales of one matrix, or of one shard of it."""
        scales = self.tensors()[1:]
        if expert is not None:
            scales = tuple([each[expert] for each in scales])
        if shard is None:
            return scales
        index = next(itertools.islice(self.layout.shard_indices(), shard, None)).index[1:]
        return tuple([each[own] for each, own in zip(scales, index, strict=True)])

    def reset(self, region: Region | None = None) -> None:
        """Forget what arrived, of one region or of all: a reload begins.

        Codes and scales stay where they are until they are overwritten. Scales that the region has a part in are not
        known any longer: it must be whole scale blocks, or be observed with all that shares its scales.
        """
        self.tracker.reset(region)
        if self._observation is not None:
            self._observation.forget(region)
        if region is None:
            self.scales_known.clear()
        elif scales_are_shared(self.layout, self.scale_group):
            self.scales_known = {known for known in self.scales_known if known[0] != region.expert}
        else:
            self.scales_known -= {(region.expert, block.shard) for block in self.layout.blocks(region)}


def materialized_in(
    module: nn.Module, name: str, full_name: str, layout: WeightLayout, storage: FinalStorage
) -> QuantizedParameter:
    """The meta parameter `name` of `module` and its scales: made real in `storage` when they are first asked for."""
    return QuantizedParameter(full_name, layout, _Materializing(module, name, layout, storage), storage.device)


def held_by(
    module: nn.Module, name: str, full_name: str, layout: WeightLayout, device: torch.device
) -> QuantizedParameter:
    """The parameter `name` of `module` and its scales as they stand there, looked up anew: engines exchange them."""
    reference, names = weakref.ref(module), layout.format.names(name)

    def tensors() -> Tensors:
        held = alive(reference)._parameters
        return tuple([plain(_not_none(held[each])).data for each in names])

    return QuantizedParameter(full_name, layout, tensors, device)


class _Materializing:
    """Codes and scales, materialized by the first caller."""

    def __init__(self, module: nn.Module, name: str, layout: WeightLayout, storage: FinalStorage) -> None:
        self._module, self._name, self._layout, self._storage = weakref.ref(module), name, layout, storage
        self._lock = threading.Lock()
        self._tensors: Tensors | None = None

    def __call__(self) -> Tensors:
        with self._lock:
            if self._tensors is None:
                module, names = alive(self._module), self._layout.format.names(self._name)
                self._tensors = tuple(plain(materialize(module, name, self._storage)).data for name in names)
                self._layout.clear_padding(self._tensors)
        return self._tensors


def _not_none(parameter: nn.Parameter | None) -> nn.Parameter:
    assert parameter is not None
    return parameter
