"""NL4: sixteen levels of unequal distance, one signed E4M3 scale for 32 of a row, one float32 scale for each row.

A weight is level * (scale * scale_2), which float32 holds exactly. The levels, `nl4_levels.LEVELS`, are integers of at
most seven bits, denser near zero as weights are, as in llama.cpp's IQ4_NL and in NF4; zero is one of them. There is one
that is longest, -106, and scales have a sign: the largest element of a block takes it, whatever its own sign is, as in
llama.cpp's Q4_0 and IQ4_NL. No other tool reads the format. With each operation rounded to float32:

    scale_2  = 2^(floor(log2(amax of the row, at most the largest BF16)) - 14), at least 2^-112
    nearest  = E4M3 code of (amax of the block / scale_2) * (1 / 106), to nearest, ties to even
    lowest   = the first code from nearest - 1 on, at least 1, with amax of the block within 127 of its scale
    tried    = nearest, nearest + 1, nearest + 2, lowest; none below lowest, and none above 448
    y        = weight * (1 / (scale * scale_2)), to the nearest integer, ties to even; within -127 and 127
    code     = that of the level nearest to y, which is never halfway between two

The block takes the scale of the least squared error, the first of equals: sum((y - level)^2), in integers, times the
square of the scale. It is positive where the largest element (of two of a magnitude, the negative one) is negative, or
all are zeros. In the topmost binade of a type a scale is 288 at most, so that every value is finite.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..formats import NL4, SHORT, Tensors, WeightFormat
from ..nl4_levels import (
    BLOCK,
    CAPPED_CODE,
    CAPPED_FROM,
    FURTHEST,
    LARGEST_CODE,
    LEAST_ROW_EXPONENT,
    LEVELS,
    LONGEST,
    MOST_RAISED,
    RECIPROCAL,
    ROW_EXPONENT,
    STEPS,
    THRESHOLDS,
)
from ..scale_rules import LARGEST_BF16
from .arguments import check_finish, check_observe, check_quantize
from .operations import Reference, column_amax, row_chunks

SORTED = tuple(sorted(LEVELS))


@dataclass(frozen=True)
class Nl4Codec:
    """The arithmetic in plain torch; `values` are float32 [r, c], `scales` scale * scale_2 of the blocks."""

    format: WeightFormat = NL4
    largest: float = float(LONGEST)

    def scales_from_amax(self, amax: torch.Tensor) -> torch.Tensor:
        """float32 scale_2 from the maxima of rows."""
        exponent = torch.frexp(amax.clamp(max=LARGEST_BF16)).exponent - 1 - ROW_EXPONENT
        lowest = torch.full_like(exponent, LEAST_ROW_EXPONENT)
        exponent = torch.where(amax > 0, exponent.clamp(min=LEAST_ROW_EXPONENT), lowest)
        return (exponent + 127 << 23).view(torch.float32)

    def block_scales(self, values: torch.Tensor, scale_2: torch.Tensor, kind: str) -> torch.Tensor:
        """E4M3 scales of the blocks of finite `values`, which were of a kind, under scale_2 [r, 1]."""
        padded = F.pad(values, (0, -values.shape[1] % BLOCK)).view(len(values), -1, BLOCK)
        high, low = padded.amax(-1), padded.amin(-1)
        top = torch.maximum(high, -low) + 0.0  # which has no sign where it is zero
        amax = top * (1.0 / scale_2)
        last = torch.where(scale_2 >= 2.0 ** CAPPED_FROM[kind], CAPPED_CODE, LARGEST_CODE)
        positive = (-low >= high) | (top == 0)
        nearest = (amax * RECIPROCAL).clamp(max=448.0).to(torch.float8_e4m3fn).view(torch.uint8).int()
        lowest = torch.minimum((nearest + min(STEPS)).clamp(min=1), last)
        for _ in range(MOST_RAISED):
            lowest = torch.minimum(lowest + (amax > FURTHEST * _magnitude(lowest)), last)
        best, least = torch.zeros_like(nearest), torch.full_like(amax, torch.inf)
        for step in STEPS:
            code = torch.minimum(torch.maximum(nearest + step, lowest), last)
            scale = torch.where(positive, 1.0, -1.0) * _magnitude(code)
            whole = self.ratio(values, scale * scale_2)
            error = F.pad(whole - _nearest_level(whole), (0, -values.shape[1] % BLOCK)).view(padded.shape)
            total = error.square().sum(-1) * scale.square()
            better = total < least
            least, best = torch.where(better, total, least), torch.where(better, code, best)
        return (best + torch.where(positive, 0, 0x80)).to(torch.uint8).view(torch.float8_e4m3fn)

    def ratio(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """values * (1 / scales), rounded to integers within -127 and 127."""
        y = values * (1.0 / scales).repeat_interleave(BLOCK, 1)[:, : values.shape[1]]
        return y.clamp(-FURTHEST, FURTHEST).round()

    def encode(self, ratio: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Codes of the nearest levels; [r, c] -> packed uint8 [r, ceil(c / 32) * 16]."""
        code = (_index(ratio) + 8 & 15).to(torch.uint8)
        code = F.pad(code, (0, -code.shape[1] % BLOCK))
        return code[:, 0::2] | (code[:, 1::2] << 4)

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, cols: int) -> torch.Tensor:
        """float32 [r, cols] that the packed codes [r, ceil(cols / 32) * 16] stand for."""
        levels = torch.tensor(LEVELS, dtype=torch.float32, device=codes.device)
        code = torch.stack((codes & 15, codes >> 4), -1).flatten(1)[:, :cols]
        return levels[code.int()] * scales.repeat_interleave(BLOCK, 1)[:, :cols]


