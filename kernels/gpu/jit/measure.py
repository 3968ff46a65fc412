"""Statistics of the quantize kernels: one column of partial sums per program, added up in a fixed order afterwards."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import tile_start


@triton.jit
def store_partials(partials, signal, noise, max_error, amax_bits, saturated, zeros):
    """Write what a program measured to its column of float64 `partials` [6, programs]."""
    here = partials + tl.program_id(0)
    programs = tl.num_programs(0)
    amax = amax_bits.to(tl.float32, bitcast=True)
    tl.store(here, signal)
    tl.store(here + programs, noise)
    tl.store(here + 2 * programs, max_error)
    tl.store(here + 3 * programs, amax.to(tl.float64))
    tl.store(here + 4 * programs, saturated.to(tl.float64))
    tl.store(here + 5 * programs, zeros.to(tl.float64))


@triton.jit
def merge_partials(partials, statistics, programs, elements, BLOCK: tl.constexpr):
    """Add `partials` [6, programs] and the number of elements to `statistics` [7]; program i makes entry i."""
    entry = tl.program_id(0)
    if entry == 0:
        tl.store(statistics, tl.load(statistics) + elements.to(tl.float64))
    else:
        row = partials + (entry - 1).to(tl.int64) * programs
        total = tl.zeros([BLOCK], tl.float64)
        top = tl.zeros([BLOCK], tl.float64)
        for start in range(0, programs, BLOCK):
            i = start + tl.arange(0, BLOCK)
            part = tl.load(row + i, mask=i < programs, other=0.0)
            total += part
            top = tl.maximum(top, part)
        before = tl.load(statistics + entry)
        added = before + tl.sum(total, 0)
        tl.store(statistics + entry, tl.where((entry == 3) | (entry == 4), tl.maximum(before, tl.max(top, 0)), added))


@triton.jit
def count_nonfinite(bits, nonfinite):
    """Add the number of magnitudes (int32 bits) that are infinite or NaN to the int64 at `nonfinite`."""
    bad = (bits >= 0x7F800000).to(tl.int64)
    tl.atomic_add(nonfinite, tl.sum(tl.reshape(bad, [bad.numel]), 0))


@triton.jit
def store_measured_blocks(partials, values, error, top, saturated, zero, rows, cols):
    """Write what a program measured of float32 `values` [R, B, W] and their absolute errors.

    `top` are the bits of the blocks' maxima [R, B]; `saturated` and `zero` say which elements are, and those outside of
    the matrix are zeros.
    """
    # In units of each block's maximum, so that no square leaves float32.
    extent = tl.maximum(top.to(tl.float32, bitcast=True), 2.0**-126)
    near = tl.div_rn(values, extent[:, :, None])
    off = tl.div_rn(error, extent[:, :, None])
    weight = extent.to(tl.float64) * extent.to(tl.float64)
    signal = tl.sum(tl.sum(tl.sum(near * near, 2).to(tl.float64) * weight, 1), 0)
    noise = tl.sum(tl.sum(tl.sum(off * off, 2).to(tl.float64) * weight, 1), 0)
    max_error = tl.max(tl.max(tl.max(error, 2), 1), 0).to(tl.float64)
    largest = tl.max(tl.max(top, 1), 0)
    far, zeros = counted_in_blocks(saturated, zero, rows, cols)
    store_partials(partials, signal, noise, max_error, largest, far, zeros)


@triton.jit
def counted_in_blocks(saturated, zero, rows, cols):
    """How many elements [R, B, W] of this program are saturated, and how many inside of the matrix are zero."""
    R: tl.constexpr = zero.shape[0]
    ACROSS: tl.constexpr = zero.shape[1] * zero.shape[2]
    # Both counts in one sum: a tile has fewer than 2^15 elements, and those outside the matrix are zeros.
    counted = tl.sum(tl.sum(tl.sum((saturated.to(tl.int32) << 16) + zero.to(tl.int32), 2), 1), 0)
    first_row, first_col = tile_start(cols, R, ACROSS)
    seen = tl.minimum(rows - first_row, R) * tl.minimum(cols - first_col, ACROSS)
    return counted >> 16, (counted & 0xFFFF) - (R * ACROSS - seen)
