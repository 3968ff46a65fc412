"""MXFP4 in vector IR: one intrinsic quantizes a run of 32-element blocks, one dequantizes it.

BF16 has a fast path on 16-bit lanes. With v = max(|x| - scale/4, 0) as bit patterns, an element is above 0.25 scale
when v > 0, at or above 0.75 scale when v >= 192, and from there rounding v to its upper bits is rounding to E2M1.
That needs scale/4 to be a normal BF16 (byte >= 3), so other blocks, and other sources, take the float32 path, which
multiplies by the exact 2^(127 - byte) and rounds by adding 2^22 times the element's own power of two.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from . import statistics as st
from .mxfp4 import EMAX, T_EVEN
from .vector_ir import (
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
    add_f64,
    constant,
    count_to,
    emitted,
    load,
    load_scalar,
    magnitudes,
    max_f64,
    source_element,
    splat,
    store,
    store_scalar,
    widen,
)

RUN_BLOCKS = 128
"""Blocks a call may take: float32 sums stay accurate and 8-bit counters cannot overflow."""
MIN_FAST_BYTE = 3
FAST_AMAX = (127 - 30) << 7, (127 + 60) << 7
"""BF16 bits between which a run's amax must lie for its squares to be summed in float32."""


def emit_bf16_run(
    b: ir.IRBuilder,
    source: ir.Value,
    codes: ir.Value,
    scales: ir.Value,
    blocks: ir.Value,
    out: ir.Value,
    with_statistics: bool,
) -> ir.Value:
    """What `mxfp4_table_ir.quantize_bf16_run` does, for any processor."""
    acc = Accumulators(b)
    largest = cgutils.alloca_once_value(b, I32(0))
    odd_block = cgutils.alloca_once_value(b, I32(0))
    if with_statistics:
        for name in ("signal0", "signal1", "noise0", "noise1", "error"):
            acc.start(name, constant(b, F32, 16, 0.0))
        acc.start("counts", constant(b, I16, 32, 0))
    with count_to(b, blocks) as i:
        bits = load(b, b.add(source, b.mul(i, I64(64))), I16, 32)
        magnitude = magnitudes(bits, "bf16")
        amax = b.zext(magnitude.reduce("umax"), I32)
        b.store(umax(b, b.load(largest), amax), largest)
        byte = even_byte(b, amax, 7)
        slow = b.and_(b.icmp_unsigned("<", byte, I32(MIN_FAST_BYTE)), b.icmp_unsigned("!=", amax, I32(0)))
        b.store(b.or_(b.load(odd_block), b.zext(slow, I32)), odd_block)
        store_scalar(b, b.trunc(byte, I8), b.add(scales, i))
        used = umax(b, byte, I32(MIN_FAST_BYTE))
        quarter = splat(b, b.trunc(b.shl(b.sub(used, I32(2)), I32(7)), I16), 32)
        v = magnitude.minus_saturating(quarter)
        above_quarter, above_three_quarters = v.gt(0), v.ge(192)
        w = v.max(256)
        rounded = w + ((w >> 6) & 1) + (31 - 128)
        nonzero = v.call("llvm.umin", constant(b, I16, 32, 1))
        code = above_three_quarters.select(rounded >> 6, nonzero)
        store_pairs(code | ((bits >> 12) & 8), b.add(codes, b.mul(i, I64(16))))
        if with_statistics:
            half = quarter + 128
            decoded = above_three_quarters.select((rounded & 0xFFC0) + half, above_quarter.select(half, 0))
            saturated = v.gt(256 + 256 + 64)
            acc.update("counts", lambda a: a + saturated.select(constant(b, I16, 32, 257), nonzero))
            _measure_bf16(acc, magnitude, decoded)
    result = b.load(largest)
    unfit = b.icmp_unsigned("!=", b.load(odd_block), I32(0))
    if with_statistics:
        outside = b.or_(
            b.icmp_unsigned("<", result, I32(FAST_AMAX[0])), b.icmp_unsigned(">", result, I32(FAST_AMAX[1]))
        )
        unfit = b.or_(unfit, b.and_(outside, b.icmp_unsigned("!=", result, I32(0))))
        with b.if_then(b.not_(unfit)):
            _add_bf16_statistics(acc, blocks, out)
    return b.select(unfit, I64(-1), b.zext(result, I64))


