"""NL4 codes back to values, in vector IR: a block of 32 at a time, its levels from a table in a register.

A level times its E4M3 scale has eleven significant bits: float32 holds the product, BF16 rounds it. The scale of a row
is a power of two and may as well be left to whoever sums products.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from ...nl4_levels import BLOCK, LEVELS
from ..processor import has
from .nvfp4_decode import e4m3_value, tables
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
    constant,
    count_to,
    emitted,
    load,
    splat,
    store,
)


@emitted
def dequantize_blocks(
    typing: Any, codes: Any, scales: Any, scale_2: Any, out: Any, blocks: Any, kind: Any
) -> tuple[Any, Codegen]:
    """(codes, scales, float32 scale of the row, out, blocks, kind "bf16" or "f32"): 32 values each, at addresses."""
    out_kind = str(kind.literal_value)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        codes, scales, scale_2, out, blocks, _ = args
        with count_to(b, blocks) as i:
            at = b.add(codes, b.mul(i, I64(BLOCK // 2)))
            unit = b.fmul(e4m3_value(b, b.add(scales, i)), scale_2)
            place = b.add(out, b.mul(i, I64(BLOCK * ITEM_BYTES[out_kind])))
            if out_kind == "bf16" and tables():
                store(look_up(b, at, unit), place)
            else:
                even, odd = values(b, at, unit)
                store_pairs(even, odd, place, out_kind)
        return context.get_dummy_value()

    return types.void(codes, scales, scale_2, out, blocks, kind), codegen


def look_up(b: ir.IRBuilder, codes: ir.Value, unit: ir.Value) -> Vector:
    """BF16 bits of 32 values in order, of codes times a float32 unit; needs `tables`."""
    grid = Vector(b, ir.Constant(ir.VectorType(F32, 16), [float(level) for level in LEVELS])) * splat(b, unit, 16)
    pairs = load(b, codes, I8, BLOCK // 2).zext(I32)
    # Only five bits of a lane's index count, and both halves of the table are the same: nothing needs masking off.
    return grid.narrowed_with(grid).permuted((pairs | (pairs << 12)).cast(I16))


def values(b: ir.IRBuilder, codes: ir.Value, unit: ir.Value) -> list[Vector]:
    """float32 values of the even and of the odd ones of 32 codes."""
    pairs, units = load(b, codes, I8, BLOCK // 2), splat(b, unit, 16)
    return [_levels(each).sext(I32).to_float(F32) * units for each in (pairs & 15, pairs >> 4)]


def _levels(codes: Vector) -> Vector:
    """int8 [16] levels of codes in bytes."""
    b, table = codes.b, codes.new(ir.Constant(codes.type, list(LEVELS)))
    if has("f16c"):  # an x86 processor that shuffles bytes
        return table.bytes_shuffled(codes)
    level = constant(b, I8, BLOCK // 2, 0)
    for number, each in enumerate(LEVELS):
        level = codes.eq(number).select(level.new(level.like(each)), level)
    return level
