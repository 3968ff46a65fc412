"""What a quantize kernel measures while a piece is in cache: one float64 vector per parameter."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

COUNT = 0
"""Elements seen (padding is not counted)."""
SIGNAL = 1
"""Sum of x squared (the CPU kernels of FP8 and integers square x / scale in float32: below 2^-63 scale that is 0)."""
NOISE = 2
"""Sum of (x - dequantized x) squared."""
MAX_ERROR = 3
"""Largest |x - dequantized x|."""
AMAX = 4
"""Largest |x|."""
SATURATED = 5
"""Elements whose |x| / scale exceeds the largest code value (by more than the rounding of the scale)."""
ZERO = 6
"""Elements whose code is a zero of either sign."""
STATS = 7
"""Length of the vector."""

MAXIMA = (MAX_ERROR, AMAX)
"""Entries that combine by maximum; all others add."""

SATURATION_SLACK = 2.0**-20
"""Relative excess over the largest code that still counts as rounding of the scale, not as saturation."""


def new_statistics(device: torch.device | str = "cpu") -> torch.Tensor:
    """A zeroed float64 [STATS] vector that quantize kernels accumulate into."""
    import torch  # the numbers above are for processes without it, too

    return torch.zeros(STATS, dtype=torch.float64, device=device)


def merge(into: torch.Tensor, other: torch.Tensor) -> None:
    """Add the float64 [STATS] vector `other` to `into` in place (maxima by maximum)."""
    maxima = [into[i].maximum(other[i]) for i in MAXIMA]
    into += other
    for i, value in zip(MAXIMA, maxima, strict=True):
        into[i] = value


def sqnr_db(statistics: torch.Tensor) -> float:
    """Signal to quantization noise ratio in dB: 10 log10(signal / noise); inf without noise, nan where all is zero.

    0 where the squares of all elements vanish beside their scale: then every code is zero and everything is lost.
    -inf where the noise is infinite, which it is beside no finite weights.
    """
    signal, noise = float(statistics[SIGNAL]), float(statistics[NOISE])
    if signal == 0.0:
        return math.nan if float(statistics[AMAX]) == 0.0 else 0.0
    if noise == math.inf:
        return -math.inf
    return 10.0 * math.log10(signal / noise) if noise > 0.0 else math.inf
