"""Arithmetic of single elements: widening, small floats and integers as codes, E8M0 bytes. All in float32 and int32.

Conversions are spelled out in integers, so that every target, and the interpreter, gives the same bits: sm_80 and
gfx942 have no E4M3 conversion, no target but the newest has one for FP4 or FP6, and a magnitude is never flushed.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widened(raw):
    """float32 of weights as they are loaded: BF16 as int16 bits, FP16 and FP32 as themselves."""
    if raw.dtype == tl.int16:
        return (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return raw.to(tl.float32)


@triton.jit
def narrowed(values, pointer):
    """float32 values as the element type of `pointer`, rounded once; BF16 as int16 bits."""
    if pointer.dtype.element_ty == tl.int16:
        bits = values.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.int16)
    return values.to(pointer.dtype.element_ty)


@triton.jit
def power_of_two(biased):
    """float32 2^(biased - 127) of int32 biased exponents 0..254; 0 gives the subnormal 2^-127."""
    return tl.where(biased == 0, 0x400000, biased << 23).to(tl.float32, bitcast=True)


@triton.jit
def encode_float(magnitude, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr):
    """Nearest code of a float32 magnitude, without sign, ties to even, saturating at LARGEST.

    Normal codes by adding half a step to the bits; subnormal ones by adding the float32 whose last bit is one step.
    """
    SHIFT: tl.constexpr = 23 - MANTISSA
    MAGIC: tl.constexpr = 2.0 ** (SHIFT + 1 - BIAS)
    MAGIC_BITS: tl.constexpr = (127 + SHIFT + 1 - BIAS) << 23
    SMALLEST_NORMAL: tl.constexpr = 2.0 ** (1 - BIAS)
    y = tl.minimum(magnitude, LARGEST)
    bits = y.to(tl.int32, bitcast=True)
    half = (1 << (SHIFT - 1)) - 1
    normal = ((bits + half + ((bits >> SHIFT) & 1)) >> SHIFT) - ((127 - BIAS) << MANTISSA)
    subnormal = (y + MAGIC).to(tl.int32, bitcast=True) - MAGIC_BITS
    return tl.where(y < SMALLEST_NORMAL, subnormal, normal)


@triton.jit
def decode_float(code, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """float32 of int32 codes without sign; the product makes subnormal codes normal, exactly."""
    RESCALE: tl.constexpr = 2.0 ** (127 - BIAS)
    return (code << (23 - MANTISSA)).to(tl.float32, bitcast=True) * RESCALE


@triton.jit
def encode_int(magnitude, LARGEST: tl.constexpr):
    """Nearest integer of a float32 magnitude, ties to even, at most LARGEST."""
    return (tl.minimum(magnitude, LARGEST) + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000


@triton.jit
def with_sign(values, code, SIGN: tl.constexpr):
    """float32 magnitudes with the sign that bit SIGN of the codes has."""
    sign = (code & (1 << SIGN)) << (31 - SIGN)
    return (values.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def e4m3(byte):
    """float32 of int32 E4M3 codes, NaN included."""
    magnitude = byte & 0x7F
    return with_sign(tl.where(magnitude == 0x7F, float("nan"), decode_float(magnitude, 3, 7)), byte, 7)


@triton.jit
def nl4_level(code):
    """float32 levels of int32 NL4 codes: from four words, of four bytes each, that hold their magnitudes."""
    first = tl.where((code & 8) == 0, 0x1D120900, 0x3544576A)
    second = tl.where((code & 8) == 0, 0x57443528, 0x09121D28)
    word = tl.where((code & 4) == 0, first, second)
    magnitude = (word >> ((code & 3) << 3)) & 0xFF
    return with_sign(magnitude.to(tl.float32), code, 3)


@triton.jit
def in_order(first, second, third, fourth):
    """Four tensors [..., n] as [..., n, 2, 2]: one after the other, when reshaped to [..., 4n]."""
    return tl.join(tl.join(first, third), tl.join(second, fourth))


@triton.jit
def six_bit_codes(words):
    """Four codes in the low 24 bits of each int32 word [..., n], as [..., n, 2, 2] in order."""
    return in_order(words & 63, (words >> 6) & 63, (words >> 12) & 63, (words >> 18) & 63)
