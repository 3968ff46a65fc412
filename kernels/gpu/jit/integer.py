"""Integers with a scale and a zero point for each group of a row (see `quantload.kernels.integer` for the arithmetic).

A program makes R rows of B blocks of W columns. A block is a GROUP; where GROUP is 0 the group is the whole row, of
which blocks are any parts. Scales and zero points stand side by side; BF16 ones come as int16 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decoded_matmul import load_weight
from .elements import encode_int, narrowed, power_of_two, widened
from .measure import count_nonfinite, store_partials
from .tile_matmul import rows_from
from .tiles import block_place, tile_place


@triton.jit
def quantize_integers(
    source,
    codes,
    scales,
    partials,
    nonfinite,
    rows,
    cols,
    source_stride,
    code_stride,
    scale_stride,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SEARCHED: tl.constexpr,
    KNOWN: tl.constexpr,
    MEASURE: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    W: tl.constexpr,
):
    """Codes of a matrix, and scales and zero points unless they are KNOWN, which those of whole rows must be."""
    row, block, col, inside = block_place(rows, cols, R, B, W)
    raw = tl.load(source + row[:, None, None] * source_stride + col[None, :, :], mask=inside, other=0)
    values = widened(raw)
    signed = values.to(tl.int32, bitcast=True)
    high, low = _maxima(signed)
    amax = tl.max(tl.max(tl.maximum(high, low), 1), 0)
    if amax >= 0x7F800000:
        count_nonfinite(signed & 0x7FFFFFFF, nonfinite)

    scale_at = scales + row[:, None] * scale_stride + (2 * block if GROUP else 0 * block)[None, :]
    block_inside = (row < rows)[:, None] & (block * W < cols)[None, :]
    if KNOWN:
        scale = widened(tl.load(scale_at, mask=block_inside, other=1))
        zero = widened(tl.load(scale_at + 1, mask=block_inside, other=0)).to(tl.int32)
    else:
        TOP: tl.constexpr = 15 if raw.dtype == tl.float16 else 127
        if SEARCHED:
            scale, zero = _least_error(values, high, low, scales, TOP)
        else:
            scale, zero = _scale_and_zero(high, low, scales, BITS, SYMMETRIC, TOP)
        tl.store(scale_at, narrowed(scale, scales), mask=block_inside)
        tl.store(scale_at + 1, narrowed(zero.to(tl.float32), scales), mask=block_inside)

    SMALLEST: tl.constexpr = 1 if SYMMETRIC else 0
    LARGEST: tl.constexpr = (1 << BITS) - 1
    FAR: tl.constexpr = 4096.0  # from any code, whatever the zero point
    ratio = tl.div_rn(values, scale[:, :, None])
    steps = encode_int(tl.abs(ratio), FAR)
    code = tl.where(signed < 0, -steps, steps) + zero[:, :, None]
    code = tl.minimum(tl.maximum(code, SMALLEST), LARGEST)
    _store_codes(codes, tl.where(inside, code, 0), row, block, cols, code_stride, rows, BITS)

    if MEASURE:
        REACH: tl.constexpr = (LARGEST - SMALLEST + 1) / 2 * (1 + 2.0**-20)
        MIDDLE: tl.constexpr = (LARGEST + SMALLEST) / 2
        distance = code - zero[:, :, None]
        error = tl.where(inside, tl.abs(values - distance.to(tl.float32) * scale[:, :, None]), 0.0)
        # Squares of float32 near 1 and below, whatever the weights: no error is larger than its weight, zero is a code.
        exponent = tl.maximum(amax >> 23, 1)
        unit = power_of_two(exponent).to(tl.float64)
        near = values * power_of_two(254 - exponent)
        off = error * power_of_two(254 - exponent)
        signal = tl.sum(tl.sum(tl.sum(near * near, 2).to(tl.float64), 1), 0) * unit * unit
        noise = tl.sum(tl.sum(tl.sum(off * off, 2).to(tl.float64), 1), 0) * unit * unit
        max_error = tl.max(tl.max(tl.max(error, 2), 1), 0).to(tl.float64)
        beyond = tl.abs(ratio + zero.to(tl.float32)[:, :, None] - MIDDLE) > REACH
        # Both counts in one sum: a tile has fewer than 2^15 elements.
        counts = tl.where(inside, (beyond.to(tl.int32) << 16) + (distance == 0).to(tl.int32), 0)
        counted = tl.sum(tl.sum(tl.sum(counts, 2), 1), 0)
        store_partials(partials, signal, noise, max_error, amax, counted >> 16, counted & 0xFFFF)


@triton.jit
def observe_integers(
    source,
    amax,
    nonfinite,
    rows,
    cols,
    source_stride,
    amax_stride,
    GROUP: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    W: tl.constexpr,
):
    """Raise int32 `amax` to the float32 bits of the largest weight of each group and of minus its smallest."""
    row, block, col, inside = block_place(rows, cols, R, B, W)
    raw = tl.load(source + row[:, None, None] * source_stride + col[None, :, :], mask=inside, other=0)
    signed = widened(raw).to(tl.int32, bitcast=True)
    high, low = _maxima(signed)
    if tl.max(tl.max(tl.maximum(high, low), 1), 0) >= 0x7F800000:
        count_nonfinite(signed & 0x7FFFFFFF, nonfinite)
    at = amax + row[:, None] * amax_stride + (2 * block if GROUP else 0 * block)[None, :]
    block_inside = (row < rows)[:, None] & (block * W < cols)[None, :]
    tl.atomic_max(at, high, mask=block_inside)
    tl.atomic_max(at + 1, low, mask=block_inside)


@triton.jit
def scales_integers(
    amax,
    scales,
    rows,
    groups,
    amax_stride,
    scale_stride,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    N: tl.constexpr,
):
    """Scales and zero points from float32 maxima, by the arithmetic of `quantize_integers`; in place too."""
    i = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    row, group = i // groups, i % groups
    at = amax + row * amax_stride + 2 * group
    high = tl.load(at, mask=row < rows, other=0.0).to(tl.int32, bitcast=True)
    low = tl.load(at + 1, mask=row < rows, other=0.0).to(tl.int32, bitcast=True)
    scale, zero = _scale_and_zero(high, low, scales, BITS, SYMMETRIC, 127)
    to = scales + row * scale_stride + 2 * group
    tl.store(to, narrowed(scale, scales), mask=row < rows)
    tl.store(to + 1, narrowed(zero.to(tl.float32), scales), mask=row < rows)


@triton.jit
def dequantize_groups(
    codes,
    scales,
    out,
    rows,
    cols,
    code_stride,
    scale_stride,
    out_stride,
    CODE: tl.constexpr,
    GROUP: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """The values of codes and scales, R x C a program; see `load_weight` for CODE."""
    first_row, first_col, row, col, inside = tile_place(rows, cols, R, C)
    codes += first_row * code_stride
    scales += first_row * scale_stride
    near = rows_from(first_row, rows, R).to(tl.int32)
    values = load_weight(
        codes, scales, near, first_col, cols, code_stride, scale_stride, CODE, "affine", GROUP, False, R, C
    )
    tl.store(out + (row * out_stride)[:, None] + col[None, :], narrowed(values, out), mask=inside)


@triton.jit
def _maxima(signed):
    """float32 bits [R, B] of the largest and of minus the smallest value of each block, both at least 0."""
    magnitude = signed & 0x7FFFFFFF
    return tl.max(tl.where(signed < 0, 0, magnitude), 2), tl.max(tl.where(signed < 0, magnitude, 0), 2)


@triton.jit
def _scale_and_zero(high, low, scales, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, TOP: tl.constexpr):
    """float32 scales, rounded to the type of `scales`, and int32 zero points, from maxima as float32 bits.

    TOP is the largest exponent of the weights. No maximum beyond what `scale_rules` says is followed.
    """
    FOLLOWED: tl.constexpr = 3.3895313892515355e38 if SYMMETRIC else (2.0 - 9 * 2.0**-6) * 2.0**TOP
    LARGEST: tl.constexpr = (1 << BITS) - 1
    above = tl.minimum(high.to(tl.float32, bitcast=True), FOLLOWED)
    below = tl.minimum(low.to(tl.float32, bitcast=True), FOLLOWED)
    STEPS: tl.constexpr = 7.0 if SYMMETRIC else LARGEST / 2
    extent = tl.maximum(above, below) if SYMMETRIC else above * 0.5 + below * 0.5
    scale = _stored(tl.div_rn(extent, STEPS), scales)
    zero = tl.full(high.shape, 8, tl.int32) if SYMMETRIC else encode_int(tl.div_rn(below, scale), LARGEST)
    return scale, zero


@triton.jit
def _stored(scale, scales):
    """Scales rounded to the type of `scales`, within what that holds and the formats take."""
    scale = widened(narrowed(scale, scales))
    if scales.dtype.element_ty == tl.float16:
        scale = tl.minimum(scale, 65504.0)
    return tl.maximum(scale, 2.0**-24)


@triton.jit
def _least_error(values, high, low, scales, TOP: tl.constexpr):
    """float32 scales and int32 zero points of the least squared error (see `reference.integer_mse`)."""
    FOLLOWED: tl.constexpr = 1.75 * 2.0**TOP
    above = tl.minimum(high.to(tl.float32, bitcast=True), FOLLOWED)
    below = tl.minimum(low.to(tl.float32, bitcast=True), FOLLOWED)
    whole = tl.div_rn(above * 0.5 + below * 0.5, 7.5)
    first = _stored(whole, scales)
    scale, zero = first, tl.zeros(first.shape, tl.int32)
    least = tl.full(first.shape, float("inf"), tl.float32)
    factor = tl.full([1, 1], 1.0, tl.float32)
    for _ in range(8):
        tried, lowest, error, next_error = _tried(values, whole, below, first, scales, factor)
        scale = tl.where(error < least, tried, scale)
        zero = tl.where(error < least, lowest, zero)
        least = tl.minimum(error, least)
        scale = tl.where(next_error < least, tried, scale)
        zero = tl.where(next_error < least, lowest + 1, zero)
        least = tl.minimum(next_error, least)
        factor -= 0.0234375
    return scale, tl.minimum(tl.maximum(zero, 0), 15)


@triton.jit
def _tried(values, whole, below, first, scales, factor):
    """The scale of a factor, the lower of its zero points, which may be -1 or less, and the errors of both."""
    shift = tl.div_rn(7.5, factor) - 7.0
    scale = _stored(whole * factor, scales)
    lowest = _nearest(tl.minimum(tl.div_rn(below, scale), 64.0) - shift)
    y = values * tl.div_rn(1.0, scale)[:, :, None]
    steps = _nearest(tl.minimum(tl.maximum(y, -32.0), 32.0) * 32.0)
    ratio = tl.div_rn(scale, first)
    error = _squares(steps, tl.minimum(tl.maximum(lowest, 0), 15)) * (ratio * ratio)
    next_error = _squares(steps, tl.minimum(tl.maximum(lowest + 1, 0), 15)) * (ratio * ratio)
    return scale, lowest, error, next_error


@triton.jit
def _nearest(y):
    """int32 of float32 of at most 2^22, ties to even."""
    return (y + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def _squares(steps, zero):
    """float32 [R, B]: the squared errors of blocks, of int32 values [R, B, W] in 32nds of their scales."""
    nearest = (steps + 16) & -32
    lowest = (zero * -32)[:, :, None]
    off = steps - tl.minimum(tl.maximum(nearest, lowest), lowest + 15 * 32)
    return tl.sum(off * off, 2).to(tl.float32)


@triton.jit
def _store_codes(codes, code, row, block, cols, stride, rows, BITS: tl.constexpr):
    """Write int32 codes [R, B, W], those of four bits two to a byte, the first in its lower half."""
    R: tl.constexpr = code.shape[0]
    B: tl.constexpr = code.shape[1]
    W: tl.constexpr = code.shape[2]
    PACKED: tl.constexpr = 8 // BITS
    if PACKED == 2:
        low, high = tl.split(tl.reshape(code, [R, B, W // 2, 2]))
        code = low | (high << 4)
    byte = (block * (W // PACKED))[:, None] + tl.arange(0, W // PACKED)[None, :]
    inside = (row < rows)[:, None, None] & (byte * PACKED < cols)[None, :, :]
    tl.store(codes + row[:, None, None] * stride + byte[None, :, :], code.to(tl.uint8), mask=inside)
