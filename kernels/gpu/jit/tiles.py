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


@triton.jit
def blocks_inside(rows, cols, row, block, W: tl.constexpr):
    """Which of the blocks of W columns [R, B] of this program begin inside of the matrix."""
    return (row < rows)[:, None] & (block * W < cols)[None, :]


@triton.jit
def store_four_bits(codes, code, row, block, stride, inside):
    """Write int32 codes [R, B, W] of blocks that are `inside`: two to a byte, the first in the lowest bits."""
    R: tl.constexpr = code.shape[0]
    B: tl.constexpr = code.shape[1]
    BYTES: tl.constexpr = code.shape[2] // 2
    low, high = tl.split(tl.reshape(code, [R, B, BYTES, 2]))
    at = codes + row[:, None, None] * stride + (block * BYTES)[None, :, None] + tl.arange(0, BYTES)[None, None, :]
    tl.store(at, (low | (high << 4)).to(tl.uint8), mask=inside[:, :, None])


@triton.jit
def load_four_bits(codes, row, block, stride, inside, R: tl.constexpr, B: tl.constexpr, W: tl.constexpr):
    """int32 codes [R, B, W], the inverse of `store_four_bits`."""
    BYTES: tl.constexpr = W // 2
    at = codes + row[:, None, None] * stride + (block * BYTES)[None, :, None] + tl.arange(0, BYTES)[None, None, :]
    packed = tl.load(at, mask=inside[:, :, None], other=0).to(tl.int32)
    return tl.reshape(tl.join(packed & 15, packed >> 4), [R, B, W])
