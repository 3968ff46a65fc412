"""Compile the numba kernels that quantize: one function per (operation, format family, element kind).

The functions take addresses and byte strides, so that calling one costs about a microsecond.

The loop nest is rows of blocks, then groups of neighbouring blocks as wide as a few cache lines, then strips of a few
rows, so that short rows of a block do not jump through memory. A group is gone through twice: first for the maximum of
each of its blocks, then, from the cache, for the codes. Between the two all scales of the group are final, and `inside`
says that no element of it exceeds the largest code, which spares the second pass the clamping. A group with a NaN or an
infinity gets no codes; such elements are counted in the end.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
from numba import types

from ... import statistics as st
from ...scale_rules import (
    FP8_BLOCK_MIN_AMAX,
    FP8_CHANNEL_MIN_SCALE,
    FP8_LARGEST,
    FP8_TENSOR_MIN_AMAX,
    INT8_LARGEST,
    LARGEST_BF16,
)
from ..compiled import FINGERPRINT, Compiled, KernelFunction, Recipe, jit, read_f32, read_f64, write_f32, write_f64
from ..ir.magnitude import amax_tile, count_above, magnitude_to_f32
from ..ir.scaled import TILE_ELEMENTS, quantize_tile
from ..ir.vector import INFINITY_BITS, ITEM_BYTES, LARGEST_FINITE

_i64 = types.int64
QUANTIZE = types.int64(*[_i64] * 12)
"""(source, codes, scales: address and stride each; rows, cols, known, statistics, block_rows, block_cols)."""
OBSERVE = types.int64(*[_i64] * 8)
"""(source, amax: address and stride each; rows, cols, block_rows, block_cols)."""


def _add_count_and_amax(out: int, count: int, amax: float) -> None:
    write_f64(out + 8 * st.COUNT, read_f64(out + 8 * st.COUNT) + count)
    write_f64(out + 8 * st.AMAX, max(read_f64(out + 8 * st.AMAX), np.float64(amax)))


add_count_and_amax = nb.njit(nogil=True)(_add_count_and_amax)


def _scale_of(rule: str, amax: Any) -> Any:
    """float32 scale of a float32 amax; `fp8.Fp8Codec` and `int8.Int8Codec` give the sources of the rules."""
    amax = min(amax, np.float32(LARGEST_BF16))
    if rule == "fp8_channel":
        return max(amax / np.float32(FP8_LARGEST), np.float32(FP8_CHANNEL_MIN_SCALE))
    if rule == "fp8_tensor":
        return np.float32(1.0) / (
            np.float32(1.0) / max(amax, np.float32(FP8_TENSOR_MIN_AMAX)) * np.float32(FP8_LARGEST)
        )
    if rule == "fp8_block":
        return max(amax, np.float32(FP8_BLOCK_MIN_AMAX)) / np.float32(FP8_LARGEST)
    scale = amax / np.float32(INT8_LARGEST)
    return scale if scale > np.float32(0.0) else np.float32(1.0)


scale_of = nb.njit(nogil=True, error_model="numpy")(_scale_of)
TARGETS = {"fp8_channel": "fp8_divide", "fp8_tensor": "fp8_divide", "fp8_block": "fp8_multiply", "int8": "int8"}

GROUP_COLS = 2048
"""Columns whose blocks are worked on together, so that a block's short rows do not jump through memory."""
STRIP_ROWS = 8
"""Rows of a block that are worked on before going to the block beside it."""


def _scaled_quantize(rule: str, kind: str, measure: bool) -> Recipe[KernelFunction]:
    fingerprint, width, infinity, target = FINGERPRINT, ITEM_BYTES[kind], INFINITY_BITS[kind], TARGETS[rule]
    finite = np.float32(LARGEST_FINITE[kind])
    limit = np.float32((INT8_LARGEST if rule == "int8" else FP8_LARGEST) * (1.0 + st.SATURATION_SLACK))
    tile_elements, group_cols, strip_rows = TILE_ELEMENTS, GROUP_COLS, STRIP_ROWS

    def quantize(  # type: ignore[no-untyped-def]
        source,
        source_stride,
        codes,
        codes_stride,
        scales,
        scales_stride,
        rows,
        cols,
        known,
        out,
        block_rows,
        block_cols,
    ):
        len(fingerprint)
        largest, saturated = 0, 0
        across_step = min(block_cols, 4096)
        down_step = strip_rows if block_cols < cols else max(1, tile_elements // across_step)
        group = max(1, group_cols // block_cols) * block_cols
        block_bits = np.empty(group // block_cols, np.int64)
        for r in range(0, rows, block_rows):
            height = min(block_rows, rows - r)
            for left in range(0, cols, group):
                right, worst = min(left + group, cols), 0
                block_bits[:] = 0
                for y in range(r, r + height, down_step):
                    for c in range(left, right, block_cols):
                        s, down = source + y * source_stride + c * width, min(down_step, r + height - y)
                        bits = amax_tile(s, source_stride, down, min(block_cols, right - c), kind)
                        block_bits[(c - left) // block_cols] = max(block_bits[(c - left) // block_cols], bits)
                        worst = max(worst, bits)
                largest = max(largest, worst)
                if worst >= infinity:
                    continue
                inside = 1
                for c in range(left, right, block_cols):
                    e = scales + r // block_rows * scales_stride + c // block_cols * 4
                    amax = magnitude_to_f32(block_bits[(c - left) // block_cols], kind)
                    if known == 0:
                        write_f32(e, scale_of(rule, amax))
                    above = limit * read_f32(e)
                    if amax > above:
                        inside = 0
                    if measure and amax > above:
                        s, across = source + r * source_stride + c * width, min(block_cols, right - c)
                        saturated += count_above(s, source_stride, height, across, above, kind)
                for y in range(r, r + height, down_step):
                    for x in range(left, right, across_step):
                        quantize_tile(
                            source + y * source_stride + x * width,
                            source_stride,
                            codes + y * codes_stride + x,
                            codes_stride,
                            min(down_step, r + height - y),
                            min(across_step, right - x),
                            read_f32(scales + r // block_rows * scales_stride + x // block_cols * 4),
                            inside,
                            target,
                            kind,
                            measure,
                            out,
                        )
        if largest >= infinity:
            return count_above(source, source_stride, rows, cols, finite, kind)
        if measure:
            add_count_and_amax(out, rows * cols, magnitude_to_f32(largest, kind))
            write_f64(out + 8 * st.SATURATED, read_f64(out + 8 * st.SATURATED) + saturated)
        return 0

    return jit(quantize, QUANTIZE)


def _observe(kind: str) -> Recipe[KernelFunction]:
    fingerprint, width, infinity = FINGERPRINT, ITEM_BYTES[kind], INFINITY_BITS[kind]
    finite = np.float32(LARGEST_FINITE[kind])

    def observe(source, source_stride, amax, amax_stride, rows, cols, block_rows, block_cols):  # type: ignore[no-untyped-def]
        len(fingerprint)
        largest = 0
        for r in range(0, rows, block_rows):
            for c in range(0, cols, block_cols):
                s = source + r * source_stride + c * width
                bits = amax_tile(s, source_stride, min(block_rows, rows - r), min(block_cols, cols - c), kind)
                largest = max(largest, bits)
                a = amax + r // block_rows * amax_stride + c // block_cols * 4
                write_f32(a, max(read_f32(a), magnitude_to_f32(bits, kind)))
        if largest >= infinity:
            return count_above(source, source_stride, rows, cols, finite, kind)
        return 0

    return jit(observe, OBSERVE)


scaled_quantize = Compiled(_scaled_quantize)
observe = Compiled(_observe)
