"""Tile sizes of the matmul kernels: few tokens read weights as fast as memory goes, many tokens fill the matrix units.

Chosen so that no default spills registers on any target (`tests/kernels/test_triton_linear.py` compiles them).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .target import GpuTarget

FEW_TOKENS = 32
"""Up to here a product is limited by reading the weight, and is split along K to keep every processor busy."""
LARGEST_SPLIT = 16


@dataclass(frozen=True)
class Tiles:
    """Tokens, weight rows and columns of a tile, and how many warps and pipeline stages work on it."""

    tokens: int
    rows: int
    columns: int
    warps: int
    stages: int

    def even(self, k: int) -> bool:
        """Whether k columns are whole steps."""
        return k % self.columns == 0


def mx_tiles(target: GpuTarget, tokens: int, k: int, quantized: bool, itemsize: int = 2) -> Tiles:
    """Tiles for an MXFP4 weight; with `quantized` activations, which go to matrix instructions, for MXFP8 as well.

    Blackwell has those for 128 weight rows only, gfx950 for 128 columns.
    """
    few, stages = tokens <= FEW_TOKENS, 2 if target.is_amd else 3
    if itemsize == 4 and not quantized:
        return decoded_tiles(target, tokens, k, itemsize)
    if quantized:
        rows = 128 if target.capability else 64
        columns = 128 if target.capability and itemsize == 4 and tokens > 16 else 256  # more would spill there
        tiles = Tiles(_fitting(tokens, 32), rows, columns, 4, stages) if few else Tiles(128, 128, 128, 8, stages)
        return tiles if tokens > 64 or few else replace(tiles, tokens=64, warps=4)
    if few:
        return _dividing(Tiles(_fitting(tokens, 32), 64, 256, 4, stages), k, 64)
    wide = tokens > 64
    return _dividing(Tiles(128 if wide else 64, 128, 64, 8 if wide else 4, stages), k, 32)


def decoded_tiles(target: GpuTarget, tokens: int, k: int, itemsize: int = 2) -> Tiles:
    """Tiles for a weight that arithmetic decodes in registers, each step's columns at once."""
    few, stages = tokens <= FEW_TOKENS, 2 if target.is_amd else 3
    if itemsize == 4:
        return Tiles(16, 64, 64, 4, 2) if few else Tiles(32, 64, 32, 8, 2)
    if few:
        columns = 64 if tokens > 16 and target.capability >= 100 else 128  # more would spill there with small groups
        return _dividing(Tiles(_fitting(tokens, 32), 64, columns, 4, stages), k, 64)
    return _dividing(Tiles(128 if tokens > 64 else 64, 128, 64, 8, stages), k, 32)


def scaled_tiles(
    target: GpuTarget, tokens: int, k: int, quantized: bool, itemsize: int = 2, blocks: bool = False
) -> Tiles:
    """Tiles for a weight of one byte per element; rows and columns divide 128, the side of an FP8 scale block.

    With `blocks` of scales along K too, each step's sum needs registers of its own.
    """
    few, stages = tokens <= FEW_TOKENS, 2 if target.is_amd else 3
    if itemsize == 4 and not quantized:
        return Tiles(16 if few else 32, 64, 64, 4, 2)
    if few:
        return _dividing(Tiles(_fitting(tokens, 32), 64, 128, 4, stages), k, 64)
    if quantized and blocks:
        return _dividing(Tiles(64, 128, 128, 8, stages), k, 64)
    wide = tokens > 64
    return _dividing(Tiles(128 if wide else 64, 128, 128 if quantized else 64, 8 if wide else 4, stages), k, 64)


def split_of_k(target: GpuTarget, programs: int, tiles: Tiles, tokens: int, k: int) -> int:
    """Columns each part of a product sums, in whole steps: all of k where there are programs enough."""
    steps = max(1, -(-k // tiles.columns))
    parts = min(2 * target.processors // max(programs, 1), LARGEST_SPLIT, steps // 2)
    if tokens > FEW_TOKENS or parts < 2:
        return steps * tiles.columns
    return -(-steps // parts) * tiles.columns


def _fitting(tokens: int, largest: int) -> int:
    """The smallest tile of a power of two, at least 16, that holds the tokens."""
    return min(largest, max(16, 1 << max(tokens - 1, 0).bit_length()))


def _dividing(tiles: Tiles, k: int, least: int) -> Tiles:
    """The tiles with fewer columns where that leaves no incomplete step."""
    columns = tiles.columns
    while columns > least and k % columns:
        columns //= 2
    return replace(tiles, columns=columns) if k % columns == 0 else tiles
