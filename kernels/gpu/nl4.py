"""Launches `jit/nl4.py`: NL4 without a matmul."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats import SHORT, Tensors, WeightFormat
from ..nl4_levels import BLOCK, CAPPED_FROM
from .jit import nl4
from .launch import EXACT, SCALES, TILE, bits, grid_of, new_partials, width_of
from .scaled import observe, tile_of


@dataclass(frozen=True)
class Nl4Launches:
    """The launches of the format (see `launch.Launches`): its block scales are made with the codes, known or not."""

    format: WeightFormat
    scale_mode: str = "default"
    in_one_pass: bool = False

    def quantize(
        self,
        source: torch.Tensor,
        tensors: Tensors,
        nonfinite: torch.Tensor,
        measured: bool,
        known: bool,
    ) -> torch.Tensor:
        codes, scale, scale_2 = tensors
        rows, cols = source.shape
        tile = _tile(cols)
        grid = grid_of(rows, cols, tile["R"], BLOCK * tile["B"])
        partials = new_partials(source, grid, measured)
        nl4.quantize_nl4[grid](
            bits(source), codes, bits(scale), scale_2, partials, nonfinite, rows, cols,
            source.stride(0), codes.stride(0), scale.stride(0), scale_2.stride(0),
            CAPPED=2.0 ** CAPPED_FROM[SHORT[source.dtype]], MEASURE=measured, **tile, num_warps=4, **EXACT,
        )  # fmt: skip
        return partials

    def observe(self, source: torch.Tensor, amax: torch.Tensor, nonfinite: torch.Tensor) -> None:
        observe(source, amax, nonfinite, "row", *tile_of(source.shape[1]))

    def finish_scales(self, amax: torch.Tensor, scales: Tensors) -> None:
        top, scale_2 = amax.view(-1), scales[1].view(-1)
        nl4.scales_nl4[grid_of(1, top.numel(), 1, SCALES)](
            top, scale_2, top.numel(), top.stride(0), scale_2.stride(0), N=SCALES, num_warps=4, **EXACT
        )

    def dequantize(self, tensors: Tensors, out: torch.Tensor) -> None:
        codes, scale, scale_2 = tensors
        rows, cols = out.shape
        tile = _tile(cols)
        nl4.dequantize_nl4[grid_of(rows, cols, tile["R"], BLOCK * tile["B"])](
            codes, bits(scale), scale_2, bits(out), rows, cols,
            codes.stride(0), scale.stride(0), scale_2.stride(0), out.stride(0), **tile, num_warps=4, **EXACT,
        )  # fmt: skip


def _tile(cols: int) -> dict[str, int]:
    """Rows, and blocks of 32 columns, of a tile."""
    width = max(width_of(cols), BLOCK)
    return {"R": TILE // width, "B": width // BLOCK}
