"""Weights that are no codes, as float32 values in vector IR: BF16, float16 and float32 are all exact in it."""

from __future__ import annotations

from llvmlite import ir

from .vector import F32, I64, ITEM_BYTES, Vector, load, source_element

LANES = 16


def values(b: ir.IRBuilder, address: ir.Value, kind: str) -> list[Vector]:
    """The 32 values at an address, in their order, `LANES` in each vector; float16 wants a processor with f16c."""
    return [_values(b, b.add(address, I64(ITEM_BYTES[kind] * at)), kind) for at in (0, LANES)]


def _values(b: ir.IRBuilder, address: ir.Value, kind: str) -> Vector:
    bits = load(b, address, source_element(kind), LANES)
    if kind == "f32":
        return bits.cast(F32)
    if kind == "bf16":
        return (bits.zext(source_element("f32")) << 16).cast(F32)
    return bits.cast(ir.HalfType()).to_float(F32)
