"""NL4 in vector IR: one intrinsic quantizes a run of blocks of 32 from any source, sixteen of them at a time.

The largest elements of sixteen blocks meet in the lanes of one vector, so that their scales are made together. What is
tried of each is a vector of inverses, under which two blocks at a time become integers of a byte: adding 1.5 * 2^23
rounds them, and their errors, looked up in a table of 256 bytes or found by comparing, are squared and summed as
integers, the same on every processor in whatever order.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from ...mx_elements import E4M3
from ...nl4_levels import (
    BLOCK,
    CAPPED_CODE,
    CAPPED_FROM,
    FURTHEST,
    LARGEST_CODE,
    MOST_RAISED,
    RECIPROCAL,
    STEPS,
)
from .mx import nearest, umax
from .nl4_bytes import CODE_OF_BYTE, SORTED, greater, index_of, less, level_of, looked_up, squares_of_fours, tables
from .statistics import add_square, measured_run, start_measuring
from .vector import (
    F32,
    I8,
    I16,
    I32,
    I64,
    ITEM_BYTES,
    Accumulators,
    Codegen,
    Vector,
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

LANES = 16
"""Blocks whose scales are made together."""
RUN_GROUPS = 8
"""Groups of them a call may take: float32 sums stay accurate."""
LOWEST_STEP = min(STEPS)
"""That of the lowest scale that is tried, where it is not raised."""
PAIR = 2 * BLOCK
"""Elements that are worked on together: two blocks."""
MAGIC = 1.5 * 2.0**23
"""Added to a small float32 it leaves the nearest integer in the lowest bits, of ties the even one."""


@emitted
def quantize_run(
    typing: Any,
    source: Any,
    codes: Any,
    scales: Any,
    rows: Any,
    groups: Any,
    kind: Any,
    sums: Any,
    out: Any,
) -> tuple[Any, Codegen]:
    """(source, codes, scales, scales of rows, groups, kind, sums, statistics) -> largest magnitude bits.

    `rows` is the address of the float32 scale of the row of each block. `sums`: "none", "f32" or "f64", what statistics
    are summed in; with "f32" the result is -1, and `statistics` as they were, where float32 cannot hold the squares.
    """
    settings = str(kind.literal_value), str(sums.literal_value)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        source, codes, scales, rows, groups, _, _, out = args
        return _Run(b, *settings).emit(source, codes, scales, rows, groups, out)

    return types.int64(source, codes, scales, rows, groups, kind, sums, out), codegen


class _Lanes:
    """A float32 for each of sixteen blocks, in memory, from which any of them is broadcast."""

    def __init__(self, b: ir.IRBuilder) -> None:
        self.b, self.address = b, _address(b, ir.ArrayType(F32, LANES))

    def set(self, values: Vector) -> None:
        store(values, self.address)

    def splat(self, block: ir.Value) -> Vector:
        """That of a block, sixteen times."""
        return splat(self.b, load_scalar(self.b, self.b.add(self.address, self.b.mul(block, I64(4))), F32), LANES)


def _address(b: ir.IRBuilder, kind: ir.Type) -> ir.Value:
    """The address of memory of the function."""
    return b.ptrtoint(cgutils.alloca_once(b, kind), I64)


def _both(b: ir.IRBuilder, pair: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The numbers of the blocks of a pair."""
    first = b.mul(pair, I64(2))
    return first, b.add(first, I64(1))


