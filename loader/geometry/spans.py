"""Where parts of a checkpoint tensor land: spans of elements, and the coordinates that a parameter is written in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .layout import WeightLayout
from .regions import Region


class Span(NamedTuple):
    """A block of one checkpoint tensor that lands in one region.

    Element (row, column) of the region is element `offset + row * row_stride + column * column_stride` of the
    flattened checkpoint tensor.
    """

    parameter: str
    region: Region
    offset: int
    row_stride: int
    column_stride: int


@dataclass(frozen=True)
class Landing:
    """The coordinates a parameter is written in: its matrices, and whether the model keeps them transposed."""

    experts: int | None
    rows: int
    columns: int
    transposed: bool = False
    layout: WeightLayout | None = None
