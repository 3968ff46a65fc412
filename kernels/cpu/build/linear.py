"""Compile what a matmul with quantized weights needs: dequantized rows, dot products, and tasks that threads share.

A task is a C function of one address, where its arguments stand as int64 (`ARGUMENTS`). Each thread takes some rows
until there are none left, so a slow core holds up nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ... import nl4_levels, nvfp4_scales
from ...mx_elements import ELEMENTS
from ..compiled import FINGERPRINT, CFunction, Compiled, Recipe, c_function, read_f32, read_u8, write_u8
from ..ir.decoders import DECODERS as DOT_DECODERS
from ..ir.dot import dot_rows
from ..ir.integer_decode import LANES, dequantize_group
from ..ir.mx_decode import block_bytes, dequantize_run
from ..ir.nl4_decode import dequantize_blocks
from ..ir.nvfp4_decode import dequantize_pairs
from ..ir.scaled_decode import dequantize_tile
from ..ir.vector import I64, ITEM_BYTES, load_scalar
from ..ir.wide import arrange
from ..processor import has
from .scaled import STRIP_ROWS

_i64 = types.int64
DEQUANTIZE = types.int64(*[_i64] * 8)
TASK = types.void(_i64)
ARRANGE = types.void(*[_i64] * 4)
ARGUMENTS = (
    "next_row",
    "rows",
    "step",
    "codes",
    "codes_stride",
    "scales",
    "out",
    "out_stride",
    "cols",
    "x",
    "x_stride",
    "dequantize",
    "tokens",
    "panels",
    "next_panel",
    "narrow",
    "row_scales",
    "row_scales_stride",
)
"""The arguments of a task in order, of which it uses those it needs; strides are bytes between rows.

`narrow`: whether products are stored in BF16, instead of float32. `row_scales`: where the float32 stands that the
products of the first row are multiplied by besides, or 0.
`scales` is the address of `SCALE_ARGUMENTS` of each scale tensor of the format, in its order.
"""
SCALE_ARGUMENTS = ("address", "stride", "block_rows", "block_cols")


def _take(typing: Any, address: Any, count: Any) -> Any:
    """Add `count` to the int64 at an address, atomically, and return what was there."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return b.atomic_rmw("add", b.inttoptr(args[0], I64.as_pointer()), args[1], "monotonic")

    return types.int64(types.int64, types.int64), codegen


def _call_dequantize(
    typing: Any,
    function: Any,
    codes: Any,
    codes_stride: Any,
    scales: Any,
    out: Any,
    out_stride: Any,
    first: Any,
    rows: Any,
    cols: Any,
) -> Any:
    """Call the C function at an address, one of those that `dequantize` makes."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        pointer = b.inttoptr(args[0], ir.FunctionType(I64, [I64] * 8).as_pointer())
        return b.call(pointer, list(args[1:]))

    return types.int64(*[types.int64] * 9), codegen


def _argument(typing: Any, data: Any, index: Any) -> Any:
    """The int64 of an index at an address. Emitted: numba would compile a function of each index, in every process."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return load_scalar(b, b.add(args[0], b.mul(args[1], I64(8))), I64)

    return types.int64(types.int64, types.int64), codegen


take = intrinsic(_take)
argument = intrinsic(_argument)
call_dequantize = intrinsic(_call_dequantize)


def _dequantize(family: str, kind: str) -> Recipe[CFunction]:
    """C function (codes, their stride, scales, out, its stride, first, rows, cols) for a tile.

    `scales` is that of `ARGUMENTS`, for a matrix of which the tile begins with row `first`.
    """
    return c_function(DECODERS[family](family, kind), DEQUANTIZE)


def _mx_dequantize(family: str, kind: str) -> Any:
    fingerprint, width, code_bytes = FINGERPRINT, ITEM_BYTES[kind], block_bytes(family)

    def dequantize(codes, codes_stride, scales, out, out_stride, first, rows, cols):  # type: ignore[no-untyped-def]
        len(fingerprint)
        blocks, rest = cols // 32, cols % 32
        last = np.empty(32 * width, np.uint8)
        exponents, stride = argument(scales, 0), argument(scales, 1)
        for row in range(rows):
            c, e, o = codes + row * codes_stride, exponents + (first + row) * stride, out + row * out_stride
            dequantize_run(c, e, o, blocks, family, kind)
            if rest:
                dequantize_run(c + blocks * code_bytes, e + blocks, np.int64(last.ctypes.data), 1, family, kind)
                for i in range(rest * width):
                    write_u8(o + blocks * 32 * width + i, last[i])
        return 0

    return dequantize


