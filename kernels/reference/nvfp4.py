"""NVFP4 as checkpoints store it, to be quantized anew: E2M1 codes, one float32 scale for 16 of a row.

A scale is the E4M3 scale of its block times the float32 scale of the tensor, multiplied when it is read.
"""

from __future__ import annotations

import torch

from ..formats import NVFP4, WeightFormat
from .mxfp4 import VALUES
from .operations import Reading


class Nvfp4Decoder:
    """The arithmetic of NVFP4 in plain torch."""

    format: WeightFormat = NVFP4

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, cols: int) -> torch.Tensor:
        """float32 [r, cols] that the packed codes [r, ceil(cols / 2)] stand for."""
        of_nibble = torch.tensor(VALUES + tuple(-v for v in VALUES), dtype=torch.float32, device=codes.device)
        of_byte = torch.stack((of_nibble.repeat(16), of_nibble.repeat_interleave(16)), -1)
        pairs = of_byte.view(torch.int64).flatten()  # both values of a byte are one word to be fetched
        values = pairs.index_select(0, codes.reshape(-1).int()).view(torch.float32).view(codes.shape[0], -1)
        return values[:, :cols].mul_(scales)


def make(fmt: WeightFormat, scale_mode: str) -> Reading:
    """The operations of the format: it is only read."""
    return Reading(Nvfp4Decoder())
