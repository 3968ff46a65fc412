"""Statistics in vector IR: what kernels that quantize add to the float64 vector of `statistics`."""

from __future__ import annotations

from llvmlite import ir

from ... import statistics as st
from .vector import F64, I64, Accumulators, load_scalar, store_scalar


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
