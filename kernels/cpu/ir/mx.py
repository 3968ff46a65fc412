"""Every MX format in vector IR: one intrinsic quantizes a run of 32-element blocks from any source.

An element becomes y = |x| * 2^(127 - byte) in float32, and adding 2^(23 - mantissa bits) times its own power of two
rounds y to its code, ties to even. Elements with even and with odd k stand in vectors of their own, so that a shift and
an or bring the codes of two neighbours together.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from ... import statistics as st
from ...mx_elements import ELEMENTS, MxElement
from .statistics import measured_run, start_measuring
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
    count_to,
    emitted,
    float32_bits,
    load,
    load_scalar,
    magnitudes,
    source_element,
    splat,
    store,
    store_scalar,
    widen,
)

RUN_BLOCKS = 128
"""Blocks a call may take: float32 sums stay accurate and 8-bit counters cannot overflow."""


@emitted
def quantize_run(
    typing: Any,
    source: Any,
    codes: Any,
    scales: Any,
    blocks: Any,
    known: Any,
    element: Any,
    mode: Any,
    kind: Any,
    sums: Any,
    out: Any,
) -> tuple[Any, Codegen]:
    """(source, codes, scales, blocks, known, element, mode, kind, sums, statistics) -> largest magnitude bits.

    `known` nonzero reads the scale bytes instead of setting them. `element` is the name of an MX format, `mode`
    one of `registry.SCALE_MODES`. `sums`: "none", "f32" or "f64", what statistics are summed in; with "f32" the result
    is -1, and `statistics` as they were, where float32 cannot hold the squares.
    """
    settings = (str(mode.literal_value), str(kind.literal_value), str(sums.literal_value))
    chosen = ELEMENTS[str(element.literal_value)]

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        source, codes, scales, blocks, known, _, _, _, _, out = args
        return MxRun(b, chosen, *settings).emit(source, codes, scales, blocks, known, out)

    return types.int64(source, codes, scales, blocks, known, element, mode, kind, sums, out), codegen


class MxRun:
    """The code of one quantize_run call."""

    def __init__(self, b: ir.IRBuilder, element: MxElement, mode: str, kind: str, sums: str) -> None:
        self.b, self.element, self.mode, self.kind, self.sums = b, element, mode, kind, sums
        self.last = I32(element.last_byte(kind))
        self.acc = Accumulators(b)

    def emit(
        self, source: ir.Value, codes: ir.Value, scales: ir.Value, blocks: ir.Value, known: ir.Value, out: ir.Value
    ) -> ir.Value:
        b = self.b
        largest = cgutils.alloca_once_value(b, I32(0))
        start_measuring(self.acc, self.sums, (I32, 16))
        use_stored = b.icmp_unsigned("!=", known, I64(0))
        code_bytes = 4 * self.element.code_bits
        with count_to(b, blocks) as i:
            address = b.add(source, b.mul(i, I64(32 * ITEM_BYTES[self.kind])))
            bits = load(b, address, source_element(self.kind), 32)
            amax = largest_bits(bits, self.kind)
            b.store(umax(b, b.load(largest), amax), largest)
            values, signs = even_and_odd(bits, self.kind)
            byte = self._byte(amax, values)
            byte = b.select(use_stored, b.zext(load_scalar(b, b.add(scales, i), I8), I32), byte)
            store_scalar(b, b.trunc(byte, I8), b.add(scales, i))
            inverse = self._inverse(byte)
            ratios = [x * inverse for x in values]
            rounded = [nearest(y, self.element) for y in ratios]
            even, odd = (code for code, _ in rounded)
            self._store(even, odd, signs, b.add(codes, b.mul(i, I64(code_bytes))))
            self._measure(values, ratios, rounded, byte)
        return measured_run(self.acc, self.sums, self.kind, b.load(largest), out)

    def _byte(self, amax: ir.Value, values: list[Vector]) -> ir.Value:
        """The scale byte by the rule of the mode, from magnitude bits of amax and the magnitudes of the block."""
        b, element = self.b, self.element
        bits = float32_bits(b, amax, self.kind)
        if self.mode == "default":
            return umin(b, scale_byte(b, bits, element.threshold, element.emax, 23), self.last)
        floor = umin(b, scale_byte(b, bits, 1 << 23, element.emax, 23), self.last)
        better = b.and_(self._next_is_better(floor, values), b.icmp_unsigned("<", floor, self.last))
        return b.add(floor, b.zext(better, I32))

    def _next_is_better(self, floor: ir.Value, values: list[Vector]) -> ir.Value:
        """Whether the squared error is less under the next scale, summed in the order that `mx_mse` gives."""
        b, squares = self.b, []
        for step in (0, 1):
            inverse = power_of_two(b, b.sub(I32(254 - step), floor))
            ratios = [x * inverse for x in values]
            even, odd = (y - nearest(y, self.element)[1] for y in ratios)
            squares.append(even * even + odd * odd)
        here, there = squares
        both = here
        while both.type.count > 2:  # halves of both sums onto each other, side by side
            n = here.type.count
            low = here.shuffle([*range(n // 2), *range(n, n + n // 2)], there)
            high = here.shuffle([*range(n // 2, n), *range(n + n // 2, 2 * n)], there)
            both = low + high
            here, there = both.half(False), both.half(True)
        sums = [b.extract_element(both.value, I32(lane)) for lane in (0, 1)]
        return b.fcmp_ordered(">", sums[0], b.fmul(sums[1], F32(4.0)))

    def _inverse(self, byte: ir.Value) -> Vector:
        """What magnitudes are multiplied by to be rounded to codes."""
        return power_of_two(self.b, self.b.sub(I32(254), byte))

    def _store(self, even: Vector, odd: Vector, signs: Vector, address: ir.Value) -> None:
        """32 codes; `signs` holds them at bits 15 and 31 of each pair."""
        n = self.element.code_bits
        pairs = even | (odd << n)
        pairs = pairs | ((signs >> (16 - n)) & (1 << (n - 1))) | ((signs >> (32 - 2 * n)) & (1 << (2 * n - 1)))
        if n == 6:
            quads = pairs.cast(I64)
            packed = (quads | (quads >> 20)).cast(I8)
            store(packed.shuffle([8 * quad + byte for quad in range(8) for byte in range(3)]), address)
        else:
            store(pairs.trunc(I8 if n == 4 else I16), address)

    def _measure(
        self, values: list[Vector], ratios: list[Vector], rounded: list[tuple[Vector, Vector]], byte: ir.Value
    ) -> None:
        if self.sums == "none":
            return
        self._add_squares(values, ratios, [decoded for _, decoded in rounded], byte)
        for y, (code, _) in zip(ratios, rounded, strict=True):
            zero, saturated = code.eq(0), y.gt(self.element.largest * (1.0 + st.SATURATION_SLACK))
            self.acc.update("zero", lambda a, z=zero: z.select(a + 1, a))  # type: ignore[misc]
            self.acc.update("saturated", lambda a, s=saturated: s.select(a + 1, a))  # type: ignore[misc]

    def _add_squares(self, values: list[Vector], ratios: list[Vector], decoded: list[Vector], byte: ir.Value) -> None:
        """Signal, noise and the largest error; `decoded` are the values of the codes, in the units of `ratios`."""
        unit, weight = power_of_two(self.b, byte), _square_of_scale(self.b, byte)
        for x, y, nearby in zip(values, ratios, decoded, strict=True):
            error = y - nearby
            absolute = error.call("llvm.fabs") * unit
            self._raise_error(absolute)
            if self.sums == "f32":
                self._add_product("signal", x, x)
                self._add_product("noise", absolute, absolute)
            else:
                self._add_product("signal", _squares(y), weight)
                self._add_product("noise", _squares(error), weight)

    def _raise_error(self, absolute: Vector) -> None:
        self.acc.update("error", lambda a: a.max(absolute))

    def _add_product(self, name: str, x: Vector, y: Vector) -> None:
        self.acc.update(name, lambda a: accumulate_product(x, y, a))


def scale_byte(b: ir.IRBuilder, amax: ir.Value, threshold: int, emax: int, mantissa_bits: int) -> ir.Value:
    """Scale bytes from i32 magnitude bits of amax (8 exponent bits above `mantissa_bits`), a scalar or a vector."""
    # Adding what the threshold lacks to the next power of two carries into the exponent exactly from there on.
    carry = (0x800000 - threshold) >> (23 - mantissa_bits)
    exponent = b.lshr(b.add(amax, _like(amax, carry)), _like(amax, mantissa_bits))
    difference = b.sub(exponent, _like(amax, emax))
    zero = _like(amax, 0)
    return b.select(b.icmp_signed("<", difference, zero), zero, difference)


def power_of_two_bits(b: ir.IRBuilder, biased: ir.Value) -> ir.Value:
    """float32 bits of 2^(biased - 127), biased 0 .. 254, i32 or a vector of them; 0 gives the subnormal 2^-127."""
    is_zero = b.icmp_unsigned("==", biased, _like(biased, 0))
    return b.select(is_zero, _like(biased, 0x400000), b.shl(biased, _like(biased, 23)))


def _like(value: ir.Value, number: int) -> ir.Constant:
    """A number as a constant of the type of a scalar or vector."""
    if isinstance(value.type, ir.VectorType):
        return ir.Constant(value.type, [number] * value.type.count)
    return value.type(number)


def largest_bits(bits: Vector, kind: str) -> ir.Value:
    """i32 magnitude bits of the largest of some elements of a kind of source."""
    largest = magnitudes(bits, kind).reduce("umax")
    return largest if largest.type == I32 else bits.b.zext(largest, I32)


def umax(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.select(b.icmp_unsigned(">", x, y), x, y)


def umin(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.select(b.icmp_unsigned("<", x, y), x, y)


def power_of_two(b: ir.IRBuilder, biased: ir.Value) -> Vector:
    """float32 2^(biased - 127) in sixteen lanes."""
    return splat(b, b.bitcast(power_of_two_bits(b, biased), F32), 16)


def _square_of_scale(b: ir.IRBuilder, byte: ir.Value) -> Vector:
    """2^(2 byte - 254) in float64, which cannot over- or underflow."""
    bits = b.shl(b.zext(b.add(b.shl(byte, I32(1)), I32(1023 - 254)), I64), I64(52))
    return splat(b, b.bitcast(bits, F64), 8)


def _squares(y: Vector) -> Vector:
    """Sums of two squares each, float64."""
    return ((y.half(False) * y.half(False)) + (y.half(True) * y.half(True))).to_float(F64)


def even_and_odd(bits: Vector, kind: str) -> tuple[list[Vector], Vector]:
    """float32 magnitudes of the even and of the odd ones of 32 elements, and int32 with their signs at 15 and 31."""
    if kind == "f32":
        even, odd = bits.shuffle(range(0, 32, 2)), bits.shuffle(range(1, 32, 2))
        signs = ((even >> 16) & 0x8000) | (odd & 0x80000000)
        return [magnitudes(each, kind).cast(F32) for each in (even, odd)], signs
    words = bits.cast(I32)
    if kind == "bf16":
        return [((words & 0x7FFF) << 16).cast(F32), (words & 0x7FFF0000).cast(F32)], words
    return [widen(words & 0x7FFF, kind), widen((words >> 16) & 0x7FFF, kind)], words


def nearest(y: Vector, element: MxElement) -> tuple[Vector, Vector]:
    """Codes without a sign (int32) and values (float32) nearest to y >= 0, ties to even, saturating."""
    kept, smallest_normal = element.mantissa_bits, 1 - element.bias
    clamped = y.min(element.largest)
    anchor = (clamped.max(2.0**smallest_normal).cast(I32) & 0x7F800000) + ((23 - kept) << 23)
    total = clamped + anchor.cast(F32)
    code = (total.cast(I32) - anchor) + ((anchor >> (23 - kept)) - ((127 + smallest_normal + 23 - kept) << kept))
    return code, total - anchor.cast(F32)
