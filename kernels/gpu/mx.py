"""Launches `jit/mx.py`: MX formats without a matmul."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..formats import Tensors, WeightFormat
from ..reference.operations import as_one_row
from .jit import mx
from .launch import EXACT, SCALES, TILE, bits, grid_of, new_partials, width_of


@dataclass(frozen=True)
class MxLaunches:
    """The launches of an MX format (see `triton_launch.Launches`)."""

    format: WeightFormat
    scale_mode: str = "default"
    in_one_pass: bool = True

    def quantize(
        self,
        source: torch.Tensor,
        tensors: Tensors,
        nonfinite: torch.Tensor,
        measured: bool,
        known: bool,
    ) -> torch.Tensor:
        codes, scales = tensors
        rows, cols = as_one_row(self.format, source, codes, scales)
        tile = _tile(rows, cols)
        grid = grid_of(rows, cols, tile["R"], 32 * tile["B"])
        partials = new_partials(source, grid, measured)
        mx.quantize_mx[grid](
            bits(source), bits(codes), scales, partials, nonfinite, rows, cols,
            source.stride(0), codes.stride(0), scales.stride(0),
            **self._constants(), KNOWN=known, MEASURE=measured, **tile, num_warps=4, **EXACT,
        )  # fmt: skip
        return partials

    def observe(self, source: torch.Tensor, amax: torch.Tensor, nonfinite: torch.Tensor) -> None:
        rows, cols = source.shape
        tile = _tile(rows, cols)
        mx.observe_mx[grid_of(rows, cols, tile["R"], 32 * tile["B"])](
            bits(source), amax.view(torch.int32), nonfinite, rows, cols, source.stride(0), amax.stride(0),
            **tile, num_warps=4, **EXACT,
        )  # fmt: skip

    def finish_scales(self, amax: torch.Tensor, scales: Tensors) -> None:
        (scale,) = scales
        element = self.format.mx_element
        rows, cols = amax.shape
        mx.scales_mx[grid_of(1, amax.numel(), 1, SCALES)](
            amax.view(torch.int32), scale, rows, cols, amax.stride(0), scale.stride(0),
            EMAX=element.emax, THRESHOLD=element.threshold, N=SCALES, num_warps=4, **EXACT,
        )  # fmt: skip

    def dequantize(self, tensors: Tensors, out: torch.Tensor) -> None:
        codes, scales = tensors
        rows, cols = out.shape
        element, tile = self.format.mx_element, _tile(rows, cols)
        mx.dequantize_mx[grid_of(rows, cols, tile["R"], 32 * tile["B"])](
            bits(codes), scales, bits(out), rows, cols, codes.stride(0), scales.stride(0), out.stride(0),
            CODE_BITS=self.format.code_bits, MANTISSA=element.mantissa_bits, BIAS=element.bias,
            NAN=0x7F if self.format.code_bits == 8 else -1, **tile, num_warps=4, **EXACT,
        )  # fmt: skip

    def _constants(self) -> dict[str, Any]:
        """Of the elements and the scale rule."""
        element = self.format.mx_element
        return {
            "CODE_BITS": self.format.code_bits,
            "MANTISSA": element.mantissa_bits,
            "BIAS": element.bias,
            "LARGEST": element.largest,
            "EMAX": element.emax,
            "THRESHOLD": element.threshold,
        }


def _tile(rows: int, cols: int) -> dict[str, int]:
    """Rows, and blocks of 32 columns, of a tile."""
    width = TILE if rows == 1 else max(width_of(cols), 32)
    return {"R": TILE // width, "B": width // 32}
