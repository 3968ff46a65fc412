"""Scale bytes of MX formats by the squared error of each block: floor(log2 amax) - emax, or the next one.

The first cuts off what lies above the largest code, the second makes room for it at half the resolution. A tie goes to
the first. A still larger scale cannot win, because its codes below amax are codes of the second one too. The bytes are
no other tool's, but whatever reads the format reads them.
"""

from __future__ import annotations

from typing import NoReturn

import torch
import torch.nn.functional as F

from ..formats import SHORT, Tensors
from .arguments import check_finish
from .mxfp4 import BLOCK
from .operations import Codec, Reference, row_chunks


class MseReference(Reference):
    """The operations of one MX codec with scales of the least squared error (see `registry`)."""

    def make_scales(self, source: torch.Tensor, scales: Tensors) -> int:
        (scale,) = scales
        amax = torch.zeros(scale.shape, dtype=torch.float32, device=source.device)
        nonfinite = self.observe(source, amax)
        if not nonfinite:
            for start, stop in row_chunks(*source.shape):
                values = source[start:stop].float()
                last = self.codec.format.mx_element.last_byte(SHORT[source.dtype])
                scale[start:stop].copy_(least_error_bytes(self.codec, values, amax[start:stop], last))
        return nonfinite

    def finish_scales(self, amax: torch.Tensor, scales: Tensors) -> NoReturn:
        check_finish(self.codec.format, amax, scales)
        raise ValueError(
            f"{self.codec.format.name}: scales of the least squared error cannot be told from amax alone; "
            "quantize pieces that hold whole blocks of 32 columns"
        )


def least_error_bytes(codec: Codec, values: torch.Tensor, amax: torch.Tensor, last: int) -> torch.Tensor:
    """uint8 [r, blocks], at most `last`, for finite float32 `values` [r, c], from amax [r, blocks]."""
    emax = codec.format.mx_element.emax
    floor = ((amax.view(torch.int32) >> 23) - emax).clamp(0, 254).to(torch.uint8)
    here, there = (squared_errors(codec, codec.ratio(values, byte), byte) for byte in (floor, floor + 1))
    return floor + ((here > 4.0 * there) & (floor < last)).to(torch.uint8)


def squared_errors(codec: Codec, ratio: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 [r, blocks] in units of the squared scale, summed as every kernel must: even and odd k, then halves."""
    unscaled = torch.full_like(scales, 127)
    error = ratio - codec.decode(codec.encode(ratio, scales), unscaled, ratio.shape[1])
    square = F.pad(error, (0, -error.shape[1] % BLOCK)).square().view(*scales.shape, BLOCK)
    return folded(square[..., 0::2] + square[..., 1::2])[..., 0]


def folded(values: torch.Tensor) -> torch.Tensor:
    """Sums over the last dimension, a power of two, halves onto halves; it stays, with one element."""
    while values.shape[-1] > 1:
        low, high = values.chunk(2, dim=-1)
        values = low + high
    return values