def _measure_bf16(acc: Accumulators, magnitude: Vector, decoded: Vector) -> None:
    """Even and odd lanes become float32 by a shift and a mask; the order of a sum's terms does not matter."""
    x, q = magnitude.cast(I32), decoded.cast(I32)
    errors = []
    for lane, (xf, qf) in enumerate(((x << 16, q << 16), (x & 0xFFFF0000, q & 0xFFFF0000))):
        value = xf.cast(F32)
        error = value - qf.cast(F32)
        acc.update(f"signal{lane}", lambda a, v=value: accumulate_product(v, v, a))  # type: ignore[misc]
        acc.update(f"noise{lane}", lambda a, e=error: accumulate_product(e, e, a))  # type: ignore[misc]
        errors.append(error.call("llvm.fabs"))
    acc.update("error", lambda a: a.max(errors[0]).max(errors[1]))


def _add_bf16_statistics(acc: Accumulators, blocks: ir.Value, out: ir.Value) -> None:
    b = acc.b
    add_f64(b, out, st.SIGNAL, b.fpext((acc.get("signal0") + acc.get("signal1")).sum(), F64))
    add_f64(b, out, st.NOISE, b.fpext((acc.get("noise0") + acc.get("noise1")).sum(), F64))
    max_f64(b, out, st.MAX_ERROR, b.fpext(acc.get("error").reduce("fmax"), F64))
    counts = acc.get("counts").zext(I32)  # nonzero codes in the low byte, saturated ones in the high byte
    add_f64(b, out, st.SATURATED, b.sitofp((counts >> 8).reduce("add"), F64))
    zeros = b.sub(b.trunc(b.mul(blocks, I64(32)), I32), (counts & 255).reduce("add"))
    add_f64(b, out, st.ZERO, b.sitofp(zeros, F64))


@emitted
def quantize_wide_run(
    typing: Any, source: Any, codes: Any, scales: Any, blocks: Any, known: Any, kind: Any, measure: Any, out: Any
) -> tuple[Any, Codegen]:
    """Like `mxfp4_table_ir.quantize_bf16_run` for any source and scale -> the largest magnitude bits of the source.

    `known` nonzero reads the scale bytes instead of setting them.
    """
    source_kind, with_statistics = str(kind.literal_value), bool(measure.literal_value)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        source, codes, scales, blocks, known, _, _, out = args
        acc = Accumulators(b)
        largest = cgutils.alloca_once_value(b, I32(0))
        byte_slot = cgutils.alloca_once_value(b, I32(0))
        if with_statistics:
            for name in ("signal", "noise"):
                acc.start(name, constant(b, F64, 8, 0.0))
            acc.start("error", constant(b, F32, 16, 0.0))
            for name in ("zero", "saturated"):
                acc.start(name, constant(b, I32, 16, 0))
        with count_to(b, blocks) as i:
            width = ITEM_BYTES[source_kind]
            bits = load(b, b.add(source, b.mul(i, I64(32 * width))), source_element(source_kind), 32)
            magnitude = magnitudes(bits, source_kind)
            amax = magnitude.reduce("umax")
            wide_amax = amax if amax.type == I32 else b.zext(amax, I32)
            b.store(umax(b, b.load(largest), wide_amax), largest)
            address = b.add(scales, i)
            b.store(b.zext(load_scalar(b, address, I8), I32), byte_slot)
            with b.if_then(b.icmp_unsigned("==", known, I64(0))):
                lanes = widen(splat(b, wide_amax, 16), source_kind).cast(I32)
                computed = even_byte(b, b.extract_element(lanes.value, I32(0)), 23)
                b.store(computed, byte_slot)
                store_scalar(b, b.trunc(computed, I8), address)
            byte = b.load(byte_slot)
            inverse = splat(b, b.bitcast(power_of_two_bits(b, b.sub(I32(254), byte)), F32), 16)
            unit = splat(b, b.bitcast(power_of_two_bits(b, byte), F32), 16)
            parts, halves = [], []
            for high in (False, True):
                part = magnitude.half(high)
                wide = part if source_kind == "f32" else part.zext(I32)
                y = widen(wide, source_kind) * inverse
                code, decoded = _round_to_e2m1(y)
                parts.append(code)
                halves.append((y, decoded, code))
            code = parts[0].shuffle(range(32), parts[1]).trunc(I16)
            sign = (bits >> 28).trunc(I16) if source_kind == "f32" else bits >> 12
            store_pairs(code | (sign & 8), b.add(codes, b.mul(i, I64(16))))
            if with_statistics:
                _measure_wide(acc, halves, unit, byte)
        if with_statistics:
            _add_wide_statistics(acc, out)
        return b.zext(b.load(largest), I64)

    return types.int64(source, codes, scales, blocks, known, kind, measure, out), codegen


