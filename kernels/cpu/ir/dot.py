"""Dot products of rows of quantized weights with a few vectors of activations, in vector IR.

Weights are decoded 32 at a time in registers, used for all tokens, and never stored. What differs between formats is
a `Decoder`: how 32 codes become factors, and how their products are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types

from . import nl4_decode, nvfp4_decode, plain_decode
from .integer_decode import even_and_odd, look_up, scale_and_zero, table_of_codes
from .mx_decode import look_up_mxfp6, values
from .mxfp4_decode import decode_block, look_up_block
from .quads import BLOCKS, CODE_BYTES, QUADS, X_BYTES, Quads, look_ups
from .scaled_decode import HALF_UNIT, decode, decode_with_halves, signed_pairs
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
    accumulate_product,
    constant,
    count_to,
    emitted,
    load,
    load_scalar,
    nearest_bf16,
    prefetch,
    splat,
    store_scalar,
)

CODES_AHEAD, SCALES_AHEAD = 4096, 512
"""Bytes that are asked for ahead, at least: what memory gives while it makes one of them wait."""
BLOCK = 32
"""Weights that are decoded together; the K of a call is a multiple of it."""


def _float32_scale(b: ir.IRBuilder, scale: ir.Value) -> tuple[ir.Value, None]:
    return load_scalar(b, scale, F32), None


def _scale_of_halves(b: ir.IRBuilder, scale: ir.Value) -> tuple[ir.Value, None]:
    return b.fmul(load_scalar(b, scale, F32), F32(HALF_UNIT)), None


@dataclass(frozen=True)
class Decoder:
    """How 32 weights are decoded and multiplied."""

    code_bytes: int
    """Bytes of 32 codes."""
    x_bytes: int
    """Bytes of the 32 activations that they meet."""
    decode: Callable[[ir.IRBuilder, ir.Value, Any], list[Vector]]
    """(builder, address of the codes, address of the block's scale byte or what `segment` made) -> factors."""
    accumulate: Callable[[Vector, list[Vector], ir.Value], Vector]
    """(16 float32 sums, factors, address of the activations) -> the sums with the products added."""
    block_scales: int = 0
    """Scale bytes that each 32 weights have of their own; 0: a segment of a row has one scale."""
    even_first: bool = False
    """Whether the activations of a block must stand with the 16 even ones before the 16 odd ones."""
    segment: Callable[[ir.IRBuilder, ir.Value], tuple[ir.Value, Any]] = _float32_scale
    """(builder, address of the scale of a segment) -> float32 scale, what its codes are decoded with."""
    scale_bytes: int = 4
    """Bytes from the scale of a segment to that of the next."""

    def serves(self, block_cols: int) -> bool:
        """Whether a scale for every `block_cols` weights of a row (0: for all of them) is one that it reads."""
        return self.block_scales > 0 or block_cols % BLOCK == 0


def _f32_products(sums: Vector, factors: list[Vector], x: ir.Value) -> Vector:
    b = sums.b
    for number, factor in enumerate(factors):
        sums = accumulate_product(factor, load(b, b.add(x, I64(64 * number)), F32, 16), sums)
    return sums


def _bf16_products(sums: Vector, factors: list[Vector], x: ir.Value) -> Vector:
    (factor,) = factors
    return sums.add_bf16_products(factor, load(sums.b, x, factor.type.element, 32))


def _mxfp4_values(b: ir.IRBuilder, codes: ir.Value, scale: ir.Value) -> list[Vector]:
    """The 16 even weights, then the 16 odd ones."""
    pairs = decode_block(b, codes, scale).cast(I32)
    return [(pairs << 16).cast(F32), (pairs & 0xFFFF0000).cast(F32)]


def _mxfp4_bits(b: ir.IRBuilder, codes: ir.Value, scale: ir.Value) -> list[Vector]:
    return [look_up_block(b, codes, scale)]


def _mx_values(family: str) -> Callable[[ir.IRBuilder, ir.Value, ir.Value], list[Vector]]:
    return lambda b, codes, scale: values(b, codes, scale, family)


def _mxfp6_bits(name: str) -> Callable[[ir.IRBuilder, ir.Value, ir.Value], list[Vector]]:
    return lambda b, codes, scale: [look_up_mxfp6(b, codes, scale, name)]


def _mxfp8_bits(b: ir.IRBuilder, codes: ir.Value, scale: ir.Value) -> list[Vector]:
    return [_interleave(*values(b, codes, scale, "mxfp8_f16c"))]


def _nvfp4_values(b: ir.IRBuilder, codes: ir.Value, scales: ir.Value) -> list[Vector]:
    return nvfp4_decode.values(b, codes, nvfp4_decode.scales_of(b, scales))


def _nvfp4_bits(b: ir.IRBuilder, codes: ir.Value, scales: ir.Value) -> list[Vector]:
    return [nvfp4_decode.look_up(b, codes, nvfp4_decode.scales_of(b, scales))]


def _nl4_values(b: ir.IRBuilder, codes: ir.Value, scale: ir.Value) -> list[Vector]:
    return nl4_decode.values(b, codes, nvfp4_decode.e4m3_value(b, scale))


def _nl4_bits(b: ir.IRBuilder, codes: ir.Value, scale: ir.Value) -> list[Vector]:
    return [nl4_decode.look_up(b, codes, nvfp4_decode.e4m3_value(b, scale))]


def _scaled_values(target: str) -> Callable[[ir.IRBuilder, ir.Value, Any], list[Vector]]:
    return lambda b, codes, scale: [decode(load(b, b.add(codes, I64(at)), I8, 16).sext(I32), target) for at in (0, 16)]


def _fp8_halves(b: ir.IRBuilder, codes: ir.Value, _: None) -> list[Vector]:
    return [decode_with_halves(load(b, b.add(codes, I64(at)), I8, 16).sext(I16)) for at in (0, 16)]


def _fp8_bits(b: ir.IRBuilder, codes: ir.Value, _: None) -> list[Vector]:
    pairs = load(b, codes, I16, 16)
    even, odd = (pairs << 8).shift_right_signed(8), pairs.shift_right_signed(8)
    return [_interleave(decode_with_halves(even), decode_with_halves(odd))]


def _int8_bits(b: ir.IRBuilder, codes: ir.Value, _: None) -> list[Vector]:
    even, odd = signed_pairs(b, codes)
    return [_interleave(decode(even, "int8"), decode(odd, "int8"))]


def _interleave(even: Vector, odd: Vector) -> Vector:
    """BF16 bits of float32 values that have no more than eight significant bits: even lanes, odd lanes."""
    return ((even.cast(I32) >> 16) | (odd.cast(I32) & 0xFFFF0000)).cast(I16)


def _integer_decoder(bits: int, scale_kind: str, x_kind: str) -> Decoder:
    """Codes with a zero point, which the factors have behind them."""

    def with_table(b: ir.IRBuilder, words: ir.Value) -> tuple[ir.Value, Vector]:
        scale, zero = scale_and_zero(b, words, scale_kind)
        return scale, table_of_codes(b, zero)

    def with_zero(b: ir.IRBuilder, words: ir.Value) -> tuple[ir.Value, Vector]:
        scale, zero = scale_and_zero(b, words, scale_kind)
        return scale, splat(b, zero, 16)

    def factors(b: ir.IRBuilder, codes: ir.Value, zero: Vector) -> list[Vector]:
        pair = even_and_odd(b, codes, bits, zero)
        return pair if x_kind == "f32" else [_interleave(*pair)]

    tables = bits == 4 and x_kind == "bf16"
    return Decoder(
        code_bytes=BLOCK * bits // 8,
        x_bytes=BLOCK * ITEM_BYTES[x_kind],
        decode=(lambda b, codes, table: [look_up(b, codes, table)]) if tables else factors,
        accumulate=_bf16_products if x_kind == "bf16" else _f32_products,
        segment=with_table if tables else with_zero,
        scale_bytes=2 * ITEM_BYTES[scale_kind],
        even_first=x_kind == "f32",
    )


def _plain_decoder(kind: str) -> Decoder:
    """Weights that are no codes; the scale of a row is to be 1."""
    return Decoder(
        code_bytes=BLOCK * ITEM_BYTES[kind],
        x_bytes=BLOCK * ITEM_BYTES["f32"],
        decode=lambda b, weights, _: plain_decode.values(b, weights, kind),
        accumulate=_f32_products,
    )


DECODERS: Mapping[str, Decoder] = {
    "mxfp4_bf16": Decoder(16, 64, _mxfp4_bits, _bf16_products, block_scales=1),
    "mxfp4_f32": Decoder(16, 128, _mxfp4_values, _f32_products, block_scales=1, even_first=True),
    **{
        decoder: made
        for name in ("mxfp6_e2m3", "mxfp6_e3m2")
        for decoder, made in (
            (f"{name}_bf16", Decoder(24, 64, _mxfp6_bits(name), _bf16_products, block_scales=1)),
            (f"{name}_f32", Decoder(24, 128, _mx_values(name), _f32_products, block_scales=1, even_first=True)),
        )
    },
    "mxfp8_bf16": Decoder(32, 64, _mxfp8_bits, _bf16_products, block_scales=1),
    "mxfp8_f16c": Decoder(32, 128, _mx_values("mxfp8_f16c"), _f32_products, block_scales=1, even_first=True),
    "mxfp8_f32": Decoder(32, 128, _mx_values("mxfp8"), _f32_products, block_scales=1, even_first=True),
    "nvfp4_bf16": Decoder(16, 64, _nvfp4_bits, _bf16_products, block_scales=2),
    "nvfp4_f32": Decoder(16, 128, _nvfp4_values, _f32_products, block_scales=2, even_first=True),
    "nl4_bf16": Decoder(16, 64, _nl4_bits, _bf16_products, block_scales=1),
    "nl4_f32": Decoder(16, 128, _nl4_values, _f32_products, block_scales=1, even_first=True),
    "fp8_bf16": Decoder(32, 64, _fp8_bits, _bf16_products, segment=_scale_of_halves),
    "fp8_f16c": Decoder(32, 128, _fp8_halves, _f32_products, segment=_scale_of_halves),
    "fp8_f32": Decoder(32, 128, _scaled_values("fp8"), _f32_products),
    "int8_bf16": Decoder(32, 64, _int8_bits, _bf16_products),
    "int8_f32": Decoder(32, 128, _scaled_values("int8"), _f32_products),
    **{
        f"uint{bits}_{scale_kind}_{x_kind}": _integer_decoder(bits, scale_kind, x_kind)
        for bits in (4, 8)
        for scale_kind in ITEM_BYTES
        for x_kind in ("bf16", "f32")
    },
    **{f"plain_{kind}": _plain_decoder(kind) for kind in ITEM_BYTES},
}
"""`_bf16`: activations in BF16, needs avx512bw and avx512bf16. Others: activations in float32; `_f16c` needs f16c.

Those of `quads.QUADS` want activations in another order (`quads.arrange`). `plain_`: weights that are no codes, of that
kind, with activations in float32; `plain_f16` needs f16c.
"""


def _ahead(b: ir.IRBuilder, stride: ir.Value, rows: int, least: int) -> ir.Value:
    """Bytes from rows that are worked on to those that are asked for meanwhile: the next ones, or further on."""
    next_rows = b.mul(stride, I64(rows))
    return b.select(b.icmp_unsigned("<", next_rows, I64(least)), I64(least), next_rows)


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
    rows: Any,
    tokens: Any,
    decoder: Any,
) -> tuple[Any, Codegen]:
    """out[t][r] = sum over k of weight[r][k] * x[t][k], for `rows` rows and `tokens` tokens (literals).

    Sums are float32, and so is `out`, or where `narrow` is not 0 it is the nearest BF16.

    Addresses and strides in bytes; `segment_blocks` blocks share a float32 scale where blocks have no scale bytes.
    """
    n_rows, n_tokens = int(rows.literal_value), int(tokens.literal_value)
    kind, quads = DECODERS[str(decoder.literal_value)], QUADS.get(str(decoder.literal_value))

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        codes, codes_stride, scales, scales_stride, x, x_stride, blocks, segment_blocks, out, out_stride, narrow, *_ = (
            args
        )
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

        def add_quad(quads: Quads, quad: ir.Value) -> None:
            prefetch(b, next_codes, quad, CODE_BYTES * n_rows)
            prefetch(b, next_scales, quad, kind.block_scales * BLOCKS * n_rows)
            at, x_at = b.mul(quad, I64(CODE_BYTES)), b.mul(quad, I64(X_BYTES))
            scales_at = b.mul(quad, I64(kind.block_scales * BLOCKS))
            for row in range(n_rows):
                factors = look_ups(table, b.add(code_rows[row], at))
                scale = quads.scales(b, b.add(scale_rows[row], scales_at))
                for token in range(n_tokens):
                    part = constant(b, F32, 16, 0.0)
                    for number, factor in enumerate(factors):
                        part = _bf16_products(part, [factor], b.add(b.add(x_rows[token], x_at), I64(64 * number)))
                    acc.update(f"sum {row} {token}", lambda a, p=part, s=scale: accumulate_product(p, s, a))  # type: ignore[misc]

        if quads is not None:
            table = quads.table(b)
            count = b.lshr(blocks, I64(2))
            done = b.mul(count, I64(BLOCKS))
            with count_to(b, count) as quad:
                add_quad(quads, quad)
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
                with count_to(b, b.select(b.icmp_unsigned("<", left, segment_blocks), left, segment_blocks)) as i:
                    add_block(b.add(first, i), "part", list(states))
                for row in range(n_rows):
                    scale = splat(b, scales[row], 16)
                    for token in range(n_tokens):
                        part = acc.get(f"part {row} {token}")
                        acc.update(f"sum {row} {token}", lambda a, p=part, s=scale: accumulate_product(p, s, a))  # type: ignore[misc]
        sums = {(row, token): acc.get(f"sum {row} {token}").sum() for row, token in cells}
        with b.if_else(b.icmp_unsigned("!=", narrow, I64(0))) as branches:
            for branch, width, stored in zip(branches, (2, 4), (nearest_bf16, _as_it_is), strict=True):
                with branch:
                    for (row, token), total in sums.items():
                        address = b.add(b.add(out, b.mul(out_stride, I64(token))), I64(width * row))
                        store_scalar(b, stored(b, total), address)
        return context.get_dummy_value()

    addresses = (codes, codes_stride, scales, scales_stride, x, x_stride, blocks, segment_blocks, out, out_stride)
    return types.void(*addresses, narrow, rows, tokens, decoder), codegen
