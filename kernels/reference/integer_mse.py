"""Scales and zero points of INT4 groups by the squared error: the best of sixteen pairs (see `group_search`).

The range from the smallest to the largest weight of a group is cut off at both ends alike, by up to a sixth, so that
the steps are finer for those that stay within. With each operation rounded to float32, L = 15, low minus the smallest
weight and high the largest, both at least 0 and at most `searched_extreme`:

    scale = ((high / 2 + low / 2) / (L / 2)) * factor, stored as the rule of the format says, for each of `FACTORS`
    zero  = round(low / scale - shift) and the next one, within 0 .. L
    y     = weight * (1 / scale), within -32 and 32, to the nearest multiple of 1/32, ties to even
    error = y - (round(y) within -zero and L - zero), in 32nds

The group takes the pair of the least sum(error^2) * (scale / first scale)^2, the first of equals. Codes are those of
the format's own rule under it. No other tool makes these bytes, and every tool that reads the format reads them.
"""

from __future__ import annotations

from typing import NoReturn

import torch
import torch.nn.functional as F

from ..formats import SHORT, Tensors, WeightFormat
from ..group_search import FACTORS, FURTHEST, LARGEST, SHIFTS, UNIT, ZERO_POINTS, searched_extreme
from .arguments import check_finish
from .fp8 import divided
from .integer import IntegerCodec, IntegerReference
from .operations import Reference, row_chunks


class IntegerMseReference(IntegerReference):
    """The operations of an INT4 format with scales and zero points of the least squared error (see `registry`)."""

    def make_scales(self, source: torch.Tensor, scales: Tensors) -> int:
        (scale,) = scales
        amax = torch.zeros(scale.shape, dtype=torch.float32, device=source.device)
        nonfinite = self.observe(source, amax)
        if not nonfinite:
            amax.clamp_(max=searched_extreme(SHORT[source.dtype]))
            for start, stop in row_chunks(*source.shape):
                scale[start:stop].copy_(self._searched(source[start:stop].float(), amax[start:stop]))
        return nonfinite

    def finish_scales(self, amax: torch.Tensor, scales: Tensors) -> NoReturn:
        fmt = self.codec.format
        check_finish(fmt, amax, scales)
        raise ValueError(
            f"{fmt.name}: scales and zero points of the least squared error cannot be told from extremes alone; "
            f"quantize pieces that hold whole groups of {fmt.block_cols} columns"
        )

    def _searched(self, values: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
        """Scales and zero points [r, 2 * groups] for finite float32 `values` [r, c] and their extremes."""
        high, low = amax[:, 0::2], amax[:, 1::2]
        groups = F.pad(values, (0, -values.shape[1] % self.codec.format.block_cols)).view(*low.shape, -1)
        whole = divided(high * 0.5 + low * 0.5, LARGEST / 2)
        first = self.codec.stored(whole * FACTORS[0]).float()
        least = torch.full_like(low, torch.inf)
        best = torch.stack((first, torch.zeros_like(low)), -1)
        for factor, shift in zip(FACTORS, SHIFTS, strict=True):
            scale = self.codec.stored(whole * factor).float()
            y = (groups * (1.0 / scale)[..., None]).clamp(-FURTHEST, FURTHEST)
            y = (y / UNIT).round() * UNIT
            lowest = (low / scale - shift).round()
            for step in ZERO_POINTS:
                zero = (lowest + step).clamp(0, LARGEST)
                code = torch.minimum(torch.maximum(y.round(), -zero[..., None]), (LARGEST - zero)[..., None])
                error = ((y - code) / UNIT).int()
                total = (error * error).sum(-1).float() * (scale / first).square()
                better = total < least
                least = torch.where(better, total, least)
                best = torch.where(better[..., None], torch.stack((scale, zero), -1), best)
        return best.flatten(1).to(self.codec.format.scale_dtype)


def make(fmt: WeightFormat, scale_mode: str) -> Reference:
    """The operations of an INT4 format in a scale mode."""
    return (IntegerMseReference if scale_mode == "mse" else IntegerReference)(IntegerCodec(fmt))
