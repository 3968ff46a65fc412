"""Compile the numba kernels that quantize to MXFP4 with a multiplier for each row."""

from __future__ import annotations

import numba as nb
import numpy as np

from ... import statistics as st
from ...scale_rules import CANDIDATES
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
)
from ..ir.magnitude import count_above, magnitude_to_f32
from ..ir.mxfp4_rows import LANES, candidate_errors, quantize_row
from ..ir.vector import INFINITY_BITS, ITEM_BYTES, LARGEST_FINITE
from .scaled import QUANTIZE, add_count_and_amax


def _best_candidate(errors: np.ndarray, blocks: int) -> int:
    """The candidate of the least error of all blocks, in place; `blocks`, a power of two, is halved (`mxfp4_rows`)."""
    while blocks > 1:
        blocks //= 2
        for i in range(blocks * LANES):
            errors[i] += errors[blocks * LANES + i]
    best = 0
    for j in range(LANES):
        errors[j] *= CANDIDATES[j] * CANDIDATES[j]
        if errors[j] < errors[best]:
            best = j
    return best


best_candidate = nb.njit(nogil=True)(_best_candidate)


def _quantize_rows(kind: str, measure: bool) -> Recipe[KernelFunction]:
    fingerprint, width, infinity = FINGERPRINT, ITEM_BYTES[kind], INFINITY_BITS[kind]
    finite, sums, candidates, lanes = np.float32(LARGEST_FINITE[kind]), "f64" if measure else "none", CANDIDATES, LANES

    def quantize(source, source_stride, codes, codes_stride, scales, scales_stride, rows, cols, known, out, _, __):  # type: ignore[no-untyped-def]
        len(fingerprint)
        whole, rest, largest = cols // 32, cols % 32, 0
        blocks = whole + (rest > 0)
        together = 1
        while together < blocks:
            together *= 2
        errors = np.zeros(together * lanes, np.float64)
        padded = np.zeros(32 * width, np.uint8)
        e, last = np.int64(errors.ctypes.data), np.int64(padded.ctypes.data)
        for row in range(rows):
            s, c, f = source + row * source_stride, codes + row * codes_stride, scales + row * scales_stride
            for i in range(rest * width):
                padded[i] = read_u8(s + whole * 32 * width + i)
            if known == 0:
                bits = candidate_errors(s, whole, kind, e)
                if rest:
                    bits = max(bits, candidate_errors(last, 1, kind, e + whole * lanes * 8))
                largest = max(largest, bits)
                if bits >= infinity:
                    continue
                write_f32(f + blocks, np.float32(candidates[best_candidate(errors, together)]))
            multiplier = read_f32(f + blocks)
            largest = max(largest, quantize_row(s, c, f, whole, known, multiplier, kind, sums, out))
            if rest:
                bits = quantize_row(last, c + whole * 16, f + whole, 1, known, multiplier, kind, sums, out)
                largest = max(largest, bits)
        if largest >= infinity:
            return count_above(source, source_stride, rows, cols, finite, kind)
        if measure:
            add_count_and_amax(out, rows * cols, magnitude_to_f32(largest, kind))
            if rest:
                write_f64(out + 8 * st.ZERO, read_f64(out + 8 * st.ZERO) - rows * (32 - rest))
        return 0

    return jit(quantize, QUANTIZE)


quantize_rows = Compiled(_quantize_rows)
