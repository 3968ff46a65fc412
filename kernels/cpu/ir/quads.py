"""Codes of four and six bits, four blocks of 32 at a time, looked up as they lie in memory, in vector IR.

Four codes make a word of 16 bits, or 24, of which each look-up takes one: what it does with the others is to ignore
them, so nothing has to be spread first. Activations stand in the order of `words` (see `wide`), and sums of pairs are
multiplied by the scales of the blocks when 128 products have been added up.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from llvmlite import ir

from ...mx_elements import ELEMENTS, MxElement, code_values
from ...nl4_levels import LEVELS
from .mxfp4_decode import E2M1_BITS
from .scaled_decode import HALF_UNIT, decode_with_halves
from .vector import F32, I8, I16, I32, I64, Vector, constant, load
from .wide import BLOCKS, WORDS, Wide

_TOGETHER = BLOCKS["words"]
LEAST_MX = 0x00400000
"""float32 bits of 2^-127, which the scale byte 0 stands for."""
_NAN = 0x7FC00000


def look_ups(b: ir.IRBuilder, table: Vector, codes: ir.Value) -> list[Vector]:
    """Of 128 codes of four bits at an address; `table` has all sixteen twice, as an index has a bit of the next code.

    Needs avx512bw.
    """
    words = load(b, codes, I16, WORDS)
    return [table.permuted(words >> (4 * number) if number else words) for number in range(_TOGETHER)]


def _look_ups_of_six_bits(b: ir.IRBuilder, table: tuple[Vector, Vector], codes: ir.Value) -> list[Vector]:
    """Of 128 codes at an address: four of them are three bytes. Needs avx512vbmi."""
    first, second = load(b, codes, I8, 64), load(b, b.add(codes, I64(64)), I8, 32)
    second = second.shuffle([*range(32), *[32] * 32])
    low, high = (first.bytes_permuted_with(second, _pairs_of_bytes(b, at)).cast(I16) for at in (0, 1))
    positive, negative = table
    indices = low, low >> 6, high >> 4, high >> 10  # only six bits of a lane count
    return [positive.permuted_with(negative, index) for index in indices]


def _pairs_of_bytes(b: ir.IRBuilder, first: int) -> Vector:
    """Where the bytes `first` and `first` + 1 of every three stand."""
    numbers = [3 * word + first + k for word in range(WORDS) for k in (0, 1)]
    return Vector(b, ir.Constant(ir.VectorType(I8, 2 * WORDS), numbers))


def powers_of_two(count: int) -> Callable[[ir.IRBuilder, ir.Value], Vector]:
    """Of `count` scale bytes of MX formats, each for as many of the sixteen lanes."""

    def scales(b: ir.IRBuilder, address: ir.Value) -> Vector:
        bits = (load(b, address, I8, count).zext(I32) << 23).max(LEAST_MX)
        return bits.cast(F32).shuffle(_spread(count))

    return scales


def _e4m3(count: int) -> Callable[[ir.IRBuilder, ir.Value], Vector]:
    """Of `count` scales in E4M3, each for as many of the sixteen lanes."""

    def scales(b: ir.IRBuilder, address: ir.Value) -> Vector:
        codes = load(b, address, I8, count).sext(I16)
        value = decode_with_halves(codes) * HALF_UNIT
        nan = constant(b, I32, count, _NAN).cast(F32)
        return (codes & 0x7F).eq(0x7F).select(nan, value).shuffle(_spread(count))

    return scales


def _spread(count: int) -> list[int]:
    return [lane * count // 16 for lane in range(16)]


def bf16_bits(value: float) -> int:
    """Of a number that BF16 holds exactly."""
    return int.from_bytes(struct.pack("<f", value), "little") >> 16


def _sixteen(values: Sequence[int], scales: Callable[[ir.IRBuilder, ir.Value], Vector]) -> Wide:
    """Codes of four bits that stand for these BF16 bits."""

    def table(b: ir.IRBuilder) -> Vector:
        return Vector(b, ir.Constant(ir.VectorType(I16, WORDS), [*values, *values]))

    return Wide("words", 64, look_ups, table, scales)


def _mxfp6(element: MxElement) -> Wide:
    values = [bf16_bits(value) for value in code_values(element)]

    def table(b: ir.IRBuilder) -> tuple[Vector, Vector]:
        positive = Vector(b, ir.Constant(ir.VectorType(I16, WORDS), values))
        return positive, positive | 0x8000

    return Wide("words", 96, _look_ups_of_six_bits, table, powers_of_two(_TOGETHER))


QUADS: Mapping[str, Wide] = MappingProxyType(
    {
        "mxfp4": _sixteen(E2M1_BITS, powers_of_two(_TOGETHER)),
        "nvfp4": _sixteen(E2M1_BITS, _e4m3(2 * _TOGETHER)),
        "nl4": _sixteen([bf16_bits(level) for level in LEVELS], _e4m3(_TOGETHER)),
        **{name: _mxfp6(ELEMENTS[name]) for name in ("mxfp6_e2m3", "mxfp6_e3m2")},
    }
)
"""By format."""
OF_SEGMENTS = Wide("words", 64, look_ups)
"""Codes of four bits that are looked up in the table of a segment."""
