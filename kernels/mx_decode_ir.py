"""Codes of every MX format back to values, in vector IR: 32 at a time, even and odd k in vectors of their own.

A family is the name of an MX format, or "mxfp8_f16c" for MXFP8 through the conversion from FP16, which needs f16c.
"""

from __future__ import annotations

import struct
from typing import Any

from llvmlite import ir
from numba import types

from .mx_elements import ELEMENTS, MxElement, code_values
from .mx_ir import power_of_two_bits
from .mxfp4_decode_ir import decode_block
from .scaled_decode_ir import HALF_UNIT, decode_with_halves
from .vector_ir import (
    F32,
    I8,
    I16,
    I32,
    I64,
    ITEM_BYTES,
    Codegen,
    Vector,
    constant,
    count_to,
    emitted,
    load,
    load_scalar,
    splat,
    store,
)

LANES = 32


def block_bytes(family: str) -> int:
    """Bytes of 32 codes."""
    return 4 * _element(family).code_bits


@emitted
def dequantize_run(
    typing: Any, codes: Any, scales: Any, out: Any, blocks: Any, family: Any, kind: Any
) -> tuple[Any, Codegen]:
    """(codes, scales, out addresses, blocks, family, kind "bf16" or "f32"): whole blocks of 32 values."""
    name, out_kind = str(family.literal_value), str(kind.literal_value)
    store_block = _store_mxfp4 if name == "mxfp4" else _store_products

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        codes, scales, out, blocks, _, _ = args
        with count_to(b, blocks) as i:
            code_address = b.add(codes, b.mul(i, I64(block_bytes(name))))
            out_address = b.add(out, b.mul(i, I64(LANES * ITEM_BYTES[out_kind])))
            store_block(b, code_address, b.add(scales, i), out_address, name, out_kind)
        return context.get_dummy_value()

    return types.void(codes, scales, out, blocks, family, kind), codegen


def _store_mxfp4(b: ir.IRBuilder, codes: ir.Value, scale: ir.Value, out: ir.Value, family: str, kind: str) -> None:
    bits = decode_block(b, codes, scale)
    store(bits if kind == "bf16" else bits.zext(I32) << 16, out)


def _store_products(b: ir.IRBuilder, codes: ir.Value, scale: ir.Value, out: ir.Value, family: str, kind: str) -> None:
    even, odd = values(b, codes, scale, family)
    if kind == "bf16":
        low, high = (_rounded_to_bf16(each) for each in (even, odd))
        store((low >> 16) | (high & 0xFFFF0000), out)
        return
    for part in (0, 1):
        lanes = [lane for k in range(8 * part, 8 * part + 8) for lane in (k, 16 + k)]
        store(even.shuffle(lanes, odd), b.add(out, I64(64 * part)))


def _rounded_to_bf16(value: Vector) -> Vector:
    """int32 whose upper half is the nearest BF16, ties to even: only numbers below 2^-126 need rounding at all."""
    bits = value.cast(I32)
    return bits + 0x7FFF + ((bits >> 16) & 1)


def values(b: ir.IRBuilder, codes: ir.Value, scale: ir.Value, family: str) -> list[Vector]:
    """float32 values of the even and of the odd ones of 32 codes, with the scale byte at an address."""
    unit = splat(b, b.bitcast(power_of_two_bits(b, b.zext(load_scalar(b, scale, I8), I32)), F32), 16)
    if family == "mxfp8_f16c":
        return [decode_with_halves(each.trunc(I16)) * HALF_UNIT * unit for each in _signed_pairs(b, codes)]
    element = _element(family)
    return [_decode(each, element) * unit for each in _codes(b, codes, element)]


def _element(family: str) -> MxElement:
    return ELEMENTS[family.removesuffix("_f16c")]


def _codes(b: ir.IRBuilder, address: ir.Value, element: MxElement) -> list[Vector]:
    """The even and the odd codes as int32."""
    if element.code_bits == 8:
        pairs = load(b, address, I16, 16).zext(I32)
        return [pairs & 255, pairs >> 8]
    words = load(b, address, I8, 24).shuffle([3 * quad + k for quad in range(8) for k in (0, 1, 1, 2)]).cast(I16)
    pairs = words.zext(I32) >> Vector(b, ir.Constant(ir.VectorType(I32, 16), [0, 4] * 8))
    return [pairs & 63, (pairs >> 6) & 63]


def _signed_pairs(b: ir.IRBuilder, address: ir.Value) -> list[Vector]:
    """The even and the odd byte codes, sign-extended."""
    pairs = load(b, address, I16, 16).sext(I32)
    return [(pairs << 24).shift_right_signed(24), pairs.shift_right_signed(8)]


def _decode(codes: Vector, element: MxElement) -> Vector:
    """float32 values of int32 codes at scale 1."""
    bits, kept = element.code_bits, element.mantissa_bits
    magnitude = codes & ((1 << (bits - 1)) - 1)
    normal = (magnitude << (23 - kept)) + ((127 - element.bias) << 23)
    subnormal = (magnitude.to_float(F32) * 2.0 ** (1 - element.bias - kept)).cast(I32)
    sign = (codes << (32 - bits)) & 0x80000000
    return (magnitude.gt((1 << kept) - 1).select(normal, subnormal) | sign).cast(F32)


def look_up_mxfp6(b: ir.IRBuilder, codes: ir.Value, scale: ir.Value, name: str) -> Vector:
    """BF16 bits of 32 MXFP6 values in order, through a table in two registers, for avx512bw.

    As in `mxfp4_decode_ir.look_up_block` the table is scaled, and a block in which a code has no normal BF16 counts as
    zero: one whose largest weight is below 2^-118.
    """
    element = ELEMENTS[name]
    bits = [_bf16_bits(value) for value in code_values(element)]
    byte = b.zext(load_scalar(b, scale, I8), I32)
    shift = splat(b, b.trunc(b.shl(b.sub(byte, I32(127)), I32(7)), I16), LANES)
    smallest = 128 - (bits[1] >> 7)  # the first byte under which the smallest code is still normal
    tiny = b.icmp_unsigned("<", byte, I32(smallest))
    kept = Vector(b, b.bitcast(b.select(tiny, I32(0), I32(0xFFFFFFFE)), ir.VectorType(ir.IntType(1), LANES)))
    positive = kept.select(Vector(b, ir.Constant(ir.VectorType(I16, LANES), bits)) + shift, 0)
    negative = positive | constant(b, I16, LANES, 0x8000)
    spread = [3 * quad + k for quad in range(8) for k in (0, 1, 0, 1, 1, 2, 2, 2)]
    words = load(b, codes, I8, 24).shuffle(spread).cast(I16)
    index = words >> Vector(b, ir.Constant(ir.VectorType(I16, LANES), [0, 6, 4, 2] * 8))
    return positive.permuted_with(negative, index)  # only six bits of a lane's index count


def _bf16_bits(value: float) -> int:
    """Of a number that BF16 holds exactly."""
    return int.from_bytes(struct.pack("<f", value), "little") >> 16
