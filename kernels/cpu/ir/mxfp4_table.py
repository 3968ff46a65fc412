"""MXFP4 from BF16 through tables in registers, for AVX-512: a third fewer instructions than `mxfp4_ir`, the same bytes.

With v = |x| - scale/4 as bit patterns, every border between E2M1 codes is a multiple of 32, and a tie goes up exactly
where bit 6 is set; so (v + 31 + bit 6) >> 5 is an index into the codes. Statistics multiply BF16 pairs: noise is
sum(x^2) - 2 sum(xq) + sum(q^2), and where that would lose digits the run is left to the float32 path. The largest
error needs single errors; `largest_error_run` computes them for the few blocks that can hold it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from ... import statistics as st
from .mx import power_of_two_bits, umax
from .mxfp4 import MIN_FAST_BYTE, Blocks, emit_bf16_run, store_pairs
from .statistics import add_f64, max_f64
from .vector import (
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    Accumulators,
    Codegen,
    Vector,
    constant,
    count_to,
    emitted,
    load,
    load_scalar,
    magnitudes,
    splat,
)

CODES = (0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7)
"""E2M1 code by index."""
ABOVE_QUARTER = (0, 128, 256, 320, 384, 448, 512, 576)
"""BF16 bits of the value of a code less those of scale/4; zero has no such bits."""
LANES = 32
MIN_NOISE = 2.0**-10
"""Share of the energy from which on noise is a difference of sums that keeps three digits."""


@emitted
def quantize_bf16_run(
    typing: Any, source: Any, codes: Any, scales: Any, blocks: Any, measure: Any, tables: Any, out: Any
) -> tuple[Any, Codegen]:
    """(source, codes, scales, blocks, measure, tables, statistics) -> largest amax bits, or -1: take the other path.

    The scale bytes are computed and stored. -1 comes after codes were written, never after statistics were. With
    `tables`, which need avx512bw, and avx512bf16 to measure, the largest error is left to `largest_error_run`.
    """
    with_statistics = bool(measure.literal_value)
    emit = _emit_with_tables if bool(tables.literal_value) else emit_bf16_run

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        source, codes, scales, blocks, _, _, out = args
        return emit(b, source, codes, scales, blocks, out, with_statistics)

    return types.int64(source, codes, scales, blocks, measure, tables, out), codegen


def _emit_with_tables(
    b: ir.IRBuilder,
    source: ir.Value,
    codes: ir.Value,
    scales: ir.Value,
    blocks: ir.Value,
    out: ir.Value,
    with_statistics: bool,
) -> ir.Value:
    acc = Accumulators(b)
    taken = Blocks(b, source, scales)
    counts = {name: cgutils.alloca_once_value(b, I32(0)) for name in ("nonzero", "saturated")}
    for name in ("signal", "cross", "decoded"):
        acc.start(name, constant(b, F32, 16, 0.0))
    with count_to(b, blocks) as i:
        bits, magnitude, byte = taken.take(i)
        below, above, index = _index(magnitude, byte)
        code = _table(b, CODES).permuted(index)
        store_pairs(code | ((bits >> 12) & 8), b.add(codes, b.mul(i, I64(16))))
        if with_statistics:
            nonzero = index.gt(0)
            decoded = _decoded(b, index, nonzero, below)
            acc.update("signal", lambda a: a.add_bf16_products(magnitude, magnitude))
            acc.update("cross", lambda a: a.add_bf16_products(magnitude, decoded))
            acc.update("decoded", lambda a: a.add_bf16_products(decoded, decoded))
            _count(b, counts["nonzero"], nonzero)
            _count(b, counts["saturated"], above.gt(31 + 576))
    result, unfit = taken.result(with_statistics)
    if with_statistics:
        signal, cross, decoded = (b.fpext(acc.get(name).sum(), F64) for name in ("signal", "cross", "decoded"))
        noise = b.fadd(b.fsub(signal, b.fmul(F64(2.0), cross)), decoded)
        exact = b.fcmp_ordered("==", noise, F64(0.0))
        large = b.fcmp_ordered(">", noise, b.fmul(F64(MIN_NOISE), signal))
        unfit = b.or_(unfit, b.not_(b.or_(exact, large)))
        with b.if_then(b.not_(unfit)):
            add_f64(b, out, st.SIGNAL, signal)
            add_f64(b, out, st.NOISE, noise)
            add_f64(b, out, st.SATURATED, b.sitofp(b.load(counts["saturated"]), F64))
            zeros = b.sub(b.trunc(b.mul(blocks, I64(LANES)), I32), b.load(counts["nonzero"]))
            add_f64(b, out, st.ZERO, b.sitofp(zeros, F64))
    return b.select(unfit, I64(-1), b.zext(result, I64))


@emitted
def largest_error_run(typing: Any, source: Any, scales: Any, blocks: Any, known: Any, out: Any) -> tuple[Any, Codegen]:
    """Raise the largest error in `out`, which is `known` (float32), by those of a run that was just quantized.

    No error is larger than its block's scale: a block whose scale is not above `known` is not looked at.
    """

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        source, scales, blocks, known, out = args
        acc = Accumulators(b)
        acc.start("error", constant(b, F32, 16, 0.0))
        with count_to(b, blocks) as i:
            byte = b.zext(load_scalar(b, b.add(scales, i), I8), I32)
            scale = b.bitcast(power_of_two_bits(b, byte), F32)
            with b.if_then(b.fcmp_ordered(">", scale, known), likely=False):
                magnitude = magnitudes(load(b, b.add(source, b.mul(i, I64(64))), I16, LANES), "bf16")
                below, _, index = _index(magnitude, byte)
                x, q = magnitude.cast(I32), _decoded(b, index, index.gt(0), below).cast(I32)
                for xf, qf in ((x << 16, q << 16), (x & 0xFFFF0000, q & 0xFFFF0000)):
                    error = (xf.cast(F32) - qf.cast(F32)).call("llvm.fabs")
                    acc.update("error", lambda a, e=error: a.max(e))  # type: ignore[misc]
        max_f64(b, out, st.MAX_ERROR, b.fpext(acc.get("error").reduce("fmax"), F64))
        return context.get_dummy_value()

    return types.void(source, scales, blocks, known, out), codegen


def _index(magnitude: Vector, byte: ir.Value) -> tuple[Vector, Vector, Vector]:
    """BF16 bits of scale/4 less 31 (a splat), how far |x| is above them, and the index of its code."""
    b = magnitude.b
    quarter = b.shl(b.sub(umax(b, byte, I32(MIN_FAST_BYTE)), I32(2)), I32(7))
    below = splat(b, b.trunc(b.sub(quarter, I32(31)), I16), LANES)
    above = magnitude.minus_saturating(below)
    return below, above, (above + ((magnitude >> 6) & 1)) >> 5


def _table(b: ir.IRBuilder, values: tuple[int, ...]) -> Vector:
    padded = values + values[-1:] * (LANES - len(values))
    return Vector(b, ir.Constant(ir.VectorType(I16, LANES), list(padded)))


def _decoded(b: ir.IRBuilder, index: Vector, nonzero: Vector, below: Vector) -> Vector:
    """BF16 bits of the values at `index`; `below` is a splat of those of scale/4 less 31."""
    offsets = _table(b, tuple(ABOVE_QUARTER[code] + 31 for code in CODES))
    return nonzero.select(offsets.permuted(index) + below, 0)


def _count(b: ir.IRBuilder, counter: ir.Value, mask: Vector) -> None:
    """Add the number of lanes that are set."""
    lanes = b.bitcast(mask.value, I32)
    b.store(b.add(b.load(counter), b.ctpop(lanes)), counter)
