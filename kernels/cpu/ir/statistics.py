"""Statistics in vector IR: what kernels that quantize add to the float64 vector of `statistics`."""

from __future__ import annotations

from llvmlite import ir

from ... import statistics as st
from .vector import (
    F32,
    F64,
    I32,
    I64,
    Accumulators,
    Vector,
    accumulate_product,
    constant,
    float32_bits,
    load_scalar,
    store_scalar,
)

SUMMABLE = 127 - 30, 127 + 60
"""Biased exponents between which a run's amax must lie for its squares to be summed in float32."""


def add_f64(b: ir.IRBuilder, out: ir.Value, index: int, value: ir.Value) -> None:
    """out[index] += value."""
    address = b.add(out, I64(8 * index))
    store_scalar(b, b.fadd(load_scalar(b, address, F64), value), address)


def max_f64(b: ir.IRBuilder, out: ir.Value, index: int, value: ir.Value) -> None:
    """out[index] = max(out[index], value)."""
    address = b.add(out, I64(8 * index))
    old = load_scalar(b, address, F64)
    store_scalar(b, b.select(b.fcmp_ordered(">", value, old), value, old), address)


def add_measured(acc: Accumulators, out: ir.Value) -> None:
    """Add the sums `signal` and `noise` and the counts `saturated` and `zero`, and raise the largest `error`."""
    b = acc.b
    for name, index in (("signal", st.SIGNAL), ("noise", st.NOISE)):
        total = acc.get(name).sum()
        add_f64(b, out, index, total if total.type == F64 else b.fpext(total, F64))
    max_f64(b, out, st.MAX_ERROR, b.fpext(acc.get("error").reduce("fmax"), F64))
    for name, index in (("saturated", st.SATURATED), ("zero", st.ZERO)):
        add_f64(b, out, index, b.sitofp(acc.get(name).reduce("add"), F64))


def start_measuring(acc: Accumulators, sums: str, counters: tuple[ir.Type, int]) -> None:
    """Start the sums in float32 or float64 lanes, as `sums` says ("none": nothing), and counters of type and lanes."""
    if sums == "none":
        return
    for name in ("signal", "noise"):
        acc.start(name, constant(acc.b, *((F32, 16) if sums == "f32" else (F64, 8)), 0.0))
    acc.start("error", constant(acc.b, F32, 16, 0.0))
    for name in ("zero", "saturated"):
        acc.start(name, constant(acc.b, *counters, 0))


def add_square(acc: Accumulators, sums: str, name: str, x: Vector) -> None:
    """Add the squares of float32 lanes to an accumulator, in float32 or in float64 as `sums` says."""
    for part in [x] if sums == "f32" else [x.half(False).to_float(F64), x.half(True).to_float(F64)]:
        acc.update(name, lambda a, p=part: accumulate_product(p, p, a))  # type: ignore[misc]


def measured_run(acc: Accumulators, sums: str, kind: str, largest: ir.Value, out: ir.Value) -> ir.Value:
    """Add what a run measured, and give the i64 of its largest magnitude bits.

    -1, and nothing is added, where float32 cannot hold the sums of squares: the caller runs again with float64.
    """
    b = acc.b
    result = b.zext(largest, I64)
    if sums == "none":
        return result
    if sums == "f64":
        add_measured(acc, out)
        return result
    bits = float32_bits(b, largest, kind)
    outside = b.or_(
        b.icmp_unsigned("<", bits, I32(SUMMABLE[0] << 23)), b.icmp_unsigned(">", bits, I32(SUMMABLE[1] << 23))
    )
    unfit = b.and_(outside, b.icmp_unsigned("!=", bits, I32(0)))
    with b.if_then(b.not_(unfit)):
        add_measured(acc, out)
    return b.select(unfit, I64(-1), result)
