"""NL4 without a matmul: blocks of 32 along K, whose signed E4M3 scales stand under that of the row; R x B a program.

`reference.nl4` says what is computed; the constants are those of `nl4_levels`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elements import decode_float, e4m3, encode_float, narrowed, nl4_level, widened
from .measure import count_nonfinite, store_measured_blocks
from .tiles import block_place, blocks_inside, load_four_bits, store_four_bits


@triton.jit
def quantize_nl4(
    source,
    codes,
    scales,
    scales_of_rows,
    partials,
    nonfinite,
    rows,
    cols,
    source_stride,
    code_stride,
    scale_stride,
    row_stride,
    CAPPED: tl.constexpr,
    MEASURE: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    """Codes and block scales of a matrix under the float32 at `scales_of_rows`; from CAPPED on a scale is 288 at most.

    Columns from `cols` to the end of their block are written as zeros.
    """
    row, block, col, inside = block_place(rows, cols, R, B, 32)
    raw = tl.load(source + row[:, None, None] * source_stride + col[None, :, :], mask=inside, other=0)
    signed = widened(raw).to(tl.int32, bitcast=True)
    bits = signed & 0x7FFFFFFF
    top = tl.max(bits, 2)
    if tl.max(tl.max(top, 1), 0) >= 0x7F800000:
        count_nonfinite(bits, nonfinite)

    scale_2 = tl.load(scales_of_rows + row * row_stride, mask=row < rows, other=1.0)[:, None]
    positive = tl.max(tl.where(signed < 0, bits, 0), 2) == top
    values = signed.to(tl.float32, bitcast=True)
    inverse = (0x7F000000 - scale_2.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)  # of a power of two
    amax = top.to(tl.float32, bitcast=True) * inverse
    last = tl.where(scale_2 >= CAPPED, 0x79, 0x7E)
    nearest = encode_float(amax * 0.009433962404727936, 3, 7, 448.0)
    below = tl.maximum(nearest - 1, 1)
    lowest = tl.minimum(below + _is_beyond(amax, below) + _is_beyond(amax, below + 1), last)
    byte, least = _tried(values, nearest, lowest, last, scale_2, positive)
    for step in tl.static_range(3):
        code, error = _tried(values, nearest + (-1 if step == 2 else step + 1), lowest, last, scale_2, positive)
        byte = tl.where(error < least, code, byte)
        least = tl.minimum(error, least)
    unit = decode_float(byte, 3, 7) * scale_2
    whole = _whole(values, tl.where(positive, unit, -unit))
    index = _index(tl.abs(whole))
    code = tl.where(whole < 0, 16 - tl.where(whole < -96, 8, index), index) & 15

    block_inside = blocks_inside(rows, cols, row, block, 32)
    signed_byte = byte | tl.where(positive, 0, 0x80)
    tl.store(scales + row[:, None] * scale_stride + block[None, :], signed_byte.to(tl.uint8), mask=block_inside)
    store_four_bits(codes, code, row, block, code_stride, block_inside)

    if MEASURE:
        error = tl.abs(values - nl4_level(code) * tl.where(positive, unit, -unit)[:, :, None])
        store_measured_blocks(partials, values, error, top, (whole > 87) | (whole < -106), code == 0, rows, cols)


@triton.jit
def scales_nl4(amax, scales, count, amax_stride, scale_stride, N: tl.constexpr):
    """Scales of rows from the float32 maxima of `count` rows: 2^-14 times the power of two, at least 2^-112."""
    i = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    top = tl.load(amax + i * amax_stride, mask=i < count, other=1.0).to(tl.int32, bitcast=True)
    biased = tl.maximum((top >> 23) - 14, 15)
    tl.store(scales + i * scale_stride, (biased << 23).to(tl.float32, bitcast=True), mask=i < count)


@triton.jit
def dequantize_nl4(
    codes,
    scales,
    scales_of_rows,
    out,
    rows,
    cols,
    code_stride,
    scale_stride,
    row_stride,
    out_stride,
    R: tl.constexpr,
    B: tl.constexpr,
):
    """The values of codes under both scales."""
    row, block, col, inside = block_place(rows, cols, R, B, 32)
    block_inside = blocks_inside(rows, cols, row, block, 32)
    byte = tl.load(scales + row[:, None] * scale_stride + block[None, :], mask=block_inside, other=0).to(tl.int32)
    code = load_four_bits(codes, row, block, code_stride, block_inside, R, B, 32)
    unit = e4m3(byte) * tl.load(scales_of_rows + row * row_stride, mask=row < rows, other=1.0)[:, None]
    values = nl4_level(code) * unit[:, :, None]
    tl.store(out + row[:, None, None] * out_stride + col[None, :, :], narrowed(values, out), mask=inside)


@triton.jit
def _is_beyond(amax, code):
    """1 for blocks that E4M3 codes without sign leave out of reach, else 0."""
    return (amax > decode_float(code, 3, 7) * 127.0).to(tl.int32)


@triton.jit
def _tried(values, code, lowest, last, scale_2, positive):
    """E4M3 codes without sign within `lowest` and `last`, and the squared errors of blocks under them."""
    code = tl.minimum(tl.maximum(code, lowest), last)
    scale = decode_float(code, 3, 7)
    unit = scale * scale_2
    whole = _whole(values, tl.where(positive, unit, -unit))
    off = tl.abs(whole)
    off -= tl.where(whole < -96, 106, _level(off))
    return code, tl.sum(off * off, 2).to(tl.float32) * (scale * scale)


@triton.jit
def _whole(values, unit):
    """int32 [R, B, 32]: values in units of their blocks, to the nearest integer, ties to even."""
    y = values * tl.div_rn(1.0, unit)[:, :, None]
    y = tl.minimum(tl.maximum(y, -127.0), 127.0)
    return (y + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def _index(magnitude):
    """How many of the positive levels the nearest one is from zero."""
    few = (magnitude > 4).to(tl.int32) + (magnitude > 13).to(tl.int32) + (magnitude > 23).to(tl.int32)
    more = (magnitude > 34).to(tl.int32) + (magnitude > 46).to(tl.int32) + (magnitude > 60).to(tl.int32)
    return few + more + (magnitude > 77).to(tl.int32)


@triton.jit
def _level(magnitude):
    """The nearest of the positive levels and zero."""
    few = tl.where(magnitude > 4, 9, 0) + tl.where(magnitude > 13, 9, 0) + tl.where(magnitude > 23, 11, 0)
    more = tl.where(magnitude > 34, 11, 0) + tl.where(magnitude > 46, 13, 0) + tl.where(magnitude > 60, 15, 0)
    return few + more + tl.where(magnitude > 77, 19, 0)
