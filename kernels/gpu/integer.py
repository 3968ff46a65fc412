"""Launches `jit/integer.py`: integers with zero points, without a matmul."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..formats import Tensors, WeightFormat
from ..reference.operations import as_one_row
from .jit import integer
from .launch import EXACT, SCALES, TILE, bits, grid_of, new_partials, width_of


@dataclass(frozen=True)
class IntegerLaunches:
    """The launches of an integer format with zero points (see `triton_launch.Launches`)."""

    format: WeightFormat
    scale_mode: str = "default"

    @property
    def in_one_pass(self) -> bool:
        return self.format.block_cols != 0

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
        tile = self._tile(rows, cols)
        grid = grid_of(rows, cols, tile["R"], tile["B"] * tile["W"])
        partials = new_partials(source, grid, measured)
        integer.quantize_integers[grid](
            bits(source), codes, bits(scales), partials, nonfinite, rows, cols,
            source.stride(0), codes.stride(0), scales.stride(0),
            GROUP=self.format.block_cols, **self._rule(), SEARCHED=self._searched, KNOWN=known, MEASURE=measured,
            **tile, num_warps=4, **EXACT,
        )  # fmt: skip
        return partials

    def observe(self, source: torch.Tensor, amax: torch.Tensor, nonfinite: torch.Tensor) -> None:
        rows, cols = source.shape
        tile = self._tile(rows, cols)
        integer.observe_integers[grid_of(rows, cols, tile["R"], tile["B"] * tile["W"])](
            bits(source), amax.view(torch.int32), nonfinite, rows, cols, source.stride(0), amax.stride(0),
            GROUP=self.format.block_cols, **tile, num_warps=4, **EXACT,
        )  # fmt: skip

    def finish_scales(self, amax: torch.Tensor, scales: Tensors) -> None:
        if self._searched:
            raise ValueError(
                f"{self.format.name}: scales and zero points of the least squared error cannot be told from extremes "
                f"alone; quantize pieces that hold whole groups of {self.format.block_cols} columns"
            )
        (scale,) = scales
        rows, groups = amax.shape[0], amax.shape[1] // 2
        integer.scales_integers[grid_of(1, rows * groups, 1, SCALES)](
            amax, bits(scale), rows, groups, amax.stride(0), scale.stride(0),
            **self._rule(), N=SCALES, num_warps=4, **EXACT,
        )  # fmt: skip

    def dequantize(self, tensors: Tensors, out: torch.Tensor) -> None:
        codes, scales = tensors
        rows, cols = out.shape
        width = width_of(cols)
        integer.dequantize_groups[grid_of(rows, cols, TILE // width, width)](
            codes, bits(scales), bits(out), rows, cols, codes.stride(0), scales.stride(0), out.stride(0),
            CODE=self.format.element, GROUP=self.format.block_cols, R=TILE // width, C=width,
            num_warps=4, **EXACT,
        )  # fmt: skip

    @property
    def _searched(self) -> bool:
        return self.scale_mode == "mse"

    def _rule(self) -> dict[str, Any]:
        return {"BITS": self.format.code_bits, "SYMMETRIC": self.format.rule == "symmetric"}

    def _tile(self, rows: int, cols: int) -> dict[str, int]:
        """Rows, blocks and columns of a block, of a tile: a group is a block, or the row is in as many as there are."""
        width = TILE if rows == 1 else max(width_of(cols), self.format.block_cols)
        block = self.format.block_cols or width
        return {"R": TILE // width, "B": width // block, "W": block}