class _Run:
    """The code of one quantize_run call."""

    def __init__(self, b: ir.IRBuilder, kind: str, sums: str) -> None:
        self.b, self.kind, self.sums = b, kind, sums
        self.acc = Accumulators(b)
        self.limits, self.units = _Lanes(b), _Lanes(b)
        self.inverses = [_Lanes(b) for _ in STEPS]
        self.sums_of_pairs = [_address(b, ir.ArrayType(I32, LANES * LANES // 2)) for _ in STEPS]

    def emit(
        self, source: ir.Value, codes: ir.Value, scales: ir.Value, rows: ir.Value, groups: ir.Value, out: ir.Value
    ) -> ir.Value:
        b, width = self.b, ITEM_BYTES[self.kind]
        largest = cgutils.alloca_once_value(b, I32(0))
        start_measuring(self.acc, self.sums, (I8, PAIR))
        with count_to(b, groups) as i:
            start = b.add(source, b.mul(i, I64(LANES * BLOCK * width)))
            keys = _block_maxima([_key(self._load(start, I64(at)), self.kind) for at in range(LANES)])
            keys = keys if self.kind == "f32" else keys.zext(I32)
            magnitude = keys >> 1
            b.store(umax(b, b.load(largest), magnitude.reduce("umax")), largest)
            of_rows = load(b, b.add(rows, b.mul(i, I64(4 * LANES))), F32, LANES)
            is_capped = of_rows.gt(2.0 ** CAPPED_FROM[self.kind] * 0.75)
            last = is_capped.select(constant(b, I32, LANES, CAPPED_CODE), LARGEST_CODE)
            self.limits.set(_e4m3(last) * float(FURTHEST) * of_rows)
            code, scale, inverse = self._chosen(start, self._tried(magnitude, keys, of_rows, last))
            store(code.trunc(I8), b.add(scales, b.mul(i, I64(LANES))))
            self.inverses[0].set(inverse)
            self.units.set(scale * of_rows)
            coded = b.add(codes, b.mul(i, I64(LANES * BLOCK // 2)))
            with count_to(b, I64(LANES // 2)) as pair:
                self._encode(start, pair, b.add(coded, b.mul(pair, I64(BLOCK))))
        if self.sums != "none":
            for name in ("zero", "saturated"):
                counts = self.acc.get(name).zext(I32)
                self.acc.start(name, counts)
        return measured_run(self.acc, self.sums, self.kind, b.load(largest), out)

    def _load(self, start: ir.Value, block: ir.Value) -> Vector:
        address = self.b.add(start, self.b.mul(block, I64(BLOCK * ITEM_BYTES[self.kind])))
        return load(self.b, address, source_element(self.kind), BLOCK)

    def _tried(
        self, magnitude: Vector, keys: Vector, of_rows: Vector, last: Vector
    ) -> list[tuple[Vector, Vector, Vector]]:
        """Of each scale that is tried: its E4M3 code (int32), its value, and the inverse of that times `of_rows`.

        `last` are the largest codes.
        """
        of_power = constant(self.b, I32, LANES, 254 << 23) - of_rows.cast(I32)  # the bits of its exact inverse
        amax = widen(magnitude, self.kind) * of_power.cast(F32)
        first, _ = nearest(amax * RECIPROCAL, E4M3)
        # The largest of a block goes to the one longest level, which is negative.
        sign = magnitude.gt(0).select((keys & 1) ^ 1, 0)
        lowest = below = first.max(1 - LOWEST_STEP) + LOWEST_STEP
        for raised in range(MOST_RAISED):  # independently of each other: everything after waits for them
            above = amax.gt(_e4m3(below + raised) * float(FURTHEST))
            lowest = above.select(below + (raised + 1), lowest)
        lowest = lowest.min(last)
        found = []
        for step in STEPS:
            code = lowest if step == LOWEST_STEP else (first + step).min(last).max(lowest)
            value = (_e4m3(code).cast(I32) | (sign << 31)).cast(F32)
            found.append((code | (sign << 7), value, value.new(value.like(1.0)) / (value * of_rows)))
        return found

    def _chosen(self, start: ir.Value, tried: list[tuple[Vector, Vector, Vector]]) -> tuple[Vector, Vector, Vector]:
        """That of the least squared error, the first of equals."""
        b = self.b
        for place, (_, _, inverse) in zip(self.inverses, tried, strict=True):
            place.set(inverse)
        with count_to(b, I64(LANES // 2)) as pair:
            values = self._values(start, pair)
            for place, sums in zip(self.inverses, self.sums_of_pairs, strict=True):
                store(squares_of_fours(self._integers(values, place, pair)), b.add(sums, b.mul(pair, I64(4 * LANES))))
        best, least = tried[0], None
        for each, sums in zip(tried, self.sums_of_pairs, strict=True):
            of_pairs = [load(b, b.add(sums, I64(4 * LANES * pair)), I32, LANES) for pair in range(LANES // 2)]
            total = _folded(of_pairs).to_float(F32) * (each[1] * each[1])
            if least is None:
                least = total
                continue
            better = least.gt(total)
            least = better.select(total, least)
            code, scale, inverse = (better.select(one, other) for one, other in zip(each, best, strict=True))
            best = code, scale, inverse
        return best

    def _values(self, start: ir.Value, pair: ir.Value) -> list[Vector]:
        """float32: the even and odd ones of a block, then of the next, within the reach of the largest scale."""
        found = []
        for block in _both(self.b, pair):
            top = self.limits.splat(block)
            for x in _signed_even_and_odd(self._load(start, block), self.kind):
                found.append(x.min(top).max(top * -1.0))
        return found

    def _integers(self, values: list[Vector], inverses: _Lanes, pair: ir.Value) -> Vector:
        """int8 [64]: the elements of two blocks times their inverses, rounded, in order."""
        halves = []
        for number, block in enumerate(_both(self.b, pair)):
            factor = inverses.splat(block)
            even, odd = ((x * factor + MAGIC).cast(I32) for x in values[2 * number : 2 * number + 2])
            halves.append(((even & 0xFFFF) | (odd << 16)).cast(I8))
        return halves[0].shuffle(range(0, 2 * PAIR, 2), halves[1])

    def _encode(self, start: ir.Value, pair: ir.Value, address: ir.Value) -> None:
        """Codes of two blocks, whose inverses and units stand in lanes."""
        whole = self._integers(self._values(start, pair), self.inverses[0], pair)
        code = looked_up(whole, CODE_OF_BYTE) if tables() else ((index_of(whole) + 8) & 15)
        words = code.cast(I16)
        store((words | (words >> 4)).trunc(I8), address)
        if self.sums != "none":
            self._measure(start, pair, whole, code)

    def _measure(self, start: ir.Value, pair: ir.Value, whole: Vector, code: Vector) -> None:
        acc, level = self.acc, level_of(code).sext(I16)
        for number, block in enumerate(_both(self.b, pair)):
            unit, words = self.units.splat(block), level.half(bool(number)).cast(I32)
            levels = (words << 16).shift_right_signed(16), words.shift_right_signed(16)
            for x, nearby in zip(_signed_even_and_odd(self._load(start, block), self.kind), levels, strict=True):
                error = (x - nearby.to_float(F32) * unit).call("llvm.fabs")
                acc.update("error", lambda a, e=error: a.max(e))  # type: ignore[misc]
                add_square(acc, self.sums, "signal", x)
                add_square(acc, self.sums, "noise", error)
        far = greater(whole, SORTED[-1]).value, less(whole, SORTED[0]).value
        saturated, zero = whole.new(self.b.or_(*far)), code.eq(0)
        for name, mask in (("zero", zero), ("saturated", saturated)):
            acc.update(name, lambda a, m=mask: m.select(a + 1, a))  # type: ignore[misc]


def _key(bits: Vector, kind: str) -> Vector:
    """Source bits with the sign last: unsigned, they are in the order of magnitudes, and of two the negative wins."""
    return (bits << 1) | (bits >> (31 if kind == "f32" else 15))


def _block_maxima(vectors: list[Vector]) -> Vector:
    """The largest of each of sixteen vectors, in its lane."""
    width = BLOCK
    while width > 1:
        half = width // 2
        if len(vectors) > 1:
            total = vectors[0].type.count
            low = [lane for start in range(0, 2 * total, width) for lane in range(start, start + half)]
            high = [lane + half for lane in low]
            pairs = zip(vectors[0::2], vectors[1::2], strict=True)
            vectors = [one.shuffle(low, other).max(one.shuffle(high, other)) for one, other in pairs]
        else:
            (left,) = vectors
            low = [lane for start in range(0, left.type.count, width) for lane in range(start, start + half)]
            vectors = [left.shuffle(low).max(left.shuffle([lane + half for lane in low]))]
        width = half
    return vectors[0]


def _signed_even_and_odd(bits: Vector, kind: str) -> list[Vector]:
    """float32 of the even and of the odd ones of 32 elements."""
    if kind == "f32":
        return [bits.shuffle(range(first, BLOCK, 2)).cast(F32) for first in (0, 1)]
    words = bits.cast(I32)
    if kind == "bf16":
        return [(words << 16).cast(F32), (words & 0xFFFF0000).cast(F32)]
    return [(widen(half & 0x7FFF, kind).cast(I32) | ((half & 0x8000) << 16)).cast(F32) for half in (words, words >> 16)]


def _folded(vectors: list[Vector]) -> Vector:
    """The sum of every eight lanes, of two blocks in each of eight vectors."""
    width = BLOCK // 4
    while width > 1:
        half = width // 2
        low = [lane for start in range(0, 2 * LANES, width) for lane in range(start, start + half)]
        pairs = zip(vectors[0::2], vectors[1::2], strict=True)
        vectors = [one.shuffle(low, other) + one.shuffle([lane + half for lane in low], other) for one, other in pairs]
        width = half
    return vectors[0]


def _e4m3(code: Vector) -> Vector:
    """float32 of int32 codes without sign; the product makes subnormal ones normal, exactly."""
    return (code << 20).cast(F32) * 2.0**120
