"""MXFP4: E2M1 codes, two to a byte, and one E8M0 scale byte per 32 elements along K (OCP MX, EVEN scale rule)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..formats import MXFP4, WeightFormat
from ..mx_elements import E2M1
from .operations import Reference

BLOCK = 32
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Mxfp4Codec:
    """The arithmetic of MXFP4 in plain torch."""

    format: WeightFormat = MXFP4
    largest: float = E2M1.largest

    def scales_from_amax(self, amax: torch.Tensor) -> torch.Tensor:
        """E8M0 bytes of the EVEN rule: clamp(E - 2 + (m >= T_even), 0, 254) from the float32 bits of amax."""
        bits = amax.view(torch.int32)
        byte = (bits >> 23) - E2M1.emax + ((bits & 0x7FFFFF) >= E2M1.threshold).int()
        return byte.clamp(0, 254).to(torch.uint8)

    def ratio(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """values * 2^(127 - byte), exact wherever it can matter to a code."""
        return values * _per_element(power_of_two(254 - scales.int()), values.shape[1])

    def encode(self, ratio: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Nearest E2M1 code, ties to even, saturating; [r, c] -> packed uint8 [r, ceil(c/32) * 16]."""
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
        """float32 [r, cols] that the packed codes [r, ceil(cols/32) * 16] stand for."""
        nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(1)[:, :cols].int()
        table = torch.tensor(VALUES + tuple(-v for v in VALUES), dtype=torch.float32, device=codes.device)
        return table[nibbles] * _per_element(power_of_two(scales.int()), cols)


def power_of_two(biased: torch.Tensor) -> torch.Tensor:
    """float32 2^(biased - 127) for int32 biased exponents 0..254; 0 gives the subnormal 2^-127."""
    return torch.where(biased == 0, 0x400000, biased << 23).view(torch.float32)


def _per_element(blocks: torch.Tensor, cols: int) -> torch.Tensor:
    return blocks.repeat_interleave(BLOCK, 1)[:, :cols]


reference = Reference(Mxfp4Codec())
