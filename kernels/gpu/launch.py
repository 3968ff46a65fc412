"""What the launchers of the kernels without a matmul share: tile sizes, grids, views of tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

from ..formats import Tensors, WeightFormat

TILE = 4096
"""Elements that a program of four warps makes: 32 for each thread of NVIDIA's, 16 of AMD's."""
WIDEST = 1024
"""Most columns of a tile of several rows."""
SCALES = 256
"""Scales that a program makes of maxima."""
EXACT: dict[str, Any] = {"enable_fp_fusion": False}
"""No operation of these kernels may be fused with another: each is rounded as in plain torch."""
_PARTIALS = 6


class Launches(Protocol):
    """The launches of one format, of arguments that have been checked and are not empty."""

    @property
    def format(self) -> WeightFormat: ...
    @property
    def in_one_pass(self) -> bool:
        """Whether `quantize` can make scales; else it must be given them."""

    def quantize(
        self,
        source: torch.Tensor,
        tensors: Tensors,
        nonfinite: torch.Tensor,
        measured: bool,
        known: bool,
    ) -> torch.Tensor:
        """Launch, and return the partial statistics (no columns unless `measured`)."""

    def observe(self, source: torch.Tensor, amax: torch.Tensor, nonfinite: torch.Tensor) -> None: ...
    def finish_scales(self, amax: torch.Tensor, scales: Tensors) -> None:
        """`amax` and `scales` are matrices."""

    def dequantize(self, tensors: Tensors, out: torch.Tensor) -> None: ...


def width_of(cols: int) -> int:
    """Columns of a tile of several rows."""
    return min(power_of_two(cols), WIDEST)


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below a positive number; at least 16."""
    return max(16, 1 << (value - 1).bit_length())


def grid_of(rows: int, cols: int, tile_rows: int, tile_cols: int) -> tuple[int]:
    """Programs that a matrix takes in tiles."""
    return (-(-rows // tile_rows) * -(-cols // tile_cols),)


def new_partials(source: torch.Tensor, grid: tuple[int], measured: bool) -> torch.Tensor:
    """Where the programs of a grid write their statistics."""
    return torch.empty(_PARTIALS, grid[0] if measured else 0, dtype=torch.float64, device=source.device)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A view whose type every target loads and stores: BF16 and FP8 as integers, the others as they are."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16)
    return tensor.view(torch.uint8) if tensor.dtype.is_floating_point and tensor.itemsize == 1 else tensor


def on(device: torch.device) -> AbstractContextManager[Any]:
    """The device that launches go to."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
