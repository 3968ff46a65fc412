"""Dot products of rows of quantized weights with a few vectors of activations, in vector IR.

Weights are decoded in registers, used for all tokens, and never stored: 32 at a time by a `decoders.Decoder`, or as
many as its `wide` takes together. Meanwhile the cache is asked for what comes next.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from .decoders import DECODERS, bf16_products
from .vector import (
    F32,
    I64,
    Accumulators,
    Codegen,
    accumulate_product,
    constant,
    count_to,
    emitted,
    load_scalar,
    nearest_bf16,
    prefetch,
    splat,
    store_scalar,
)
from .wide import X_BYTES

CODES_AHEAD, SCALES_AHEAD = 4096, 512
"""Bytes that are asked for ahead, at least: what memory gives while it makes one of them wait."""


def _ahead(b: ir.IRBuilder, stride: ir.Value, rows: int, least: int) -> ir.Value:
    """Bytes from rows that are worked on to those that are asked for meanwhile: the next ones, or further on."""
    next_rows = b.mul(stride, I64(rows))
    return b.select(b.icmp_unsigned("<", next_rows, I64(least)), I64(least), next_rows)


def _factors(b: ir.IRBuilder, scales: ir.Value, stride: ir.Value, rows: int) -> list[ir.Value]:
    """float32 at the address of each row, or 1 where the address is 0: no sum changes for that."""
    with b.if_else(b.icmp_unsigned("!=", scales, I64(0))) as (given, otherwise):
        with given:
            found = [load_scalar(b, b.add(scales, b.mul(stride, I64(row))), F32) for row in range(rows)]
            here = b.block
        with otherwise:
            there = b.block
    factors = []
    for value in found:
        phi = b.phi(F32)
        phi.add_incoming(value, here)
        phi.add_incoming(F32(1.0), there)
        factors.append(phi)
    return factors


def _as_it_is(_: ir.IRBuilder, total: ir.Value) -> ir.Value:
    return total


@emitted
def dot_rows(
    typing: Any,
    codes: Any,
    codes_stride: Any,
    scales: Any,
    scales_stride: Any,
    x: Any,
    x_stride: Any,
    blocks: Any,
    segment_blocks: Any,
    out: Any,
    out_stride: Any,
    narrow: Any,
    row_scales: Any,
    row_scales_stride: Any,
    rows: Any,
    tokens: Any,
    decoder: Any,
) -> tuple[Any, Codegen]:
    """out[t][r] = sum over k of weight[r][k] * x[t][k], for `rows` rows and `tokens` tokens (literals).

    Sums are float32, multiplied by the one at `row_scales` if that is not 0; so is `out`, or where `narrow` is not 0 it
    is the nearest BF16.

    Addresses and strides in bytes; `segment_blocks` blocks share a float32 scale where blocks have no scale bytes.
    """
    n_rows, n_tokens = int(rows.literal_value), int(tokens.literal_value)
    kind = DECODERS[str(decoder.literal_value)]
    wide = kind.wide

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        codes, codes_stride, scales, scales_stride, x, x_stride, blocks, segment_blocks, out, out_stride, *rest = args
        narrow, row_scales, row_scales_stride, *_ = rest
        acc = Accumulators(b)
        cells = [(row, token) for row in range(n_rows) for token in range(n_tokens)]
        for row, token in cells:
            acc.start(f"sum {row} {token}", constant(b, F32, 16, 0.0))
        code_rows = [b.add(codes, b.mul(codes_stride, I64(row))) for row in range(n_rows)]
        scale_rows = [b.add(scales, b.mul(scales_stride, I64(row))) for row in range(n_rows)]
        x_rows = [b.add(x, b.mul(x_stride, I64(token))) for token in range(n_tokens)]

        next_codes = b.add(codes, _ahead(b, codes_stride, n_rows, CODES_AHEAD))
        next_scales = b.add(scales, _ahead(b, scales_stride, n_rows, SCALES_AHEAD))

        def add_block(block: ir.Value, sums: str, segments: list[Any]) -> None:
            prefetch(b, next_codes, block, kind.code_bytes * n_rows)
            if kind.block_scales:
                prefetch(b, next_scales, block, kind.block_scales * n_rows)
            at, x_at = b.mul(block, I64(kind.code_bytes)), b.mul(block, I64(kind.x_bytes))
            for row in range(n_rows):
                own = b.mul(block, I64(kind.block_scales))
                scale = b.add(scale_rows[row], own) if kind.block_scales else segments[row]
                factors = kind.decode(b, b.add(code_rows[row], at), scale)
                for token in range(n_tokens):
                    address = b.add(x_rows[token], x_at)
                    acc.update(f"{sums} {row} {token}", lambda a, f=factors, x=address: kind.accumulate(a, f, x))  # type: ignore[misc]

        def add_wide(number: ir.Value, tables: list[Any]) -> None:
            assert wide is not None
            scale_bytes = kind.block_scales * wide.blocks
            prefetch(b, next_codes, number, wide.code_bytes * n_rows)
            if scale_bytes:
                prefetch(b, next_scales, number, scale_bytes * n_rows)
            at, x_at = b.mul(number, I64(wide.code_bytes)), b.mul(number, I64(X_BYTES * wide.blocks))
            for row in range(n_rows):
                factors = wide.factors(b, tables[row], b.add(code_rows[row], at))
                scale = wide.scales and wide.scales(b, b.add(scale_rows[row], b.mul(number, I64(scale_bytes))))
                for token in range(n_tokens):
                    part = acc.get(f"part {row} {token}") if scale is None else constant(b, F32, 16, 0.0)
                    for place, factor in enumerate(factors):
                        part = bf16_products(part, [factor], b.add(b.add(x_rows[token], x_at), I64(X_BYTES * place)))
                    if scale is None:
                        acc.set(f"part {row} {token}", part)
                    else:
                        acc.update(f"sum {row} {token}", lambda a, p=part, s=scale: accumulate_product(p, s, a))  # type: ignore[misc]

        tables = [wide.table(b)] * n_rows if wide is not None and wide.table is not None else None
        if wide is not None and wide.scales is not None:
            assert tables is not None
            count = b.udiv(blocks, I64(wide.blocks))
            done = b.mul(count, I64(wide.blocks))
            with count_to(b, count) as number:
                add_wide(number, tables)
            with count_to(b, b.sub(blocks, done)) as block:
                add_block(b.add(done, block), "sum", [])
        elif kind.block_scales:
            with count_to(b, blocks) as block:
                add_block(block, "sum", [])
        else:
            segments = b.udiv(b.add(blocks, b.sub(segment_blocks, I64(1))), segment_blocks)
            with count_to(b, segments) as segment:
                first = b.mul(segment, segment_blocks)
                left = b.sub(blocks, first)
                for row, token in cells:
                    acc.start(f"part {row} {token}", constant(b, F32, 16, 0.0))
                at = b.mul(segment, I64(kind.scale_bytes))
                scales, states = zip(*(kind.segment(b, b.add(row, at)) for row in scale_rows), strict=True)
                count = b.select(b.icmp_unsigned("<", left, segment_blocks), left, segment_blocks)
                if wide is not None:
                    whole = b.udiv(count, I64(wide.blocks))
                    with count_to(b, whole) as i:
                        add_wide(b.add(b.udiv(first, I64(wide.blocks)), i), tables or list(states))
                    whole = b.mul(whole, I64(wide.blocks))
                    first, count = b.add(first, whole), b.sub(count, whole)
                with count_to(b, count) as i:
                    add_block(b.add(first, i), "part", list(states))
                for row in range(n_rows):
                    scale = splat(b, scales[row], 16)
                    for token in range(n_tokens):
                        part = acc.get(f"part {row} {token}")
                        acc.update(f"sum {row} {token}", lambda a, p=part, s=scale: accumulate_product(p, s, a))  # type: ignore[misc]
        sums = {(row, token): acc.get(f"sum {row} {token}").sum() for row, token in cells}
        factors = _factors(b, row_scales, row_scales_stride, n_rows)
        sums = {(row, token): b.fmul(total, factors[row]) for (row, token), total in sums.items()}
        with b.if_else(b.icmp_unsigned("!=", narrow, I64(0))) as branches:
            for branch, width, stored in zip(branches, (2, 4), (nearest_bf16, _as_it_is), strict=True):
                with branch:
                    for (row, token), total in sums.items():
                        address = b.add(b.add(out, b.mul(out_stride, I64(token))), I64(width * row))
                        store_scalar(b, stored(b, total), address)
        return context.get_dummy_value()

    addresses = (codes, codes_stride, scales, scales_stride, x, x_stride, blocks, segment_blocks, out, out_stride)
    return types.void(*addresses, narrow, row_scales, row_scales_stride, rows, tokens, decoder), codegen
