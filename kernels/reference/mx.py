"""MX formats other than MXFP4: FP6 and FP8 elements with one E8M0 scale byte per 32 along K (OCP MX 1.0).

Scale rules: EVEN for MXFP6, as AMD Quark writes it; RCEIL for MXFP8, as torchao and the serving engines write it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..formats import WeightFormat
from ..mx_elements import code_values
from .mx_mse import MseReference
from .mxfp4 import BLOCK, Mxfp4Codec, power_of_two
from .operations import Reference


class MxCodec:
    """The arithmetic of MXFP6 and MXFP8 in plain torch."""

    def __init__(self, fmt: WeightFormat) -> None:
        self.element = fmt.mx_element
        self.format = fmt
        self.largest = fmt.largest

    def scales_from_amax(self, amax: torch.Tensor) -> torch.Tensor:
        """E8M0 bytes by the rule of the element type, from the float32 bits of amax."""
        bits = amax.view(torch.int32)
        byte = (bits >> 23) - self.element.emax + ((bits & 0x7FFFFF) >= self.element.threshold).int()
        return byte.clamp(0, 254).to(torch.uint8)

    def ratio(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """values * 2^(127 - byte), exact wherever it can matter to a code."""
        return values * _per_element(power_of_two(254 - scales.int()), values.shape[1])

    def encode(self, ratio: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Nearest code, ties to even, saturating; [r, c] -> codes [r, ceil(c/32) * 32], packed where they are FP6."""
        if self.format.code_dtype.is_floating_point:
            codes = ratio.clamp(-self.largest, self.largest).to(torch.float8_e4m3fn)
            return F.pad(codes.view(torch.uint8), (0, -codes.shape[1] % BLOCK)).view(torch.float8_e4m3fn)
        table = torch.tensor(code_values(self.element), dtype=torch.float32, device=ratio.device)
        midpoints = (table[1:] + table[:-1]) / 2
        magnitude = ratio.abs()
        code = torch.bucketize(magnitude, midpoints)  # the lower code on a midpoint
        code += (F.pad(midpoints, (0, 1), value=torch.inf)[code] == magnitude) & (code % 2 == 1)
        code |= torch.signbit(ratio).long() << 5
        return pack_fp6(F.pad(code.int(), (0, -code.shape[1] % BLOCK)))

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, cols: int) -> torch.Tensor:
        """float32 [r, cols] that the codes [r, ceil(cols/32) * 32] stand for."""
        if self.format.code_dtype.is_floating_point:
            return codes[:, :cols].float() * _per_element(power_of_two(scales.int()), cols)
        values = code_values(self.element)
        table = torch.tensor(values + tuple(-v for v in values), dtype=torch.float32, device=codes.device)
        return table[unpack_fp6(codes)[:, :cols]] * _per_element(power_of_two(scales.int()), cols)


def pack_fp6(codes: torch.Tensor) -> torch.Tensor:
    """int32 [r, c] of six-bit codes, c a multiple of 4, to uint8 [r, 3c/4]: four little-endian in three bytes."""
    quads = codes.view(codes.shape[0], -1, 4)
    word = quads[..., 0] | quads[..., 1] << 6 | quads[..., 2] << 12 | quads[..., 3] << 18
    return torch.stack((word, word >> 8, word >> 16), -1).to(torch.uint8).flatten(1)


def unpack_fp6(packed: torch.Tensor) -> torch.Tensor:
    """The int32 codes [r, 4n] in uint8 [r, 3n]."""
    triples = packed.view(packed.shape[0], -1, 3).int()
    word = triples[..., 0] | triples[..., 1] << 8 | triples[..., 2] << 16
    return torch.stack((word, word >> 6, word >> 12, word >> 18), -1).flatten(1) & 63


def _per_element(blocks: torch.Tensor, cols: int) -> torch.Tensor:
    return blocks.repeat_interleave(BLOCK, 1)[:, :cols]


def make(fmt: WeightFormat, scale_mode: str) -> Reference:
    """The operations of an MX format in a scale mode."""
    codec = Mxfp4Codec() if fmt.element == "e2m1" else MxCodec(fmt)
    return MseReference(codec) if scale_mode == "mse" else Reference(codec)
