"""Compile the numba kernels that quantize to NVFP4, per (scale mode, kind of source)."""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
from numba import types

from ... import statistics as st
from ...nvfp4_scales import AMAX_BITS, BLOCK, spread
from ..compiled import (
    FINGERPRINT,
    Compiled,
    KernelFunction,
    Recipe,
    jit,
    read_f32,
    read_f64,
    read_u8,
    write_f64,
    write_u8,
)
from ..ir.magnitude import count_above, magnitude_to_f32
from ..ir.nvfp4 import GROUP, LANES, RUN_GROUPS, UNDIVIDED, quantize_run
from ..ir.vector import INFINITY_BITS, ITEM_BYTES, LARGEST_FINITE
from .scaled import add_count_and_amax

QUANTIZE = types.int64(*[types.int64] * 10)
"""(source, codes, scales: address and stride each; rows, cols, address of scale_2, statistics)."""


def _multiplier_of(scale_2: Any, whole: Any) -> Any:
    """As `reference.nvfp4` has it; `whole` is the spread of the scale mode."""
    amax = np.float32(min(scale_2 * whole, np.float32(LARGEST_FLOAT32)))
    short = np.int32((amax.view(np.int32) + ROUNDING) & (-2 * ROUNDING)).view(np.float32)
    if short / whole == scale_2:
        amax = short
    return np.float32(1.0) / amax * whole


multiplier_of = nb.njit(nogil=True, error_model="numpy")(_multiplier_of)
ROUNDING = 1 << (23 - AMAX_BITS)
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


def _nvfp4_quantize(mode: str, kind: str, measure: bool) -> Recipe[KernelFunction]:
    fingerprint, width, infinity = FINGERPRINT, ITEM_BYTES[kind], INFINITY_BITS[kind]
    finite, block, group, lanes, run = np.float32(LARGEST_FINITE[kind]), BLOCK, GROUP, LANES, RUN_GROUPS
    whole_range = np.float32(spread(mode))
    least, most = (np.float32(bound) for bound in UNDIVIDED)
    quick, exact = ("f32", "f64") if measure else ("none", "none")

    def quantize(source, source_stride, codes, codes_stride, scales, scales_stride, rows, cols, tensor_scale, out):  # type: ignore[no-untyped-def]
        len(fingerprint)
        scale_2 = read_f32(tensor_scale)
        multiplier = multiplier_of(scale_2, whole_range)
        whole, rest, largest = cols // group, cols % group, 0
        padded, coded = np.zeros(group * width, np.uint8), np.empty(group // 2, np.uint8)
        scaled = np.empty(lanes, np.uint8)
        left = (rest + block - 1) // block
        for row in range(rows):
            s, c, e = source + row * source_stride, codes + row * codes_stride, scales + row * scales_stride
            first = 0
            while first < whole + (rest > 0):
                count = min(run, whole - first)
                here, there, beside = s + first * group * width, c + first * group // 2, e + first * lanes
                if count <= 0:  # fewer blocks than are made together, the last of them incomplete perhaps
                    count = 1
                    for i in range(rest * width):
                        padded[i] = read_u8(here + i)
                    here, there, beside = (
                        np.int64(padded.ctypes.data),
                        np.int64(coded.ctypes.data),
                        np.int64(scaled.ctypes.data),
                    )
                bits = -1
                if least <= multiplier <= most:
                    bits = quantize_run(here, there, beside, count, multiplier, scale_2, mode, kind, quick, 0, out)
                if bits < 0:
                    bits = quantize_run(here, there, beside, count, multiplier, scale_2, mode, kind, exact, 1, out)
                largest = max(largest, bits)
                if first == whole:
                    for i in range(left * block // 2):
                        write_u8(c + first * group // 2 + i, coded[i])
                    for i in range(left):
                        write_u8(e + first * lanes + i, scaled[i])
                first += count
        if largest >= infinity:
            return count_above(source, source_stride, rows, cols, finite, kind)
        if measure:
            add_count_and_amax(out, rows * cols, magnitude_to_f32(largest, kind))
            if rest:
                write_f64(out + 8 * st.ZERO, read_f64(out + 8 * st.ZERO) - rows * (group - rest))
        return 0

    return jit(quantize, QUANTIZE)


nvfp4_quantize = Compiled(_nvfp4_quantize)
