"""Largest magnitudes and their counts in vector IR, for every kind of source."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .vector import (
    I32,
    I64,
    ITEM_BYTES,
    Accumulators,
    Codegen,
    constant,
    count_to,
    emitted,
    load,
    load_scalar,
    magnitudes,
    source_element,
    splat,
    widen,
)


@emitted
def amax_tile(typing: Any, source: Any, stride: Any, rows: Any, cols: Any, kind: Any) -> tuple[Any, Codegen]:
    """Largest magnitude bits of `rows` x `cols` elements whose rows lie `stride` bytes apart (0 for none)."""
    source_kind = str(kind.literal_value)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        source, stride, rows, cols, _ = args
        element, width = source_element(source_kind), ITEM_BYTES[source_kind]
        lanes = 64 // width * 2
        acc = Accumulators(b)
        for name in ("a", "b"):
            acc.start(name, constant(b, element, lanes // 2, 0))
        tail = cgutils.alloca_once_value(b, ir.Constant(element, 0))
        groups, rest = b.udiv(cols, I64(lanes)), b.urem(cols, I64(lanes))
        with count_to(b, rows) as row:
            start = b.add(source, b.mul(row, stride))
            with count_to(b, groups) as i:
                bits = load(b, b.add(start, b.mul(i, I64(lanes * width))), element, lanes)
                magnitude = magnitudes(bits, source_kind)
                acc.update("a", lambda a, m=magnitude: a.max(m.half(False)))  # type: ignore[misc]
                acc.update("b", lambda a, m=magnitude: a.max(m.half(True)))  # type: ignore[misc]
            end = b.add(start, b.mul(groups, I64(lanes * width)))
            with count_to(b, rest) as i:
                one = load_scalar(b, b.add(end, b.mul(i, I64(width))), element)
                one = b.and_(one, ir.Constant(element, 0x7FFFFFFF if source_kind == "f32" else 0x7FFF))
                old = b.load(tail)
                b.store(b.select(b.icmp_unsigned(">", one, old), one, old), tail)
        whole, old = acc.get("a").max(acc.get("b")).reduce("umax"), b.load(tail)
        return b.zext(b.select(b.icmp_unsigned(">", whole, old), whole, old), I64)

    return types.int64(source, stride, rows, cols, kind), codegen


@emitted
def magnitude_to_f32(typing: Any, bits: Any, kind: Any) -> tuple[Any, Codegen]:
    """The float32 value of magnitude bits (int64) of a source element."""
    source_kind = str(kind.literal_value)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return b.extract_element(widen(splat(b, b.trunc(args[0], I32), 1), source_kind).value, I32(0))

    return types.float32(bits, kind), codegen


@emitted
def count_above(
    typing: Any, source: Any, stride: Any, rows: Any, cols: Any, limit: Any, kind: Any
) -> tuple[Any, Codegen]:
    """Elements of a tile with |x| > limit (float32), NaN included."""
    source_kind = str(kind.literal_value)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        source, stride, rows, cols, limit, _ = args
        total = cgutils.alloca_once_value(b, I64(0))
        with count_to(b, rows) as row, count_to(b, cols) as col:
            address = b.add(b.add(source, b.mul(row, stride)), b.mul(col, I64(ITEM_BYTES[source_kind])))
            bits = magnitudes(load(b, address, source_element(source_kind), 1), source_kind)
            value = widen(bits if source_kind == "f32" else bits.zext(I32), source_kind)
            above = b.fcmp_unordered(">", b.extract_element(value.value, I32(0)), limit)
            b.store(b.add(b.load(total), b.zext(above, I64)), total)
        return b.load(total)

    return types.int64(source, stride, rows, cols, limit, kind), codegen
