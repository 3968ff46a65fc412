"""MXFP4 from BF16 in vector IR, on 16-bit lanes.

With v = max(|x| - scale/4, 0) as bit patterns, an element is above 0.25 scale
when v > 0, at or above 0.75 scale when v >= 192, and from there rounding v to its upper bits is rounding to E2M1.
That needs scale/4 to be a normal BF16 (byte >= 3), and a byte up to the last of BF16; other blocks, and other sources,
take the float32 path of `mx_ir`.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

from ... import statistics as st
from ...mx_elements import E2M1
from .mx import scale_byte, umax
from .statistics import SUMMABLE, add_f64, max_f64
from .vector import (
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    Accumulators,
    Vector,
    accumulate_product,
    constant,
    count_to,
    load,
    magnitudes,
    splat,
    store,
    store_scalar,
)

MIN_FAST_BYTE = 3
FAST_AMAX = SUMMABLE[0] << 7, SUMMABLE[1] << 7
"""BF16 bits between which a run's amax must lie for its squares to be summed in float32."""
LARGEST_AMAX = (E2M1.emax + E2M1.last_byte("bf16") << 7) + (E2M1.threshold >> 16) - 1
"""BF16 bits of the largest amax of a block with the last scale byte."""


class Blocks:
    """What comes first with every block, however codes are made: its scale byte, and whether the run can be fast."""

    def __init__(self, b: ir.IRBuilder, source: ir.Value, scales: ir.Value) -> None:
        self.b, self.source, self.scales = b, source, scales
        self.largest, self.odd = cgutils.alloca_once_value(b, I32(0)), cgutils.alloca_once_value(b, I32(0))

    def take(self, i: ir.Value) -> tuple[Vector, Vector, ir.Value]:
        """Bits and magnitudes of block `i`, and its scale byte, which is stored."""
        b = self.b
        bits = load(b, b.add(self.source, b.mul(i, I64(64))), I16, 32)
        magnitude = magnitudes(bits, "bf16")
        amax = b.zext(magnitude.reduce("umax"), I32)
        b.store(umax(b, b.load(self.largest), amax), self.largest)
        byte = even_byte(b, amax, 7)
        slow = b.and_(b.icmp_unsigned("<", byte, I32(MIN_FAST_BYTE)), b.icmp_unsigned("!=", amax, I32(0)))
        b.store(b.or_(b.load(self.odd), b.zext(slow, I32)), self.odd)
        store_scalar(b, b.trunc(byte, I8), b.add(self.scales, i))
        return bits, magnitude, byte

    def result(self, with_statistics: bool) -> tuple[ir.Value, ir.Value]:
        """Largest amax bits, and whether the run must take the other path."""
        b, largest = self.b, self.b.load(self.largest)
        # Of a larger amax the byte would be above the last one, and here no code saturates beyond 7 times the scale.
        beyond = b.icmp_unsigned(">", largest, I32(LARGEST_AMAX))
        unfit = b.or_(b.icmp_unsigned("!=", b.load(self.odd), I32(0)), beyond)
        if with_statistics:
            low, high = FAST_AMAX
            outside = b.icmp_unsigned(">", b.sub(largest, I32(low)), I32(high - low))
            unfit = b.or_(unfit, b.and_(outside, b.icmp_unsigned("!=", largest, I32(0))))
        return largest, unfit


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
    taken = Blocks(b, source, scales)
    if with_statistics:
        for name in ("signal0", "signal1", "noise0", "noise1", "error"):
            acc.start(name, constant(b, F32, 16, 0.0))
        acc.start("counts", constant(b, I16, 32, 0))
    with count_to(b, blocks) as i:
        bits, magnitude, byte = taken.take(i)
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
    result, unfit = taken.result(with_statistics)
    if with_statistics:
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


def even_byte(b: ir.IRBuilder, amax: ir.Value, mantissa_bits: int) -> ir.Value:
    """EVEN scale byte from the i32 magnitude bits of a block's amax (8 exponent bits above `mantissa_bits`)."""
    return scale_byte(b, amax, E2M1.threshold, E2M1.emax, mantissa_bits)


def store_pairs(code: Vector, address: ir.Value) -> None:
    """32 codes in 16-bit lanes to 16 bytes, even lanes in the low nibbles."""
    pairs = code.cast(I32)
    store((pairs | (pairs >> 12)).trunc(I8), address)
