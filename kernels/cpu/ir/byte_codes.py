"""E4M3 codes of a byte, two blocks of 32 at a time, through tables of the two bytes of a BF16, for avx512vbmi.

A table of 128 bytes has one byte of the value of each magnitude; interleaved, both make the values, in the order of
`bytes` (see `wide`).
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from ...mx_elements import E4M3, code_values
from .quads import bf16_bits, powers_of_two
from .scaled_decode import HALF_UNIT
from .vector import I8, I16, Vector, load
from .wide import BLOCKS, Wide

_BYTES = 64
Table = tuple[Vector, Vector]


def _tables(unit: float) -> Callable[[ir.IRBuilder], tuple[Table, Table]]:
    """The lower and the upper bytes of the BF16 of all magnitudes, in two vectors each; `unit` is what 1 stands for."""
    bits = [bf16_bits(value / unit) for value in code_values(E4M3)]

    def table(b: ir.IRBuilder, shift: int) -> Table:
        values = [each >> shift & 0xFF for each in bits]
        first, second = (ir.Constant(ir.VectorType(I8, _BYTES), values[at : at + _BYTES]) for at in (0, _BYTES))
        return Vector(b, first), Vector(b, second)

    return lambda b: (table(b, 0), table(b, 8))


def _values(b: ir.IRBuilder, tables: tuple[Table, Table], codes: ir.Value) -> list[Vector]:
    code = load(b, codes, I8, _BYTES)
    low, high = (first.bytes_permuted_with(second, code) for first, second in tables)  # seven bits of a lane count
    high |= code & 0x80
    return [low.shuffle(_interleaved(half), high).cast(I16) for half in (0, 8)]


def _interleaved(first: int) -> list[int]:
    """Of each sixteen lanes, the eight from `first` on, of one vector and another in turns."""
    lanes = [start + lane for start in range(first, _BYTES, 16) for lane in range(8)]
    return [lane + at for lane in lanes for at in (0, _BYTES)]


MXFP8 = Wide("bytes", _BYTES, _values, _tables(1.0), powers_of_two(BLOCKS["bytes"]))
FP8 = Wide("bytes", _BYTES, _values, _tables(HALF_UNIT))
"""In units of `HALF_UNIT`."""
