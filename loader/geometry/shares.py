"""What one rank has of a parameter that several ranks hold together: intervals of one of its dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .regions import Interval


@dataclass(frozen=True)
class Share:
    """The elements of a rank: `intervals` of dimension `dim`, which has `size` in all, one behind the other."""

    dim: int
    size: int
    intervals: tuple[Interval, ...]

    @property
    def length(self) -> int:
        """Elements of the dimension that the rank has."""
        return sum(high - low for low, high in self.intervals)

    def of(self, tensor: Tensor) -> Tensor:
        """The rank's part of a whole tensor, which may be `Coordinates`."""
        parts = [tensor.narrow(self.dim, low, high - low) for low, high in self.intervals]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)


def even_share(dim: int, size: int, rank: int, ranks: int, parts: int = 1) -> Share | None:
    """The share of a dimension of `parts` equal parts, such as gate and up, of each of which every rank has as much.

    `None` where they cannot be divided evenly.
    """
    each, rest = divmod(size, parts * ranks)
    if rest:
        return None
    first = (part * (size // parts) + rank * each for part in range(parts))
    return Share(dim, size, tuple((low, low + each) for low in first))


def repeated_share(dim: int, size: int, heads: int, rank: int, ranks: int) -> Share | None:
    """The share of a dimension of `heads` heads that are fewer than the ranks: one, which some ranks have together.

    `None` where as many ranks cannot have each.
    """
    if ranks % heads or size % heads:
        return None
    width, head = size // heads, rank * heads // ranks
    return Share(dim, size, ((head * width, (head + 1) * width),))
