"""Scale bytes of MX formats by the squared error of each block: floor(log2 amax) - emax, or the next one.

The first cuts off what lies above the largest code, the second makes room for it at half the resolution. A tie goes to
the first. A still larger scale cannot win, because its codes below amax are codes of the second one too. The bytes are
no other tool's, but whatever reads the format reads them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import mx, mxfp4
from .mx_elements import ELEMENTS
from .mxfp4 import BLOCK
from .reference import Codec, Reference, check_finish, check_quantize, row_chunks


class MseReference(Reference):
    """The operations of one MX codec with scales of the least squared error (see `registry`)."""

    def quantize(
        self,
        source: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        statistics: torch.Tensor | None = None,
        scales_known: bool = False,
    ) -> int:
        check_quantize(self.codec.format, source, codes, scales)
        if not scales_known:
            amax = torch.zeros(scales.shape, dtype=torch.float32, device=source.device)
            nonfinite = self.observe(source, amax)
            if nonfinite:
                return nonfinite
            for start, stop in row_chunks(*source.shape):
                values = source[start:stop].float()
                scales[start:stop].copy_(least_error_bytes(self.codec, values, amax[start:stop]))
        return super().quantize(source, codes, scales, statistics, scales_known=True)

    def finish_scales(self, amax: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        check_finish(self.codec.format, amax, out)
        raise ValueError(
            f"{self.codec.format.name}: scales of the least squared error cannot be told from amax alone; "
            "quantize pieces that hold whole blocks of 32 columns"
        )


def least_error_bytes(codec: Codec, values: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """uint8 [r, blocks] for finite float32 `values` [r, c], from amax [r, blocks]."""
    emax = ELEMENTS[codec.format.name].emax
    floor = ((amax.view(torch.int32) >> 23) - emax).clamp(0, 254).to(torch.uint8)
    here, there = (_squared_errors(codec, values, floor + step) for step in (0, 1))
    return floor + (here > 4.0 * there).to(torch.uint8)


def _squared_errors(codec: Codec, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 [r, blocks] in units of the squared scale, summed as every kernel must: even and odd k, then halves."""
    ratio = codec.ratio(values, scales)
    unscaled = torch.full_like(scales, 127)
    error = ratio - codec.decode(codec.encode(ratio, scales), unscaled, values.shape[1])
    square = F.pad(error, (0, -error.shape[1] % BLOCK)).square().view(*scales.shape, BLOCK)
    total = square[..., 0::2] + square[..., 1::2]
    while total.shape[-1] > 1:
        low, high = total.chunk(2, dim=-1)
        total = low + high
    return total[..., 0]


references = {
    reference.codec.format.name: MseReference(reference.codec)
    for reference in (mxfp4.reference, *mx.references.values())
}
