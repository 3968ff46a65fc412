"""NVFP4: E2M1 codes, two to a byte, one E4M3 scale for 16 of a row, and one float32 scale for the tensor.

A weight is code * (scale * scale_2), in float32. The rules are those of compressed-tensors 0.20 (`generate_gparam`,
`calculate_qparams` and its compressor) on maxima in float32; scale_2 is NVIDIA ModelOpt's `weight_scale_2`. With
R = 6 * 448 and each operation rounded to float32:

    scale_2     = amax of the tensor (at most the largest BF16) / R, and 1 where the multiplier would not be finite
    multiplier  = R * (1 / amax of the tensor) (compressed-tensors' `weight_global_scale`)
    scale       = multiplier * (amax of the block / 6), to E4M3, at most 448; 0.125 where that gives 0
    code        = w / (scale / multiplier), to E2M1, ties to even, at most 6; a weight of -0 is stored as 0

The multiplier is told from scale_2 alone, so that any part of a tensor can be quantized once that is known: the maximum
is scale_2 * R, rounded to 12 bits where scale_2 belongs to that number too, as it does for weights in BF16 and FP16.

The scale mode "mse" is what ModelOpt calls "four over six": R = 6 * 256, as it has there, and each block takes amax / 6
or amax / 4 for its scale, whichever has the smaller squared error; a tie goes to 6.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..formats import NVFP4, Tensors, WeightFormat
from ..nvfp4_scales import AMAX_BITS, BLOCK, EMPTY_SCALE, LARGEST, LARGEST_FLOAT32, LARGEST_SCALE, SMALLEST_AMAX, spread
from ..scale_rules import LARGEST_BF16
from .arguments import check_finish, check_observe, check_quantize
from .fp8 import divided
from .mx_mse import folded
from .mxfp4 import VALUES
from .operations import Reference, column_amax, row_chunks


@dataclass(frozen=True)
class Nvfp4Codec:
    """The arithmetic in plain torch; `values` are float32 [r, c], `scale` E4M3 [r, ceil(c / 16)]."""

    scale_mode: str = "default"
    format: WeightFormat = NVFP4
    largest: float = LARGEST

    def scales_from_amax(self, amax: torch.Tensor) -> torch.Tensor:
        """float32 scale_2 from the maxima of tensors."""
        whole, amax = spread(self.scale_mode), amax.clamp(max=LARGEST_BF16)
        usable = torch.isfinite(amax.clamp(min=SMALLEST_AMAX).reciprocal() * whole)
        return torch.where(usable, divided(amax, whole), 1.0)

    def multiplier(self, scale_2: torch.Tensor) -> torch.Tensor:
        """float32 R * (1 / amax), by which weights come into the range of codes times E4M3."""
        whole = spread(self.scale_mode)
        amax = (scale_2 * whole).clamp(max=LARGEST_FLOAT32)
        short = _shortened(amax)
        amax = torch.where(divided(short, whole) == scale_2, short, amax)
        return amax.reciprocal() * whole

    def scale_2_of(self, multiplier: torch.Tensor) -> torch.Tensor:
        """float32 scale_2 whose `multiplier` is given; NaN for a multiplier that is none, not finite or not positive.

        It is that of the largest weight in BF16 or FP16 which one scale mode or the other gives it, where there is such
        a weight, else the reciprocal.
        """
        found = multiplier.reciprocal()
        for mode in ("mse", "default"):
            codec, whole = Nvfp4Codec(mode), torch.full_like(multiplier, spread(mode))
            scale_2 = codec.scales_from_amax(_shortened(whole / multiplier))
            found = torch.where(codec.multiplier(scale_2) == multiplier, scale_2, found)
        return torch.where(torch.isfinite(multiplier) & (multiplier > 0), found, torch.nan)

    def block_scales(self, values: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
        """E4M3 scales of the blocks of finite `values` under scale_2 [1, 1]."""
        amax, multiplier = column_amax(values.abs(), BLOCK), self.multiplier(scale_2)
        six = _to_e4m3(multiplier * divided(amax, 6.0))
        if self.scale_mode == "default":
            return six
        four = _to_e4m3(multiplier * divided(amax, 4.0))
        errors = [_squared_errors(self, values, each.float(), multiplier) for each in (six, four)]
        return torch.where((errors[1] < errors[0]), four.view(torch.uint8), six.view(torch.uint8)).view(six.dtype)

    def steps(self, scale: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
        """float32 scale / multiplier of each block."""
        return scale.float() / self.multiplier(scale_2)

    def ratio(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """values / scales, which are `steps`; a zero has no sign."""
        return (values + 0.0) / _per_element(scales, values.shape[1])

    def encode(self, ratio: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Nearest E2M1 code, ties to even, saturating; [r, c] -> packed uint8 [r, ceil(c / 16) * 8]."""
        y = ratio.abs()
        code = (y > 0.25).to(torch.uint8)
        code += y >= 0.75
        code += y > 1.25
        code += y >= 1.75
        code += y > 2.5
        code += y >= 3.5
        code += y > 5.0
        code |= torch.signbit(ratio).to(torch.uint8) << 3
        code = F.pad(code, (0, -code.shape[1] % BLOCK))
        return code[:, 0::2] | (code[:, 1::2] << 4)

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, cols: int) -> torch.Tensor:
        """float32 [r, cols] that the packed codes [r, ceil(cols / 16) * 8] stand for; `scales` are scale * scale_2."""
        return _e2m1(codes)[:, :cols].mul_(_per_element(scales, cols))


