"""`mxfp4_rows` in vector IR: the squared errors of a row under every candidate, and its codes under one multiplier."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from ...mx_elements import E2M1, LARGEST_MULTIPLIER, last_byte_of_row
from ...scale_rules import CANDIDATES
from .mx import (
    MxRun,
    even_and_odd,
    largest_bits,
    nearest,
    power_of_two,
    power_of_two_bits,
    scale_byte,
    umax,
    umin,
)
from .vector import (
    F32,
    F64,
    I32,
    I64,
    ITEM_BYTES,
    Codegen,
    Vector,
    constant,
    count_to,
    emitted,
    float32_bits,
    load,
    source_element,
    splat,
    store,
)

LANES = len(CANDIDATES)
"""Candidates, one in each lane of a vector."""
RECIPROCALS = tuple(float(np.float32(1.0) / np.float32(each)) for each in CANDIDATES)


@emitted
def candidate_errors(typing: Any, source: Any, blocks: Any, kind: Any, errors: Any) -> tuple[Any, Codegen]:
    """(source, blocks, kind, errors) -> largest magnitude bits.

    Writes the float64 [blocks, LANES] squared errors of each block under each candidate to `errors`, in units of the
    squared candidate.
    """
    name = str(kind.literal_value)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        source, blocks, _, errors = args
        largest = cgutils.alloca_once_value(b, I32(0))
        with count_to(b, blocks) as i:
            bits = load(b, b.add(source, b.mul(i, I64(32 * ITEM_BYTES[name]))), source_element(name), 32)
            amax = largest_bits(bits, name)
            b.store(umax(b, b.load(largest), amax), largest)
            amax_f32 = splat(b, b.bitcast(float32_bits(b, amax, name), F32), LANES)
            values, _ = even_and_odd(bits, name)
            store(_block_errors(b, values, amax_f32, name), b.add(errors, b.mul(i, I64(8 * LANES))))
        return b.zext(b.load(largest), I64)

    return types.int64(source, blocks, kind, errors), codegen


@emitted
def quantize_row(
    typing: Any,
    source: Any,
    codes: Any,
    scales: Any,
    blocks: Any,
    known: Any,
    multiplier: Any,
    kind: Any,
    sums: Any,
    out: Any,
) -> tuple[Any, Codegen]:
    """(source, codes, scales, blocks, known, multiplier, kind, sums, statistics) -> largest magnitude bits.

    As `mx_ir.quantize_run`, of any number of blocks of a row with a float32 multiplier; `sums` is "none" or "f64".
    """
    settings = str(kind.literal_value), str(sums.literal_value)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        source, codes, scales, blocks, known, multiplier, _, _, out = args
        return _RowRun(b, multiplier, *settings).emit(source, codes, scales, blocks, known, out)

    return types.int64(source, codes, scales, blocks, known, multiplier, kind, sums, out), codegen


class _RowRun(MxRun):
    """The code of one quantize_row call."""

    def __init__(self, b: ir.IRBuilder, multiplier: ir.Value, kind: str, sums: str) -> None:
        super().__init__(b, E2M1, "default", kind, sums)
        self.multiplier, self.reciprocal = multiplier, b.fdiv(F32(1.0), multiplier)

    def _byte(self, amax: ir.Value, values: list[Vector]) -> ir.Value:
        b = self.b
        amax_f32 = b.fmul(b.bitcast(float32_bits(b, amax, self.kind), F32), self.reciprocal)
        small = b.fcmp_ordered("<=", self.multiplier, F32(LARGEST_MULTIPLIER))
        last = b.select(small, self.last, b.sub(self.last, I32(1)))
        return umin(b, scale_byte(b, b.bitcast(amax_f32, I32), E2M1.threshold, E2M1.emax, 23), last)

    def _inverse(self, byte: ir.Value) -> Vector:
        return super()._inverse(byte) * splat(self.b, self.reciprocal, 16)

    def _add_squares(self, values: list[Vector], ratios: list[Vector], decoded: list[Vector], byte: ir.Value) -> None:
        """From the very values that codes stand for: a row of few weights may be kept all but exactly."""
        unit = power_of_two(self.b, byte) * splat(self.b, self.multiplier, 16)
        for x, nearby in zip(values, decoded, strict=True):
            error = (x - nearby * unit).call("llvm.fabs")
            self._raise_error(error)
            for name, each in (("signal", x), ("noise", error)):
                for half in (each.half(False).to_float(F64), each.half(True).to_float(F64)):
                    self._add_product(name, half, half)


def _block_errors(b: ir.IRBuilder, values: list[Vector], amax: Vector, kind: str) -> Vector:
    """float64 [LANES] of a block of which `values` are the magnitudes, those with even and those with odd k."""
    last = [last_byte_of_row(each, kind) for each in CANDIDATES]
    reciprocals = amax.new(ir.Constant(ir.VectorType(F32, LANES), list(RECIPROCALS)))
    bytes_ = amax.new(scale_byte(b, (amax * reciprocals).cast(I32).value, E2M1.threshold, E2M1.emax, 23))
    bytes_ = bytes_.call("llvm.umin", amax.new(ir.Constant(ir.VectorType(I32, LANES), last)))
    inverses = amax.new(power_of_two_bits(b, (constant(b, I32, LANES, 254) - bytes_).value)).cast(F32)
    factors = inverses * reciprocals
    in_units = _folded(values, factors, range(LANES))
    squared_scales = (((bytes_ << 1) + (1023 - 254)).zext(I64) << 52).cast(F64)
    return in_units.to_float(F64) * squared_scales


def _folded(values: list[Vector], factors: Vector, candidates: range) -> Vector:
    """The sums of the squared rounding errors of some candidates, each folded to 16 / len(candidates) lanes."""
    if len(candidates) == 1:
        factor = factors.shuffle([candidates[0]] * 16)
        even, odd = (y - nearest(y, E2M1)[1] for y in (x * factor for x in values))
        return even * even + odd * odd
    middle = len(candidates) // 2
    here, there = _folded(values, factors, candidates[:middle]), _folded(values, factors, candidates[middle:])
    width = 16 // middle  # lanes that a candidate has in each of the two
    lanes = [lane for start in range(0, 32, width) for lane in range(start, start + width // 2)]
    return here.shuffle(lanes, there) + here.shuffle([lane + width // 2 for lane in lanes], there)
