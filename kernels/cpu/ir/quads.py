"""Codes of four bits, four blocks of 32 at a time: looked up as they lie in memory, in vector IR for avx512bw.

A word of 16 bits holds four codes. Shifted by 0, 4, 8 and 12 bits, 32 such words are the indices of four look-ups in a
table of sixteen, so that nothing has to be spread first; activations are brought into that order once for all rows
(`arrange`). A look-up has one weight of each word, and lanes 4i to 4i + 3 of float32 sums of pairs belong to block i:
they are multiplied by the scales of the blocks when 128 products have been added up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types

from ...nl4_levels import LEVELS
from .mxfp4_decode import E2M1_BITS
from .nvfp4_decode import e4m3_value
from .vector import F32, I8, I16, I32, I64, Codegen, Vector, count_to, emitted, load, store

BLOCKS = 4
WEIGHTS = 128
WORDS = 32
CODE_BYTES = 2 * WORDS
"""Of 128 weights."""
X_BYTES = 256
"""Of the 128 activations that meet the codes, in BF16."""
LEAST_MXFP4 = 0x00400000
"""float32 bits of 2^-127, which the scale byte 0 stands for."""


@dataclass(frozen=True)
class Quads:
    """How four blocks are decoded: what their codes mean, and the scales of their sums."""

    values: tuple[int, ...]
    """BF16 bits of the sixteen codes."""
    scales: Callable[[ir.IRBuilder, ir.Value], Vector]
    """(builder, address of the scale of the first block) -> float32 [16] factors of the sums of pairs."""

    def table(self, b: ir.IRBuilder) -> Vector:
        """For `look_ups`: twice, as an index has one bit of the next code."""
        return Vector(b, ir.Constant(ir.VectorType(I16, 32), list(self.values * 2)))


def look_ups(table: Vector, codes: ir.Value) -> list[Vector]:
    """BF16 bits of the 128 values at an address; those of codes 4i + n are in lane i of the n-th vector."""
    words = load(table.b, codes, I16, WORDS)
    return [table.permuted(words >> (4 * number) if number else words) for number in range(BLOCKS)]


def _powers_of_two(b: ir.IRBuilder, address: ir.Value) -> Vector:
    bits = (load(b, address, I8, BLOCKS).zext(I32) << 23).max(LEAST_MXFP4)
    return bits.cast(F32).shuffle([lane // 4 for lane in range(16)])


def _e4m3(b: ir.IRBuilder, address: ir.Value, count: int) -> Vector:
    """`count` scales, each for as many of the sixteen lanes."""
    scales = Vector(b, ir.Constant(ir.VectorType(F32, count), ir.Undefined))
    for number in range(count):
        value = e4m3_value(b, b.add(address, I64(number)))
        scales = scales.new(b.insert_element(scales.value, value, I32(number)))
    return scales.shuffle([lane * count // 16 for lane in range(16)])


def _bf16_bits(value: int) -> int:
    """Of a whole number of at most eight significant bits."""
    if value == 0:
        return 0
    exponent = abs(value).bit_length() - 1
    mantissa = abs(value) * 128 >> exponent & 127
    return (value < 0) << 15 | exponent + 127 << 7 | mantissa


QUADS: Mapping[str, Quads] = {
    "mxfp4_bf16": Quads(E2M1_BITS, _powers_of_two),
    "nvfp4_bf16": Quads(E2M1_BITS, lambda b, address: _e4m3(b, address, 8)),
    "nl4_bf16": Quads(tuple(map(_bf16_bits, LEVELS)), lambda b, address: _e4m3(b, address, 4)),
}
"""By the name of the decoder in `decoders.DECODERS` that serves what is left over."""


@emitted
def arrange(typing: Any, x: Any, out: Any, blocks: Any) -> tuple[Any, Codegen]:
    """Bring BF16 activations of a row of so many blocks of 32 into the order of `look_ups`; those left over stay."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        x, out, blocks = args
        quads = b.lshr(blocks, I64(2))
        with count_to(b, quads) as quad:
            at = b.mul(quad, I64(X_BYTES))
            words = load(b, b.add(x, at), I64, WORDS)
            for number in range(BLOCKS):
                lanes = (words >> (16 * number) if number else words).trunc(I16)
                store(lanes, b.add(out, b.add(at, I64(2 * WORDS * number))))
        done = b.mul(quads, I64(BLOCKS))
        with count_to(b, b.sub(blocks, done)) as block:
            at = b.mul(b.add(done, block), I64(2 * WORDS))
            store(load(b, b.add(x, at), I16, WORDS), b.add(out, at))
        return context.get_dummy_value()

    return types.void(x, out, blocks), codegen
