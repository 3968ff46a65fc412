"""FP8 and INT8 with one float32 scale in vector IR: intrinsics that work on a tile of rows under one scale.

Quotients are the correctly rounded x / scale. Where the processor has a fused multiply-add and x comes from BF16 or
FP16, they are made of a reciprocal and one correction instead of a division: with r = rn(1/s), q = rn(x r) and
e = x - q s, the value rn(q + e r) lies on the same side of every rounding boundary of the codes as rn(x/s) does,
because x has at most 11 significant bits and a boundary at most 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from ... import statistics as st
from ..processor import has
from .statistics import add_f64, max_f64
from .vector import (
    F32,
    F64,
    I8,
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
    fused,
    load,
    load_scalar,
    magnitudes,
    source_element,
    splat,
    store,
    store_scalar,
    widen,
)

LANES = 32
TILE_ELEMENTS = 16384
"""Elements a quantize call may take: float32 sums stay accurate and 16-bit counters cannot overflow."""
MIN_CORRECTED_SCALE = 2.0**-60
"""Below this the correction of a reciprocal could underflow: divide."""


@emitted
def quantize_tile(
    typing: Any,
    source: Any,
    source_stride: Any,
    codes: Any,
    codes_stride: Any,
    rows: Any,
    cols: Any,
    scale: Any,
    inside: Any,
    target: Any,
    kind: Any,
    measure: Any,
    out: Any,
) -> tuple[Any, Codegen]:
    """Codes of a finite tile of at most TILE_ELEMENTS under one scale; strides in bytes; statistics added to `out`.

    `inside` nonzero promises that no |x| / scale exceeds the largest code by more than rounding.

    `target`: "fp8_divide" (code of x / scale), "fp8_multiply" (code of x * (1 / scale)) or "int8" (x / scale).
    """
    settings = str(target.literal_value), str(kind.literal_value), bool(measure.literal_value)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        source, source_stride, codes, codes_stride, rows, cols, scale, inside, _, _, _, out = args
        tile = _Tile(b, source, source_stride, codes, codes_stride, rows, cols, scale, inside, *settings)
        tile.emit()
        if settings[2]:
            tile.add_statistics(out)
        return context.get_dummy_value()

    signature = types.void(
        source, source_stride, codes, codes_stride, rows, cols, scale, inside, target, kind, measure, out
    )
    return signature, codegen


class _Tile:
    """The code of one quantize_tile call."""

    def __init__(
        self,
        b: ir.IRBuilder,
        source: ir.Value,
        source_stride: ir.Value,
        codes: ir.Value,
        codes_stride: ir.Value,
        rows: ir.Value,
        cols: ir.Value,
        scale: ir.Value,
        inside: ir.Value,
        target: str,
        kind: str,
        measure: bool,
    ) -> None:
        self.b, self.kind, self.target, self.measure = b, kind, target, measure
        self.source, self.source_stride, self.codes, self.codes_stride = source, source_stride, codes, codes_stride
        self.rows, self.cols, self.scalar, self.inside = rows, cols, scale, inside
        self.width = ITEM_BYTES[kind]
        self.acc = Accumulators(b)
        for name in ("signal", "noise", "error") if measure else ():
            self.acc.start(name, constant(b, F32, 16, 0.0))
        if measure:
            self.acc.start("zero", constant(b, I16, LANES, 0))
        self.scale = splat(b, scale, 16)
        self.reciprocal = constant(b, F32, 16, 1.0) / self.scale

    def emit(self) -> None:
        b = self.b
        corrected = has("fma") and self.kind != "f32" and self.target != "fp8_multiply"
        if not corrected:
            self._loops(corrected=False)
        elif self.target == "int8":
            enough = b.fcmp_ordered(">=", self.scalar, ir.Constant(F32, MIN_CORRECTED_SCALE))
            with b.if_else(b.and_(enough, b.icmp_unsigned("!=", self.inside, I64(0)))) as (then, otherwise):
                with then:
                    self._loops(corrected=True)
                with otherwise:
                    self._loops(corrected=False)
        else:
            self._loops(corrected=True)  # the rules of FP8 scales keep them above MIN_CORRECTED_SCALE

    def _loops(self, corrected: bool) -> None:
        b = self.b
        groups, rest = b.udiv(self.cols, I64(LANES)), b.urem(self.cols, I64(LANES))
        with count_to(b, self.rows) as row:
            source = b.add(self.source, b.mul(row, self.source_stride))
            codes = b.add(self.codes, b.mul(row, self.codes_stride))
            with count_to(b, groups) as i:
                self._group(
                    b.add(source, b.mul(i, I64(LANES * self.width))), b.add(codes, b.mul(i, I64(LANES))), corrected
                )
            with b.if_then(b.icmp_unsigned(">", rest, I64(0))):
                done = b.mul(groups, I64(LANES))
                tail_source, tail_codes = b.add(source, b.mul(done, I64(self.width))), b.add(codes, done)
                with _padded(b, tail_source, b.mul(rest, I64(self.width)), tail_codes, rest, self.width) as buffers:
                    self._group(*buffers, corrected)

    def _group(self, source: ir.Value, codes: ir.Value, corrected: bool) -> None:
        b = self.b
        bits = load(b, source, source_element(self.kind), LANES)
        signed = self.target == "int8"
        results = []
        for x in floats(bits, self.kind, signed):
            y = self._quotient(x, corrected)
            code, decoded = _round_to_int8(y, clamp=not corrected) if signed else _round_to_e4m3(y)
            results.append(code)
            if self.measure:
                error = y - decoded
                self.acc.update("signal", lambda a, v=y: accumulate_product(v, v, a))  # type: ignore[misc]
                self.acc.update("noise", lambda a, e=error: accumulate_product(e, e, a))  # type: ignore[misc]
                self.acc.update("error", lambda a, e=error: a.max(e.call("llvm.fabs")))  # type: ignore[misc]
        if self.kind == "f32":
            code = results[0].shuffle(range(LANES), results[1]).trunc(I16)
        else:
            code = ((results[0] & 0xFFFF) | (results[1] << 16)).cast(I16)
        if self.measure:
            zero = (code & 0xFF if signed else code).eq(0)
            self.acc.update("zero", lambda a: zero.select(a + 1, a))
        if not signed:
            sign = (bits >> 24).trunc(I16) if self.kind == "f32" else bits >> 8
            code = code | (sign & 0x80)
        store(code.trunc(I8), codes)

    def _quotient(self, x: Vector, corrected: bool) -> Vector:
        if self.target == "fp8_multiply":
            return x * self.reciprocal
        if not corrected:
            return x / self.scale
        return corrected_quotient(x, self.scale, self.reciprocal)

    def add_statistics(self, out: ir.Value) -> None:
        b, acc = self.b, self.acc
        scale = b.fpext(self.scalar, F64)
        square = b.fmul(scale, scale)
        add_f64(b, out, st.SIGNAL, b.fmul(b.fpext(acc.get("signal").sum(), F64), square))
        add_f64(b, out, st.NOISE, b.fmul(b.fpext(acc.get("noise").sum(), F64), square))
        max_f64(b, out, st.MAX_ERROR, b.fmul(b.fpext(acc.get("error").reduce("fmax"), F64), scale))
        zeros = b.zext(acc.get("zero").zext(I32).reduce("add"), I64)
        padding = b.urem(b.sub(I64(0), self.cols), I64(LANES))
        zeros = b.sub(zeros, b.mul(padding, self.rows))
        add_f64(b, out, st.ZERO, b.sitofp(zeros, F64))


def corrected_quotient(x: Vector, scale: Vector, reciprocal: Vector) -> Vector:
    """x / scale without a division (see the module), for processors with `fma`."""
    first = x * reciprocal
    rest = fused(first.new(first.b.fneg(first.value)), scale, x)
    return fused(rest, reciprocal, first)


@contextmanager
def _padded(
    b: ir.IRBuilder, source: ir.Value, source_bytes: ir.Value, codes: ir.Value, count: ir.Value, width: int
) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Buffers for one group: the source copied in and padded with zeros; `count` codes copied out afterwards."""
    inside = cgutils.alloca_once(b, ir.ArrayType(I8, LANES * width))
    outside = cgutils.alloca_once(b, ir.ArrayType(I8, LANES))
    from_address, to_address = b.ptrtoint(inside, I64), b.ptrtoint(outside, I64)
    store(constant(b, I8, LANES * width, 0), from_address)
    with count_to(b, source_bytes) as i:
        store_scalar(b, load_scalar(b, b.add(source, i), I8), b.add(from_address, i))
    yield from_address, to_address
    with count_to(b, count) as i:
        store_scalar(b, load_scalar(b, b.add(to_address, i), I8), b.add(codes, i))


