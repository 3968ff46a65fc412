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
