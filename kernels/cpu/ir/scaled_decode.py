"""FP8 and INT8 codes with one float32 scale back to values, in vector IR."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from ..processor import has
from .vector import F16, F32, I8, I16, I32, I64, ITEM_BYTES, Codegen, Vector, count_to, emitted, load, splat, store

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
        pairs = b.udiv(cols, I64(32))
        done = b.mul(pairs, I64(32))

        def store_rows(normal: bool) -> None:
            with count_to(b, rows) as row:
                source = b.add(codes, b.mul(row, codes_stride))
                target_row = b.add(out, b.mul(row, out_stride))
                with count_to(b, pairs) as i:
                    at = b.mul(i, I64(32))
                    both = signed_pairs(b, b.add(source, at))
                    even, odd = (_values(each, target_name) * splat(b, unit, 16) for each in both)
                    store_pairs(even, odd, b.add(target_row, b.mul(at, I64(width))), out_kind, normal)
                with count_to(b, b.sub(cols, done)) as i:
                    at = b.add(done, i)
                    value = _values(load(b, b.add(source, at), I8, 1).sext(I32), target_name) * splat(b, unit, 1)
                    rounded = value if out_kind == "f32" else to_bf16(value)
                    store(rounded, b.add(target_row, b.mul(at, I64(width))))

        if out_kind == "f32" or not has("avx512bf16"):
            store_rows(normal=False)
            return context.get_dummy_value()
        least, largest = (b.fcmp_ordered(op, scale, F32(2.0**e)) for op, e in ((">=", -110), ("<=", 110)))
        with b.if_else(b.and_(least, largest), likely=True) as (then, otherwise):
            for branch, normal in ((then, True), (otherwise, False)):
                with branch:
                    store_rows(normal)
        return context.get_dummy_value()

    return types.void(codes, codes_stride, out, out_stride, rows, cols, scale, target, kind), codegen


def _values(codes: Vector, target: str) -> Vector:
    """float32 values of codes that were sign-extended to 32 bits; those of `fp8_f16c` in units of `HALF_UNIT`."""
    return decode_with_halves(codes.trunc(I16)) if target == "fp8_f16c" else decode(codes, target)


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


def signed_pairs(b: ir.IRBuilder, address: ir.Value) -> list[Vector]:
    """The even and the odd ones of 32 byte codes, sign-extended to 32 bits."""
    pairs = load(b, address, I16, 16).sext(I32)
    return [(pairs << 24).shift_right_signed(24), pairs.shift_right_signed(8)]


def store_pairs(even: Vector, odd: Vector, address: ir.Value, kind: str, normal: bool = False) -> None:
    """32 finite float32 values, of which those in even places stand in one vector, rounded to `kind` "bf16" or kept.

    `normal` promises that none is subnormal.
    """
    if kind == "bf16" and normal and has("avx512bf16"):
        store(even.narrowed_with(odd).shuffle([lane for k in range(16) for lane in (k, 16 + k)]), address)
        return
    if kind == "bf16":
        store((_rounded_to_bf16(even) >> 16) | (_rounded_to_bf16(odd) & 0xFFFF0000), address)
        return
    b = even.b
    for part in (0, 1):
        lanes = [lane for k in range(8 * part, 8 * part + 8) for lane in (k, 16 + k)]
        store(even.shuffle(lanes, odd), b.add(address, I64(64 * part)))


def to_bf16(value: Vector) -> Vector:
    """BF16 bits nearest to finite float32 values, ties to even."""
    return (_rounded_to_bf16(value) >> 16).trunc(I16)


def _rounded_to_bf16(value: Vector) -> Vector:
    """int32 whose upper half is the nearest BF16, ties to even."""
    bits = value.cast(I32)
    return bits + 0x7FFF + ((bits >> 16) & 1)
