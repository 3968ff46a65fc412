"""The `weight_loader` closures: what a checkpoint tensor, or a piece of it, is handed to.

A closure is bound to (layer, parameter name), never to a parameter object: the meta parameter it was attached to is
replaced when its first piece arrives, and the closure moves along, so that a reload works.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import NonFiniteWeightError, RouteError, ShapeMismatchError
from ..kernels.statistics import MAXIMA, merge, new_statistics
from ..schemes.base import LinearScheme, NonFiniteError, TensorStats
from ..schemes.layout import WeightLayout
from .parameter import QuantizedParameter, alive, materialize
from .regions import Interval, Region, RegionTracker
from .storage import FinalStorage

MERGED_AT_ONCE = 64
"""Pieces whose statistics are merged in one go."""


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


class DirectWeightLoader:
    """Writes pieces of one parameter or buffer that is kept as stored, converting the dtype where it differs.

    Coordinates are those of the tensor flattened to two dimensions, [product of the others, last].
    """

    def __init__(self, module: nn.Module, name: str, full_name: str, dtype: torch.dtype, storage: FinalStorage) -> None:
        # A closure hangs on its parameter and so on its module: a strong reference back would keep both alive.
        self._module, self._name, self.dtype, self._storage = weakref.ref(module), name, dtype, storage
        self._shape = _held(module, name).shape
        self.columns = int(self._shape[-1]) if len(self._shape) else 1
        self.rows = self._shape.numel() // self.columns if self.columns else 0
        self.tracker = RegionTracker(full_name, None, self.rows, self.columns)
        self._lock = threading.Lock()
        if not self._shape.numel():  # no piece will ever come for it
            materialize(module, name, storage, dtype)

    def __reduce__(self) -> tuple[type[DetachedWeightLoader], tuple[str]]:
        return DetachedWeightLoader, (self.tracker.name,)

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
            _check_shape(self.tracker.name, loaded_weight, self._shape)
            region = Region(None, (0, self.rows), (0, self.columns))
        else:
            _check_shape(self.tracker.name, loaded_weight, _extent(region))
        view = self._view(region)
        self.tracker.claim(region)
        view.copy_(loaded_weight.reshape(view.shape))
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

    def reset(self) -> None:
        """A reload begins."""
        self.tracker.reset()

    def _view(self, region: Region) -> Tensor:
        with self._lock:
            tensor = materialize(alive(self._module), self._name, self._storage, self.dtype)
        flat = tensor.data.view(self.rows, self.columns)
        return flat[slice(*region.rows), slice(*region.columns)]


class LayerProgress:
    """The parameters of one quantized layer on their way, and the statistics of what was quantized.

    When the last region of the last parameter is written, `finish(layer)` runs, once, in the thread that wrote it.
    """

    def __init__(self, parameters: dict[str, QuantizedParameter], finish: Callable[[Tensor], None]) -> None:
        self.parameters = parameters
        self._statistics = new_statistics()
        self._to_merge: list[Tensor] = []
        self._finish = finish
        self._incomplete = set(parameters)
        self._lock = threading.Lock()

    def add(self, stats: TensorStats) -> None:
        """Add the statistics of one piece."""
        if stats.values is not None:
            with self._lock:
                self._to_merge.append(stats.values)
                if len(self._to_merge) == MERGED_AT_ONCE:
                    self._merge()

    def commit(self, name: str, numel: int) -> None:
        """So many elements of a parameter are written."""
        if not self.parameters[name].tracker.commit(numel):
            return
        with self._lock:
            self._incomplete.discard(name)
            last = not self._incomplete
            if last and self._to_merge:
                self._merge()
        if last:
            self._finish(self._statistics)

    def reset(self) -> None:
        """A reload begins."""
        with self._lock:
            self._incomplete = set(self.parameters)
            self._statistics = new_statistics()
            self._to_merge.clear()
        for parameter in self.parameters.values():
            parameter.reset()

    def _merge(self) -> None:
        """Add up what has come since the last time; merging vectors one by one takes as long as a small piece."""
        together = torch.stack(self._to_merge).to(self._statistics.device)
        total = together.sum(0)
        total[list(MAXIMA)] = together[:, list(MAXIMA)].amax(0)
        merge(self._statistics, total)
        self._to_merge.clear()


class Quantize(Protocol):
    """Writes the codes (and, unless known, the scales) of a piece; raises `NonFiniteError`."""

    def __call__(self, weight: Tensor, out: Tensor, scale: Tensor, *, scales_known: bool = False) -> TensorStats:
        """`weight` [R, C] into `out` and `scale`."""


class RegionQuantizer:
    """Quantizes the pieces of one layer's parameters on arrival, wherever they lie.

    What linear and MoE loaders share. It never holds more high-precision data than the piece it was handed.
    """

    def __init__(
        self,
        progress: LayerProgress,
        quantize: Quantize,
        observe: Callable[[Tensor, Tensor], None],
        finish_scales: Callable[[Tensor], None],
    ) -> None:
        self.progress = progress
        self._quantize, self._observe, self._finish_scales = quantize, observe, finish_scales

    def load(self, name: str, weight: Tensor, region: Region) -> None:
        """Quantize `weight` [rows, columns of the region] into place.

        Raises `RepeatedRegionError`, `ShapeMismatchError`, `NonFiniteWeightError`, and `ValueError` for a piece that
        cuts through scale blocks nobody observed.
        """
        parameter = self.progress.parameters[name]
        _check_region_shape(parameter.full_name, weight, region)
        blocks = list(parameter.layout.blocks(region))
        known = region.expert in parameter.scales_known
        if not known and not all(block.whole for block in blocks):
            raise ValueError(
                f"{parameter.full_name}: {region} cuts through scale blocks of {parameter.layout.format.name}; "
                f"hand over whole blocks, or observe every piece first"
            )
        parameter.tracker.claim(region)
        for block in blocks:
            codes, scales = parameter.views(region, block)
            part = weight[slice(*block.rows)].to(codes.device)
            try:
                self.progress.add(self._quantize(part, codes, scales, scales_known=known))
            except NonFiniteError:
                raise non_finite_error(parameter.full_name, weight) from None
        self.progress.commit(name, region.numel)

    def load_experts(self, name: str, weights: Tensor, experts: range, rows: Interval, columns: Interval) -> None:
        """Quantize the same rows and columns of several experts, `weights` [experts, rows, columns], into place.

        In one call where rows may be laid end to end because no scale reaches over the end of a row. Raises as `load`.
        """
        parameter = self.progress.parameters[name]
        if not _rows_can_be_joined(parameter.layout, columns):
            for weight, expert in zip(weights, experts, strict=True):
                self.load(name, weight, Region(expert, rows, columns))
            return
        region = Region(experts[0], rows, columns)
        _check_region_shape(parameter.full_name, weights[0], region)
        parameter.tracker.claim_each(experts, rows, columns)
        where = slice(experts.start, experts.stop, experts.step), slice(*rows)
        codes, scales = (tensor[where].flatten(1) for tensor in parameter.tensors())
        weight = weights.flatten(1).to(codes.device)
        try:
            self.progress.add(self._quantize(weight, codes, scales))
        except NonFiniteError:
            raise non_finite_error(parameter.full_name, weight) from None
        self.progress.commit(name, len(experts) * region.numel)

    def observe(self, name: str, weight: Tensor, region: Region) -> None:
        """First pass over a piece of a matrix whose scales span several pieces."""
        parameter = self.progress.parameters[name]
        _check_region_shape(parameter.full_name, weight, region)
        parameter.begin_observing(region.expert)
        for block in parameter.layout.blocks(region):
            _, maxima = parameter.views(region, block)
            amax = torch.zeros_like(maxima)
            try:
                self._observe(weight[slice(*block.rows)].to(amax.device), amax)
            except NonFiniteError:
                raise non_finite_error(parameter.full_name, weight) from None
            parameter.raise_maxima(maxima, amax)
        complete = parameter.observed(region)
        if complete is not None:
            self._finish_scales(complete)
            parameter.scales_known.add(region.expert)


class OnlineWeightLoader:
    """The `weight_loader` of one quantized parameter, linear or experts: quantizes what arrives."""

    def __init__(self, name: str, quantizer: RegionQuantizer) -> None:
        self._name = name
        self._quantizer = quantizer
        self.parameter = quantizer.progress.parameters[name]

    def __reduce__(self) -> tuple[type[DetachedWeightLoader], tuple[str]]:
        return DetachedWeightLoader, (self.parameter.full_name,)

    def __call__(
        self,
        param: Tensor,
        loaded_weight: Tensor,
        *,
        shard_id: str | None = None,
        expert_id: int | None = None,
        region: Region | None = None,
    ) -> None:
        self._quantizer.load(self._name, loaded_weight, region or self._whole_shard(shard_id, expert_id))

    def load_experts(self, weights: Tensor, experts: range, rows: Interval, columns: Interval) -> None:
        """Take the same rows and columns of several experts at once: `weights` [experts, rows, columns]."""
        self._quantizer.load_experts(self._name, weights, experts, rows, columns)

    def observe(self, loaded_weight: Tensor, region: Region) -> None:
        """First pass over a piece of a matrix whose scales span several pieces."""
        self._quantizer.observe(self._name, loaded_weight, region)

    def reset(self) -> None:
        """Announce a reload of the layer: every region may, and must, arrive again."""
        self._quantizer.progress.reset()

    def _whole_shard(self, shard_id: str | None, expert_id: int | None) -> Region:
        layout, name = self.parameter.layout, self.parameter.full_name
        if expert_id not in ((None,) if layout.experts is None else range(layout.experts)):
            wanted = "no expert_id" if layout.experts is None else f"an expert_id below {layout.experts}"
            raise ShapeMismatchError(f"{name}: got expert_id {expert_id} with a whole shard, {wanted} is expected")
        try:
            rows = layout.shard_rows(shard_id)
        except KeyError as error:
            raise ShapeMismatchError(f"{name}: {error.args[0]}") from None
        return Region(expert_id, rows, (0, layout.columns))


def linear_quantizer(scheme: LinearScheme, progress: LayerProgress) -> RegionQuantizer:
    """The region quantizer of a linear layer."""
    return RegionQuantizer(
        progress, scheme.quantizer.quantize, scheme.quantizer.observe, scheme.quantizer.finish_scales
    )


def non_finite_error(name: str, weight: Tensor) -> NonFiniteWeightError:
    """The error that names the first NaN or Inf of a piece; `.position` is its (row, column) there."""
    row, column = (~torch.isfinite(weight)).nonzero()[0].tolist()
    error = NonFiniteWeightError(
        f"{name}: element [{row}, {column}] of the piece is {weight[row, column].item()}; "
        f"weights to be quantized must be finite: repair the checkpoint, or ignore this layer"
    )
    error.position = (row, column)
    return error


def _rows_can_be_joined(layout: WeightLayout, columns: Interval) -> bool:
    """Whether rows laid end to end have the codes and scales they have one below the other."""
    fmt, whole = layout.format, columns == (0, layout.columns)
    return whole and fmt.block_rows == 1 and fmt.block_cols > 0 and layout.columns % fmt.block_cols == 0


def _extent(region: Region) -> tuple[int, int]:
    return region.rows[1] - region.rows[0], region.columns[1] - region.columns[0]


def _check_region_shape(name: str, weight: Tensor, region: Region) -> None:
    expected = _extent(region)
    if tuple(weight.shape) != expected:
        raise ShapeMismatchError(f"{name}: got a piece of shape {tuple(weight.shape)} for {region}, shape {expected}")


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
