"""Codes of integers with zero points back to values, in vector IR: (code - zero point) is exact in BF16 and float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from ..processor import has
from .scaled_decode import store_pairs, to_bf16
from .vector import (
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
    source_element,
    splat,
    store,
    widen,
)

LANES = 16


@emitted
def dequantize_group(
    typing: Any, codes: Any, words: Any, out: Any, length: Any, bits: Any, dtype: Any, kind: Any
) -> tuple[Any, Codegen]:
    """float32 (code - zero) * scale of `length` codes, a multiple of `LANES`, rounded to `kind` "bf16" or kept.

    `words` is where the scale and the zero point stand, in the literal `dtype`.
    """
    code_bits, scale_kind = int(bits.literal_value), str(dtype.literal_value)
    out_kind = str(kind.literal_value)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        codes, words, out, length, *_ = args
        width = ITEM_BYTES[out_kind]
        scale, zero = (splat(b, word, LANES) for word in scale_and_zero(b, words, scale_kind))
        pairs = b.udiv(length, I64(2 * LANES))
        store_values = _table_of_values if code_bits == 4 and out_kind == "bf16" and has("avx512bw") else _arithmetic
        store_next = store_values(b, scale, zero, code_bits, out_kind, scale_kind == "f16")
        with count_to(b, pairs) as i:
            store_next(
                b.add(codes, b.mul(i, I64(2 * LANES * code_bits // 8))), b.add(out, b.mul(i, I64(2 * LANES * width)))
            )
        done = b.mul(pairs, I64(2 * LANES))
        with b.if_then(b.icmp_unsigned("<", done, length)):
            at = b.add(codes, b.udiv(b.mul(done, I64(code_bits)), I64(8)))
            value = (_codes(b, at, code_bits).zext(I32).to_float(F32) - zero) * scale
            store(value if out_kind == "f32" else to_bf16(value), b.add(out, b.mul(done, I64(width))))
        return context.get_dummy_value()

    return types.void(codes, words, out, length, bits, dtype, kind), codegen


def _table_of_values(
    b: ir.IRBuilder, scale: Vector, zero: Vector, bits: int, kind: str, normal: bool
) -> Callable[[ir.Value, ir.Value], None]:
    """Stores the values of 32 codes of four bits in BF16, of which a group has no more than sixteen."""
    codes = Vector(b, ir.Constant(ir.VectorType(F32, 16), [float(code) for code in range(16)]))
    table = _twice(to_bf16((codes - zero) * scale))
    return lambda address, out: store(look_up(b, address, table), out)


def _arithmetic(
    b: ir.IRBuilder, scale: Vector, zero: Vector, bits: int, kind: str, normal: bool
) -> Callable[[ir.Value, ir.Value], None]:
    """Stores the values of 32 codes; `normal` promises that none is a subnormal float32."""

    def store_next(address: ir.Value, out: ir.Value) -> None:
        even, odd = (each * scale for each in even_and_odd(b, address, bits, zero))
        store_pairs(even, odd, out, kind, normal)

    return store_next


def _codes(b: ir.IRBuilder, address: ir.Value, bits: int) -> Vector:
    """The next `LANES` codes as bytes."""
    if bits == 8:
        return load(b, address, I8, LANES)
    pairs = load(b, address, I8, LANES // 2).zext(I16)
    return ((pairs & 15) | ((pairs << 4) & 0xF00)).cast(I8)


def scale_and_zero(b: ir.IRBuilder, words: ir.Value, kind: str) -> tuple[ir.Value, ir.Value]:
    """float32 scale and zero point from the two words of a group."""
    if kind == "f16" and has("f16c"):
        both = load(b, words, F16, 2).to_float(F32)
        return b.extract_element(both.value, I32(0)), b.extract_element(both.value, I32(1))
    width = ITEM_BYTES[kind]
    scale, zero = (_word(b, b.add(words, I64(at)), kind) for at in (0, width))
    return scale, zero


def _word(b: ir.IRBuilder, address: ir.Value, kind: str) -> ir.Value:
    bits = load(b, address, source_element(kind), 1)
    if kind == "f16":
        magnitude = widen((bits & 0x7FFF).zext(I32), kind).cast(I32)
        value = (magnitude | ((bits & 0x8000).zext(I32) << 16)).cast(F32)
    else:
        value = widen(bits if kind == "f32" else bits.zext(I32), kind)
    return b.extract_element(value.value, I32(0))


def table_of_codes(b: ir.IRBuilder, zero: ir.Value) -> Vector:
    """BF16 bits of code - zero for the sixteen codes of four bits, twice."""
    codes = Vector(b, ir.Constant(ir.VectorType(F32, 16), [float(code) for code in range(16)]))
    values = codes - splat(b, zero, 16)
    return values.narrowed_with(values) if has("avx512bf16") else _twice((values.cast(I32) >> 16).trunc(I16))


def _twice(table: Vector) -> Vector:
    """A table of sixteen for `look_up`."""
    return table.shuffle([*range(16), *range(16)])


def look_up(b: ir.IRBuilder, codes: ir.Value, table: Vector) -> Vector:
    """BF16 bits of the next 32 codes of four bits from a table that stands there twice; needs avx512bw."""
    pairs = load(b, codes, I8, 16).zext(I32)
    # Only five bits of a lane's index count, and both halves of the table are the same: nothing needs masking off.
    return table.permuted((pairs | (pairs << 12)).cast(I16))


def even_and_odd(b: ir.IRBuilder, codes: ir.Value, bits: int, zero: Vector) -> list[Vector]:
    """float32 code - zero of the next 32 codes: the 16 in even places, then the 16 in odd ones."""
    pairs = load(b, codes, ir.IntType(2 * bits), 16).zext(I32)
    return [lanes.to_float(F32) - zero for lanes in (pairs & (1 << bits) - 1, pairs >> bits)]
