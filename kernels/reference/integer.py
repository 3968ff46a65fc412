"""INT4 and INT8 weights with a zero point: unsigned codes, a scale and a zero point for each group of a row.

A weight is (code - zero) * scale in float32. From the smallest and largest weight of a group, zero included, with
L = 2^bits - 1 as in AutoAWQ's zero point quantization:

    scale = (largest - smallest) / L, stored in the dtype of the scales; neither counts beyond `largest_extreme`
    zero  = round(-smallest / scale), within 0 .. L
    code  = round(weight / scale) + zero, within 0 .. L

with the stored scale, ties to even. Where scales are float16 they stay finite: a group with a range above L * 65504
saturates. No scale is less than `SMALLEST_SCALE`: groups of zeros have that one, and their codes are their zero point.

`int4fp8_channel` is symmetric, as SGLang's `quark_int4fp8_moe` makes its experts: scale = largest magnitude / 7,
zero 8, codes 1 .. 15. SGLang divides that scale by the FP8 scale of the tensor and multiplies it with it again;
nothing of the FP8 scale is left, so it is not computed here.

The maxima of `observe` have the shape of the scales: the largest weight of a group and minus its smallest, both at
least 0, where its scale and its zero point will stand. So larger of two is what pieces of a group combine by.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .. import statistics as st
from ..formats import Tensors, WeightFormat
from ..scale_rules import SMALLEST_SCALE, SYMMETRIC_LARGEST
from .arguments import check_observe
from .fp8 import divided
from .operations import Reference, column_amax, row_chunks


@dataclass(frozen=True)
class IntegerCodec:
    """The arithmetic of an integer format in plain torch; expanded scales are [2, r, c]: scales, then zero points."""

    format: WeightFormat

    @property
    def largest(self) -> float:
        """The largest code."""
        return self.format.largest

    @property
    def smallest(self) -> float:
        """The smallest code that is used."""
        return 1.0 if self.is_symmetric else 0.0

    @property
    def is_symmetric(self) -> bool:
        """Whether the rule gives every row the same zero point."""
        return self.format.rule == "symmetric"

    def scales_from_amax(self, amax: torch.Tensor) -> torch.Tensor:
        """Scales and zero points side by side, in the dtype of the scales, from the float32 maxima of `observe`."""
        high, low = amax[:, 0::2], amax[:, 1::2]
        if self.is_symmetric:
            scale = divided(torch.maximum(high, low), SYMMETRIC_LARGEST)
        else:  # of half the range, because the range itself may not be a finite float32
            scale = divided(high * 0.5 + low * 0.5, self.largest / 2)
        scale = self.stored(scale)
        zero = torch.full_like(high, 8.0) if self.is_symmetric else (low / scale.float()).round().clamp(0, self.largest)
        return torch.stack((scale, zero.to(scale.dtype)), 2).flatten(1)

    def stored(self, scale: torch.Tensor) -> torch.Tensor:
        """float32 scales in the dtype of the scales, within what that holds and the format takes."""
        dtype = self.format.scale_dtype
        return scale.to(dtype).clamp(SMALLEST_SCALE, torch.finfo(dtype).max)

    def ratio(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """values / scales, before the zero points are added."""
        return values / scales[0]

    def encode(self, ratio: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Codes [r, c], those of four bits packed [r, ceil(c / 2)]; the nibble behind the last of an odd row is 0."""
        codes = (ratio.round() + scales[1]).clamp(self.smallest, self.largest).to(torch.uint8)
        if self.format.code_bits == 8:
            return codes
        codes = F.pad(codes, (0, codes.shape[1] % 2))
        return codes[:, 0::2] | codes[:, 1::2] << 4

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, cols: int) -> torch.Tensor:
        """float32 [r, cols]: (code - zero point) * scale."""
        if self.format.code_bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), -1).flatten(1)[:, :cols]
        return (codes.float() - scales[1]) * scales[0]


@dataclass(frozen=True)
class IntegerReference(Reference):
    """The operations of a codec that has two numbers for each group."""

    codec: IntegerCodec

    def observe(self, source: torch.Tensor, amax: torch.Tensor) -> int:
        """Raise `amax` to the largest weight of each group and minus its smallest (see the module)."""
        fmt = self.codec.format
        check_observe(fmt, source, amax)
        nonfinite = 0
        for start, stop in row_chunks(*source.shape):
            values = source[start:stop].float()
            nonfinite += int((~torch.isfinite(values)).sum())
            for word, part in enumerate((values, -values)):
                known = amax[start:stop, word::2]
                known.copy_(torch.maximum(known, column_amax(part.clamp(min=0), fmt.block_cols)))
        amax.clamp_(max=fmt.largest_amax(source.dtype))
        return nonfinite

    def expand(self, scales: Tensors, start: int, stop: int, cols: int) -> torch.Tensor:
        """float32 [2, rows, cols]: the scale and the zero point of every element."""
        (scale,) = scales
        words = torch.stack((scale[start:stop, 0::2], scale[start:stop, 1::2])).float()
        return words.repeat_interleave(self.codec.format.block_cols or max(cols, 1), 2)[..., :cols]

    def saturated(self, ratio: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Elements more than half a code, and the rounding of the scale, beyond the codes that are used."""
        smallest, largest = self.codec.smallest, self.codec.largest
        reach = (largest - smallest + 1.0) / 2 * (1.0 + st.SATURATION_SLACK)
        return (ratio + scales[1] - (largest + smallest) / 2).abs() > reach


def make(fmt: WeightFormat, scale_mode: str) -> Reference:
    """The operations of an integer format; there is one scale mode."""
    return IntegerReference(IntegerCodec(fmt))
