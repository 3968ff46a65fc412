"""MX formats: 32 elements along K share a power of two. One program makes R rows of B blocks."""

from __future__ import annotations

import triton
import triton.language as tl

from .elements import decode_float, encode_float, narrowed, power_of_two, six_bit_codes, widened, with_sign
from .measure import count_nonfinite, counted_in_blocks, store_partials
from .tiles import block_place, blocks_inside, load_four_bits, store_four_bits


@triton.jit
def quantize_mx(
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
    CODE_BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    LARGEST: tl.constexpr,
    EMAX: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KNOWN: tl.constexpr,
    MEASURE: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    """Codes and scale bytes of a matrix; see `registry` for `quantize` and `mx_elements.MxElement` for the constants.

    Columns from `cols` to the end of their block are written as zeros. KNOWN: the scale bytes are read, not made.
    """
    row, block, col, inside = block_place(rows, cols, R, B, 32)
    raw = tl.load(source + row[:, None, None] * source_stride + col[None, :, :], mask=inside, other=0)
    signed = widened(raw).to(tl.int32, bitcast=True)
    bits = signed & 0x7FFFFFFF
    amax = tl.max(bits, 2)
    largest = tl.max(tl.max(amax, 1), 0)
    if largest >= 0x7F800000:
        count_nonfinite(bits, nonfinite)

    scale_at = scales + row[:, None] * scale_stride + block[None, :]
    block_inside = blocks_inside(rows, cols, row, block, 32)
    if KNOWN:
        byte = tl.load(scale_at, mask=block_inside, other=0).to(tl.int32)
    else:
        TOP: tl.constexpr = 142 if raw.dtype == tl.float16 else 254
        byte = _scale_byte(amax, EMAX, THRESHOLD, TOP)
        tl.store(scale_at, byte.to(tl.uint8), mask=block_inside)

    ratio = bits.to(tl.float32, bitcast=True) * power_of_two(254 - byte)[:, :, None]
    code = encode_float(ratio, MANTISSA, BIAS, LARGEST)
    _store_codes(
        codes, code | ((signed >> 31) & (1 << (CODE_BITS - 1))), row, block, code_stride, block_inside, CODE_BITS
    )

    if MEASURE:
        LIMIT: tl.constexpr = LARGEST * (1 + 2.0**-20)
        error = tl.abs(ratio - decode_float(code, MANTISSA, BIAS))
        unit = power_of_two(byte).to(tl.float64)
        signal = tl.sum(tl.sum(tl.sum(ratio * ratio, 2).to(tl.float64) * unit * unit, 1), 0)
        noise = tl.sum(tl.sum(tl.sum(error * error, 2).to(tl.float64) * unit * unit, 1), 0)
        max_error = tl.max(tl.max(tl.max(error, 2).to(tl.float64) * unit, 1), 0)
        saturated, zeros = counted_in_blocks(ratio > LIMIT, code == 0, rows, cols)
        store_partials(partials, signal, noise, max_error, largest, saturated, zeros)


@triton.jit
def observe_mx(source, amax, nonfinite, rows, cols, source_stride, amax_stride, R: tl.constexpr, B: tl.constexpr):
    """float32 bits of the largest magnitude of each block, where it exceeds what int32 `amax` holds already."""
    row, block, col, inside = block_place(rows, cols, R, B, 32)
    raw = tl.load(source + row[:, None, None] * source_stride + col[None, :, :], mask=inside, other=0)
    bits = widened(raw).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    top = tl.max(bits, 2)
    if tl.max(tl.max(top, 1), 0) >= 0x7F800000:
        count_nonfinite(bits, nonfinite)
    at = amax + row[:, None] * amax_stride + block[None, :]
    block_inside = blocks_inside(rows, cols, row, block, 32)
    tl.store(at, tl.maximum(top, tl.load(at, mask=block_inside, other=0)), mask=block_inside)


@triton.jit
def scales_mx(
    amax, scales, rows, cols, amax_stride, scale_stride, EMAX: tl.constexpr, THRESHOLD: tl.constexpr, N: tl.constexpr
):
    """Scale bytes from the float32 bits of block maxima, by the arithmetic of `quantize_mx`."""
    i = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    row, col = i // cols, i % cols
    top = tl.load(amax + row * amax_stride + col, mask=row < rows, other=0)
    tl.store(scales + row * scale_stride + col, _scale_byte(top, EMAX, THRESHOLD, 254).to(tl.uint8), mask=row < rows)


@triton.jit
def dequantize_mx(
    codes,
    scales,
    out,
    rows,
    cols,
    code_stride,
    scale_stride,
    out_stride,
    CODE_BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    NAN: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    """The values of codes and scale bytes; NAN is the code (without sign) that is no number, -1 where there is none."""
    row, block, col, inside = block_place(rows, cols, R, B, 32)
    block_inside = blocks_inside(rows, cols, row, block, 32)
    byte = tl.load(scales + row[:, None] * scale_stride + block[None, :], mask=block_inside, other=0).to(tl.int32)
    code = _load_codes(codes, row, block, code_stride, block_inside, CODE_BITS, R, B)
    magnitude = code & ((1 << (CODE_BITS - 1)) - 1)
    values = decode_float(magnitude, MANTISSA, BIAS)
    if NAN >= 0:
        values = tl.where(magnitude == NAN, float("nan"), values)
    values = with_sign(values, code, CODE_BITS - 1) * power_of_two(byte)[:, :, None]
    tl.store(out + row[:, None, None] * out_stride + col[None, :, :], narrowed(values, out), mask=inside)


@triton.jit
def _scale_byte(amax, EMAX: tl.constexpr, THRESHOLD: tl.constexpr, TOP: tl.constexpr):
    """int32 scale bytes from the float32 bits of block maxima, whose exponents are at most TOP (see `MxElement`)."""
    byte = (amax >> 23) - EMAX + ((amax & 0x7FFFFF) >= THRESHOLD).to(tl.int32)
    return tl.minimum(tl.maximum(byte, 0), TOP - EMAX)


@triton.jit
def _store_codes(codes, code, row, block, stride, inside, CODE_BITS: tl.constexpr):
    """Write int32 codes [R, B, 32]: one, or two, to a byte, or four to three bytes, the first in the lowest bits."""
    R: tl.constexpr = code.shape[0]
    B: tl.constexpr = code.shape[1]
    BYTES: tl.constexpr = 4 * CODE_BITS
    at = codes + row[:, None, None] * stride + (block * BYTES)[None, :, None]
    if CODE_BITS == 8:
        tl.store(at + tl.arange(0, 32)[None, None, :], code.to(tl.uint8), mask=inside[:, :, None])
    elif CODE_BITS == 4:
        store_four_bits(codes, code, row, block, stride, inside)
    else:
        even, odd = tl.split(tl.reshape(code, [R, B, 8, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        word = first | (second << 6) | (third << 12) | (fourth << 18)
        at += tl.arange(0, 8)[None, None, :] * 3
        tl.store(at, word.to(tl.uint8), mask=inside[:, :, None])
        tl.store(at + 1, (word >> 8).to(tl.uint8), mask=inside[:, :, None])
        tl.store(at + 2, (word >> 16).to(tl.uint8), mask=inside[:, :, None])


@triton.jit
def _load_codes(codes, row, block, stride, inside, CODE_BITS: tl.constexpr, R: tl.constexpr, B: tl.constexpr):
    """int32 codes [R, B, 32], the inverse of `_store_codes`."""
    BYTES: tl.constexpr = 4 * CODE_BITS
    at = codes + row[:, None, None] * stride + (block * BYTES)[None, :, None]
    if CODE_BITS == 8:
        code = tl.load(at + tl.arange(0, 32)[None, None, :], mask=inside[:, :, None], other=0).to(tl.int32)
    elif CODE_BITS == 4:
        code = load_four_bits(codes, row, block, stride, inside, R, B, 32)
    else:
        at += tl.arange(0, 8)[None, None, :] * 3
        word = tl.load(at, mask=inside[:, :, None], other=0).to(tl.int32)
        word |= tl.load(at + 1, mask=inside[:, :, None], other=0).to(tl.int32) << 8
        word |= tl.load(at + 2, mask=inside[:, :, None], other=0).to(tl.int32) << 16
        code = tl.reshape(six_bit_codes(word), [R, B, 32])
    return code
