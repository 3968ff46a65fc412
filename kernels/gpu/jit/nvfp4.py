"""NVFP4 without a matmul: blocks of 16 along K with E4M3 scales under one of the tensor. R rows of B blocks a program.

`reference.nvfp4` says what is computed, and what SPREAD is: the largest weight of a tensor over its tensor scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elements import decode_float, e4m3, encode_float, narrowed, widened, with_sign
from .measure import count_nonfinite, store_measured_blocks
from .tiles import block_place, blocks_inside, load_four_bits, store_four_bits


@triton.jit
def quantize_nvfp4(
    source,
    codes,
    scales,
    scale_of_tensor,
    partials,
    nonfinite,
    rows,
    cols,
    source_stride,
    code_stride,
    scale_stride,
    SPREAD: tl.constexpr,
    MSE: tl.constexpr,
    MEASURE: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    """Codes and block scales of a matrix under the float32 at `scale_of_tensor`.

    Columns from `cols` to the end of their block are written as zeros.
    """
    row, block, col, inside = block_place(rows, cols, R, B, 16)
    raw = tl.load(source + row[:, None, None] * source_stride + col[None, :, :], mask=inside, other=0)
    signed = widened(raw).to(tl.int32, bitcast=True)
    bits = signed & 0x7FFFFFFF
    top = tl.max(bits, 2)
    if tl.max(tl.max(top, 1), 0) >= 0x7F800000:
        count_nonfinite(bits, nonfinite)

    scale_2 = tl.load(scale_of_tensor)
    code, byte = encode_blocks(signed, scale_2, SPREAD, MSE, R, B)
    block_inside = blocks_inside(rows, cols, row, block, 16)
    tl.store(scales + row[:, None] * scale_stride + block[None, :], byte.to(tl.uint8), mask=block_inside)
    store_four_bits(codes, code, row, block, code_stride, block_inside)

    if MEASURE:
        LIMIT: tl.constexpr = 6.0 * (1 + 2.0**-20)
        values = bits.to(tl.float32, bitcast=True)
        scale = decode_float(byte, 3, 7)
        unit = scale * scale_2
        ratio = tl.div_rn(values, tl.div_rn(scale, multiplier_of(scale_2, SPREAD))[:, :, None])
        error = tl.abs(values - decode_float(code & 7, 1, 1) * unit[:, :, None])
        store_measured_blocks(partials, values, error, top, ratio > LIMIT, (code & 7) == 0, rows, cols)


@triton.jit
def encode_blocks(signed, scale_2, SPREAD: tl.constexpr, MSE: tl.constexpr, R: tl.constexpr, B: tl.constexpr):
    """int32 codes [R, B, 16] and E4M3 codes of the scales [R, B], of float32 bits under a scale or one for each row."""
    bits = signed & 0x7FFFFFFF
    values = bits.to(tl.float32, bitcast=True)
    multiplier = multiplier_of(scale_2, SPREAD)
    byte = _block_scales(values, tl.max(bits, 2).to(tl.float32, bitcast=True), multiplier, MSE, R, B)
    step = tl.div_rn(decode_float(byte, 3, 7), multiplier)
    code = encode_float(tl.div_rn(values, step[:, :, None]), 1, 1, 6.0)
    return code | tl.where(bits > 0, (signed >> 28) & 8, 0), byte


@triton.jit
def tensor_scale(amax, SPREAD: tl.constexpr):
    """float32 scales of tensors from their maxima."""
    amax = tl.minimum(amax, 3.3895313892515355e38)  # the largest BF16
    multiplier = tl.div_rn(1.0, tl.maximum(amax, 2.0**-126)) * SPREAD
    return tl.where(multiplier < float("inf"), tl.div_rn(amax, SPREAD), 1.0)


@triton.jit
def multiplier_of(scale_2, SPREAD: tl.constexpr):
    """float32 SPREAD * (1 / amax of the tensor), from its scale alone."""
    amax = tl.minimum(scale_2 * SPREAD, 3.4028234663852886e38)
    short = ((amax.to(tl.int32, bitcast=True) + 0x800) & -0x1000).to(tl.float32, bitcast=True)
    amax = tl.where(tl.div_rn(short, SPREAD) == scale_2, short, amax)
    return tl.div_rn(1.0, amax) * SPREAD


@triton.jit
def scales_nvfp4(amax, scales, count, amax_stride, scale_stride, SPREAD: tl.constexpr, N: tl.constexpr):
    """Tensor scales from the float32 maxima of `count` tensors."""
    i = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    top = tl.load(amax + i * amax_stride, mask=i < count, other=1.0)
    tl.store(scales + i * scale_stride, tensor_scale(top, SPREAD), mask=i < count)


@triton.jit
def dequantize_nvfp4(
    codes,
    scales,
    scale_of_tensor,
    out,
    rows,
    cols,
    code_stride,
    scale_stride,
    out_stride,
    R: tl.constexpr,
    B: tl.constexpr,
):
    """The values of codes under both scales."""
    row, block, col, inside = block_place(rows, cols, R, B, 16)
    block_inside = blocks_inside(rows, cols, row, block, 16)
    byte = tl.load(scales + row[:, None] * scale_stride + block[None, :], mask=block_inside, other=0).to(tl.int32)
    code = load_four_bits(codes, row, block, code_stride, block_inside, R, B, 16)
    unit = e4m3(byte) * tl.load(scale_of_tensor)
    values = with_sign(decode_float(code & 7, 1, 1), code, 3) * unit[:, :, None]
    tl.store(out + row[:, None, None] * out_stride + col[None, :, :], narrowed(values, out), mask=inside)


@triton.jit
def _block_scales(values, amax, multiplier, MSE: tl.constexpr, R: tl.constexpr, B: tl.constexpr):
    """int32 E4M3 codes of the scales of magnitudes [R, B, 16] whose maxima are `amax`."""
    six = _to_e4m3(multiplier * tl.div_rn(amax, 6.0))
    if not MSE:
        return six
    four = _to_e4m3(multiplier * (amax * 0.25))
    here = _squared_errors(values, six, multiplier, R, B)
    there = _squared_errors(values, four, multiplier, R, B)
    return tl.where(there < here, four, six)


@triton.jit
def _to_e4m3(scale):
    code = encode_float(scale, 3, 7, 448.0)
    return tl.where(code == 0, 0x20, code)


@triton.jit
def _squared_errors(values, byte, multiplier, R: tl.constexpr, B: tl.constexpr):
    """float32 [R, B] in units of the multiplier: even and odd k, then halves onto halves."""
    scale = decode_float(byte, 3, 7)
    inverse = tl.minimum(tl.div_rn(multiplier, scale), 3.4028234663852886e38)  # times a zero, an infinity is no number
    ratio = values * inverse[:, :, None]
    error = ratio - decode_float(encode_float(ratio, 1, 1, 6.0), 1, 1)
    even, odd = tl.split(tl.reshape(error * error, [R, B, 8, 2]))
    left, right = tl.split(tl.permute(tl.reshape(even + odd, [R, B, 2, 4]), (0, 1, 3, 2)))
    first, second = tl.split(tl.permute(tl.reshape(left + right, [R, B, 2, 2]), (0, 1, 3, 2)))
    one, other = tl.split(first + second)
    return (one + other) * (scale * scale)
