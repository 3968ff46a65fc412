"""Codes of every MX format back to values, in vector IR: 32 at a time, even and odd k in vectors of their own.

A family is the name of an MX format, or "mxfp8_f16c" for MXFP8 through the conversion from FP16, which needs f16c.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types

from ...mx_elements import ELEMENTS, MxElement, code_values
from ..processor import has
from .mx import power_of_two_bits
from .mxfp4_decode import decode_block, look_up_block
from .scaled_decode import HALF_UNIT, decode_with_halves, signed_pairs, store_pairs
from .vector import (
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
    with_table = name in LOOK_UPS and out_kind == "bf16" and has("avx512bw")
    store_block = _store_looked_up if with_table else _store_exact

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        codes, scales, out, blocks, _, _ = args
        with count_to(b, blocks) as i:
            code_address = b.add(codes, b.mul(i, I64(block_bytes(name))))
            out_address = b.add(out, b.mul(i, I64(LANES * ITEM_BYTES[out_kind])))
            store_block(b, code_address, b.add(scales, i), out_address, name, out_kind)
        return context.get_dummy_value()

    return types.void(codes, scales, out, blocks, family, kind), codegen


def _store_looked_up(b: ir.IRBuilder, codes: ir.Value, scale: ir.Value, out: ir.Value, family: str, kind: str) -> None:
    """Through a table, but where a code would be no normal BF16."""
    element = _element(family)
    first, last = _first_normal_byte(element), 254 - element.emax
    byte = b.zext(load_scalar(b, scale, I8), I32)
    beyond = b.icmp_unsigned(">", b.sub(byte, I32(first)), I32(last - first))
    with b.if_else(beyond, likely=False) as (then, otherwise):
        with then:
            _store_exact(b, codes, scale, out, family, kind)
        with otherwise:
            store(LOOK_UPS[family](b, codes, scale), out)


def _store_exact(b: ir.IRBuilder, codes: ir.Value, scale: ir.Value, out: ir.Value, family: str, kind: str) -> None:
    if family == "mxfp4":
        bits = decode_block(b, codes, scale)
        store(bits if kind == "bf16" else bits.zext(I32) << 16, out)
        return
    even, odd = values(b, codes, scale, family)
    store_pairs(even, odd, out, kind)  # rounds only numbers below 2^-126


def values(b: ir.IRBuilder, codes: ir.Value, scale: ir.Value, family: str) -> list[Vector]:
    """float32 values of the even and of the odd ones of 32 codes, with the scale byte at an address."""
    unit = splat(b, b.bitcast(power_of_two_bits(b, b.zext(load_scalar(b, scale, I8), I32)), F32), 16)
    if family == "mxfp8_f16c":
        return [decode_with_halves(each.trunc(I16)) * HALF_UNIT * unit for each in signed_pairs(b, codes)]
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
    tiny = b.icmp_unsigned("<", byte, I32(_first_normal_byte(element)))
    kept = Vector(b, b.bitcast(b.select(tiny, I32(0), I32(0xFFFFFFFE)), ir.VectorType(ir.IntType(1), LANES)))
    positive = kept.select(Vector(b, ir.Constant(ir.VectorType(I16, LANES), bits)) + shift, 0)
    negative = positive | constant(b, I16, LANES, 0x8000)
    spread = [3 * quad + k for quad in range(8) for k in (0, 1, 0, 1, 1, 2, 2, 2)]
    words = load(b, codes, I8, 24).shuffle(spread).cast(I16)
    index = words >> Vector(b, ir.Constant(ir.VectorType(I16, LANES), [0, 6, 4, 2] * 8))
    return positive.permuted_with(negative, index)  # only six bits of a lane's index count


def shift_mxfp8(b: ir.IRBuilder, codes: ir.Value, scale: ir.Value) -> Vector:
    """BF16 bits of 32 MXFP8 values in order, for avx512bw: E4M3 moved up, and a table for what is subnormal in it.

    Blocks in which a code has no normal BF16, whose largest weight is below 2^-108, count as zero.
    """
    element = ELEMENTS["mxfp8"]
    byte = b.zext(load_scalar(b, scale, I8), I32)
    shift = splat(b, b.trunc(b.shl(b.sub(byte, I32(127)), I32(7)), I16), LANES)
    kept = b.select(b.icmp_unsigned("<", byte, I32(_first_normal_byte(element))), I16(0), I16(0x7FFF))
    code = load(b, codes, I8, LANES).zext(I16)
    magnitude = code & 0x7F
    normal = (magnitude << 4) + (shift + ((127 - element.bias) << 7))
    steps = [_bf16_bits(value) for value in code_values(element)[: 1 << element.mantissa_bits]]
    table = Vector(b, ir.Constant(ir.VectorType(I16, LANES), steps + [0] * (LANES - len(steps))))
    nonzero = Vector(b, ir.Constant(ir.VectorType(I16, LANES), [0] + [0xFFFF] * (LANES - 1)))
    subnormal = (table + (shift & nonzero)).permuted(magnitude)
    value = magnitude.gt((1 << element.mantissa_bits) - 1).select(normal, subnormal)
    return (value & splat(b, kept, LANES)) | ((code << 8) & 0x8000)


LOOK_UPS: Mapping[str, Callable[[ir.IRBuilder, ir.Value, ir.Value], Vector]] = {
    "mxfp4": look_up_block,
    **{name: partial(look_up_mxfp6, name=name) for name in ("mxfp6_e2m3", "mxfp6_e3m2")},
    "mxfp8": shift_mxfp8,
    "mxfp8_f16c": shift_mxfp8,
}
"""(builder, addresses of 32 codes and of their scale byte) -> BF16 bits, by format; tiny blocks become zeros."""


def _first_normal_byte(element: MxElement) -> int:
    """The first scale byte under which the smallest code is a normal BF16."""
    return 128 - (_bf16_bits(code_values(element)[1]) >> 7)


def _bf16_bits(value: float) -> int:
    """Of a number that BF16 holds exactly."""
    return int.from_bytes(struct.pack("<f", value), "little") >> 16
