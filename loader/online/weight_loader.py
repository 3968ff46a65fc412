"""The `weight_loader` closures: what a checkpoint tensor, or a piece of it, is handed to.

A closure is bound to (layer, parameter name), never to a parameter object: the meta parameter it was attached to is
replaced when its first piece arrives, and the closure moves along, so that a reload works.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import RouteError, ShapeMismatchError
from ..geometry.regions import Interval, Region, RegionTracker
from ..schemes.base import TensorStats
from .parameter import QuantizedParameter, alive, materialize
from .quantizing import RegionQuantizer
from .storage import FinalStorage


class WeightLoader(Protocol):
    """What vLLM and SGLang call for every checkpoint tensor, and quantload for every piece of one."""

    def __call__(
        self,
        param: Tensor,
        loaded_weight: Tensor,
        *,
        shard_id: str | None = None,
        expert_id: int | None = None,
        region: Region | None = None,
    ) -> None:
        """Take a whole shard (`region=None`), or the rows and columns `region` names, in checkpoint precision."""


class DetachedWeightLoader:
    """What stands on the parameters of a copied or unpickled model: a copy has the weights, not the way they came."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *_: Any, **__: Any) -> None:
        raise RouteError(f"{self._name} belongs to a copy of a loaded model; load into the original, or load anew")

    observe = reset = __call__


class ParameterLoader(ABC):
    """A closure on a parameter: takes the shards that servers hand over, and the pieces that quantload reads."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What it calls itself in messages."""

    @abstractmethod
    def load_shard(self, loaded_weight: Tensor, shard_id: str | None, expert_id: int | None) -> None:
        """Take a whole shard."""

    @abstractmethod
    def load_region(self, loaded_weight: Tensor, region: Region) -> None:
        """Take the rows and columns of a region."""

    def __reduce__(self) -> tuple[type[DetachedWeightLoader], tuple[str]]:
        return DetachedWeightLoader, (self.name,)

    def __call__(
        self,
        param: Tensor,
        loaded_weight: Tensor,
        *,
        shard_id: str | None = None,
        expert_id: int | None = None,
        region: Region | None = None,
    ) -> None:
        if region is None:
            self.load_shard(loaded_weight, shard_id, expert_id)
        else:
            self.load_region(loaded_weight, region)


class DirectWeightLoader(ParameterLoader):
    """Writes pieces of one parameter or buffer that is kept as stored, converting the dtype where it differs.

    Coordinates are those of the tensor flattened to two dimensions, [product of the others, last].
    """

    def __init__(self, module: nn.Module, name: str, full_name: str, dtype: torch.dtype, storage: FinalStorage) -> None:
        # A closure hangs on its parameter and so on its module: a strong reference back would keep both alive.
        self._module, self._attribute, self.dtype, self._storage = weakref.ref(module), name, dtype, storage
        self._shape = _held(module, name).shape
        self.columns = int(self._shape[-1]) if len(self._shape) else 1
        self.rows = self._shape.numel() // self.columns if self.columns else 0
        self.tracker = RegionTracker(full_name, None, self.rows, self.columns)
        self._lock = threading.Lock()
        if not self._shape.numel():  # no piece will ever come for it
            materialize(module, name, storage, dtype)

    @property
    def name(self) -> str:
        return self.tracker.name

    def load_shard(self, loaded_weight: Tensor, shard_id: str | None, expert_id: int | None) -> None:
        """There is one shard: the whole tensor."""
        _check_shape(self.name, loaded_weight, self._shape)
        whole = Region(None, (0, self.rows), (0, self.columns))
        self.load_region(loaded_weight.reshape(self.rows, self.columns), whole)

    def load_region(self, loaded_weight: Tensor, region: Region) -> None:
        _check_shape(self.name, loaded_weight, _extent(region))
        view = self._view(region)
        self.tracker.claim(region)
        view.copy_(loaded_weight)
        self.tracker.commit(region.numel)

    def direct_target(self, region: Region) -> Tensor:
        """The uint8 view of the final storage that whole rows of the stored dtype can be read into."""
        self.tracker.claim(region)
        return self._view(region).reshape(-1).view(torch.uint8)

    def direct_done(self, region: Region) -> None:
        """What `direct_target` gave out has been read into."""
        self.tracker.commit(region.numel)

    def accepts_bytes(self, dtype: torch.dtype, region: Region) -> bool:
        """Whether a region stored as `dtype` is contiguous in the final tensor and needs no conversion."""
        whole_rows = region.columns == (0, self.columns) or region.rows[1] - region.rows[0] == 1
        return whole_rows and dtype == self.dtype

    def tensors(self) -> tuple[Tensor, ...]:
        """The final tensor."""
        with self._lock:
            return (materialize(alive(self._module), self._attribute, self._storage, self.dtype).data,)

    def restored(self, statistics: Tensor | None) -> None:
        """What `tensors` gave out was filled with what it held after an earlier load; there are no statistics."""
        region = Region(None, (0, self.rows), (0, self.columns))
        self.tracker.claim(region)
        self.tracker.commit(region.numel)

    align = 1, 1
    whole_rows = False

    def whole(self, region: Region) -> bool:
        """Every element is written for itself."""
        return True

    def missing(self) -> Iterator[str]:
        """What has not arrived."""
        return self.tracker.described_gaps()

    def reset(self) -> None:
        """A reload begins."""
        self.tracker.reset()

    def _view(self, region: Region) -> Tensor:
        (tensor,) = self.tensors()
        flat = tensor.view(self.rows, self.columns)
        return flat[slice(*region.rows), slice(*region.columns)]


