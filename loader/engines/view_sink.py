"""Pieces of a checkpoint for a tensor that is there already: what an engine keeps as it is."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from ..geometry.regions import Interval, Region, RegionTracker
from ..online.non_finite import NonFiniteValues
from ..online.sink import InPlace


class ViewSink:
    """Writes pieces into `target` [rows, columns], of any strides and dtype (see `Sink`)."""

    align = (1, 1)
    whole_rows = False
    maxima_bytes = 0

    def __init__(self, name: str, target: Tensor, non_finite: NonFiniteValues) -> None:
        """`name` is that of the checkpoint tensor; `non_finite` is told of NaN and infinities."""
        self.name = name
        self.values_dtype: torch.dtype | None = target.dtype
        self._target, self._dtype, self._non_finite = target, target.dtype, non_finite
        self._rows, self._columns = target.shape
        self._tracker = RegionTracker(name, None, self._rows, self._columns)

    def scales_are_local(self, region: Region) -> bool:
        """Always: nothing is computed."""
        return True

    def scale_group(self, expert: int | None) -> Hashable:
        return self.name, id(self), expert

    def in_place(self, dtype: torch.dtype, region: Region) -> InPlace | None:
        """Where the region is contiguous in the target and needs no conversion."""
        if dtype != self._dtype or not self._view(region).is_contiguous():
            return None
        return InPlace(functools.partial(self._bytes, region), functools.partial(self._arrived, region))

    def load_region(self, loaded_weight: Tensor, region: Region) -> None:
        view = self._view(region)
        self._tracker.claim(region)
        self._look(loaded_weight, region)
        view.copy_(loaded_weight)
        self._tracker.commit(region.numel)

    def load_experts(self, weights: Tensor, experts: Sequence[int | None], rows: Interval, columns: Interval) -> None:
        """Take the same rows and columns of several matrices: there is one, without a number."""
        for weight, expert in zip(weights, experts, strict=True):
            self.load_region(weight, Region(expert, rows, columns))

    def observe(self, loaded_weight: Tensor, region: Region) -> None:
        """There is nothing to learn where scales are local."""

    def missing(self) -> Iterator[str]:
        return self._tracker.described_gaps()

    def _arrived(self, region: Region) -> None:
        self._look(self._view(region), region)
        self._tracker.commit(region.numel)

    def _bytes(self, region: Region) -> Tensor:
        self._tracker.claim(region)
        return self._view(region).reshape(-1).view(torch.uint8)

    def _look(self, values: Tensor, region: Region) -> None:
        self._non_finite.look(
            self.name,
            (self._rows, self._columns),
            values,
            self._dtype,
            first=region.rows[0] * self._columns + region.columns[0],
            pitch=self._columns,
        )

    def _view(self, region: Region) -> Tensor:
        return self._target[slice(*region.rows), slice(*region.columns)]
