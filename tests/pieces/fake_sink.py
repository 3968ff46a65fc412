"""A sink for tests of planners: what a test does not need does nothing."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import torch
from quantload.geometry.regions import Interval, Region
from quantload.online.sink import InPlace, Sink
from torch import Tensor


class FakeSink(Sink):
    """Takes anything; experts one by one."""

    name = "fake"
    values_dtype = None
    align = 1, 1
    whole_rows = False
    maxima_bytes = 0

    def scales_are_local(self, region: Region) -> bool:
        return True

    def scale_group(self, expert: int | None) -> Hashable:
        return id(self), expert

    def in_place(self, dtype: torch.dtype, region: Region) -> InPlace | None:
        return None

    def load_region(self, loaded_weight: Tensor, region: Region) -> None:
        """To be overridden."""

    def load_experts(self, weights: Tensor, experts: Sequence[int | None], rows: Interval, columns: Interval) -> None:
        for weight, expert in zip(weights, experts, strict=True):
            self.load_region(weight, Region(expert, rows, columns))

    def observe(self, loaded_weight: Tensor, region: Region) -> None:
        """To be overridden."""

    def missing(self) -> Iterator[str]:
        return iter(())
