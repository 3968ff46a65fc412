"""The `weight_loader` closures: what a checkpoint tensor, or a piece of it, is handed to.

A closure is bound to (layer, parameter name), never to a parameter object: the meta parameter it was attached to is
replaced when its first piece arrives, and the closure moves along, so that a reload works.
"""

from __future__ import annotations

import functools
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import RouteError, ShapeMismatchError
from ..geometry.layout import ShardId
from ..geometry.regions import Interval, Region, RegionTracker
from ..schemes.base import TensorStats
from .engine_calls import NOT_GIVEN, shard_of
from .non_finite import NonFiniteValues
from .parameter import QuantizedParameter, alive, materialize
from .quantizing import RegionQuantizer
from .sink import InPlace, Sink
from .storage import FinalStorage


class WeightLoader(Protocol):
    """What vLLM and SGLang call for every checkpoint tensor (`engine_calls` says how), and anyone for a part of one."""

    def __call__(
        self,
        param: Tensor,
        loaded_weight: Tensor,
        *positional: Any,
        weight_name: str | None = None,
        shard_id: ShardId = None,
        loaded_shard_id: ShardId = None,
        expert_id: int | None = None,
        return_success: bool = False,
        region: Region | None = None,
    ) -> bool | None:
        """Take a whole shard (`region=None`), or the rows and columns `region` names, in checkpoint precision.

        Returns True where `return_success` asks for it.
        """


class DetachedWeightLoader:
    """What stands on the parameters of a copied or unpickled model: a copy has the weights, not the way they came."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *_: Any, **__: Any) -> None:
        raise RouteError(f"{self._name} belongs to a copy of a loaded model; load into the original, or load anew")

    observe = reset = __call__


class ParameterLoader(Sink, ABC):
    """A closure on a parameter of a model: takes the shards that engines hand over, and the pieces quantload reads."""

    values_dtype: torch.dtype | None = None
    align: tuple[int, int] = (1, 1)
    whole_rows: bool = False
    maxima_bytes: int = 0
    supports_moe_loading: bool = False
    """What vLLM asks of a closure before it hands the weights of experts over."""

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each of the final tensors."""

    @abstractmethod
    def load_shard(self, loaded_weight: Tensor, shard_id: ShardId, expert_id: int | None) -> None:
        """Take a whole shard."""

    @abstractmethod
    def reset(self) -> None:
        """A reload of the layer begins: every region may, and must, arrive again."""

    def scales_are_local(self, region: Region) -> bool:
        """Always, where nothing is computed from other elements."""
        return True

    def in_place(self, dtype: torch.dtype, region: Region) -> InPlace | None:
        """Never, unless overridden."""
        return None

    def load_experts(self, weights: Tensor, experts: Sequence[int | None], rows: Interval, columns: Interval) -> None:
        """Take the same rows and columns of several experts at once: `weights` [experts, rows, columns]."""
        for weight, expert in zip(weights, experts, strict=True):
            self.load_region(weight, Region(expert, rows, columns))

    def scale_group(self, expert: int | None) -> Hashable:
        return self.name, expert

    def observe(self, loaded_weight: Tensor, region: Region) -> None:
        """There is nothing to learn where scales are local."""

    def __reduce__(self) -> tuple[type[DetachedWeightLoader], tuple[str]]:
        return DetachedWeightLoader, (self.name,)

    def __call__(
        self,
        param: Tensor,
        loaded_weight: Tensor,
        *positional: Any,
        weight_name: str | None = None,
        shard_id: ShardId = NOT_GIVEN,
        loaded_shard_id: ShardId = NOT_GIVEN,
        expert_id: int | None = NOT_GIVEN,
        return_success: bool = False,
        region: Region | None = None,
    ) -> bool | None:
        if region is not None:
            self.load_region(loaded_weight, region)
            return True if return_success else None
        shard = shard_of(self.name, positional, weight_name, shard_id, loaded_shard_id, expert_id, return_success)
        self.load_shard(loaded_weight, shard.shard_id, shard.expert_id)
        return True if shard.return_success else None


