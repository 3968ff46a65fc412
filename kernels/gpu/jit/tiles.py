"""Where the tile of a program lies."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_start(across, R: tl.constexpr, C: tl.constexpr):
    """First row (int64) and first column of this program's R x C of a matrix that is `across` wide."""
    tiles = tl.cdiv(across, C)
    tile = tl.program_id(0)
    return (tile // tiles).to(tl.int64) * R, (tile % tiles) * C


@triton.jit
def tile_place(rows, cols, R: tl.constexpr, C: tl.constexpr):
    """First row and column of this program's tile, its rows (int64) [R], its columns [C], which are inside [R, C]."""
    first_row, first_col = tile_start(cols, R, C)
    row = first_row + tl.arange(0, R)
    col = first_col + tl.arange(0, C)
    return first_row, first_col, row, col, (row < rows)[:, None] & (col < cols)[None, :]


@triton.jit
def block_place(rows, cols, R: tl.constexpr, B: tl.constexpr, W: tl.constexpr):
    """Rows (int64) [R], blocks of W columns [B] and columns [B, W] of this program, and which elements are inside."""
    first_row, first_col = tile_start(cols, R, B * W)
    row = first_row + tl.arange(0, R)
    block = first_col // W + tl.arange(0, B)
    col = block[:, None] * W + tl.arange(0, W)[None, :]
    return row, block, col, (row < rows)[:, None, None] & (col < cols)[None, :, :]
