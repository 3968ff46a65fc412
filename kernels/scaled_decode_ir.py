"""FP8 and INT8 codes with one float32 scale back to values, in vector IR."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from .vector_ir import (
    F16,
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
    splat,
    store,
)

HALF_UNIT = 256.0
"""What 1 stands for in the values of `decode_with_halves`."""


@emitted
def dequantize_tile(
    typing: Any,
    codes: Any,
    codes_stride: Any,
    out: Any,
    out_stride: Any,
    rows: Any,
    cols: Any,
    scale: Any,
    target: Any,
    kind: Any,
) -> tuple[Any, Codegen]:
    """float32 code * scale of a tile, rounded to `kind` "bf16" or kept as "f32"; strides in bytes."""
    target_name, out_kind = str(target.literal_value), str(kind.literal_value)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        codes, codes_stride, out, out_stride, rows, cols, scale, _, _ = args
        width = ITEM_BYTES[out_kind]
        unit = b.fmul(scale, F32(HALF_UNIT)) if target_name == "fp8_f16c" else scale
        groups, rest = b.udiv(cols, I64(16)), b.urem(cols, I64(16))
        with count_to(b, rows) as row:
            source = b.add(codes, b.mul(row, codes_stride))
            target_row = b.add(out, b.mul(row, out_stride))
            for lanes, count in ((16, groups), (1, rest)):
                done = I64(0) if lanes == 16 else b.mul(groups, I64(16))
                with count_to(b, count) as i:
                    at = b.add(done, b.mul(i, I64(lanes)))
                    value = _values(load(b, b.add(source, at), I8, lanes), target_name) * splat(b, unit, lanes)
                    rounded = value if out_kind == "f32" else to_bf16(value)
                    store(rounded, b.add(target_row, b.mul(at, I64(width))))
        return context.get_dummy_value()

    return types.void(codes, codes_stride, out, out_stride, rows, cols, scale, target, kind), codegen


def _values(codes: Vector, target: str) -> Vector:
    """float32 values of byte codes: `int8`, `fp8`, or in units of `HALF_UNIT` `fp8_f16c`."""
    return decode_with_halves(codes.sext(I16)) if target == "fp8_f16c" else decode(codes.sext(I32), target)


def decode(codes: Vector, target: str) -> Vector:
    """float32 values of codes that were sign-extended to 32 bits."""
    if target == "int8":
        return codes.to_float(F32)
    magnitude = codes & 0x7F
    normal = (magnitude << 20) + (120 << 23)
    subnormal = (magnitude.to_float(F32) * 2.0**-9).cast(I32)
    return (magnitude.gt(7).select(normal, subnormal) | (codes & 0x80000000)).cast(F32)


def decode_with_halves(codes: Vector) -> Vector:
    """float32 E4M3 values, in units of `HALF_UNIT`, of codes sign-extended to 16 bits; needs f16c.

    A byte moved up by seven bits is an FP16 number, subnormals included, whose exponent is less by eight.
    """
    bits = (codes << 7) & 0xBFFF
    return bits.cast(F16).to_float(F32)


def to_bf16(value: Vector) -> Vector:
    """BF16 bits nearest to finite float32 values, ties to even."""
    bits = value.cast(I32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).trunc(I16)
