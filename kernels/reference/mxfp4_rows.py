"""MXFP4 whose rows have a multiplier: w ~ m * Q(w / m), m the best of 16 between one power of two and the next.

A power of two more in m is one less in every scale byte, so one octave holds all there is to try: m = 2^(j/16),
j = 0..15, in float32. The row takes the m of the least squared error under the EVEN rule; a tie goes to the smallest j,
so a row of zeros has m = 1. In float32, with r = 1 / m:

    byte  = EVEN rule of (r * amax of the block), at most `last_byte_of_row`
    ratio = w * (r * 2^(127 - byte)), rounded to E2M1
    value = (code * 2^(byte - 127)) * m

The squared error is summed so that every kernel can do the same: of a block, in units of its scale, in float32 as
`mx_mse` does; of a row in float64, halves of the blocks onto each other, their number filled up to a power of two.
"""

from __future__ import annotations

from typing import NoReturn

import torch
import torch.nn.functional as F

from ..formats import MULTIPLIER_BYTES, MXFP4_ROWS, SHORT, Tensors, WeightFormat
from ..mx_elements import E2M1, last_byte_of_row
from ..scale_rules import CANDIDATES
from . import mxfp4
from .arguments import check_finish, check_observe
from .mx_mse import folded, squared_errors
from .mxfp4 import BLOCK, power_of_two
from .operations import Reference, column_amax, row_chunks


class Mxfp4RowsCodec:
    """The arithmetic in plain torch; `scales` are rows of the scale tensor."""

    format: WeightFormat = MXFP4_ROWS
    largest: float = E2M1.largest

    def __init__(self) -> None:
        self._blocks = mxfp4.Mxfp4Codec()

    def scales_from_amax(self, amax: torch.Tensor) -> NoReturn:
        """There is no such rule: raises `ValueError`."""
        raise ValueError(
            f"{self.format.name}: the multiplier of a row cannot be told from maxima of its parts; quantize pieces "
            "that hold whole rows, or choose mxfp4"
        )

    def ratio(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """values * (1 / multiplier * 2^(127 - byte))."""
        bytes_, multipliers = split(scales)
        return values * _factors(bytes_, 1.0 / multipliers, values.shape[1])

    def encode(self, ratio: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """MXFP4 codes, [r, c] -> packed uint8 [r, ceil(c/32) * 16]."""
        return self._blocks.encode(ratio, scales)

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, cols: int) -> torch.Tensor:
        """float32 [r, cols]: the values of MXFP4, times the multipliers."""
        bytes_, multipliers = split(scales)
        return self._blocks.decode(codes, bytes_, cols) * multipliers

    def best_scales(self, values: torch.Tensor, kind: str) -> torch.Tensor:
        """Rows of the scale tensor for finite float32 `values` [r, c] that were of a kind."""
        amax = column_amax(values.abs(), BLOCK)
        multiplier = torch.ones(len(values), 1, dtype=torch.float32, device=values.device)
        least = torch.full_like(multiplier, torch.inf, dtype=torch.float64)
        best = torch.zeros_like(amax, dtype=torch.uint8)
        for candidate in CANDIDATES:
            reciprocal = 1.0 / torch.full_like(multiplier, candidate)
            bytes_ = self._blocks.scales_from_amax(amax * reciprocal).clamp_(max=last_byte_of_row(candidate, kind))
            error = self._squared_error(values, bytes_, reciprocal) * candidate**2
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, bytes_, best)
            multiplier = torch.where(better, candidate, multiplier)
        return torch.cat((best, multiplier.view(torch.uint8)), 1)

    def _squared_error(self, values: torch.Tensor, bytes_: torch.Tensor, reciprocal: torch.Tensor) -> torch.Tensor:
        """float64 [r, 1] of values / multiplier."""
        in_units = squared_errors(self._blocks, values * _factors(bytes_, reciprocal, values.shape[1]), bytes_)
        squared_scale = ((2 * bytes_.long() + 1023 - 254) << 52).view(torch.float64)
        total = in_units.double() * squared_scale
        return folded(F.pad(total, (0, (1 << (total.shape[1] - 1).bit_length()) - total.shape[1])))


class Mxfp4RowsReference(Reference):
    """The operations of the format (see `registry`); a multiplier needs its whole row."""

    codec: Mxfp4RowsCodec

    def make_scales(self, source: torch.Tensor, scales: Tensors) -> int:
        (scale,) = scales
        for start, stop in row_chunks(*source.shape) if source.shape[1] else ():
            values = source[start:stop].float()
            finite = torch.where(torch.isfinite(values), values, 0)
            scale[start:stop].copy_(self.codec.best_scales(finite, SHORT[source.dtype]))
        return 0

    def observe(self, source: torch.Tensor, amax: torch.Tensor) -> int:
        check_observe(self.codec.format, source, amax)
        return mxfp4.reference.observe(source, amax[:, :-MULTIPLIER_BYTES])

    def finish_scales(self, amax: torch.Tensor, scales: Tensors) -> NoReturn:
        check_finish(self.codec.format, amax, scales)
        self.codec.scales_from_amax(amax)


def split(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale bytes [..., blocks], a view, and the float32 multipliers [..., 1]."""
    bytes_, multipliers = scales[..., :-MULTIPLIER_BYTES], scales[..., -MULTIPLIER_BYTES:]
    # A clone even where it is contiguous: it may begin at an address that no float32 can.
    return bytes_, multipliers.clone(memory_format=torch.contiguous_format).view(torch.float32)


def _factors(bytes_: torch.Tensor, reciprocal: torch.Tensor, cols: int) -> torch.Tensor:
    return (power_of_two(254 - bytes_.int()) * reciprocal).repeat_interleave(BLOCK, 1)[:, :cols]


def make(fmt: WeightFormat, scale_mode: str) -> Reference:
    """The operations of the format; there is one scale mode."""
    return Mxfp4RowsReference(Mxfp4RowsCodec())
