"""Integers with zero points in vector IR: the largest and smallest of groups, their scales, and their codes.

What is worked on at once is a batch of up to `BATCH` groups: their extremes first, then the scales of all of them in
one vector, then their codes. Quotients are made as in `scaled_ir`, or divided.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from ... import statistics as st
from ...scale_rules import LARGEST_BF16, SMALLEST_SCALE, SYMMETRIC_LARGEST, largest_extreme
from ..processor import has
from .scaled import corrected_quotient, floats
from .scaled_decode import to_bf16
from .statistics import add_measured
from .vector import (
    F32,
    F64,
    I16,
    I32,
    I64,
    ITEM_BYTES,
    Accumulators,
    Codegen,
    Vector,
    accumulate_product,
    constant,
    count_to,
    emitted,
    load,
    load_scalar,
    source_element,
    splat,
    store,
    widen,
)

BATCH = 16
MAGIC = 1.5 * 2.0**23
"""Added to a float32 of at most 2^22, it leaves the nearest integer, ties to even, in the low bits."""
FAR = 2.0**20
"""Quotients beyond it saturate, whatever they are."""
LARGEST_F16 = 65504.0


@emitted
def group_extremes(
    typing: Any, source: Any, length: Any, groups: Any, high: Any, low: Any, lanes: Any, kind: Any
) -> tuple[Any, Codegen]:
    """Largest x and -x, at least 0, of `groups` runs of `length` elements, to float32 `high` and `low`.

    Returns the largest magnitude bits. `length` is a multiple of the literal `lanes`.
    """
    n_lanes, source_kind = int(lanes.literal_value), str(kind.literal_value)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        source, length, groups, high, low, _, _ = args
        element, width = source_element(source_kind), ITEM_BYTES[source_kind]
        magnitude = 0x7FFFFFFF if source_kind == "f32" else 0x7FFF
        sign = 31 if source_kind == "f32" else 15
        acc = Accumulators(b)
        acc.start("worst", constant(b, I32, 1, 0))
        with count_to(b, groups) as group:
            acc.start("high", constant(b, element, n_lanes, 0))
            acc.start("low", constant(b, element, n_lanes, 0))
            start = b.add(source, b.mul(group, b.mul(length, I64(width))))
            with count_to(b, b.udiv(length, I64(n_lanes))) as i:
                bits = load(b, b.add(start, b.mul(i, I64(n_lanes * width))), element, n_lanes)
                order = bits ^ (bits.shift_right_signed(sign) & magnitude)  # as signed integers, in order of value
                acc.update("high", lambda a, o=order: a.call("llvm.smax", o))  # type: ignore[misc]
                acc.update("low", lambda a, o=order: a.call("llvm.smin", o))  # type: ignore[misc]
            found = acc.get("high").reduce("smax"), b.not_(acc.get("low").reduce("smin"))
            for value, out in zip(found, (high, low), strict=True):
                least = ir.Constant(element, 0)
                value = b.select(b.icmp_signed("<", value, least), least, value)
                bits = splat(b, value, 1) if source_kind == "f32" else splat(b, value, 1).zext(I32)
                store(widen(bits, source_kind), b.add(out, b.mul(group, I64(4))))
                acc.update("worst", lambda a, m=bits: a.max(m))  # type: ignore[misc]
        return b.zext(b.extract_element(acc.get("worst").value, I32(0)), I64)

    return types.int64(source, length, groups, high, low, lanes, kind), codegen


@emitted
def scales_of_extremes(
    typing: Any, high: Any, low: Any, words: Any, levels: Any, symmetric: Any, kind: Any, dtype: Any
) -> tuple[Any, Codegen]:
    """Scales and zero points of a batch, side by side at `words` in the literal `dtype`, by the rule of `integer`.

    `kind` is that of the weights.
    """
    followed = LARGEST_BF16 if bool(symmetric.literal_value) else largest_extreme(str(kind.literal_value))
    largest, is_symmetric, scale_kind = int(levels.literal_value), bool(symmetric.literal_value), dtype.literal_value

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        above, below = (load(b, address, F32, BATCH).min(followed) for address in args[:2])
        half_range = above * 0.5 + below * 0.5
        scale = above.max(below) / SYMMETRIC_LARGEST if is_symmetric else half_range / (largest / 2)
        stored = rounded_scale(scale.max(SMALLEST_SCALE), scale_kind)
        zero = (below / widened_scale(stored, scale_kind)).min(float(largest)) + MAGIC - MAGIC
        zero = constant(b, F32, BATCH, 8.0) if is_symmetric else zero
        pairs = [lane for i in range(BATCH) for lane in (i, i + BATCH)]
        store(stored.shuffle(pairs, rounded_scale(zero, scale_kind)), args[2])
        return context.get_dummy_value()

    return types.void(high, low, words, levels, symmetric, kind, dtype), codegen


@emitted
def split_words(typing: Any, words: Any, scales: Any, zeros: Any, dtype: Any) -> tuple[Any, Codegen]:
    """float32 scales and zero points of a batch from the words of the literal `dtype` that hold them side by side."""
    scale_kind = str(dtype.literal_value)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        values = widened_scale(load(b, args[0], source_element(scale_kind), 2 * BATCH), scale_kind)
        store(values.shuffle(range(0, 2 * BATCH, 2)), args[1])
        store(values.shuffle(range(1, 2 * BATCH, 2)), args[2])
        return context.get_dummy_value()

    return types.void(words, scales, zeros, dtype), codegen


def widened_scale(bits: Vector, kind: str) -> Vector:
    """float32 of the bits of positive numbers."""
    return widen(bits if kind == "f32" else bits.zext(I32), kind)


def rounded_scale(value: Vector, kind: str) -> Vector:
    """Bits nearest to positive float32 numbers, ties to even; the largest float16 where that cannot hold them."""
    if kind == "f32":
        return value.cast(I32)
    if kind == "bf16":
        return to_bf16(value)
    capped = value.min(LARGEST_F16)
    bits = capped.cast(I32)
    normal = ((bits + 0xFFF + ((bits >> 13) & 1)) >> 13) - (112 << 10)
    subnormal = (capped + 0.5).cast(I32) - 0x3F000000  # float32 have steps of 2^-24 there
    return (bits.ge(0x38800000)).select(normal, subnormal).trunc(I16)


@emitted
def quantize_groups(
    typing: Any,
    source: Any,
    codes: Any,
    length: Any,
    groups: Any,
    scales: Any,
    zeros: Any,
    near: Any,
    lanes: Any,
    bits: Any,
    smallest: Any,
    kind: Any,
    measure: Any,
    out: Any,
) -> tuple[Any, Codegen]:
    """Codes of `groups` runs of `length` finite elements, a multiple of `lanes`; statistics added to `out`.

    `scales` and `zeros` are float32, one for each run. `near` nonzero promises quotients of at most `FAR`.
    """
    settings = (
        int(lanes.literal_value),
        int(bits.literal_value),
        int(smallest.literal_value),
        str(kind.literal_value),
        bool(measure.literal_value),
    )

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        source, codes, length, groups, scales, zeros, near, *_, out = args
        with b.if_else(b.icmp_unsigned("!=", near, I64(0))) as (then, otherwise):
            for branch, is_near in ((then, True), (otherwise, False)):
                with branch:
                    _Groups(b, source, codes, length, groups, scales, zeros, is_near, *settings).emit(out)
        return context.get_dummy_value()

    arguments = source, codes, length, groups, scales, zeros, near, lanes, bits, smallest, kind, measure, out
    return types.void(*arguments), codegen


def values_even_and_odd(bits: Vector, kind: str) -> list[Vector]:
    """float32 of the elements in even places and in odd ones."""
    if kind != "f32":
        return floats(bits, kind, True)
    return [bits.shuffle(range(first, bits.type.count, 2)).cast(F32) for first in (0, 1)]


class _Groups:
    """The code of one quantize_groups call for quotients that are near, or for any."""

    def __init__(
        self,
        b: ir.IRBuilder,
        source: ir.Value,
        codes: ir.Value,
        length: ir.Value,
        groups: ir.Value,
        scales: ir.Value,
        zeros: ir.Value,
        near: bool,
        lanes: int,
        bits: int,
        smallest: int,
        kind: str,
        measure: bool,
    ) -> None:
        self.b, self.kind, self.measure, self.near = b, kind, measure, near
        self.source, self.codes, self.length, self.groups = source, codes, length, groups
        self.scales, self.zeros = scales, zeros
        self.lanes, self.half, self.bits = lanes, lanes // 2, bits
        self.smallest, self.largest = smallest, (1 << bits) - 1
        self.corrected = near and kind != "f32" and has("fma")
        self.acc = Accumulators(b)

    def emit(self, out: ir.Value) -> None:
        b, acc, half = self.b, self.acc, self.half
        if self.measure:
            for name in ("signal", "noise"):
                acc.start(name, constant(b, F64, half, 0.0))
            acc.start("error", constant(b, F32, half, 0.0))
            for name in ("zero", "saturated"):
                acc.start(name, constant(b, I32, half, 0))
        source_bytes = b.mul(self.length, I64(ITEM_BYTES[self.kind]))
        code_bytes = b.udiv(b.mul(self.length, I64(self.bits)), I64(8))
        with count_to(b, self.groups) as group:
            at = b.mul(group, I64(4))
            scale, zero = (load_scalar(b, b.add(base, at), F32) for base in (self.scales, self.zeros))
            self._group(
                b.add(self.source, b.mul(group, source_bytes)),
                b.add(self.codes, b.mul(group, code_bytes)),
                scale,
                zero,
            )
        if self.measure:
            add_measured(acc, out)

    def _group(self, source: ir.Value, codes: ir.Value, scale: ir.Value, zero: ir.Value) -> None:
        b, acc, half = self.b, self.acc, self.half
        self.scale = splat(b, scale, half)
        self.reciprocal = constant(b, F32, half, 1.0) / self.scale
        zeros = splat(b, zero, half)
        self.lowest = constant(b, F32, half, MAGIC + self.smallest) - zeros
        self.highest = constant(b, F32, half, MAGIC + self.largest) - zeros
        self.offset = (constant(b, F32, half, MAGIC) - zeros).cast(I32)
        names = ("group signal", "group noise", "group error") if self.measure and self.near else ()
        for name in names:
            acc.start(name, constant(b, F32, half, 0.0))
        with count_to(b, b.udiv(self.length, I64(self.lanes))) as i:
            self._step(
                b.add(source, b.mul(i, I64(self.lanes * ITEM_BYTES[self.kind]))),
                b.add(codes, b.mul(i, I64(self.lanes * self.bits // 8))),
            )
        if names:
            square = self.scale.to_float(F64) * self.scale.to_float(F64)
            for name in ("signal", "noise"):
                part = acc.get(f"group {name}").to_float(F64)
                acc.update(name, lambda a, p=part: accumulate_product(p, square, a))  # type: ignore[misc]
            worst = acc.get("group error") * self.scale
            acc.update("error", lambda a: a.max(worst))

    def _step(self, source: ir.Value, codes: ir.Value) -> None:
        bits = load(self.b, source, source_element(self.kind), self.lanes)
        even, odd = (self._codes(x) for x in values_even_and_odd(bits, self.kind))
        store((even | (odd << self.bits)).trunc(ir.IntType(2 * self.bits)), codes)

    def _codes(self, x: Vector) -> Vector:
        y = self._quotient(x)
        total = (y + MAGIC).max(self.lowest).min(self.highest)
        if self.measure:
            self._measure(x, y, total - MAGIC)
        return total.cast(I32) - self.offset

    def _quotient(self, x: Vector) -> Vector:
        if not self.corrected:
            y = x / self.scale
            return y if self.near else y.max(-FAR).min(FAR)
        return corrected_quotient(x, self.scale, self.reciprocal)

    def _measure(self, x: Vector, y: Vector, rounded: Vector) -> None:
        acc = self.acc
        # Half a code in 255 would keep too few digits of a difference of quotients.
        error = y - rounded if self.bits == 4 or not self.near else (x - rounded * self.scale) * self.reciprocal
        size = error.call("llvm.fabs")
        beyond = size.gt(0.5 + (self.largest - self.smallest + 1) / 2 * st.SATURATION_SLACK)
        acc.update("saturated", lambda a: beyond.select(a + 1, a))
        none = rounded.eq(0.0)
        acc.update("zero", lambda a: none.select(a + 1, a))
        if self.near:
            acc.update("group signal", lambda a: accumulate_product(y, y, a))
            acc.update("group noise", lambda a: accumulate_product(error, error, a))
            acc.update("group error", lambda a: a.max(size))
            return
        wide, value = x.to_float(F64), rounded.to_float(F64) * self.scale.to_float(F64)
        difference = wide - value
        acc.update("signal", lambda a: accumulate_product(wide, wide, a))
        acc.update("noise", lambda a: accumulate_product(difference, difference, a))
        narrow = (x - rounded * self.scale).call("llvm.fabs")
        acc.update("error", lambda a: a.max(narrow))
