"""INT8 weights, symmetric, one float32 scale per row: amax / 127, codes clamped to +-127."""

from __future__ import annotations

import torch

from ..formats import INT8_CHANNEL, WeightFormat
from ..scale_rules import INT8_LARGEST
from .fp8 import divided
from .operations import Reference


class Int8Codec:
    """The arithmetic of INT8 in plain torch."""

    format: WeightFormat = INT8_CHANNEL
    largest: float = INT8_LARGEST

    def scales_from_amax(self, amax: torch.Tensor) -> torch.Tensor:
        """amax / 127; 1 where that is zero, so that a row of zeros has a usable scale."""
        scales = divided(amax, INT8_LARGEST)
        return torch.where(scales == 0, 1.0, scales)

    def ratio(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return values / scales

    def encode(self, ratio: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Nearest integer, ties to even, within +-127."""
        return ratio.round().clamp(-INT8_LARGEST, INT8_LARGEST).to(torch.int8)

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, cols: int) -> torch.Tensor:
        return codes.float() * scales


def make(fmt: WeightFormat, scale_mode: str) -> Reference:
    """The operations of the format; there is one scale mode."""
    return Reference(Int8Codec())