def _round_to_e2m1(y: Vector) -> tuple[Vector, Vector]:
    """Codes (int32) and values (float32) nearest to y >= 0, ties to even, saturating at 6."""
    clamped = y.min(6.0)
    anchor = (clamped.max(1.0).cast(I32) & 0x7F800000) + (22 << 23)
    total = clamped + anchor.cast(F32)
    decoded = total - anchor.cast(F32)
    code = (total.cast(I32) - anchor) + (((anchor >> 23) - (127 + 22)) << 1)
    return code, decoded


def _measure_wide(acc: Accumulators, halves: list[tuple[Vector, Vector, Vector]], unit: Vector, byte: ir.Value) -> None:
    """Energies in units of the block's scale, weighted in float64 by its square, which cannot over- or underflow."""
    b = acc.b
    weight_bits = b.shl(b.zext(b.add(b.shl(byte, I32(1)), I32(1023 - 254)), I64), I64(52))
    weight = splat(b, b.bitcast(weight_bits, F64), 8)
    for y, decoded, code in halves:
        error = y - decoded
        for name, value in (("signal", y), ("noise", error)):
            square = (value.half(False) * value.half(False)) + (value.half(True) * value.half(True))
            wide = square.to_float(F64)
            acc.update(name, lambda a, w=wide: accumulate_product(w, weight, a))  # type: ignore[misc]
        absolute = error.call("llvm.fabs") * unit
        acc.update("error", lambda a, e=absolute: a.max(e))  # type: ignore[misc]
        zero, saturated = code.eq(0), y.gt(6.0)
        acc.update("zero", lambda a, z=zero: z.select(a + 1, a))  # type: ignore[misc]
        acc.update("saturated", lambda a, s=saturated: s.select(a + 1, a))  # type: ignore[misc]


def _add_wide_statistics(acc: Accumulators, out: ir.Value) -> None:
    b = acc.b
    add_f64(b, out, st.SIGNAL, acc.get("signal").sum())
    add_f64(b, out, st.NOISE, acc.get("noise").sum())
    max_f64(b, out, st.MAX_ERROR, b.fpext(acc.get("error").reduce("fmax"), F64))
    add_f64(b, out, st.SATURATED, b.sitofp(acc.get("saturated").reduce("add"), F64))
    add_f64(b, out, st.ZERO, b.sitofp(acc.get("zero").reduce("add"), F64))


def even_byte(b: ir.IRBuilder, amax: ir.Value, mantissa_bits: int) -> ir.Value:
    """EVEN scale byte from the i32 magnitude bits of a block's amax (8 exponent bits above `mantissa_bits`)."""
    # Adding what T_even lacks to the next power of two carries into the exponent exactly when m >= T_even.
    carry = (0x800000 - T_EVEN) >> (23 - mantissa_bits)
    exponent = b.lshr(b.add(amax, I32(carry)), I32(mantissa_bits))
    difference = b.sub(exponent, I32(EMAX))
    return b.select(b.icmp_signed("<", difference, I32(0)), I32(0), difference)


def power_of_two_bits(b: ir.IRBuilder, biased: ir.Value) -> ir.Value:
    """float32 bits of 2^(biased - 127), biased 0 .. 254; 0 gives the subnormal 2^-127."""
    return b.select(b.icmp_unsigned("==", biased, I32(0)), I32(0x400000), b.shl(biased, I32(23)))


def umax(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.select(b.icmp_unsigned(">", x, y), x, y)


def store_pairs(code: Vector, address: ir.Value) -> None:
    """32 codes in 16-bit lanes to 16 bytes, even lanes in the low nibbles."""
    pairs = code.cast(I32)
    store((pairs | (pairs >> 12)).trunc(I8), address)
