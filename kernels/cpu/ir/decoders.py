"""How codes of each format become factors, and how their products with activations are added up, in vector IR."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from . import byte_codes, nl4_decode, nvfp4_decode, plain_decode
from .integer_decode import even_and_odd, look_up, scale_and_zero, table_of_codes
from .mx_decode import look_up_mxfp6, values
from .mxfp4_decode import decode_block, look_up_block
from .quads import OF_SEGMENTS, QUADS
from .scaled_decode import HALF_UNIT, decode, decode_with_halves, signed_pairs
from .vector import F32, I8, I16, I32, I64, ITEM_BYTES, Vector, accumulate_product, load, load_scalar, splat
from .wide import Wide

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
    wide: Wide | None = None
    """How several blocks are decoded together, if they are; all segments but the last have a whole number of such."""

    def serves(self, block_cols: int) -> bool:
        """Whether a scale for every `block_cols` weights of a row (0: for all of them) is one that it reads."""
        return self.block_scales > 0 or block_cols % BLOCK == 0


def _f32_products(sums: Vector, factors: list[Vector], x: ir.Value) -> Vector:
    b = sums.b
    for number, factor in enumerate(factors):
        sums = accumulate_product(factor, load(b, b.add(x, I64(64 * number)), F32, 16), sums)
    return sums


def bf16_products(sums: Vector, factors: list[Vector], x: ir.Value) -> Vector:
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


def _integer_decoder(bits: int, scale_kind: str, x_kind: str, wide: Wide | None = None) -> Decoder:
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
        accumulate=bf16_products if x_kind == "bf16" else _f32_products,
        segment=with_table if tables else with_zero,
        scale_bytes=2 * ITEM_BYTES[scale_kind],
        even_first=x_kind == "f32",
        wide=wide,
    )


def _plain_decoder(kind: str) -> Decoder:
    """Weights that are no codes; the scale of a row is to be 1."""
    return Decoder(
        code_bytes=BLOCK * ITEM_BYTES[kind],
        x_bytes=BLOCK * ITEM_BYTES["f32"],
        decode=lambda b, weights, _: plain_decode.values(b, weights, kind),
        accumulate=_f32_products,
    )


def _plain_bits(b: ir.IRBuilder, weights: ir.Value, _: Any) -> list[Vector]:
    return [load(b, weights, I16, BLOCK)]


DECODERS: Mapping[str, Decoder] = {
    "mxfp4_bf16": Decoder(16, 64, _mxfp4_bits, bf16_products, block_scales=1, wide=QUADS["mxfp4"]),
    "mxfp4_f32": Decoder(16, 128, _mxfp4_values, _f32_products, block_scales=1, even_first=True),
    **{
        decoder: made
        for name in ("mxfp6_e2m3", "mxfp6_e3m2")
        for decoder, made in (
            (f"{name}_bf16", Decoder(24, 64, _mxfp6_bits(name), bf16_products, block_scales=1)),
            (f"{name}_vbmi_bf16", Decoder(24, 64, _mxfp6_bits(name), bf16_products, block_scales=1, wide=QUADS[name])),
            (f"{name}_f32", Decoder(24, 128, _mx_values(name), _f32_products, block_scales=1, even_first=True)),
        )
    },
    "mxfp8_bf16": Decoder(32, 64, _mxfp8_bits, bf16_products, block_scales=1),
    "mxfp8_vbmi_bf16": Decoder(32, 64, _mxfp8_bits, bf16_products, block_scales=1, wide=byte_codes.MXFP8),
    "mxfp8_f16c": Decoder(32, 128, _mx_values("mxfp8_f16c"), _f32_products, block_scales=1, even_first=True),
    "mxfp8_f32": Decoder(32, 128, _mx_values("mxfp8"), _f32_products, block_scales=1, even_first=True),
    "nvfp4_bf16": Decoder(16, 64, _nvfp4_bits, bf16_products, block_scales=2, wide=QUADS["nvfp4"]),
    "nvfp4_f32": Decoder(16, 128, _nvfp4_values, _f32_products, block_scales=2, even_first=True),
    "nl4_bf16": Decoder(16, 64, _nl4_bits, bf16_products, block_scales=1, wide=QUADS["nl4"]),
    "nl4_f32": Decoder(16, 128, _nl4_values, _f32_products, block_scales=1, even_first=True),
    "fp8_bf16": Decoder(32, 64, _fp8_bits, bf16_products, segment=_scale_of_halves),
    "fp8_vbmi_bf16": Decoder(32, 64, _fp8_bits, bf16_products, segment=_scale_of_halves, wide=byte_codes.FP8),
    "fp8_f16c": Decoder(32, 128, _fp8_halves, _f32_products, segment=_scale_of_halves),
    "fp8_f32": Decoder(32, 128, _scaled_values("fp8"), _f32_products),
    "int8_bf16": Decoder(32, 64, _int8_bits, bf16_products),
    "int8_f32": Decoder(32, 128, _scaled_values("int8"), _f32_products),
    **{
        f"uint{bits}_{scale_kind}_{x_kind}": _integer_decoder(bits, scale_kind, x_kind)
        for bits in (4, 8)
        for scale_kind in ITEM_BYTES
        for x_kind in ("bf16", "f32")
    },
    **{
        f"uint4_{scale_kind}_quads_bf16": _integer_decoder(4, scale_kind, "bf16", OF_SEGMENTS)
        for scale_kind in ITEM_BYTES
    },
    **{f"plain_{kind}": _plain_decoder(kind) for kind in ITEM_BYTES},
    "plain_bf16_bf16": Decoder(64, 64, _plain_bits, bf16_products),
}
"""`_bf16`: activations in BF16, needs avx512bw and avx512bf16; `_vbmi_bf16` needs avx512vbmi, too. Others: activations
in float32; `_f16c` needs f16c.

Those with a `wide` want activations in another order (`wide.arrange`). `plain_`: weights that are no codes, of that
kind, with activations in float32 unless it ends with `_bf16`, too; `plain_f16` needs f16c.
"""


def order_of(decoder: str) -> str | None:
    """The order in which activations must stand (see `wide`), if it is not their own."""
    wide = DECODERS[decoder].wide
    return None if wide is None else wide.order
