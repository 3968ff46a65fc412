"""Weights with scales along K, decoded in registers by arithmetic: small floats, and integers with zero points."""

from __future__ import annotations

import triton
import triton.language as tl

from .elements import decode_float, e4m3, in_order, nl4_level, power_of_two, six_bit_codes, widened, with_sign


@triton.jit
def decoded_tile(
    x,
    codes,
    scales,
    x_rows,
    w_rows,
    k_begin,
    k_end,
    k,
    x_stride,
    code_stride,
    scale_stride,
    CODE: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """float32 [BN, BT]: weight rows, in the type of x, times tokens over columns [k_begin, k_end) of k.

    The pointers are at their rows; see `load_weight` for CODE, SCALE and GROUP. EVEN_K: every step is a whole one.
    BK is a power of two, at least 16, and k_begin a multiple of it.
    """
    columns = tl.arange(0, BK)
    tile = tl.zeros((BN, BT), tl.float32)
    for at in range(k_begin, k_end, BK):
        w = load_weight(codes, scales, w_rows, at, k, code_stride, scale_stride, CODE, SCALE, GROUP, EVEN_K, BN, BK)
        x_place = x + at + (x_rows[:, None] * x_stride + columns[None, :])
        a = tl.load(x_place) if EVEN_K else tl.load(x_place, mask=columns[None, :] < k - at, other=0.0)
        tile = tl.dot(w.to(a.dtype), tl.trans(a), tile, input_precision="ieee")
    return tile


@triton.jit
def load_weight(
    codes,
    scales,
    rows,
    at,
    k,
    code_stride,
    scale_stride,
    CODE: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """float32 [BN, BK] of rows and columns [at, at + BK), by the arithmetic of `dequantize`; finite beyond k.

    CODE: "e2m1", "e2m3", "e3m2", "e4m3", "nl4", "uint4" or "uint8". SCALE, of GROUP columns each (0: the whole row):
    "e8m0" or "e4m3", a byte, or "affine", a float with a zero point beside it.
    """
    values = _decode(load_codes(codes, rows, at, k, code_stride, CODE, EVEN_K, BN, BK), CODE)
    GROUPS: tl.constexpr = BK // GROUP if GROUP > 0 and GROUP < BK else 1
    group = tl.arange(0, GROUPS)[None, :]
    if GROUP:
        group += at // GROUP
    inside = group < (1 if GROUP == 0 else (k + GROUP - 1) // GROUP)
    values = values.reshape(BN, GROUPS, BK // GROUPS)
    if SCALE == "affine":
        place = scales + (rows[:, None] * scale_stride + 2 * group)
        scale = widened(tl.load(place, mask=inside, other=0))
        zero = widened(tl.load(place + 1, mask=inside, other=0))
        values = (values - zero[:, :, None]) * scale[:, :, None]
    else:
        byte = tl.load(scales + (rows[:, None] * scale_stride + group), mask=inside, other=0)
        unit = e4m3(byte.to(tl.int32)) if SCALE == "e4m3" else power_of_two(byte.to(tl.int32))
        values *= unit[:, :, None]
    return values.reshape(BN, BK)


@triton.jit
def load_codes(
    codes,
    rows,
    at,
    k,
    stride,
    CODE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """int32 codes [BN, BK] of rows and columns [at, at + BK); zeros from k on, but for those in its last byte or word.

    Codes of six bits come as int32 words, three for sixteen of them.
    """
    if CODE == "e2m3" or CODE == "e3m2":
        first, second, third = _load_words(codes, rows, at, k, stride, EVEN_K, BK)
        quads = in_order(
            first & 0xFFFFFF,
            ((first >> 24) & 0xFF) | ((second & 0xFFFF) << 8),
            ((second >> 16) & 0xFFFF) | ((third & 0xFF) << 16),
            (third >> 8) & 0xFFFFFF,
        )
        return six_bit_codes(quads.reshape(BN, BK // 4)).reshape(BN, BK)
    PACKED: tl.constexpr = 2 if CODE == "e2m1" or CODE == "nl4" or CODE == "uint4" else 1
    bytes_ = tl.arange(0, BK // PACKED)
    place = codes + at // PACKED + (rows[:, None] * stride + bytes_[None, :])
    packed = tl.load(place) if EVEN_K else tl.load(place, mask=bytes_[None, :] * PACKED < k - at, other=0)
    if PACKED == 2:
        packed = tl.join(packed & 15, packed >> 4).reshape(BN, BK)
    return packed.to(tl.int32)


@triton.jit
def _load_words(words, rows, at, k, stride, EVEN_K: tl.constexpr, BK: tl.constexpr):
    """First, second and third int32 word of every sixteen codes."""
    sixteens = tl.arange(0, BK // 16)[None, :]
    place = words + at // 16 * 3 + (rows[:, None] * stride + sixteens * 3)
    if EVEN_K:
        return tl.load(place), tl.load(place + 1), tl.load(place + 2)
    inside = sixteens * 16 < k - at
    return (
        tl.load(place, mask=inside, other=0),
        tl.load(place + 1, mask=inside, other=0),
        tl.load(place + 2, mask=inside, other=0),
    )


@triton.jit
def _decode(code, CODE: tl.constexpr):
    """float32 of int32 codes; there is no NaN among them."""
    if CODE == "uint4" or CODE == "uint8":
        return code.to(tl.float32)
    if CODE == "nl4":
        return nl4_level(code)
    SIGN: tl.constexpr = 3 if CODE == "e2m1" else 7 if CODE == "e4m3" else 5
    MANTISSA: tl.constexpr = 1 if CODE == "e2m1" else 2 if CODE == "e3m2" else 3
    BIAS: tl.constexpr = 7 if CODE == "e4m3" else 3 if CODE == "e3m2" else 1
    return with_sign(decode_float(code & ((1 << SIGN) - 1), MANTISSA, BIAS), code, SIGN)
