"""Launches `jit/scaled.py`: FP8 and INT8 with float32 scales, without a matmul."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..formats import Tensors, WeightFormat
from .jit import scaled
from .launch import EXACT, SCALES, TILE, bits, grid_of, new_partials, power_of_two, width_of

ROW_TILE = 2048
"""Elements of rows that a program works on at a time, where it makes whole rows."""


@dataclass(frozen=True)
class ScaledLaunches:
    """The launches of a format with float32 scales (see `triton_launch.Launches`)."""

    format: WeightFormat
    scale_mode: str = "default"

    @property
    def in_one_pass(self) -> bool:
        return self.format.block_rows != 0

    def quantize(
        self,
        source: torch.Tensor,
        tensors: Tensors,
        nonfinite: torch.Tensor,
        measured: bool,
        known: bool,
    ) -> torch.Tensor:
        codes, scales = tensors
        rows, cols = source.shape
        strides = (source.stride(0), codes.stride(0), scales.stride(0))
        common = {**self._rule(), "KNOWN": known, "MEASURE": measured, **EXACT}
        if self._group() == "row":
            width = min(power_of_two(cols), ROW_TILE)
            tile, warps = {"R": ROW_TILE // width, "C": width}, 4
            grid: tuple[int] = (-(-rows // tile["R"]),)
            kernel = scaled.quantize_rows
        else:
            tile, warps = self._tile(cols)
            grid = grid_of(rows, cols, tile["R"], tile["C"])
            kernel, common = scaled.quantize_tiles, {**common, "BLOCKS": bool(self.format.block_rows)}
        partials = new_partials(source, grid, measured)
        kernel[grid](
            bits(source), bits(codes), scales, partials, nonfinite, rows, cols, *strides,
            **common, **tile, num_warps=warps,
        )  # fmt: skip
        return partials

    def observe(self, source: torch.Tensor, amax: torch.Tensor, nonfinite: torch.Tensor) -> None:
        observe(source, amax, nonfinite, self._group(), *self._tile(source.shape[1]))

    def finish_scales(self, amax: torch.Tensor, scales: Tensors) -> None:
        (scale,) = scales
        rows, cols = amax.shape
        scaled.scales_scaled[grid_of(1, amax.numel(), 1, SCALES)](
            amax, scale, rows, cols, amax.stride(0), scale.stride(0), **self._rule(), N=SCALES, num_warps=4, **EXACT
        )

    def dequantize(self, tensors: Tensors, out: torch.Tensor) -> None:
        codes, scales = tensors
        rows, cols = out.shape
        tile, warps = self._tile(cols)
        scaled.dequantize_scaled[grid_of(rows, cols, tile["R"], tile["C"])](
            bits(codes), scales, bits(out), rows, cols, codes.stride(0), scales.stride(0), out.stride(0),
            GROUP=self._group(), CODE=self.format.element, **tile, num_warps=warps, **EXACT,
        )  # fmt: skip

    def _rule(self) -> dict[str, Any]:
        return {"RULE": self.format.rule, "FNUZ": self.format.ocp is not None}

    def _group(self) -> str:
        """What one scale serves."""
        return "all" if not self.format.block_rows else "row" if self.format.block_rows == 1 else "block"

    def _tile(self, cols: int) -> tuple[dict[str, int], int]:
        """Rows and columns of a tile, and how many warps work on it: a scale block is one tile."""
        if self.format.block_rows > 1:
            return {"R": self.format.block_rows, "C": self.format.block_cols}, 8
        return tile_of(cols)


def observe(
    source: torch.Tensor, amax: torch.Tensor, nonfinite: torch.Tensor, group: str, tile: dict[str, int], warps: int
) -> None:
    """Raise `amax` of each "row", "block" or "all" of a matrix; a program takes a tile of R rows and C columns."""
    rows, cols = source.shape
    scaled.observe_scaled[grid_of(rows, cols, tile["R"], tile["C"])](
        bits(source), amax.view(torch.int32), nonfinite, rows, cols, source.stride(0), amax.stride(0),
        GROUP=group, **tile, num_warps=warps, **EXACT,
    )  # fmt: skip


def tile_of(cols: int) -> tuple[dict[str, int], int]:
    """Rows and columns of a tile that is no scale block, and how many warps work on it."""
    width = width_of(cols)
    return {"R": TILE // width, "C": width}, 4
