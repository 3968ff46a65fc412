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

from ... import nvfp4_scales
from ...mx_elements import ELEMENTS
from ..compiled import FINGERPRINT, CFunction, Compiled, Recipe, c_function, read_f32, read_u8, write_u8
from ..ir.dot import dot_rows
from ..ir.integer_decode import LANES, dequantize_group
from ..ir.mx_decode import block_bytes, dequantize_run
from ..ir.nvfp4_decode import dequantize_pairs
from ..ir.scaled_decode import dequantize_tile
from ..ir.vector import I64, ITEM_BYTES, load_scalar
from ..processor import has
from .scaled import STRIP_ROWS

_i64 = types.int64
DEQUANTIZE = types.int64(*[_i64] * 10)
TASK = types.void(_i64)
ARGUMENTS = (
    "next_row",
    "rows",
    "step",
    "codes",
    "codes_stride",
    "scales",
    "scales_stride",
    "block_rows",
    "block_cols",
    "out",
    "out_stride",
    "cols",
    "x",
    "x_stride",
    "dequantize",
    "tokens",
    "panels",
    "next_panel",
)
"""The arguments of a task in order, of which it uses those it needs; strides are bytes between rows."""


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
    scales_stride: Any,
    out: Any,
    out_stride: Any,
    rows: Any,
    cols: Any,
    block_rows: Any,
    block_cols: Any,
) -> Any:
    """Call the C function at an address, one of those that `dequantize` makes."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        pointer = b.inttoptr(args[0], ir.FunctionType(I64, [I64] * 10).as_pointer())
        return b.call(pointer, list(args[1:]))

    return types.int64(*[types.int64] * 11), codegen


take = intrinsic(_take)
call_dequantize = intrinsic(_call_dequantize)


def _dequantize(family: str, kind: str) -> Recipe[CFunction]:
    """C function (codes, scales, out: address and stride each; rows, cols, block_rows, block_cols) for a tile."""
    return c_function(DECODERS[family](family, kind), DEQUANTIZE)


def _mx_dequantize(family: str, kind: str) -> Any:
    fingerprint, width, code_bytes = FINGERPRINT, ITEM_BYTES[kind], block_bytes(family)

    def dequantize(codes, codes_stride, scales, scales_stride, out, out_stride, rows, cols, block_rows, block_cols):  # type: ignore[no-untyped-def]
        len(fingerprint)
        blocks, rest = cols // 32, cols % 32
        last = np.empty(32 * width, np.uint8)
        for row in range(rows):
            c, e, o = codes + row * codes_stride, scales + row * scales_stride, out + row * out_stride
            dequantize_run(c, e, o, blocks, family, kind)
            if rest:
                dequantize_run(c + blocks * code_bytes, e + blocks, np.int64(last.ctypes.data), 1, family, kind)
                for i in range(rest * width):
                    write_u8(o + blocks * 32 * width + i, last[i])
        return 0

    return dequantize


def _scaled_dequantize(family: str, kind: str) -> Any:
    fingerprint, width, strip_rows = FINGERPRINT, ITEM_BYTES[kind], STRIP_ROWS

    def dequantize(codes, codes_stride, scales, scales_stride, out, out_stride, rows, cols, block_rows, block_cols):  # type: ignore[no-untyped-def]
        len(fingerprint)
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
                    read_f32(scales + y // block_rows * scales_stride + c // block_cols * 4),
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

    def dequantize(codes, codes_stride, scales, scales_stride, out, out_stride, rows, cols, block_rows, block_cols):  # type: ignore[no-untyped-def]
        len(fingerprint)
        coded, values = np.zeros(lanes, np.uint8), np.empty(lanes * width, np.uint8)
        for row in range(rows):
            for at in range(0, cols, block_cols):
                c, e = (
                    codes + row * codes_stride + at * bits // 8,
                    scales + row * scales_stride + at // block_cols * word,
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
    """`block_cols` of the function holds the float32 bits of scale_2."""
    fingerprint, width, block = FINGERPRINT, ITEM_BYTES[kind], nvfp4_scales.BLOCK

    def dequantize(codes, codes_stride, scales, scales_stride, out, out_stride, rows, cols, block_rows, block_cols):  # type: ignore[no-untyped-def]
        len(fingerprint)
        pairs, rest = cols // (2 * block), cols % (2 * block)
        coded, scaled, last = np.zeros(block, np.uint8), np.zeros(2, np.uint8), np.empty(2 * block * width, np.uint8)
        for row in range(rows):
            c, e, o = codes + row * codes_stride, scales + row * scales_stride, out + row * out_stride
            dequantize_pairs(c, e, block_cols, o, pairs, kind)
            if rest:
                blocks = (rest + block - 1) // block
                for i in range(blocks * block // 2):
                    coded[i] = read_u8(c + pairs * block + i)
                for i in range(blocks):
                    scaled[i] = read_u8(e + pairs * 2 + i)
                here, beside = np.int64(coded.ctypes.data), np.int64(scaled.ctypes.data)
                dequantize_pairs(here, beside, block_cols, np.int64(last.ctypes.data), 1, kind)
                for i in range(rest * width):
                    write_u8(o + pairs * 2 * block * width + i, last[i])
        return 0

    return dequantize


DECODERS: Mapping[str, Callable[[str, str], Any]] = MappingProxyType(
    {
        **dict.fromkeys((*ELEMENTS, "mxfp8_f16c"), _mx_dequantize),
        "nvfp4": _nvfp4_dequantize,
        **dict.fromkeys(("fp8", "fp8_f16c", "int8"), _scaled_dequantize),
        **{f"uint{bits}_{scale}": _integer_dequantize for bits in (4, 8) for scale in ("f16", "bf16", "f32")},
    }
)
"""What makes the function for each `WeightFormat.decoder`, with the instructions of F16C or without."""


def most_tokens() -> int:
    """Tokens whose sums for one row, each of sixteen lanes, fit the processor's registers."""
    return 8 if has("avx512bw") else 4


