"""Compile the numba kernels that quantize to MX formats: one function per (format, scale mode, kind of source).

The loop nest is rows, then runs of up to `RUN_BLOCKS` blocks of 32 columns; the vector code in `ir` makes scales and
codes of a run in one pass over it. `first` is the first block of the row without codes. An incomplete last block is a
run of its own, a copy filled up with zeros, whose codes are stored too. A run answers with the bits of its largest
magnitude, by which NaN and infinities show, or with a negative number where sums of squares in float32 would not be
exact enough: then it is done again with sums in float64. `fast` is the way through tables in registers, for BF16 to
MXFP4; the largest error is looked for there only in runs whose maximum allows one that is larger than any so far.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np

from ... import statistics as st
from ...mx_elements import ELEMENTS
from ..compiled import FINGERPRINT, Compiled, KernelFunction, Recipe, jit, read_f64, read_u8, write_f64
from ..ir.magnitude import count_above, magnitude_to_f32
from ..ir.mx import RUN_BLOCKS, quantize_run
from ..ir.mxfp4_table import largest_error_run, quantize_bf16_run
from ..ir.vector import INFINITY_BITS, ITEM_BYTES, LARGEST_FINITE
from ..processor import has
from .scaled import QUANTIZE, add_count_and_amax


def _largest_possible_error(amax_bits: int) -> Any:
    """Of MXFP4 blocks whose amax has at most these BF16 bits; never less where a block's amax is less."""
    amax = magnitude_to_f32(amax_bits, "bf16")
    scale = magnitude_to_f32(max((amax_bits + 32 >> 7) - 2, 1) << 7, "bf16")
    return scale if amax >= np.float32(5.0) * scale else max(np.float32(0.5) * scale, amax - np.float32(4.0) * scale)


largest_possible_error = nb.njit(nogil=True)(_largest_possible_error)


def _mx_quantize(name: str, mode: str, kind: str, measure: bool) -> Recipe[KernelFunction]:
    fingerprint, width, infinity = FINGERPRINT, ITEM_BYTES[kind], INFINITY_BITS[kind]
    finite, code_bytes = np.float32(LARGEST_FINITE[kind]), 4 * ELEMENTS[name].code_bits
    run_blocks, exact = RUN_BLOCKS, "f64" if measure else "none"
    fast = name == "mxfp4" and mode == "default" and kind == "bf16"
    tables = has("avx512bw") and (has("avx512bf16") or not measure)

    def quantize(source, source_stride, codes, codes_stride, scales, scales_stride, rows, cols, known, out, _, __):  # type: ignore[no-untyped-def]
        len(fingerprint)
        blocks, rest, largest = cols // 32, cols % 32, 0
        padded = np.zeros(32 * width, np.uint8)
        for row in range(rows):
            s, c, e = source + row * source_stride, codes + row * codes_stride, scales + row * scales_stride
            first = 0
            while first < blocks + (rest > 0):
                count = min(run_blocks, blocks - first)
                here, there = s + first * 32 * width, c + first * code_bytes
                if count <= 0:  # the incomplete last block
                    count, here = 1, np.int64(padded.ctypes.data)
                    for i in range(rest * width):
                        padded[i] = read_u8(s + blocks * 32 * width + i)
                bits = -1
                if fast:
                    if known == 0:
                        bits = quantize_bf16_run(here, there, e + first, count, measure, tables, out)
                        if tables and measure and bits > 0:
                            worst = np.float32(read_f64(out + 8 * st.MAX_ERROR))
                            if largest_possible_error(bits) > worst:
                                largest_error_run(here, e + first, count, worst, out)
                elif measure:
                    bits = quantize_run(here, there, e + first, count, known, name, mode, kind, "f32", out)
                if bits < 0:
                    bits = quantize_run(here, there, e + first, count, known, name, mode, kind, exact, out)
                largest = max(largest, bits)
                first += count
        if largest >= infinity:
            return count_above(source, source_stride, rows, cols, finite, kind)
        if measure:
            add_count_and_amax(out, rows * cols, magnitude_to_f32(largest, kind))
            if rest:
                write_f64(out + 8 * st.ZERO, read_f64(out + 8 * st.ZERO) - rows * (32 - rest))
        return 0

    return jit(quantize, QUANTIZE)


mx_quantize = Compiled(_mx_quantize)
