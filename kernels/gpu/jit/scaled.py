"""FP8 and INT8 with float32 scales: per row, or one for a tile (a whole tensor, or a 128 x 128 block).

RULE names the arithmetic: "int8", "fp8_channel", "fp8_tensor" or "fp8_block" (see `fp8` and `int8`). FNUZ: codes are
stored as E4M3 FNUZ, which mean half as much, with twice the scale, and without a negative zero.

A program owns whole blocks of scale: R rows of all columns in `quantize_rows`, one tile in the kernels of tiles, so no
two programs write the same scale or code. It goes through its elements twice, in chunks of C columns: for the maxima,
one for eight columns so that no loop reduces across threads, and for the codes, when the elements
come from the cache. Statistics are sums of each program in `partials`, added up by the host; elements that are not
finite are counted in `nonfinite`, and then nothing that was written counts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elements import decode_float, encode_float, encode_int, narrowed, widened, with_sign
from .measure import count_nonfinite, store_partials
from .tiles import tile_place


@triton.jit
def quantize_rows(
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
    RULE: tl.constexpr,
    FNUZ: tl.constexpr,
    KNOWN: tl.constexpr,
    MEASURE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Codes and scales of R whole rows a program: once over them for the maximum, once for the codes.

    The second time they come from the cache. KNOWN: the scales are read, not made.
    """
    first_row = tl.program_id(0).to(tl.int64) * R
    row = first_row + tl.arange(0, R)
    row_inside = row < rows
    at = source + (row * source_stride)[:, None]
    top = tl.zeros([R, C // 8], tl.int32)
    if KNOWN:
        scale = tl.load(scales + row * scale_stride, mask=row_inside, other=1.0)
        if FNUZ:
            scale *= 0.5
    else:
        for start in range(0, cols, C):
            col = start + tl.arange(0, C)
            inside = row_inside[:, None] & (col < cols)[None, :]
            top = tl.maximum(top, tl.max(_eights(_magnitude(_bits(at + col[None, :], inside))), 2))
        scale = scale_of(tl.max(top, 1).to(tl.float32, bitcast=True), RULE)
        tl.store(scales + row * scale_stride, scale * 2 if FNUZ else scale, mask=row_inside)

    signal = tl.zeros([R, C // 8], tl.float32)
    noise = tl.zeros([R, C // 8], tl.float32)
    worst = tl.zeros([R, C // 8], tl.float32)
    counts = tl.zeros([R, C // 8], tl.int32)
    for start in range(0, cols, C):
        col = start + tl.arange(0, C)
        inside = row_inside[:, None] & (col < cols)[None, :]
        signed = _bits(at + col[None, :], inside)
        bits = _magnitude(signed)
        ratio = ratio_of(bits, scale[:, None], RULE)
        code = _encode(ratio, RULE)
        tl.store(
            codes + (row * code_stride)[:, None] + col[None, :], _signed_code(code, signed, RULE, FNUZ), mask=inside
        )
        if KNOWN:
            top = tl.maximum(top, tl.max(_eights(bits), 2))
        if MEASURE:
            error = tl.abs(ratio - _decode(code, RULE))
            signal += tl.sum(_eights(ratio * ratio), 2)
            noise += tl.sum(_eights(error * error), 2)
            worst = tl.maximum(worst, tl.max(_eights(error), 2))
            counts += tl.sum(_eights(tl.where(inside, _saturated_and_zero(ratio, code, RULE), 0)), 2)

    largest = tl.max(tl.max(top, 1), 0)
    if largest >= 0x7F800000:
        for start in range(0, cols, C):
            col = start + tl.arange(0, C)
            inside = row_inside[:, None] & (col < cols)[None, :]
            count_nonfinite(_magnitude(_bits(at + col[None, :], inside)), nonfinite)
    if MEASURE:
        unit = scale.to(tl.float64)
        store_partials(
            partials,
            tl.sum(tl.sum(signal, 1).to(tl.float64) * unit * unit, 0),
            tl.sum(tl.sum(noise, 1).to(tl.float64) * unit * unit, 0),
            tl.max(tl.max(worst, 1).to(tl.float64) * unit, 0),
            largest,
            tl.sum(tl.sum(counts >> 16, 1), 0),
            tl.sum(tl.sum(counts & 0xFFFF, 1), 0),
        )


@triton.jit
def quantize_tiles(
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
    RULE: tl.constexpr,
    FNUZ: tl.constexpr,
    BLOCKS: tl.constexpr,
    KNOWN: tl.constexpr,
    MEASURE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Codes of a tile of R x C elements under one scale.

    BLOCKS: the tile is a scale block. Else one scale serves the matrix, and must be KNOWN.
    """
    first_row, first_col, row, col, inside = tile_place(rows, cols, R, C)
    signed = _bits(source + (row * source_stride)[:, None] + col[None, :], inside)
    bits = _magnitude(signed)
    largest = tl.max(tl.max(bits, 1), 0)
    if largest >= 0x7F800000:
        count_nonfinite(bits, nonfinite)
    scale_at = scales
    if BLOCKS:
        scale_at += (first_row // R) * scale_stride + first_col // C
    if KNOWN:
        scale = tl.load(scale_at)
        if FNUZ:
            scale *= 0.5
    else:
        scale = scale_of(largest.to(tl.float32, bitcast=True), RULE)
        tl.store(scale_at, scale * 2 if FNUZ else scale)

    ratio = ratio_of(bits, scale, RULE)
    code = _encode(ratio, RULE)
    stored = _signed_code(code, signed, RULE, FNUZ)
    tl.store(codes + (row * code_stride)[:, None] + col[None, :], stored, mask=inside)
    if MEASURE:
        error = tl.abs(ratio - _decode(code, RULE))
        unit = scale.to(tl.float64)
        counted = tl.sum(tl.sum(_saturated_and_zero(ratio, code, RULE), 1), 0)
        seen = tl.minimum(rows - first_row, R) * tl.minimum(cols - first_col, C)
        store_partials(
            partials,
            tl.sum(tl.sum(ratio * ratio, 1), 0).to(tl.float64) * unit * unit,
            tl.sum(tl.sum(error * error, 1), 0).to(tl.float64) * unit * unit,
            tl.max(tl.max(error, 1), 0).to(tl.float64) * unit,
            largest,
            counted >> 16,
            (counted & 0xFFFF) - (R * C - seen),
        )


@triton.jit
def observe_scaled(
    source,
    amax,
    nonfinite,
    rows,
    cols,
    source_stride,
    amax_stride,
    GROUP: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Raise int32 `amax` to the float32 bits of the largest magnitudes: of each "row", "block" (a tile), or "all"."""
    first_row, first_col, row, col, inside = tile_place(rows, cols, R, C)
    bits = _magnitude(_bits(source + (row * source_stride)[:, None] + col[None, :], inside))
    top = tl.max(bits, 1)
    largest = tl.max(top, 0)
    if largest >= 0x7F800000:
        count_nonfinite(bits, nonfinite)
    if GROUP == "row":
        tl.atomic_max(amax + row * amax_stride, top, mask=row < rows)
    elif GROUP == "block":
        tl.atomic_max(amax + (first_row // R) * amax_stride + first_col // C, largest)
    else:
        tl.atomic_max(amax, largest)


@triton.jit
def scales_scaled(
    amax, scales, rows, cols, amax_stride, scale_stride, RULE: tl.constexpr, FNUZ: tl.constexpr, N: tl.constexpr
):
    """Scales from maxima, by the arithmetic of `quantize_rows` and `quantize_tiles`; in place too."""
    i = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    row, col = i // cols, i % cols
    scale = scale_of(tl.load(amax + row * amax_stride + col, mask=row < rows, other=1.0), RULE)
    tl.store(scales + row * scale_stride + col, scale * 2 if FNUZ else scale, mask=row < rows)


@triton.jit
def dequantize_scaled(
    codes,
    scales,
    out,
    rows,
    cols,
    code_stride,
    scale_stride,
    out_stride,
    GROUP: tl.constexpr,
    CODE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """The values of codes ("int8", "e4m3" or "fnuz") and float32 scales of each "row", "block" (a tile), or "all"."""
    first_row, first_col, row, col, inside = tile_place(rows, cols, R, C)
    code = tl.load(codes + (row * code_stride)[:, None] + col[None, :], mask=inside, other=0).to(tl.int32)
    if GROUP == "row":
        scale = tl.load(scales + row * scale_stride, mask=row < rows, other=1.0)[:, None]
    elif GROUP == "block":
        scale = tl.load(scales + (first_row // R) * scale_stride + first_col // C)
    else:
        scale = tl.load(scales)
    values = _values(code, CODE) * scale
    tl.store(out + (row * out_stride)[:, None] + col[None, :], narrowed(values, out), mask=inside)


@triton.jit
def scale_of(amax, RULE: tl.constexpr):
    """float32 scales of float32 maxima, every operation rounded as in plain torch."""
    amax = tl.minimum(amax, 3.3895313892515355e38)  # the largest BF16
    if RULE == "int8":
        scale = tl.div_rn(amax, 127.0)
        scale = tl.where(scale == 0, 1.0, scale)
    elif RULE == "fp8_channel":
        scale = tl.maximum(tl.div_rn(amax, 448.0), 1.0 / (448.0 * 512.0))
    elif RULE == "fp8_tensor":
        scale = tl.div_rn(1.0, tl.div_rn(1.0, tl.maximum(amax, 1e-12)) * 448.0)
    else:
        scale = tl.div_rn(tl.maximum(amax, 1e-4), 448.0)
    return scale


@triton.jit
def ratio_of(bits, scale, RULE: tl.constexpr):
    """float32 magnitudes (as bits) over their scale, as the rule wants it: divided, or times the reciprocal."""
    magnitude = bits.to(tl.float32, bitcast=True)
    if RULE == "fp8_block":
        return magnitude * tl.div_rn(1.0, scale)
    return tl.div_rn(magnitude, scale)


@triton.jit
def _eights(values):
    """[R, C] as [R, C / 8, 8]: what a thread loads at once, so that sums over the last are its own affair."""
    return tl.reshape(values, [values.shape[0], values.shape[1] // 8, 8])


@triton.jit
def _bits(pointers, inside):
    return widened(tl.load(pointers, mask=inside, other=0)).to(tl.int32, bitcast=True)


@triton.jit
def _magnitude(bits):
    return bits & 0x7FFFFFFF


@triton.jit
def _encode(ratio, RULE: tl.constexpr):
    if RULE == "int8":
        return encode_int(ratio, 127.0)
    return encode_float(ratio, 3, 7, 448.0)


@triton.jit
def _decode(code, RULE: tl.constexpr):
    if RULE == "int8":
        return code.to(tl.float32)
    return decode_float(code, 3, 7)


@triton.jit
def _signed_code(code, signed, RULE: tl.constexpr, FNUZ: tl.constexpr):
    """What is stored for a code without sign: int8, or the bits of E4M3."""
    if RULE == "int8":
        stored = tl.where(signed < 0, -code, code).to(tl.int8)
    elif FNUZ:
        stored = tl.where(code == 0, 0, code | ((signed >> 31) & 0x80)).to(tl.uint8)
    else:
        stored = (code | ((signed >> 31) & 0x80)).to(tl.uint8)
    return stored


@triton.jit
def _saturated_and_zero(ratio, code, RULE: tl.constexpr):
    """1 in the high half where the ratio is beyond the largest code, 1 in the low half where the code is zero."""
    LARGEST: tl.constexpr = 127.0 if RULE == "int8" else 448.0
    LIMIT: tl.constexpr = LARGEST * (1 + 2.0**-20)
    return ((ratio > LIMIT).to(tl.int32) << 16) + (code == 0).to(tl.int32)


@triton.jit
def _values(code, CODE: tl.constexpr):
    """float32 of int32 codes; the NaN codes give NaN."""
    if CODE == "int8":
        return code.to(tl.float32)
    magnitude = code & 0x7F
    values = with_sign(decode_float(magnitude, 3, 7), code, 7)
    if CODE == "fnuz":
        return tl.where(code == 0x80, float("nan"), values * 0.5)
    return tl.where(magnitude == 0x7F, float("nan"), values)
