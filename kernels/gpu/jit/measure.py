"""Statistics of the quantize kernels: one column of partial sums per program, added up in a fixed order afterwards."""

from __future__ import annotations

import triton
import triton.language as tl


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
