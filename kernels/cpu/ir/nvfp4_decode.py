"""NVFP4 codes back to values, in vector IR: two blocks of 16 at a time.

A code times its E4M3 scale has six significant bits, so BF16 holds the product; the scale of the tensor is left to
whoever sums products. Where it is wanted, code * (scale * scale_2) is rounded once.
"""

from __future__ import annotations

import struct
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from ...mx_elements import E2M1, E4M3, code_values
from ...nvfp4_scales import BLOCK
from ..processor import has
from .scaled_decode import store_pairs
from .vector import (
    F32,
    I8,
    I16,
    I32,
    I64,
    ITEM_BYTES,
    Codegen,
    Vector,
    count_to,
    emitted,
    load,
    load_scalar,
    splat,
    store,
)

PAIR = 2 * BLOCK
NORMAL = 2.0**-110, 2.0**110
"""Tensor scales between which no value is a subnormal float32, nor infinite."""
E2M1_VALUES = (*code_values(E2M1), *(-value for value in code_values(E2M1)))
_E4M3_MAGNITUDES = (*code_values(E4M3)[:-1], float("nan"))
E4M3_VALUES = (*_E4M3_MAGNITUDES, *(-value for value in _E4M3_MAGNITUDES))
E4M3_TABLE = "nvfp4.e4m3"
"""What a module calls the constant of these values."""


@emitted
def dequantize_pairs(
    typing: Any, codes: Any, scales: Any, scale_2: Any, out: Any, pairs: Any, kind: Any
) -> tuple[Any, Codegen]:
    """(codes, scales, float32 scale_2, out, pairs, kind "bf16" or "f32"): 32 values each, at integer addresses."""
    out_kind = str(kind.literal_value)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        codes, scales, scale_2, out, pairs, _ = args

        def store_all(with_table: bool) -> None:
            with count_to(b, pairs) as i:
                at = b.add(codes, b.mul(i, I64(BLOCK)))
                units = [b.fmul(each, scale_2) for each in scales_of(b, b.add(scales, b.mul(i, I64(2))))]
                place = b.add(out, b.mul(i, I64(PAIR * ITEM_BYTES[out_kind])))
                if with_table:
                    store(look_up(b, at, units), place)
                else:
                    even, odd = values(b, at, units)
                    store_pairs(even, odd, place, out_kind)

        if out_kind != "bf16" or not tables():
            store_all(False)
            return context.get_dummy_value()
        least, most = (b.fcmp_ordered(op, scale_2, F32(bound)) for op, bound in zip((">=", "<="), NORMAL, strict=True))
        with b.if_else(b.and_(least, most), likely=True) as (then, otherwise):
            with then:
                store_all(True)
            with otherwise:
                store_all(False)
        return context.get_dummy_value()

    return types.void(codes, scales, scale_2, out, pairs, kind), codegen


def tables() -> bool:
    """Whether values are looked up in tables that BF16 instructions make."""
    return has("avx512bw") and has("avx512bf16")


def scales_of(b: ir.IRBuilder, address: ir.Value) -> list[ir.Value]:
    """float32 values of the next two scales."""
    return [e4m3_value(b, b.add(address, I64(at))) for at in (0, 1)]


def e4m3_value(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """float32 of the E4M3 byte at an address."""
    table = b.module.globals.get(E4M3_TABLE)
    if table is None:
        table = cgutils.global_constant(b, E4M3_TABLE, ir.Constant(ir.ArrayType(F32, 256), list(E4M3_VALUES)))
    return b.load(b.gep(table, [I64(0), b.zext(load_scalar(b, address, I8), I64)]))


def look_up(b: ir.IRBuilder, codes: ir.Value, units: list[ir.Value]) -> Vector:
    """BF16 bits of 32 values in order, of which the first 16 are codes times the first unit; needs `tables`."""
    grid = Vector(b, ir.Constant(ir.VectorType(F32, 16), list(E2M1_VALUES)))
    first, second = (grid * splat(b, unit, 16) for unit in units)
    pairs = load(b, codes, I8, BLOCK).zext(I32)
    # Each 32-bit lane holds two indices; those of the second block look into the second half of the table.
    half = Vector(b, ir.Constant(ir.VectorType(I32, 16), [0] * 8 + [0x00100010] * 8))
    index = ((pairs | (pairs << 12)) & 0x000F000F) | half
    return first.narrowed_with(second).permuted(index.cast(I16))


def values(b: ir.IRBuilder, codes: ir.Value, units: list[ir.Value]) -> list[Vector]:
    """float32 values of the even and of the odd ones of 32 codes."""
    pairs = load(b, codes, I8, BLOCK).zext(I32)
    unit = splat(b, units[0], 16).shuffle([0] * 8 + [16] * 8, splat(b, units[1], 16))
    return [_decode(each) * unit for each in (pairs & 15, pairs >> 4)]


def _decode(codes: Vector) -> Vector:
    magnitude = codes & 7
    normal = (magnitude << 22) + (126 << 23)
    bits = magnitude.gt(1).select(normal, magnitude.eq(1).select(magnitude.new(magnitude.like(_bits(0.5))), 0))
    return (bits | ((codes & 8) << 28)).cast(F32)


def _bits(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])