def _shortened(amax: torch.Tensor) -> torch.Tensor:
    """float32 rounded to as many bits as the largest weight in BF16 or FP16 has at most."""
    dropped = 24 - AMAX_BITS
    return (amax.view(torch.int32) + (1 << (dropped - 1)) & -1 << dropped).view(torch.float32)


@dataclass(frozen=True)
class Nvfp4Reference(Reference):
    """The operations of the format (see `registry`); what maxima decide is scale_2 alone."""

    codec: Nvfp4Codec

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
        if not scales_known:
            amax = torch.zeros_like(scale_2)
            if nonfinite := self.observe(source, amax):
                return nonfinite
            self.finish_scales(amax, (scale, scale_2))
        nonfinite = 0
        for start, stop in row_chunks(*source.shape):
            values = source[start:stop].float()
            bad = int((~torch.isfinite(values)).sum())
            nonfinite += bad
            if bad or not values.numel():
                continue
            made = codec.block_scales(values, scale_2)
            steps = codec.steps(made, scale_2)
            ratio = codec.ratio(values, steps)
            encoded = codec.encode(ratio, steps)
            scale[start:stop].copy_(made)
            codes[start:stop].copy_(encoded)
            if statistics is not None:
                self._measure(values, ratio, encoded, made.float() * scale_2, statistics)
        return nonfinite

    def observe(self, source: torch.Tensor, amax: torch.Tensor) -> int:
        check_observe(self.codec.format, source, amax)
        nonfinite = 0
        for start, stop in row_chunks(*source.shape):
            magnitude = source[start:stop].float().abs()
            nonfinite += int((~torch.isfinite(magnitude)).sum())
            if magnitude.numel():
                torch.maximum(amax, magnitude.max(), out=amax)
        return nonfinite

    def finish_scales(self, amax: torch.Tensor, scales: Tensors) -> None:
        check_finish(self.codec.format, amax, scales)
        scales[1].copy_(self.codec.scales_from_amax(amax))

    def expand(self, scales: Tensors, start: int, stop: int, cols: int) -> torch.Tensor:
        """float32 of both scales together, for each block of rows [start, stop)."""
        scale, scale_2 = scales
        return scale[start:stop].float() * scale_2


def _e2m1(codes: torch.Tensor) -> torch.Tensor:
    """float32 [r, 2 n] of the codes in uint8 [r, n]."""
    of_nibble = torch.tensor(VALUES + tuple(-v for v in VALUES), dtype=torch.float32, device=codes.device)
    of_byte = torch.stack((of_nibble.repeat(16), of_nibble.repeat_interleave(16)), -1)
    pairs = of_byte.view(torch.int64).flatten()  # both values of a byte are one word to be fetched
    return pairs.index_select(0, codes.reshape(-1).int()).view(torch.float32).view(codes.shape[0], -1)


def _to_e4m3(scale: torch.Tensor) -> torch.Tensor:
    rounded = scale.clamp(max=LARGEST_SCALE).to(torch.float8_e4m3fn).float()
    return torch.where(rounded == 0, EMPTY_SCALE, rounded).to(torch.float8_e4m3fn)


def _squared_errors(
    codec: Nvfp4Codec, values: torch.Tensor, scale: torch.Tensor, multiplier: torch.Tensor
) -> torch.Tensor:
    """float32 [r, blocks] in units of the multiplier, summed as every kernel must: even and odd k, then halves.

    Of values * (multiplier / scale), which is what all kernels can have in common; only codes are made of quotients.
    """
    inverse = (multiplier / scale).clamp(max=LARGEST_FLOAT32)  # times a zero, an infinity is no number
    ratio = values * _per_element(inverse, values.shape[1])
    error = ratio - _e2m1(codec.encode(ratio, scale))[:, : ratio.shape[1]]
    square = F.pad(error, (0, -error.shape[1] % BLOCK)).square().view(*scale.shape, BLOCK)
    return folded(square[..., 0::2] + square[..., 1::2])[..., 0] * scale.square()


def _per_element(blocks: torch.Tensor, cols: int) -> torch.Tensor:
    return blocks.repeat_interleave(BLOCK, 1)[:, :cols]


def make(fmt: WeightFormat, scale_mode: str) -> Reference:
    """The operations of the format in a scale mode."""
    return Nvfp4Reference(Nvfp4Codec(scale_mode))
