"""What pieces are handed to: the closure of a parameter, as those see it who plan pieces and who deliver them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..geometry.regions import Interval, Region


class InPlace(NamedTuple):
    """A read straight into final storage: `target` gives the 1-D uint8 view to read into, `arrived` ends it."""

    target: Callable[[], Tensor]
    arrived: Callable[[], None]


class Sink(Protocol):
    """Takes the pieces of one parameter, or of a tensor in a file, from any number of threads.

    Coordinates are those of `Region`. A scale is local to a region if nothing outside of the region decides it.
    """

    @property
    def name(self) -> str:
        """What it calls itself in messages."""

    @property
    def values_dtype(self) -> torch.dtype | None:
        """The dtype of a parameter that keeps its values; `None` where they become codes, or go to a file."""

    @property
    def align(self) -> tuple[int, int]:
        """Rows and columns a piece must come in multiples of, to hold whole scale blocks."""

    @property
    def whole_rows(self) -> bool:
        """Whether pieces must hold whole rows, because maxima of their parts do not tell their scales."""

    @property
    def maxima_bytes(self) -> int:
        """Bytes that are held for one matrix while it is observed."""

    def scales_are_local(self, region: Region) -> bool:
        """Whether nothing outside of a region decides its scales; if not, every piece of the matrix is observed first.

        Experts differ in nothing here.
        """

    def scale_group(self, expert: int | None) -> Hashable:
        """Stands for all matrices that get their scales together with that of an expert: they are observed together."""

    def in_place(self, dtype: torch.dtype, region: Region) -> InPlace | None:
        """How the bytes of a region, stored row after row as `dtype`, are read into place; `None`: they cannot be."""

    def load_region(self, loaded_weight: Tensor, region: Region) -> None:
        """Take a piece [rows, columns of the region]."""

    def load_experts(self, weights: Tensor, experts: Sequence[int | None], rows: Interval, columns: Interval) -> None:
        """Take the same rows and columns of several experts at once: `weights` [experts, rows, columns]."""

    def observe(self, loaded_weight: Tensor, region: Region) -> None:
        """First pass over a piece of a matrix whose scales are not local to its pieces."""

    def missing(self) -> Iterator[str]:
        """What has not arrived."""
