"""NVFP4 in vector IR: one intrinsic quantizes a run of blocks of 16 from any source, sixteen of them at a time.

The maxima of sixteen blocks meet in the lanes of one vector, so that their scales, which need divisions, are made
together. Elements with even and with odd k of two blocks stand in vectors of their own, as in `mx`. Quotients of what
was BF16 or FP16 are made without a division, as `scaled` explains: r = rn(1/d), q = rn(x r), rn(q + (x - q d) r).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from ... import statistics as st
from ...mx_elements import E2M1, E4M3
from ...nvfp4_scales import BLOCK, EMPTY_SCALE, LARGEST, LARGEST_FLOAT32
from ..processor import has
from .mx import even_and_odd, largest_bits, nearest, umax
from .statistics import add_square, measured_run, start_measuring
from .vector import (
    I8,
    I32,
    I64,
    ITEM_BYTES,
    Accumulators,
    Codegen,
    Vector,
    count_to,
    emitted,
    fused,
    load,
    magnitudes,
    source_element,
    splat,
    store,
    widen,
)

LANES = 16
"""Blocks whose scales are made together."""
GROUP = LANES * BLOCK
"""Elements of them."""
RUN_GROUPS = 16
"""Groups a call may take: float32 sums stay accurate."""
PAIR = 2 * BLOCK
"""Elements that are encoded together: two blocks."""
UNDIVIDED = 2.0**-80, 2.0**80
"""Multipliers between which a quotient needs no division: no product of its correction is subnormal."""
EMPTY_CODE = 0x20
"""`EMPTY_SCALE` in E4M3."""


@emitted
def quantize_run(
    typing: Any,
    source: Any,
    codes: Any,
    scales: Any,
    groups: Any,
    multiplier: Any,
    scale_2: Any,
    mode: Any,
    kind: Any,
    sums: Any,
    exact: Any,
    out: Any,
) -> tuple[Any, Codegen]:
    """(source, codes, scales, groups, multiplier, scale_2, mode, kind, sums, exact, statistics) -> magnitude bits.

    The largest ones. `multiplier` and `scale_2` are float32, `mode` is one of `registry.SCALE_MODES`. `sums`: "none",
    "f32" or "f64", what statistics are summed in; with "f32" the result is -1, and `statistics` as they were, where
    float32 cannot hold the squares. `exact` 0: the multiplier is one of `UNDIVIDED`.
    """
    settings = str(mode.literal_value), str(kind.literal_value), str(sums.literal_value), bool(exact.literal_value)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        source, codes, scales, groups, multiplier, scale_2, _, _, _, _, out = args
        run = _Run(b, *settings, multiplier, scale_2)
        return run.emit(source, codes, scales, groups, out)

    given = (source, codes, scales, groups, multiplier, scale_2, mode, kind, sums, exact, out)
    return types.int64(*given), codegen


class _Run:
    """The code of one quantize_run call."""

    def __init__(
        self, b: ir.IRBuilder, mode: str, kind: str, sums: str, exact: bool, multiplier: ir.Value, scale_2: ir.Value
    ) -> None:
        self.b, self.mode, self.kind, self.sums = b, mode, kind, sums
        self.divides = exact or kind == "f32" or not has("fma")
        self.multiplier, self.scale_2 = splat(b, multiplier, LANES), splat(b, scale_2, LANES)
        self.acc = Accumulators(b)

    def emit(self, source: ir.Value, codes: ir.Value, scales: ir.Value, groups: ir.Value, out: ir.Value) -> ir.Value:
        b, width = self.b, ITEM_BYTES[self.kind]
        largest = cgutils.alloca_once_value(b, I32(0))
        start_measuring(self.acc, self.sums, (I32, 16))
        with count_to(b, groups) as i:
            start = b.add(source, b.mul(i, I64(GROUP * width)))
            pairs = [
                load(b, b.add(start, I64(at * width)), source_element(self.kind), PAIR) for at in range(0, GROUP, PAIR)
            ]
            top = _block_maxima([magnitudes(bits, self.kind) for bits in pairs])
            b.store(umax(b, b.load(largest), largest_bits(top, self.kind)), largest)
            amax = widen(top if self.kind == "f32" else top.zext(I32), self.kind)
            code, scale = self._scales(amax, pairs)
            store(code.trunc(I8), b.add(scales, b.mul(i, I64(LANES))))
            step, coded = scale / self.multiplier, b.add(codes, b.mul(i, I64(GROUP // 2)))
            unit = None if self.sums == "none" else scale * self.scale_2
            inverse = None if self.divides else step.new(step.like(1.0)) / step
            for number, bits in enumerate(pairs):
                lanes = _lanes_of(number)
                own = [None if each is None else each.shuffle(lanes) for each in (step, inverse, unit)]
                self._encode(bits, own, b.add(coded, I64(number * PAIR // 2)))
        return measured_run(self.acc, self.sums, self.kind, b.load(largest), out)

    def _scales(self, amax: Vector, pairs: list[Vector]) -> tuple[Vector, Vector]:
        """E4M3 codes (int32) and float32 values of sixteen scales."""
        six = self._to_e4m3(amax / LARGEST)
        if self.mode == "default":
            return six
        four = self._to_e4m3(amax / 4.0)
        here, there = (self._squared_errors(pairs, scale) * (scale * scale) for _, scale in (six, four))
        better = here.gt(there)
        return better.select(four[0], six[0]), better.select(four[1], six[1])

    def _to_e4m3(self, wanted: Vector) -> tuple[Vector, Vector]:
        code, value = nearest(self.multiplier * wanted, E4M3)
        empty = code.eq(0)
        return empty.select(code.new(code.like(EMPTY_CODE)), code), empty.select(
            value.new(value.like(EMPTY_SCALE)), value
        )

    def _squared_errors(self, pairs: list[Vector], scale: Vector) -> Vector:
        """Of sixteen blocks, in units of the multiplier, summed in the order that `reference.nvfp4` gives."""
        inverse, squares = self.multiplier / scale, []
        largest = inverse.new(inverse.like(LARGEST_FLOAT32))
        inverse = inverse.gt(largest).select(largest, inverse)  # times a zero, an infinity is no number
        for number, bits in enumerate(pairs):
            factor = inverse.shuffle(_lanes_of(number))
            values, _ = even_and_odd(bits, self.kind)
            even, odd = (y - nearest(y, E2M1)[1] for y in (x * factor for x in values))
            squares.append(even * even + odd * odd)
        return _folded(squares)

    def _encode(self, bits: Vector, own: list[Vector | None], address: ir.Value) -> None:
        """Codes of two blocks, whose steps, inverse steps and units stand in the lanes of `own`."""
        step, inverse, unit = own
        assert step is not None
        kept = magnitudes(bits, self.kind).gt(0).select(bits, 0)  # a zero has no sign
        values, signs = even_and_odd(kept, self.kind)
        ratios = [_quotient(x, step, inverse) for x in values]
        rounded = [nearest(y, E2M1) for y in ratios]
        even, odd = (code for code, _ in rounded)
        packed = even | (odd << 4) | ((signs >> 12) & 0x08) | ((signs >> 24) & 0x80)
        store(packed.trunc(I8), address)
        if unit is not None:
            self._measure(values, ratios, rounded, unit)

    def _measure(
        self, values: list[Vector], ratios: list[Vector], rounded: list[tuple[Vector, Vector]], unit: Vector
    ) -> None:
        acc = self.acc
        for x, y, (code, nearby) in zip(values, ratios, rounded, strict=True):
            error = (x - nearby * unit).call("llvm.fabs")
            acc.update("error", lambda a, e=error: a.max(e))  # type: ignore[misc]
            add_square(acc, self.sums, "signal", x)
            add_square(acc, self.sums, "noise", error)
            zero, saturated = code.eq(0), y.gt(LARGEST * (1.0 + st.SATURATION_SLACK))
            acc.update("zero", lambda a, z=zero: z.select(a + 1, a))  # type: ignore[misc]
            acc.update("saturated", lambda a, s=saturated: s.select(a + 1, a))  # type: ignore[misc]


def _quotient(x: Vector, step: Vector, inverse: Vector | None) -> Vector:
    if inverse is None:
        return x / step
    near = x * inverse
    rest = fused(near * -1.0, step, x)
    return fused(rest, inverse, near)


def _lanes_of(pair: int) -> list[int]:
    """The lanes of two blocks among sixteen, each for eight elements of its block."""
    return [2 * pair] * 8 + [2 * pair + 1] * 8


def _block_maxima(vectors: list[Vector]) -> Vector:
    """The largest of every sixteen lanes, of sixteen blocks in eight vectors."""
    step = 2
    while len(vectors) > 1:
        count = vectors[0].type.count
        even, odd = range(0, 2 * count, step), range(1, 2 * count, step)
        pairs = zip(vectors[0::2], vectors[1::2], strict=True)
        vectors = [one.shuffle(even, other).max(one.shuffle(odd, other)) for one, other in pairs]
    (left,) = vectors
    while left.type.count > LANES:
        count = left.type.count
        left = left.shuffle(range(0, count, 2)).max(left.shuffle(range(1, count, 2)))
    return left


def _folded(vectors: list[Vector]) -> Vector:
    """The sum of every eight lanes, of two blocks in each of eight vectors, halves onto halves."""
    width = BLOCK // 2
    while width > 1:
        half = width // 2
        low = [lane for start in range(0, 2 * LANES, width) for lane in range(start, start + half)]
        pairs = zip(vectors[0::2], vectors[1::2], strict=True)
        vectors = [one.shuffle(low, other) + one.shuffle([lane + half for lane in low], other) for one, other in pairs]
        width = half
    return vectors[0]