def _scaled_dequantize(family: str, kind: str) -> Any:
    fingerprint, width, strip_rows = FINGERPRINT, ITEM_BYTES[kind], STRIP_ROWS

    def dequantize(codes, codes_stride, scales, out, out_stride, first, rows, cols):  # type: ignore[no-untyped-def]
        len(fingerprint)
        stride, block_rows, block_cols = argument(scales, 1), argument(scales, 2), argument(scales, 3)
        units = argument(scales, 0) + first // block_rows * stride
        down_step = strip_rows if block_cols < cols else block_rows
        for y in range(0, rows, down_step):
            for c in range(0, cols, block_cols):
                dequantize_tile(
                    codes + y * codes_stride + c,
                    codes_stride,
                    out + y * out_stride + c * width,
                    out_stride,
                    min(down_step, rows - y),
                    min(block_cols, cols - c),
                    read_f32(units + y // block_rows * stride + c // block_cols * 4),
                    family,
                    kind,
                )
        return 0

    return dequantize


def _integer_dequantize(family: str, kind: str) -> Any:
    """`family` is "uint4" or "uint8" and the type of the scales, such as "uint4_f16"."""
    code, scale_kind = family.split("_")
    fingerprint, width, bits, lanes = FINGERPRINT, ITEM_BYTES[kind], int(code.removeprefix("uint")), LANES
    word = 2 * ITEM_BYTES[scale_kind]

    def dequantize(codes, codes_stride, scales, out, out_stride, first, rows, cols):  # type: ignore[no-untyped-def]
        len(fingerprint)
        pairs, stride, block_cols = argument(scales, 0), argument(scales, 1), argument(scales, 3)
        coded, values = np.zeros(lanes, np.uint8), np.empty(lanes * width, np.uint8)
        for row in range(rows):
            for at in range(0, cols, block_cols):
                c, e = (
                    codes + row * codes_stride + at * bits // 8,
                    pairs + (first + row) * stride + at // block_cols * word,
                )
                o, left = out + row * out_stride + at * width, min(block_cols, cols - at)
                length = left // lanes * lanes
                dequantize_group(c, e, o, length, bits, scale_kind, kind)
                if length < left:
                    for i in range(((left - length) * bits + 7) // 8):
                        coded[i] = read_u8(c + length * bits // 8 + i)
                    dequantize_group(
                        np.int64(coded.ctypes.data), e, np.int64(values.ctypes.data), lanes, bits, scale_kind, kind
                    )
                    for i in range((left - length) * width):
                        write_u8(o + length * width + i, values[i])
        return 0

    return dequantize


def _nvfp4_dequantize(family: str, kind: str) -> Any:
    fingerprint, width, block, beside = FINGERPRINT, ITEM_BYTES[kind], nvfp4_scales.BLOCK, len(SCALE_ARGUMENTS)

    def dequantize(codes, codes_stride, scales, out, out_stride, first, rows, cols):  # type: ignore[no-untyped-def]
        len(fingerprint)
        of_blocks, stride, scale_2 = argument(scales, 0), argument(scales, 1), read_f32(argument(scales, beside))
        pairs, rest = cols // (2 * block), cols % (2 * block)
        coded, scaled, last = np.zeros(block, np.uint8), np.zeros(2, np.uint8), np.empty(2 * block * width, np.uint8)
        for row in range(rows):
            c, e, o = codes + row * codes_stride, of_blocks + (first + row) * stride, out + row * out_stride
            dequantize_pairs(c, e, scale_2, o, pairs, kind)
            if rest:
                blocks = (rest + block - 1) // block
                for i in range(blocks * block // 2):
                    coded[i] = read_u8(c + pairs * block + i)
                for i in range(blocks):
                    scaled[i] = read_u8(e + pairs * 2 + i)
                here, there = np.int64(coded.ctypes.data), np.int64(scaled.ctypes.data)
                dequantize_pairs(here, there, scale_2, np.int64(last.ctypes.data), 1, kind)
                for i in range(rest * width):
                    write_u8(o + pairs * 2 * block * width + i, last[i])
        return 0

    return dequantize


def _nl4_dequantize(family: str, kind: str) -> Any:
    fingerprint, width, block, beside = FINGERPRINT, ITEM_BYTES[kind], nl4_levels.BLOCK, len(SCALE_ARGUMENTS)

    def dequantize(codes, codes_stride, scales, out, out_stride, first, rows, cols):  # type: ignore[no-untyped-def]
        len(fingerprint)
        of_blocks, stride, of_rows, row_stride = (
            argument(scales, 0),
            argument(scales, 1),
            argument(scales, beside),
            argument(scales, beside + 1),
        )
        blocks, rest = cols // block, cols % block
        last = np.empty(block * width, np.uint8)
        for row in range(rows):
            c, e, o = codes + row * codes_stride, of_blocks + (first + row) * stride, out + row * out_stride
            scale_2 = read_f32(of_rows + (first + row) * row_stride)
            dequantize_blocks(c, e, scale_2, o, blocks, kind)
            if rest:
                dequantize_blocks(c + blocks * block // 2, e + blocks, scale_2, np.int64(last.ctypes.data), 1, kind)
                for i in range(rest * width):
                    write_u8(o + blocks * block * width + i, last[i])
        return 0

    return dequantize


DECODERS: Mapping[str, Callable[[str, str], Any]] = MappingProxyType(
    {
        **dict.fromkeys((*ELEMENTS, "mxfp8_f16c"), _mx_dequantize),
        "nvfp4": _nvfp4_dequantize,
        "nl4": _nl4_dequantize,
        **dict.fromkeys(("fp8", "fp8_f16c", "int8"), _scaled_dequantize),
        **{f"uint{bits}_{scale}": _integer_dequantize for bits in (4, 8) for scale in ("f16", "bf16", "f32")},
    }
)
"""What makes the function for each `WeightFormat.decoder`, with the instructions of F16C or without."""


def most_tokens() -> int:
    """Tokens whose sums for one row, each of sixteen lanes, fit the processor's registers."""
    return 8 if has("avx512bw") else 4


def _group_rows(decoder: str, tokens: int) -> int:
    """Rows of weights whose dot products are made together: as many sums as there are registers for, at most four."""
    sums, wide = 16 if has("avx512bw") else 4, DOT_DECODERS[decoder].wide
    if wide is not None and (wide.scales is not None or wide.blocks * tokens > sums):
        sums //= 2  # what is decoded, and products that wait for their scales, take registers, too
    return min(4, sums // tokens)


def _dequantize_task() -> Recipe[CFunction]:
    fingerprint = FINGERPRINT

    def task(data: int) -> None:
        len(fingerprint)
        rows, step, cols = argument(data, 1), argument(data, 2), argument(data, 8)
        codes, codes_stride, scales = argument(data, 3), argument(data, 4), argument(data, 5)
        out, out_stride, function = argument(data, 6), argument(data, 7), argument(data, 11)
        start = take(data, step)
        while start < rows:
            c, o, height = codes + start * codes_stride, out + start * out_stride, min(step, rows - start)
            call_dequantize(function, c, codes_stride, scales, o, out_stride, start, height, cols)
            start = take(data, step)

    return c_function(task, TASK)


def _dot_task(decoder: str, tokens: int) -> Recipe[CFunction]:
    """The products of all rows, under their first scale tensor alone, with `tokens` tokens: out[t][row]."""
    fingerprint, group = FINGERPRINT, _group_rows(decoder, tokens)

    def task(data: int) -> None:
        len(fingerprint)
        rows, step, blocks = argument(data, 1), argument(data, 2), argument(data, 8) // 32
        codes, codes_stride, given = argument(data, 3), argument(data, 4), argument(data, 5)
        scales, scales_stride = argument(given, 0), argument(given, 1)
        block_rows, segment = argument(given, 2), argument(given, 3) // 32
        out, out_stride = argument(data, 6), argument(data, 7)
        x, x_stride, narrow = argument(data, 9), argument(data, 10), argument(data, 15)
        given_rows, row_stride = argument(data, 16), argument(data, 17)
        width = 2 if narrow else 4
        stride = scales_stride if block_rows == 1 else 0
        start = take(data, step)
        while start < rows:
            stop = min(start + step, rows)
            row = start
            while row + group <= stop:
                c, s, o = codes + row * codes_stride, scales + row // block_rows * scales_stride, out + row * width
                dot_rows(
                    c, codes_stride, s, stride, x, x_stride, blocks, segment, o, out_stride, narrow,
                    given_rows + row * row_stride, row_stride, group, tokens, decoder,
                )  # fmt: skip
                row += group
            while row < stop:
                c, s, o = codes + row * codes_stride, scales + row // block_rows * scales_stride, out + row * width
                dot_rows(
                    c, codes_stride, s, stride, x, x_stride, blocks, segment, o, out_stride, narrow,
                    given_rows + row * row_stride, row_stride, 1, tokens, decoder,
                )  # fmt: skip
                row += 1
            start = take(data, step)

    return c_function(task, TASK)


def _arrange(order: str) -> Recipe[CFunction]:
    """C function (x, out, rows, blocks): BF16 activations [rows, 32 * blocks], in an order of `ir.wide`."""
    fingerprint = FINGERPRINT

    def arrange_rows(x: int, out: int, rows: int, blocks: int) -> None:
        len(fingerprint)
        for row in range(rows):
            arrange(x + row * blocks * 64, out + row * blocks * 64, blocks, order)

    return c_function(arrange_rows, ARRANGE)


arrange_activations = Compiled(_arrange)
dequantize = Compiled(_dequantize)
dequantize_task = Compiled(_dequantize_task)
dot_task = Compiled(_dot_task)