def floats(bits: Vector, kind: str, signed: bool) -> list[Vector]:
    """Two float32 vectors from 32 source elements: x or |x|; even and odd lanes for 16-bit sources, else halves."""
    if kind == "f32":
        chosen = bits if signed else magnitudes(bits, kind)
        return [chosen.half(False).cast(F32), chosen.half(True).cast(F32)]
    if kind == "bf16":
        words = (bits if signed else magnitudes(bits, kind)).cast(I32)
        return [(words << 16).cast(F32), (words & 0xFFFF0000).cast(F32)]
    words, result = bits.cast(I32), []
    for lane, sign in ((words & 0x7FFF, words << 16), ((words >> 16) & 0x7FFF, words)):
        value = widen(lane, kind)
        result.append((value.cast(I32) | (sign & 0x80000000)).cast(F32) if signed else value)
    return result


def _round_to_int8(y: Vector, clamp: bool) -> tuple[Vector, Vector]:
    """Codes (low byte of int32 lanes) and values nearest to y, ties to even, within +-127."""
    clamped = y.min(127.0).max(-127.0) if clamp else y
    total = clamped + 1.5 * 2.0**23
    return total.cast(I32), total - 1.5 * 2.0**23


def _round_to_e4m3(y: Vector) -> tuple[Vector, Vector]:
    """Codes (int32 lanes) and values nearest to y >= 0, ties to even, at most 448.

    Adding 2^20 times the power of two of y (at least 2^-6) leaves three fraction bits of y in the sum.
    """
    clamped = y.min(448.0)
    anchor = (clamped.max(2.0**-6).cast(I32) & 0x7F800000) + (20 << 23)
    total = clamped + anchor.cast(F32)
    code = (total.cast(I32) - anchor) + ((anchor >> 20) - ((121 + 20) << 3))
    return code, total - anchor.cast(F32)
