"""Elements of NL4 as integers of a byte, in vector IR: their codes, levels and errors.

Looked up in tables of 256 bytes where the processor has such, else found by comparing with the borders between levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from llvmlite import ir

from ...nl4_levels import LEVELS, THRESHOLDS
from ..processor import has
from .vector import I8, I16, I32, Vector, constant

BYTES = 64
"""Elements that are looked at together: two blocks."""
SORTED = tuple(sorted(LEVELS))


def _nearest_index(whole: int) -> int:
    return sum(whole > threshold for threshold in THRESHOLDS)


INDEX_OF_BYTE = tuple(_nearest_index((byte ^ 128) - 128) for byte in range(256))
ERROR_OF_BYTE = tuple(abs((byte ^ 128) - 128 - SORTED[INDEX_OF_BYTE[byte]]) for byte in range(256))
CODE_OF_BYTE = tuple(index + 8 & 15 for index in INDEX_OF_BYTE)


def tables() -> bool:
    """Whether bytes are looked up in tables of 256."""
    return has("avx512vbmi") and has("avx512vnni")


def looked_up(whole: Vector, table: Sequence[int]) -> Vector:
    """uint8 [64]: what the table has for each of so many bytes."""
    first, second = (
        [whole.new(ir.Constant(whole.type, list(table[at : at + BYTES]))) for at in (start, start + BYTES)]
        for start in (0, 128)
    )
    positive, negative = (low.bytes_permuted_with(high, whole) for low, high in (first, second))
    return less(whole, 0).select(negative, positive)


def index_of(whole: Vector) -> Vector:
    """uint8: how many levels are below the nearest one."""
    index = constant(whole.b, I8, whole.type.count, 0)
    for threshold in THRESHOLDS:
        index = greater(whole, threshold).select(index + 1, index)
    return index


def level_of(code: Vector) -> Vector:
    """int8 levels of codes in bytes."""
    if tables():
        table = code.new(ir.Constant(code.type, list(LEVELS) * (code.type.count // len(LEVELS))))
        return table.bytes_permuted(code)
    level = constant(code.b, I8, code.type.count, 0)
    for number, each in enumerate(LEVELS):
        level = code.eq(number).select(level.new(level.like(each)), level)
    return level


def squares_of_fours(whole: Vector) -> Vector:
    """int32 [16]: sums of the squared errors of four elements each, of one block, then of the next."""
    b = whole.b
    if tables():
        error = looked_up(whole, ERROR_OF_BYTE)
        return constant(b, I32, BYTES // 4, 0).add_byte_products(error, error)
    level = constant(b, I8, BYTES, SORTED[0])
    for threshold, (low, high) in zip(THRESHOLDS, pairwise(SORTED), strict=True):
        level = greater(whole, threshold).select(level + (high - low), level)
    wide = (whole - level).sext(I16)
    even, odd = (wide.shuffle(range(first, BYTES, 2)).sext(I32) for first in (0, 1))
    pairs = even * even + odd * odd
    return pairs.shuffle(range(0, BYTES // 2, 2)) + pairs.shuffle(range(1, BYTES // 2, 2))


def greater(x: Vector, other: int) -> Vector:
    return x.new(x.b.icmp_signed(">", x.value, x.like(other)))


def less(x: Vector, other: int) -> Vector:
    return x.new(x.b.icmp_signed("<", x.value, x.like(other)))