class RestorableLoader(ParameterLoader):
    """A closure whose final tensors an earlier load may have left, to be read back as they are."""

    @property
    @abstractmethod
    def final_tensors(self) -> tuple[tuple[torch.dtype, tuple[int, ...]], ...]:
        """Dtype and shape of each: codes and scales, or values."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The final tensors, to be read into."""

    def look_at(self, number: int, start: int, values: Tensor) -> None:
        """What was just read into a final tensor, its elements from flat index `start` on: codes need no look."""

    @abstractmethod
    def restored(self, statistics: Tensor | None) -> None:
        """What `tensors` gave out was filled with what it held after an earlier load, which measured `statistics`."""


class DirectWeightLoader(RestorableLoader):
    """Writes pieces of one parameter or buffer that is kept as stored, converting the dtype where it differs.

    Coordinates are those of the tensor flattened to two dimensions, [product of the others, last].
    """

    values_dtype: torch.dtype

    def __init__(
        self,
        module: nn.Module,
        name: str,
        full_name: str,
        dtype: torch.dtype,
        storage: FinalStorage,
        non_finite: NonFiniteValues | None = None,
    ) -> None:
        """`non_finite` is told of NaN and infinities; they are loaded all the same, unless it is strict."""
        # A closure hangs on its parameter and so on its module: a strong reference back would keep both alive.
        self._module, self._attribute, self.values_dtype, self._storage = weakref.ref(module), name, dtype, storage
        self._shape = _held(module, name).shape
        self._non_finite = NonFiniteValues() if non_finite is None else non_finite
        self.is_buffer = module._parameters.get(name) is None
        self.columns = int(self._shape[-1]) if len(self._shape) else 1
        self.rows = self._shape.numel() // self.columns if self.columns else 0
        self.tracker = RegionTracker(full_name, None, self.rows, self.columns)
        self._lock = threading.Lock()
        if not self._shape.numel():  # no piece will ever come for it
            materialize(module, name, storage, dtype)

    @property
    def name(self) -> str:
        return self.tracker.name

    @property
    def module(self) -> nn.Module:
        """The one that holds the parameter; raises `ReferenceError` if it is gone."""
        return alive(self._module)

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.rows * self.columns * self.values_dtype.itemsize,)

    def load_shard(self, loaded_weight: Tensor, shard_id: ShardId, expert_id: int | None) -> None:
        """There is one shard: the whole tensor."""
        _check_shape(self.name, loaded_weight, self._shape)
        whole = Region(None, (0, self.rows), (0, self.columns))
        self.load_region(loaded_weight.reshape(self.rows, self.columns), whole)

    def load_region(self, loaded_weight: Tensor, region: Region) -> None:
        _check_shape(self.name, loaded_weight, _extent(region))
        view = self._view(region)
        self.tracker.claim(region)
        self._look(loaded_weight, region.rows[0] * self.columns + region.columns[0])
        view.copy_(loaded_weight)
        self.tracker.commit(region.numel)

    def in_place(self, dtype: torch.dtype, region: Region) -> InPlace | None:
        """Where a region is contiguous in the final tensor and needs no conversion."""
        whole_rows = region.columns == (0, self.columns) or region.rows[1] - region.rows[0] == 1
        if not whole_rows or dtype != self.values_dtype:
            return None
        return InPlace(functools.partial(self._target, region), functools.partial(self._arrived, region))

    def tensors(self) -> tuple[Tensor, ...]:
        with self._lock:
            return (materialize(self.module, self._attribute, self._storage, self.values_dtype).data,)

    @property
    def final_tensors(self) -> tuple[tuple[torch.dtype, tuple[int, ...]], ...]:
        return ((self.values_dtype, tuple(self._shape)),)

    def restored(self, statistics: Tensor | None) -> None:
        """There are no statistics of what keeps its values."""
        region = Region(None, (0, self.rows), (0, self.columns))
        self.tracker.claim(region)
        self.tracker.commit(region.numel)

    def missing(self) -> Iterator[str]:
        return self.tracker.described_gaps()

    def reset(self, region: Region | None = None) -> None:
        """A reload of the parameter begins, or of a region of it."""
        self.tracker.reset(region)

    def look_at(self, number: int, start: int, values: Tensor) -> None:
        self._look(values.unsqueeze(0), start)

    def _look(self, values: Tensor, first: int) -> None:
        """Look for NaN and infinities in `values` [rows, columns], whose first element has that flat index."""
        self._non_finite.look(
            self.name, self._shape, values, self.values_dtype, first=first, pitch=self.columns, masks=self.is_buffer
        )

    def values(self, region: Region) -> Tensor:
        """What a region of the parameter holds, as a view."""
        return self._view(region)

    def _arrived(self, region: Region) -> None:
        self._look(self._view(region), region.rows[0] * self.columns + region.columns[0])
        self.tracker.commit(region.numel)

    def _target(self, region: Region) -> Tensor:
        self.tracker.claim(region)
        return self._view(region).reshape(-1).view(torch.uint8)

    def _view(self, region: Region) -> Tensor:
        (tensor,) = self.tensors()
        flat = tensor.view(self.rows, self.columns)
        return flat[slice(*region.rows), slice(*region.columns)]