@dataclass(frozen=True)
class Nl4Reference(Reference):
    """The operations of the format (see `registry`); what maxima decide is scale_2 alone."""

    codec: Nl4Codec

    def quantize(
        self,
        source: torch.Tensor,
        tensors: Tensors,
        statistics: torch.Tensor | None = None,
        scales_known: bool = False,
    ) -> int:
        codec = self.codec
        check_quantize(codec.format, source, tensors)
        codes, scale, scale_2 = tensors
        if not scales_known and (nonfinite := self.make_scales(source, (scale, scale_2))):
            return nonfinite
        nonfinite = 0
        for start, stop in row_chunks(*source.shape):
            values = source[start:stop].float()
            bad = int((~torch.isfinite(values)).sum())
            nonfinite += bad
            if bad or not values.numel():
                continue
            made = codec.block_scales(values, scale_2[start:stop], SHORT[source.dtype])
            units = made.float() * scale_2[start:stop]
            ratio = codec.ratio(values, units)
            encoded = codec.encode(ratio, units)
            scale[start:stop].copy_(made)
            codes[start:stop].copy_(encoded)
            if statistics is not None:
                self._measure(values, ratio, encoded, units, statistics)
        return nonfinite

    def observe(self, source: torch.Tensor, amax: torch.Tensor) -> int:
        check_observe(self.codec.format, source, amax)
        nonfinite = 0
        for start, stop in row_chunks(*source.shape):
            magnitude = source[start:stop].float().abs()
            nonfinite += int((~torch.isfinite(magnitude)).sum())
            part = amax[start:stop]
            part.copy_(torch.maximum(part, column_amax(magnitude, 0)))
        return nonfinite

    def finish_scales(self, amax: torch.Tensor, scales: Tensors) -> None:
        check_finish(self.codec.format, amax, scales)
        scales[1].copy_(self.codec.scales_from_amax(amax))

    def expand(self, scales: Tensors, start: int, stop: int, cols: int) -> torch.Tensor:
        """float32 of both scales together, for each block of rows [start, stop)."""
        scale, scale_2 = scales
        return scale[start:stop].float() * scale_2[start:stop]

    def saturated(self, ratio: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Elements that are, as integers, beyond the levels of their sign."""
        return (ratio > SORTED[-1]) | (ratio < SORTED[0])


def _magnitude(code: torch.Tensor) -> torch.Tensor:
    return code.to(torch.uint8).view(torch.float8_e4m3fn).float()


def _index(whole: torch.Tensor) -> torch.Tensor:
    """How many levels are below the nearest one."""
    return torch.bucketize(whole, torch.tensor(THRESHOLDS, dtype=whole.dtype, device=whole.device))


def _nearest_level(whole: torch.Tensor) -> torch.Tensor:
    return torch.tensor(SORTED, dtype=whole.dtype, device=whole.device)[_index(whole)]


def make(fmt: WeightFormat, scale_mode: str) -> Reference:
    """The operations of the format; there is one scale mode."""
    return Nl4Reference(Nl4Codec())
