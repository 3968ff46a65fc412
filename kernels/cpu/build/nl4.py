"""Compile the numba kernels that quantize to NL4, per kind of source.

Rows are worked on as many at a time as have a multiple of `LANES` blocks, where they are whole blocks and lie one after
the other in all tensors, else one at a time: first for their maxima, then, from the cache, for scales and codes. What
is left over of blocks is a group of its own, a copy filled up with zeros.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
from numba import types

from ... import statistics as st
from ...nl4_levels import BLOCK, LEAST_ROW_EXPONENT, ROW_EXPONENT
from ...scale_rules import LARGEST_BF16
from ..compiled import (
    FINGERPRINT,
    Compiled,
    KernelFunction,
    Recipe,
    jit,
    read_f32,
    read_f64,
    read_u8,
    write_f32,
    write_f64,
    write_u8,
)
from ..ir.magnitude import amax_tile, count_above, magnitude_to_f32
from ..ir.nl4 import LANES, RUN_GROUPS, quantize_run
from ..ir.vector import INFINITY_BITS, ITEM_BYTES, LARGEST_FINITE
from .scaled import add_count_and_amax

QUANTIZE = types.int64(*[types.int64] * 12)
"""(source, codes, scales, scales of rows: address and stride each; rows, cols, known, statistics)."""


def _row_scale(amax: Any) -> Any:
    """As `nl4_levels` has it, of float32."""
    biased: Any = (np.float32(min(amax, np.float32(LARGEST_BF16))).view(np.int32) >> 23) - ROW_EXPONENT
    return np.int32(max(biased, LEAST_BIASED) << 23).view(np.float32)


row_scale = nb.njit(nogil=True)(_row_scale)
LEAST_BIASED = 127 + LEAST_ROW_EXPONENT


def _nl4_quantize(kind: str, measure: bool) -> Recipe[KernelFunction]:
    fingerprint, width, infinity = FINGERPRINT, ITEM_BYTES[kind], INFINITY_BITS[kind]
    finite, block, lanes, run = np.float32(LARGEST_FINITE[kind]), BLOCK, LANES, RUN_GROUPS
    group, exact = lanes * block, "f64" if measure else "none"

    def quantize(  # type: ignore[no-untyped-def]
        source,
        source_stride,
        codes,
        codes_stride,
        scales,
        scales_stride,
        row_scales,
        row_stride,
        rows,
        cols,
        known,
        out,
    ):
        len(fingerprint)
        blocks, together, largest = (cols + block - 1) // block, 1, 0
        dense = source_stride == cols * width and codes_stride == cols // 2 and scales_stride == blocks
        if dense and cols % block == 0:
            while together * blocks % lanes:
                together *= 2
        of_blocks = np.empty(together * blocks + lanes, np.float32)
        u = np.int64(of_blocks.ctypes.data)
        padded, coded = np.zeros(group * width, np.uint8), np.empty(group // 2, np.uint8)
        scaled = np.empty(lanes, np.uint8)
        for top in range(0, rows, together):
            count = min(together, rows - top)
            worst = 0
            for row in range(top, top + count):
                e, at = row_scales + row * row_stride, (row - top) * blocks
                if known == 0:
                    bits = amax_tile(source + row * source_stride, 0, 1, cols, kind)
                    worst = max(worst, bits)
                    write_f32(e, row_scale(magnitude_to_f32(bits, kind)))
                of_blocks[at : at + blocks] = read_f32(e)
            largest = max(largest, worst)
            if worst >= infinity:
                continue
            wide = count * cols
            of_blocks[count * blocks : count * blocks + lanes] = of_blocks[0]
            s, c, f = source + top * source_stride, codes + top * codes_stride, scales + top * scales_stride
            whole, rest = wide // group, wide % group
            left, first = (rest + block - 1) // block, 0
            if rest:
                padded[:] = 0
            while first < whole + (rest > 0):
                groups = min(run, whole - first)
                here, there, beside = s + first * group * width, c + first * group // 2, f + first * lanes
                if groups <= 0:
                    groups = 1
                    for i in range(rest * width):
                        padded[i] = read_u8(here + i)
                    here, there, beside = (
                        np.int64(padded.ctypes.data),
                        np.int64(coded.ctypes.data),
                        np.int64(scaled.ctypes.data),
                    )
                at = u + first * lanes * 4
                bits = -1
                if measure:
                    bits = quantize_run(here, there, beside, at, groups, kind, "f32", out)
                if bits < 0:
                    bits = quantize_run(here, there, beside, at, groups, kind, exact, out)
                largest = max(largest, bits)
                if first == whole:
                    for i in range(left * block // 2):
                        write_u8(c + first * group // 2 + i, coded[i])
                    for i in range(left):
                        write_u8(f + first * lanes + i, scaled[i])
                    if measure:
                        write_f64(out + 8 * st.ZERO, read_f64(out + 8 * st.ZERO) - (group - rest))
                first += groups
        if largest >= infinity:
            return count_above(source, source_stride, rows, cols, finite, kind)
        if measure:
            add_count_and_amax(out, rows * cols, magnitude_to_f32(largest, kind))
        return 0

    return jit(quantize, QUANTIZE)


nl4_quantize = Compiled(_nl4_quantize)