class OnlineWeightLoader(RestorableLoader):
    """The `weight_loader` of one quantized parameter, linear or experts: quantizes what arrives."""

    def __init__(self, attribute: str, quantizer: RegionQuantizer) -> None:
        self._attribute = attribute
        self._quantizer = quantizer
        self.parameter = quantizer.progress.parameters[attribute]
        layout = self.parameter.layout
        self.align, self.whole_rows = layout.align, layout.format.whole_rows
        self.supports_moe_loading = layout.experts is not None

    @property
    def name(self) -> str:
        return self.parameter.full_name

    def load_shard(self, loaded_weight: Tensor, shard_id: ShardId, expert_id: int | None) -> None:
        load_whole_shard(self, self.parameter, loaded_weight, shard_id, expert_id)

    def load_region(self, loaded_weight: Tensor, region: Region) -> None:
        self._quantizer.load(self._attribute, loaded_weight, region)

    def load_experts(self, weights: Tensor, experts: Sequence[int | None], rows: Interval, columns: Interval) -> None:
        """Take the same rows and columns of several experts at once: `weights` [experts, rows, columns]."""
        self._quantizer.load_experts(self._attribute, weights, experts, rows, columns)

    def observe(self, loaded_weight: Tensor, region: Region) -> None:
        """First pass over a piece of a matrix whose scales span several pieces."""
        self._quantizer.observe(self._attribute, loaded_weight, region)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.parameter.tensors()

    def restored(self, statistics: Tensor | None) -> None:
        self._quantizer.restored(self._attribute, TensorStats(statistics))

    @property
    def final_tensors(self) -> tuple[tuple[torch.dtype, tuple[int, ...]], ...]:
        return self.parameter.layout.tensors

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of the codes, then of the scales."""
        return self.parameter.layout.sizes

    @property
    def maxima_bytes(self) -> int:  # type: ignore[override]  # asked of few closures, worked out for those
        return self.parameter.layout.maxima_bytes

    def scales_are_local(self, region: Region) -> bool:
        return self.parameter.scales_are_local(region)

    def scale_group(self, expert: int | None) -> Hashable:
        group = self.parameter.scale_group
        return self.name if group is None else id(group), expert

    def missing(self) -> Iterator[str]:
        return self.parameter.tracker.described_gaps()

    def reset(self, region: Region | None = None) -> None:
        """A reload of the layer begins; or, with `region`, of that part of this parameter alone."""
        self._quantizer.progress.reset(None if region is None else {self._attribute: region})


def load_whole_shard(
    loader: ParameterLoader,
    parameter: QuantizedParameter,
    loaded_weight: Tensor,
    shard_id: ShardId,
    expert_id: int | None,
) -> None:
    """Hand a whole shard over, or, where it has three dimensions, those of all experts, whatever `expert_id` says."""
    experts = parameter.layout.experts
    if experts is None or loaded_weight.dim() != 3:
        loader.load_region(loaded_weight, whole_shard(parameter, shard_id, expert_id))
        return
    if len(loaded_weight) != experts:
        raise ShapeMismatchError(
            f"{loader.name}: got the weights of {len(loaded_weight)} experts where those of {experts} belong"
        )
    for expert, weight in enumerate(loaded_weight):
        loader.load_region(weight, whole_shard(parameter, shard_id, expert))


def whole_shard(parameter: QuantizedParameter, shard_id: ShardId, expert_id: int | None) -> Region:
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
