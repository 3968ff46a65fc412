"""Compile the numba kernels that quantize: one function per (operation, format family, element kind).

The functions take addresses and byte strides, so that calling one costs about a microsecond.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
from numba import types

from . import fp8, int8
from . import statistics as st
from .compiled import FINGERPRINT, KernelFunction, jit, locked, read_f32, read_f64, read_u8, write_f32, write_f64
from .magnitude_ir import amax_tile, count_above, magnitude_to_f32
from .mxfp4_ir import RUN_BLOCKS, quantize_wide_run
from .mxfp4_table_ir import largest_error_run, quantize_bf16_run
from .processor import has
from .scaled_ir import TILE_ELEMENTS, quantize_tile
from .vector_ir import INFINITY_BITS, ITEM_BYTES, LARGEST_FINITE

_i64 = types.int64


def _add_count_and_amax(out: int, count: int, amax: float) -> None:
    write_f64(out + 8 * st.COUNT, read_f64(out + 8 * st.COUNT) + count)
    write_f64(out + 8 * st.AMAX, max(read_f64(out + 8 * st.AMAX), np.float64(amax)))


add_count_and_amax = nb.njit(nogil=True)(_add_count_and_amax)


def _largest_possible_error(amax_bits: int) -> Any:
    """Of MXFP4 blocks whose amax has at most these BF16 bits; never less where a block's amax is less."""
    amax = magnitude_to_f32(amax_bits, "bf16")
    scale = magnitude_to_f32(max((amax_bits + 32 >> 7) - 2, 1) << 7, "bf16")
    return scale if amax >= np.float32(5.0) * scale else max(np.float32(0.5) * scale, amax - np.float32(4.0) * scale)


largest_possible_error = nb.njit(nogil=True)(_largest_possible_error)


def _mxfp4_quantize(kind: str, measure: bool) -> KernelFunction:
    fingerprint, width, infinity = FINGERPRINT, ITEM_BYTES[kind], INFINITY_BITS[kind]
    finite = np.float32(LARGEST_FINITE[kind])
    fast, run_blocks = kind == "bf16", RUN_BLOCKS
    tables = has("avx512bw") and (has("avx512bf16") or not measure)

    def quantize(source, source_stride, codes, codes_stride, scales, scales_stride, rows, cols, known, out):  # type: ignore[no-untyped-def]
        len(fingerprint)
        blocks, rest, largest = cols // 32, cols % 32, 0
        padded = np.zeros(32 * width, np.uint8)
        for row in range(rows):
            s, c, e = source + row * source_stride, codes + row * codes_stride, scales + row * scales_stride
            first = 0
            while first < blocks + (rest > 0):
                count = min(run_blocks, blocks - first)
                here = s + first * 32 * width
                if count <= 0:  # the incomplete last block
                    count, here = 1, np.int64(padded.ctypes.data)
                    for i in range(rest * width):
                        padded[i] = read_u8(s + blocks * 32 * width + i)
                bits = -1
                if fast and known == 0:
                    bits = quantize_bf16_run(here, c + first * 16, e + first, count, measure, tables, out)
                    if tables and measure and bits > 0:
                        worst = np.float32(read_f64(out + 8 * st.MAX_ERROR))
                        if largest_possible_error(bits) > worst:
                            largest_error_run(here, e + first, count, worst, out)
                if bits < 0:
                    bits = quantize_wide_run(here, c + first * 16, e + first, count, known, kind, measure, out)
                largest = max(largest, bits)
                first += count
        if largest >= infinity:
            return count_above(source, source_stride, rows, cols, finite, kind)
        if measure:
            add_count_and_amax(out, rows * cols, magnitude_to_f32(largest, kind))
            if rest:
                write_f64(out + 8 * st.ZERO, read_f64(out + 8 * st.ZERO) - rows * (32 - rest))
        return 0

    return jit(quantize, types.int64(*[_i64] * 10))


def _scale_of(rule: str, amax: Any) -> Any:
    """float32 scale of a float32 amax; `fp8.Fp8Codec` and `int8.Int8Codec` give the sources of the rules."""
    if rule == "fp8_channel":
        return max(amax / np.float32(fp8.LARGEST), np.float32(fp8.CHANNEL_MIN_SCALE))
    if rule == "fp8_tensor":
        return np.float32(1.0) / (
            np.float32(1.0) / max(amax, np.float32(fp8.TENSOR_MIN_AMAX)) * np.float32(fp8.LARGEST)
        )
    if rule == "fp8_block":
        return max(amax, np.float32(fp8.BLOCK_MIN_AMAX)) / np.float32(fp8.LARGEST)
    scale = amax / np.float32(int8.LARGEST)
    return scale if scale > np.float32(0.0) else np.float32(1.0)


scale_of = nb.njit(nogil=True, error_model="numpy")(_scale_of)
TARGETS = {"fp8_channel": "fp8_divide", "fp8_tensor": "fp8_divide", "fp8_block": "fp8_multiply", "int8_channel": "int8"}

GROUP_COLS = 2048
"""Columns whose blocks are worked on together, so that a block's short rows do not jump through memory."""
STRIP_ROWS = 8
"""Rows of a block that are worked on before going to the block beside it."""


def _scaled_quantize(rule: str, kind: str, measure: bool) -> KernelFunction:
    fingerprint, width, infinity, target = FINGERPRINT, ITEM_BYTES[kind], INFINITY_BITS[kind], TARGETS[rule]
    finite = np.float32(LARGEST_FINITE[kind])
    limit = np.float32((int8.LARGEST if rule == "int8_channel" else fp8.LARGEST) * (1.0 + st.SATURATION_SLACK))
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
                right = min(left + group, cols)
                block_bits[:] = 0
                for y in range(r, r + height, down_step):
                    for c in range(left, right, block_cols):
                        s, down = source + y * source_stride + c * width, min(down_step, r + height - y)
                        bits = amax_tile(s, source_stride, down, min(block_cols, right - c), kind)
                        block_bits[(c - left) // block_cols] = max(block_bits[(c - left) // block_cols], bits)
                worst = block_bits.max()
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

    return jit(quantize, types.int64(*[_i64] * 12))


def _observe(kind: str) -> KernelFunction:
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

    return jit(observe, types.int64(*[_i64] * 8))


mxfp4_quantize = locked(_mxfp4_quantize)
scaled_quantize = locked(_scaled_quantize)
observe = locked(_observe)
