"""Launches `jit/nvfp4.py`: NVFP4 without a matmul."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats import Tensors, WeightFormat
from ..nvfp4_scales import BLOCK, spread
from ..reference.operations import as_one_row
from .jit import nvfp4
from .launch import EXACT, SCALES, TILE, bits, grid_of, new_partials, width_of
from .scaled import observe, tile_of


@dataclass(frozen=True)
class Nvfp4Launches:
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
        rows, cols = as_one_row(self.format, source, codes, scale)
        tile = _tile(rows, cols)
        grid = grid_of(rows, cols, tile["R"], BLOCK * tile["B"])
        partials = new_partials(source, grid, measured)
        nvfp4.quantize_nvfp4[grid](
            bits(source), codes, bits(scale), scale_2, partials, nonfinite, rows, cols,
            source.stride(0), codes.stride(0), scale.stride(0),
            SPREAD=spread(self.scale_mode), MSE=self.scale_mode == "mse", MEASURE=measured,
            **tile, num_warps=4, **EXACT,
        )  # fmt: skip
        return partials

    def observe(self, source: torch.Tensor, amax: torch.Tensor, nonfinite: torch.Tensor) -> None:
        observe(source, amax, nonfinite, "all", *tile_of(source.shape[1]))

    def finish_scales(self, amax: torch.Tensor, scales: Tensors) -> None:
        top, scale_2 = amax.view(-1), scales[1].view(-1)
        nvfp4.scales_nvfp4[grid_of(1, top.numel(), 1, SCALES)](
            top, scale_2, top.numel(), top.stride(0), scale_2.stride(0),
            SPREAD=spread(self.scale_mode), N=SCALES, num_warps=4, **EXACT,
        )  # fmt: skip

    def dequantize(self, tensors: Tensors, out: torch.Tensor) -> None:
        codes, scale, scale_2 = tensors
        rows, cols = out.shape
        tile = _tile(rows, cols)
        nvfp4.dequantize_nvfp4[grid_of(rows, cols, tile["R"], BLOCK * tile["B"])](
            codes, bits(scale), scale_2, bits(out), rows, cols,
            codes.stride(0), scale.stride(0), out.stride(0), **tile, num_warps=4, **EXACT,
        )  # fmt: skip


def _tile(rows: int, cols: int) -> dict[str, int]:
    """Rows, and blocks of 16 columns, of a tile."""
    width = TILE if rows == 1 else width_of(cols)
    return {"R": TILE // width, "B": width // BLOCK}