class OnlineWeightLoader(ParameterLoader):
    """The `weight_loader` of one quantized parameter, linear or experts: quantizes what arrives."""

    def __init__(self, attribute: str, quantizer: RegionQuantizer) -> None:
        self._attribute = attribute
        self._quantizer = quantizer
        self.parameter = quantizer.progress.parameters[attribute]

    @property
    def name(self) -> str:
        return self.parameter.full_name

    def load_shard(self, loaded_weight: Tensor, shard_id: str | None, expert_id: int | None) -> None:
        self.load_region(loaded_weight, whole_shard(self.parameter, shard_id, expert_id))

    def load_region(self, loaded_weight: Tensor, region: Region) -> None:
        self._quantizer.load(self._attribute, loaded_weight, region)

    def load_experts(self, weights: Tensor, experts: range, rows: Interval, columns: Interval) -> None:
        """Take the same rows and columns of several experts at once: `weights` [experts, rows, columns]."""
        self._quantizer.load_experts(self._attribute, weights, experts, rows, columns)

    def observe(self, loaded_weight: Tensor, region: Region) -> None:
        """First pass over a piece of a matrix whose scales span several pieces."""
        self._quantizer.observe(self._attribute, loaded_weight, region)

    def tensors(self) -> tuple[Tensor, ...]:
        """The final codes and scales."""
        return self.parameter.tensors()

    def restored(self, statistics: Tensor | None) -> None:
        """What `tensors` gave out was filled with what it held after an earlier load, which measured `statistics`."""
        self._quantizer.restored(self._attribute, TensorStats(statistics))

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.parameter.layout.nbytes

    @property
    def align(self) -> tuple[int, int]:
        """Rows and columns of a scale block."""
        return self.parameter.layout.align

    @property
    def whole_rows(self) -> bool:
        """Whether scales can be told from whole rows only."""
        return self.parameter.layout.format.whole_rows

    def whole(self, region: Region) -> bool:
        """Whether the scales of a region depend on nothing outside of it."""
        return self.parameter.layout.whole(region)

    def missing(self) -> Iterator[str]:
        """What has not arrived."""
        return self.parameter.tracker.described_gaps()

    def reset(self) -> None:
        """Announce a reload of the layer: every region may, and must, arrive again."""
        self._quantizer.progress.reset()


def whole_shard(parameter: QuantizedParameter, shard_id: str | None, expert_id: int | None) -> Region:
    """The region of a shard handed over whole; raises `ShapeMismatchError` for one that the parameter has not."""
    layout, name = parameter.layout, parameter.full_name
    if expert_id not in ((None,) if layout.experts is None else range(layout.experts)):
        wanted = "no expert_id" if layout.experts is None else f"an expert_id below {layout.experts}"
        raise ShapeMismatchError(f"{name}: got expert_id {expert_id} with a whole shard, {wanted} is expected")
    try:
        rows = layout.shard_rows(shard_id)
    except KeyError as error:
        raise ShapeMismatchError(f"{name}: {error.args[0]}") from None
    return Region(expert_id, rows, (0, layout.columns))


def _extent(region: Region) -> tuple[int, int]:
    return region.rows[1] - region.rows[0], region.columns[1] - region.columns[0]


def _check_shape(name: str, loaded: Tensor, expected: Sequence[int]) -> None:
    if tuple(loaded.shape) != tuple(expected):
        raise ShapeMismatchError(
            f"{name}: got a tensor of shape {tuple(loaded.shape)} where shape {tuple(expected)} belongs"
        )


def _held(module: nn.Module, name: str) -> Tensor:
    tensor: Tensor | None = module._parameters.get(name)
    tensor = module._buffers[name] if tensor is None else tensor
    assert tensor is not None
    return tensor
