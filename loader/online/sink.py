"""A parameter and its closure, as those who cut and deliver pieces see them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..geometry.regions import Region
from .weight_loader import DirectWeightLoader


@dataclass(frozen=True, slots=True)
class Sink:
    """A parameter and the closure attached to it."""

    param: Tensor
    loader: Any

    @property
    def direct(self) -> bool:
        """Whether the parameter is kept as stored."""
        return isinstance(self.loader, DirectWeightLoader)

    @property
    def align(self) -> tuple[int, int]:
        """Rows and columns a piece must come in multiples of, to hold whole scale blocks."""
        align: tuple[int, int] = self.loader.align
        return align

    @property
    def whole_rows(self) -> bool:
        """Whether pieces must hold whole rows, because nothing that is seen of their parts tells their scales."""
        return bool(self.loader.whole_rows)

    def whole(self, region: Region) -> bool:
        """Whether what becomes of a region depends on nothing outside of it."""
        return bool(self.loader.whole(region))
