"""Quantize pieces into the parameters of one layer, in any order and from any number of threads."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..errors import NonFiniteWeightError, ShapeMismatchError
from ..geometry.layout import WeightLayout
from ..geometry.regions import Interval, Region
from ..kernels.formats import Tensors, WeightFormat
from ..kernels.statistics import MAXIMA, merge, new_statistics
from ..schemes.base import LinearScheme, NonFiniteError, TensorStats
from .observing import scales_are_shared
from .parameter import QuantizedParameter

MERGED_AT_ONCE = 64
"""Pieces whose statistics are merged in one go."""


class StatisticsSum:
    """The sum of what was measured on pieces; its owner sees to it that one thread at a time uses it."""

    def __init__(self) -> None:
        self._total = new_statistics()
        self._to_merge: list[Tensor] = []

    def add(self, values: Tensor | None) -> None:
        """Add the statistics of a piece, if any were measured."""
        if values is not None:
            self._to_merge.append(values)
            if len(self._to_merge) == MERGED_AT_ONCE:
                self._merge()

    def total(self) -> Tensor:
        """The sum of all so far, zeros without any."""
        if self._to_merge:
            self._merge()
        return self._total

    def _merge(self) -> None:
        """Add up what has come since the last time; merging vectors one by one takes as long as a small piece."""
        together = torch.stack(self._to_merge).to(self._total.device)
        total = together.sum(0)
        total[list(MAXIMA)] = together[:, list(MAXIMA)].amax(0)
        merge(self._total, total)
        self._to_merge.clear()


class LayerProgress:
    """The parameters of one quantized layer on their way, and the statistics of what was quantized.

    When the last region of the last parameter is written, `finish(layer)` runs, once, in the thread that wrote it.
    """

    def __init__(self, parameters: dict[str, QuantizedParameter], finish: Callable[[Tensor], None]) -> None:
        self.parameters = parameters
        self._statistics = StatisticsSum()
        self._finish = finish
        self._incomplete = set(parameters)
        self._lock = threading.Lock()

    def add(self, stats: TensorStats) -> None:
        """Add the statistics of one piece."""
        with self._lock:
            self._statistics.add(stats.values)

    def commit(self, name: str, numel: int) -> None:
        """So many elements of a parameter are written."""
        if not self.parameters[name].tracker.commit(numel):
            return
        with self._lock:
            self._incomplete.discard(name)
            last = not self._incomplete
        if last:
            self._finish(self._statistics.total())

    def reset(self, parameters: Mapping[str, Region | None] | None = None) -> None:
        """A reload begins: of all parameters, or of those given, each with the region of it that arrives again.

        `None` for a region is all of the parameter. Statistics start from nothing, so those that `finish` gets are of
        what arrives from now on. No piece may be on its way meanwhile.
        """
        again = dict.fromkeys(self.parameters) if parameters is None else parameters
        for name, region in again.items():
            self.parameters[name].reset(region)
        with self._lock:
            self._incomplete |= {name for name in again if not self.parameters[name].tracker.complete}
            self._statistics = StatisticsSum()


class Quantize(Protocol):
    """Writes the codes (and, unless known, the scales) of a piece; raises `NonFiniteError`."""

    def __call__(self, weight: Tensor, tensors: Tensors, *, scales_known: bool = False) -> TensorStats:
        """`weight` [R, C] into `tensors`, its codes and scales."""


class RegionQuantizer:
    """Quantizes the pieces of one layer's parameters on arrival, wherever they lie.

    What linear and MoE loaders share. It never holds more high-precision data than the piece it was handed.
    """

    def __init__(
        self,
        progress: LayerProgress,
        quantize: Quantize,
        observe: Callable[[Tensor, Tensor], None],
        finish_scales: Callable[[Tensor, Tensors], None],
    ) -> None:
        self.progress = progress
        self._quantize, self._observe, self._finish_scales = quantize, observe, finish_scales

    def load(self, name: str, weight: Tensor, region: Region) -> None:
        """Quantize `weight` [rows, columns of the region] into place.

        Raises `RepeatedRegionError`, `ShapeMismatchError`, `NonFiniteWeightError`, and `ValueError` for a piece that
        cuts through scale blocks nobody observed.
        """
        self._load_each(self.progress.parameters[name], name, (weight,), (region.expert,), region)

    def load_experts(
        self, name: str, weights: Tensor, experts: Sequence[int | None], rows: Interval, columns: Interval
    ) -> None:
        """Quantize the same rows and columns of several experts, `weights` [experts, rows, columns], into place.

        In one call where rows may be laid end to end because no scale reaches over the end of a row. Raises as `load`.
        """
        parameter, region = self.progress.parameters[name], Region(experts[0], rows, columns)
        if not isinstance(experts, range) or not _rows_can_be_joined(parameter.layout, columns):
            self._load_each(parameter, name, weights.unbind(), experts, region)
            return
        _check_shape(parameter.full_name, weights[0], region)
        parameter.tracker.claim_each(experts, rows, columns)
        where = slice(experts.start, experts.stop, experts.step), slice(*rows)
        tensors = tuple(tensor[where].flatten(1) for tensor in parameter.tensors())
        weight = weights.flatten(1).to(tensors[0].device)
        try:
            self.progress.add(self._quantize(weight, tensors))
        except NonFiniteError:
            raise non_finite_error(parameter.full_name, weight) from None
        self.progress.commit(name, len(experts) * region.numel)

    def _load_each(
        self,
        parameter: QuantizedParameter,
        name: str,
        weights: Sequence[Tensor],
        experts: Sequence[int | None],
        first: Region,
    ) -> None:
        blocks = parameter.layout.blocks(first)
        shared = scales_are_shared(parameter.layout, parameter.scale_group)
        observed = [block.shard for block in blocks if shared or not block.whole]
        for weight, expert in zip(weights, experts, strict=True):
            _check_shape(parameter.full_name, weight, first)
            if any((expert, shard) not in parameter.scales_known for shard in observed):
                raise ValueError(
                    f"{parameter.full_name}: {first} cuts through scale blocks of {parameter.layout.format.name}; "
                    f"hand over whole blocks, or observe every piece first"
                )
        parameter.tracker.claim_each(experts, first.rows, first.columns)
        for weight, expert in zip(weights, experts, strict=True):
            for block in blocks:
                known = (expert, block.shard) in parameter.scales_known
                tensors = parameter.views(expert, block)
                part = weight[slice(*block.rows)].to(tensors[0].device)
                try:
                    self.progress.add(self._quantize(part, tensors, scales_known=known))
                except NonFiniteError:
                    raise non_finite_error(parameter.full_name, weight) from None
        self.progress.commit(name, len(weights) * first.numel)

    def restored(self, name: str, stats: TensorStats) -> None:
        """All codes and scales of a parameter are what they were after an earlier load, which measured `stats`."""
        parameter = self.progress.parameters[name]
        layout, experts = parameter.layout, parameter.layout.experts
        each = (None,) if experts is None else range(experts)
        parameter.tracker.claim_each(each, (0, layout.rows), (0, layout.columns))
        self.progress.add(stats)
        self.progress.commit(name, layout.numel)

    def observe(self, name: str, weight: Tensor, region: Region) -> None:
        """First pass over a piece of a matrix whose scales span several pieces."""
        parameter = self.progress.parameters[name]
        _check_shape(parameter.full_name, weight, region)
        observation = parameter.observation(functools.partial(_finish, weakref.ref(self), name))
        parts = []
        for block in parameter.layout.blocks(region):
            amax = observation.new_maxima(block.maxima)
            try:
                self._observe(weight[slice(*block.rows)].to(amax.device), amax)
            except NonFiniteError:
                raise non_finite_error(parameter.full_name, weight) from None
            parts.append((block, amax))
        observation.add(region, parts)

    def finish_scales(self, name: str, expert: int | None, shard: int | None, maxima: Tensor) -> None:
        """All of a shard was observed, or, without a number of one, of a matrix and those scaled with it."""
        parameter = self.progress.parameters[name]
        self._finish_scales(maxima, parameter.scales(expert, shard))
        shards = range(len(parameter.layout.shards)) if shard is None else (shard,)
        parameter.scales_known.update((expert, each) for each in shards)


def _finish(
    reference: weakref.ref[RegionQuantizer], name: str, expert: int | None, shard: int | None, maxima: Tensor
) -> None:
    quantizer = reference()  # weak, as a parameter that held it would hold itself
    if quantizer is None:
        raise ReferenceError(f"the closure of {name} was deleted while it was being loaded")
    quantizer.finish_scales(name, expert, shard, maxima)


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
        f"{NonFiniteWeightError.leave_as_stored(name)}"
    )
    error.position = (row, column)
    return error


def rows_below_each_other(fmt: WeightFormat, *stacks: Tensor) -> list[Tensor] | None:
    """Stacks of weights, codes and scales as one matrix each, all to be quantized at once; `None` where they cannot be.

    The rows [matrices, rows, columns] of all matrices lie one below the other, or, where no scale reaches over the end
    of a row, those of each matrix end to end.
    """
    count, rows, columns = stacks[0].shape
    blocks_end = count == 1 or (fmt.rows_in_common and rows % fmt.rows_in_common == 0)
    if blocks_end and all(stack.stride(0) == stack.shape[1] * stack.stride(1) or count == 1 for stack in stacks):
        return [stack.flatten(0, 1) for stack in stacks]
    if fmt.joins_rows(columns) and all(stack[0].is_contiguous() for stack in stacks):
        return [stack.flatten(1) for stack in stacks]
    return None


def _rows_can_be_joined(layout: WeightLayout, columns: Interval) -> bool:
    """Whether rows laid end to end have the codes and scales they have one below the other."""
    return columns == (0, layout.columns) and not layout.is_padded and layout.format.joins_rows(layout.columns)


def _check_shape(name: str, weight: Tensor, region: Region) -> None:
    expected = region.rows[1] - region.rows[0], region.columns[1] - region.columns[0]
    if tuple(weight.shape) != expected:
        raise ShapeMismatchError(f"{name}: got a piece of shape {tuple(weight.shape)} for {region}, shape {expected}")