def _group_rows(tokens: int) -> int:
    """Rows of weights whose dot products are made together: as many sums as there are registers for, at most four."""
    return min(4, (16 if has("avx512bw") else 4) // tokens)


def _argument(typing: Any, data: Any, index: Any) -> Any:
    """Argument `index` of a task. Emitted: numba would compile a function of it for every index, in every process."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return load_scalar(b, b.add(args[0], b.mul(args[1], I64(8))), I64)

    return types.int64(types.int64, types.int64), codegen


argument = intrinsic(_argument)


def _dequantize_task() -> Recipe[CFunction]:
    fingerprint = FINGERPRINT

    def task(data: int) -> None:
        len(fingerprint)
        rows, step, cols = argument(data, 1), argument(data, 2), argument(data, 11)
        codes, codes_stride = argument(data, 3), argument(data, 4)
        scales, scales_stride = argument(data, 5), argument(data, 6)
        block_rows, block_cols = argument(data, 7), argument(data, 8)
        out, out_stride = argument(data, 9), argument(data, 10)
        start = take(data, step)
        while start < rows:
            call_dequantize(
                argument(data, 14),
                codes + start * codes_stride,
                codes_stride,
                scales + start // block_rows * scales_stride,
                scales_stride,
                out + start * out_stride,
                out_stride,
                min(step, rows - start),
                cols,
                block_rows,
                block_cols,
            )
            start = take(data, step)

    return c_function(task, TASK)


def _dot_task(decoder: str, tokens: int) -> Recipe[CFunction]:
    """The products of all rows with `tokens` tokens: out[t][row], float32."""
    fingerprint, group = FINGERPRINT, _group_rows(tokens)

    def task(data: int) -> None:
        len(fingerprint)
        rows, step, blocks = argument(data, 1), argument(data, 2), argument(data, 11) // 32
        codes, codes_stride = argument(data, 3), argument(data, 4)
        scales, scales_stride = argument(data, 5), argument(data, 6)
        block_rows, segment = argument(data, 7), argument(data, 8) // 32
        out, out_stride = argument(data, 9), argument(data, 10)
        x, x_stride = argument(data, 12), argument(data, 13)
        stride = scales_stride if block_rows == 1 else 0
        start = take(data, step)
        while start < rows:
            stop = min(start + step, rows)
            row = start
            while row + group <= stop:
                c, s, o = codes + row * codes_stride, scales + row // block_rows * scales_stride, out + row * 4
                dot_rows(
                    c, codes_stride, s, stride, x, x_stride, blocks, segment, o, out_stride, group, tokens, decoder
                )
                row += group
            while row < stop:
                c, s, o = codes + row * codes_stride, scales + row // block_rows * scales_stride, out + row * 4
                dot_rows(c, codes_stride, s, stride, x, x_stride, blocks, segment, o, out_stride, 1, tokens, decoder)
                row += 1
            start = take(data, step)

    return c_function(task, TASK)


dequantize = Compiled(_dequantize)
dequantize_task = Compiled(_dequantize_task)
dot_task = Compiled(_dot_task)
