"""Products of rows of BF16 weights with tokens, in vector IR: what a core does with both in its own caches."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from .vector import F32, I16, I64, Accumulators, Codegen, Vector, constant, count_to, emitted, load, store

ROWS = 4
TOKENS = 4
"""Rows and tokens that are multiplied together: sixteen sums, of sixteen lanes each."""
BLOCK = 32
"""Columns that an instruction takes of each."""


@emitted
def add_products(
    typing: Any,
    weights: Any,
    weights_stride: Any,
    x: Any,
    x_stride: Any,
    blocks: Any,
    out: Any,
    out_stride: Any,
    first: Any,
) -> tuple[Any, Codegen]:
    """out[t][r] += sum over k of weights[r][k] * x[t][k], float32, for `ROWS` rows and `TOKENS` tokens.

    Addresses and strides in bytes. `first` nonzero: what `out` held does not count. Needs avx512bw and avx512bf16.
    """

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        weights, weights_stride, x, x_stride, blocks, out, out_stride, first = args
        acc = Accumulators(b)
        cells = [(token, row) for token in range(TOKENS) for row in range(ROWS)]
        for token, row in cells:
            acc.start(f"{token} {row}", constant(b, F32, 16, 0.0))
        weight_rows = [b.add(weights, b.mul(weights_stride, I64(row))) for row in range(ROWS)]
        x_rows = [b.add(x, b.mul(x_stride, I64(token))) for token in range(TOKENS)]
        with count_to(b, blocks) as block:
            at = b.mul(block, I64(2 * BLOCK))
            factors = [load(b, b.add(row, at), I16, BLOCK) for row in weight_rows]
            tokens = [load(b, b.add(row, at), I16, BLOCK) for row in x_rows]
            for token, row in cells:
                acc.update(f"{token} {row}", lambda a, w=factors[row], t=tokens[token]: a.add_bf16_products(w, t))  # type: ignore[misc]
        sums = lane_sums([acc.get(f"{token} {row}") for token, row in cells])
        is_first = b.icmp_unsigned("!=", first, I64(0))
        for token in range(TOKENS):
            address = b.add(out, b.mul(out_stride, I64(token)))
            part = sums.shuffle(range(ROWS * token, ROWS * (token + 1)))
            total = part + load(b, address, F32, ROWS)
            store(part.new(b.select(is_first, part.value, total.value)), address)
        return context.get_dummy_value()

    return types.void(weights, weights_stride, x, x_stride, blocks, out, out_stride, first), codegen


def lane_sums(vectors: list[Vector]) -> Vector:
    """The sum of each of several vectors of as many lanes, each in a lane; added in the order of `Vector.sum`."""
    lanes = width = len(vectors)  # of a vector, of what is left of one sum
    while width > 1:
        half = width // 2
        low = [lane for start in range(0, 2 * lanes, width) for lane in range(start, start + half)]
        high = [lane + half for lane in low]
        pairs = zip(vectors[0::2], vectors[1::2], strict=True)
        vectors = [one.shuffle(low, other) + one.shuffle(high, other) for one, other in pairs]
        width = half
    return vectors[0]
