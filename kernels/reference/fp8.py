"""FP8 E4M3 weights with float32 scales per row, per tensor or per 128x128 block.

The scale rules are the float32 ones of the serving engines, because their bytes are what users compare with:
per row, vLLM's `scaled_fp8_quant`: max(amax / 448, 1 / (448 * 512)), code of x / scale;
per tensor, SGLang's and vLLM's `input_to_float8`: 1 / (448 * (1 / max(amax, 1e-12))), code of x / scale;
per block, DeepGEMM's `per_block_cast_to_fp8`: max(amax, 1e-4) / 448, code of x * (1 / scale).

Where the hardware takes E4M3 FNUZ (gfx942) the same bits are stored, which stand for half as much there, with twice
the scale; the one code that means something else, negative zero, becomes zero.
"""

from __future__ import annotations

import torch

from ..formats import WeightFormat
from ..scale_rules import FP8_BLOCK_MIN_AMAX, FP8_CHANNEL_MIN_SCALE, FP8_LARGEST, FP8_TENSOR_MIN_AMAX
from .operations import Reference


class Fp8Codec:
    """The arithmetic of one FP8 granularity in plain torch."""

    largest: float = FP8_LARGEST

    def __init__(self, fmt: WeightFormat) -> None:
        self.format = fmt

    def scales_from_amax(self, amax: torch.Tensor) -> torch.Tensor:
        """float32 scales; finite and positive for every finite amax."""
        if self.format.rule == "fp8_channel":
            return divided(amax, FP8_LARGEST).clamp(min=FP8_CHANNEL_MIN_SCALE)
        if self.format.rule == "fp8_tensor":
            return (amax.clamp(min=FP8_TENSOR_MIN_AMAX).reciprocal() * FP8_LARGEST).reciprocal()
        return divided(amax.clamp(min=FP8_BLOCK_MIN_AMAX), FP8_LARGEST)

    def ratio(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return values * scales.reciprocal() if self.format.rule == "fp8_block" else values / scales

    def encode(self, ratio: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Nearest E4M3 code, ties to even, saturating at 448."""
        return ratio.clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn)

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, cols: int) -> torch.Tensor:
        return codes.float() * scales


class FnuzCodec:
    """The codes and scales of an `Fp8Codec` as E4M3 FNUZ."""

    largest: float = FP8_LARGEST

    def __init__(self, fmt: WeightFormat, ocp: Fp8Codec) -> None:
        self.format = fmt
        self.ocp = ocp

    def scales_from_amax(self, amax: torch.Tensor) -> torch.Tensor:
        return self.ocp.scales_from_amax(amax) * 2

    def ratio(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return self.ocp.ratio(values, scales * 0.5)

    def encode(self, ratio: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        codes = self.ocp.encode(ratio, scales).view(torch.uint8)
        return torch.where(codes == 0x80, 0, codes).view(torch.float8_e4m3fnuz)

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, cols: int) -> torch.Tensor:
        return codes.float() * scales


def divided(amax: torch.Tensor, divisor: float) -> torch.Tensor:
    """amax / divisor, rounded once: by a number of its own, a GPU multiplies with the reciprocal instead."""
    return amax / amax.new_full((), divisor)


def make(fmt: WeightFormat, scale_mode: str) -> Reference:
    """The operations of an FP8 format; there is one scale mode."""
    return Reference(Fp8Codec(fmt) if fmt.ocp is None else FnuzCodec(fmt, Fp8Codec(fmt.ocp)))
