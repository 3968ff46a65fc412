"""MXFP4 codes back to values, in vector IR: BF16 holds every one of them exactly, down to its own subnormals."""

from __future__ import annotations

from llvmlite import ir

from .mx import power_of_two_bits
from .vector import F32, I8, I16, I32, Vector, constant, load, load_scalar, splat

_MAGNITUDES = (0, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0)
E2M1_BITS = (*_MAGNITUDES, *(0x8000 | bits for bits in _MAGNITUDES))
"""BF16 bits of the sixteen E2M1 codes at scale 1."""
NONZERO = sum(1 << lane for lane, bits in enumerate(E2M1_BITS * 2) if bits & 0x7FFF)
"""Lanes that are not zero in a vector of two such tables."""


def decode_block(b: ir.IRBuilder, codes: ir.Value, scale: ir.Value) -> Vector:
    """BF16 bits of the 32 values whose codes and scale byte stand at two addresses."""
    pairs = load(b, codes, I8, 16).zext(I32)
    code = ((pairs & 15) | ((pairs >> 4) << 16)).cast(I16)
    byte = b.zext(load_scalar(b, scale, I8), I32)
    half = b.trunc(b.shl(b.sub(byte, I32(1)), I32(7)), I16)
    magnitude = code & 7
    tiny = b.icmp_unsigned("<", byte, I32(2))
    base = splat(b, half, 32)
    normal = magnitude.gt(1).select((magnitude << 6) + base, magnitude.eq(1).select(base, 0))
    # Below 2^-125 halves are BF16 subnormals: a multiple of 2^-133, in units of 32 (byte 0) or 64 (byte 1).
    subnormal = _small_bits(b, magnitude, byte)
    return Vector(b, b.select(tiny, subnormal.value, normal.value)) | ((code & 8) << 12)


def _small_bits(b: ir.IRBuilder, magnitude: Vector, byte: ir.Value) -> Vector:
    """BF16 bits of E2M1 `magnitude` times 2^(byte - 127) for byte 0 or 1, through exact float32 products."""
    one_half = constant(b, I16, 32, E2M1_BITS[1])
    value = magnitude.gt(1).select((magnitude << 6) + E2M1_BITS[1], magnitude.eq(1).select(one_half, 0))
    scale = splat(b, b.bitcast(power_of_two_bits(b, byte), F32), 32)
    return ((value.zext(I32) << 16).cast(F32) * scale).cast(I32).__rshift__(16).trunc(I16)


def look_up_block(b: ir.IRBuilder, codes: ir.Value, scale: ir.Value) -> Vector:
    """Like `decode_block` through a table in a register, for avx512bw; blocks of scale byte 0 or 1 become zeros.

    The table is scaled, not the 32 values looked up in it: adding to the exponent multiplies by a power of two.
    """
    pairs = load(b, codes, I8, 16).zext(I32)
    byte = b.zext(load_scalar(b, scale, I8), I32)
    shift = splat(b, b.trunc(b.shl(b.sub(byte, I32(127)), I32(7)), I16), 32)
    table = Vector(b, ir.Constant(ir.VectorType(I16, 32), list(E2M1_BITS * 2)))
    # Halves of scale 2^-126 and less have no normal BF16: the whole block counts as zero.
    kept = b.select(b.icmp_unsigned("<", byte, I32(2)), I32(0), I32(NONZERO))
    mask = Vector(b, b.bitcast(kept, ir.VectorType(ir.IntType(1), 32)))
    zeros = Vector(b, ir.Constant(ir.VectorType(I16, 32), [bits & 0x8000 for bits in E2M1_BITS * 2]))
    scaled = mask.select(table + shift, zeros)
    # Only five bits of a lane's index count, and both halves of the table are the same: nothing needs masking off.
    return scaled.permuted((pairs | (pairs << 12)).cast(I16))
