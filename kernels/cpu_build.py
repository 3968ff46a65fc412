"""Compile the numba CPU kernels: one function per (operation, format family, element kind), made once, cached on disk.

The functions take addresses and byte strides, so that calling one costs about a microsecond. They are closures over
constants only: numba's disk cache keys closures by the values they close over, and `FINGERPRINT` among them makes an
upgrade of any kernel source miss the old entries (numba itself looks only at the file that holds the function).
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba as nb
import numpy as np
from numba import types
from numba.extending import intrinsic

from . import fp8, int8
from . import statistics as st
from .magnitude_ir import amax_tile, count_above, magnitude_to_f32
from .mxfp4_ir import RUN_BLOCKS, dequantize_run, quantize_bf16_run, quantize_wide_run
from .scaled_decode_ir import dequantize_tile
from .scaled_ir import TILE_ELEMENTS, quantize_tile
from .vector_ir import F32, F64, I8, INFINITY_BITS, ITEM_BYTES, LARGEST_FINITE, load_scalar, store_scalar

logger = logging.getLogger("quantload")
_compiling = threading.RLock()
KernelFunction = Callable[..., int]


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


FINGERPRINT = _fingerprint()
_i64 = types.int64


def _memory_access(element: Any, numba_type: Any) -> tuple[Any, Any]:
    def read(typing: Any, address: Any) -> Any:
        """The scalar at an address."""
        return numba_type(address), lambda context, b, signature, args: load_scalar(b, args[0], element)

    def write(typing: Any, address: Any, value: Any) -> Any:
        """Store a scalar at an address."""

        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            store_scalar(b, args[1], args[0])
            return context.get_dummy_value()

        return types.void(address, numba_type), codegen

    return intrinsic(read), intrinsic(write)


read_u8, write_u8 = _memory_access(I8, types.uint8)
read_f32, write_f32 = _memory_access(F32, types.float32)
read_f64, write_f64 = _memory_access(F64, types.float64)


def _jit(function: Callable[..., Any], signature: Any) -> KernelFunction:
    """Compile for `signature`, from numba's disk cache where there is one."""
    options = {"nogil": True, "boundscheck": False, "error_model": "numpy"}
    try:
        return nb.njit(signature, cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        logger.info("numba has no folder to cache compiled kernels in, every process compiles them: %s", error)
        return nb.njit(signature, **options)(function)  # type: ignore[no-any-return]


def _locked(build: Callable[..., KernelFunction]) -> Callable[..., KernelFunction]:
    """Make and keep one function per argument tuple; threads that need one that is being made wait for it."""
    made: dict[tuple[Any, ...], KernelFunction] = {}

    def get(*key: Any) -> KernelFunction:
        function = made.get(key)
        if function is None:
            with _compiling:
                function = made.get(key)
                if function is None:
                    function = made[key] = build(*key)
        return function

    return get


def _add_count_and_amax(out: int, count: int, amax: float) -> None:
    write_f64(out + 8 * st.COUNT, read_f64(out + 8 * st.COUNT) + count)
    write_f64(out + 8 * st.AMAX, max(read_f64(out + 8 * st.AMAX), np.float64(amax)))


add_count_and_amax = nb.njit(nogil=True)(_add_count_and_amax)


def _mxfp4_quantize(kind: str, measure: bool) -> KernelFunction:
    fingerprint, width, infinity = FINGERPRINT, ITEM_BYTES[kind], INFINITY_BITS[kind]
    finite = np.float32(LARGEST_FINITE[kind])
    fast, run_blocks = kind == "bf16", RUN_BLOCKS

    def quantize(source, source_stride, codes, codes_stride, scales, scales_stride, rows, cols, known, out):  # type: ignore[no-untyped-def]
        len(fingerprint)
        blocks, rest, largest = cols // 32, cols % 32, 0
        padded = np.zeros(32 * width, np.uint8)
        for row in range(rows):
            s, c, e = source + row * source_stride, codes + row * codes_stride, scales + row * scales_stride
            first = 0
            while first < blocks + (rest > 0):
                count = min(run_blocks, blocks - first)
                here = s + first * 32 * width
                if count <= 0:  # the incomplete last block
                    count, here = 1, np.int64(padded.ctypes.data)
                    for i in range(rest * width):
                        padded[i] = read_u8(s + blocks * 32 * width + i)
                bits = -1
                if fast and known == 0:
                    bits = quantize_bf16_run(here, c + first * 16, e + first, count, measure, out)
                if bits < 0:
                    bits = quantize_wide_run(here, c + first * 16, e + first, count, known, kind, measure, out)
                largest = max(largest, bits)
                first += count
        if largest >= infinity:
            return count_above(source, source_stride, rows, cols, finite, kind)
        if measure:
            add_count_and_amax(out, rows * cols, magnitude_to_f32(largest, kind))
            if rest:
                write_f64(out + 8 * st.ZERO, read_f64(out + 8 * st.ZERO) - rows * (32 - rest))
        return 0

    return _jit(quantize, types.int64(*[_i64] * 10))


def _mxfp4_dequantize(kind: str) -> KernelFunction:
    fingerprint, width = FINGERPRINT, ITEM_BYTES[kind]

    def dequantize(codes, codes_stride, scales, scales_stride, out, out_stride, rows, cols):  # type: ignore[no-untyped-def]
        len(fingerprint)
        blocks, rest = cols // 32, cols % 32
        last = np.empty(32 * width, np.uint8)
        for row in range(rows):
            c, e, o = codes + row * codes_stride, scales + row * scales_stride, out + row * out_stride
            dequantize_run(c, e, o, blocks, kind)
            if rest:
                dequantize_run(c + blocks * 16, e + blocks, np.int64(last.ctypes.data), 1, kind)
                for i in range(rest * width):
                    write_u8(o + blocks * 32 * width + i, last[i])
        return 0

    return _jit(dequantize, types.int64(*[_i64] * 8))


def _scale_of(rule: str, amax: Any) -> Any:
    """float32 scale of a float32 amax; `fp8.Fp8Codec` and `int8.Int8Codec` give the sources of the rules."""
    if rule == "fp8_channel":
        return max(amax / np.float32(fp8.LARGEST), np.float32(fp8.CHANNEL_MIN_SCALE))
    if rule == "fp8_tensor":
        return np.float32(1.0) / (
            np.float32(1.0) / max(amax, np.float32(fp8.TENSOR_MIN_AMAX)) * np.float32(fp8.LARGEST)
        )
    if rule == "fp8_block":
        return max(amax, np.float32(fp8.BLOCK_MIN_AMAX)) / np.float32(fp8.LARGEST)
    scale = amax / np.float32(int8.LARGEST)
    return scale if scale > np.float32(0.0) else np.float32(1.0)


scale_of = nb.njit(nogil=True, error_model="numpy")(_scale_of)
TARGETS = {"fp8_channel": "fp8_divide", "fp8_tensor": "fp8_divide", "fp8_block": "fp8_multiply", "int8_channel": "int8"}

GROUP_COLS = 2048
"""Columns whose blocks are worked on together, so that a block's short rows do not jump through memory."""
STRIP_ROWS = 8
"""Rows of a block that are worked on before going to the block beside it."""


def _scaled_quantize(rule: str, kind: str, measure: bool) -> KernelFunction:
    fingerprint, width, infinity, target = FINGERPRINT, ITEM_BYTES[kind], INFINITY_BITS[kind], TARGETS[rule]
    finite = np.float32(LARGEST_FINITE[kind])
    limit = np.float32((int8.LARGEST if rule == "int8_channel" else fp8.LARGEST) * (1.0 + st.SATURATION_SLACK))
    tile_elements, group_cols, strip_rows = TILE_ELEMENTS, GROUP_COLS, STRIP_ROWS

    def quantize(  # type: ignore[no-untyped-def]
        source,
        source_stride,
        codes,
        codes_stride,
        scales,
        scales_stride,
        rows,
        cols,
        known,
        out,
        block_rows,
        block_cols,
    ):
        len(fingerprint)
        largest, saturated = 0, 0
        across_step = min(block_cols, 4096)
        down_step = strip_rows if block_cols < cols else max(1, tile_elements // across_step)
        group = max(1, group_cols // block_cols) * block_cols
        block_bits = np.empty(group // block_cols, np.int64)
        for r in range(0, rows, block_rows):
            height = min(block_rows, rows - r)
            for left in range(0, cols, group):
                right = min(left + group, cols)
                block_bits[:] = 0
                for y in range(r, r + height, down_step):
                    for c in range(left, right, block_cols):
                        s, down = source + y * source_stride + c * width, min(down_step, r + height - y)
                        bits = amax_tile(s, source_stride, down, min(block_cols, right - c), kind)
                        block_bits[(c - left) // block_cols] = max(block_bits[(c - left) // block_cols], bits)
                worst = block_bits.max()
                largest = max(largest, worst)
                if worst >= infinity:
                    continue
                inside = 1
                for c in range(left, right, block_cols):
                    e = scales + r // block_rows * scales_stride + c // block_cols * 4
                    amax = magnitude_to_f32(block_bits[(c - left) // block_cols], kind)
                    if known == 0:
                        write_f32(e, scale_of(rule, amax))
                    above = limit * read_f32(e)
                    if amax > above:
                        inside = 0
                    if measure and amax > above:
                        s, across = source + r * source_stride + c * width, min(block_cols, right - c)
                        saturated += count_above(s, source_stride, height, across, above, kind)
                for y in range(r, r + height, down_step):
                    for x in range(left, right, across_step):
                        quantize_tile(
                            source + y * source_stride + x * width,
                            source_stride,
                            codes + y * codes_stride + x,
                            codes_stride,
                            min(down_step, r + height - y),
                            min(across_step, right - x),
                            read_f32(scales + r // block_rows * scales_stride + x // block_cols * 4),
                            inside,
                            target,
                            kind,
                            measure,
                            out,
                        )
        if largest >= infinity:
            return count_above(source, source_stride, rows, cols, finite, kind)
        if measure:
            add_count_and_amax(out, rows * cols, magnitude_to_f32(largest, kind))
            write_f64(out + 8 * st.SATURATED, read_f64(out + 8 * st.SATURATED) + saturated)
        return 0

    return _jit(quantize, types.int64(*[_i64] * 12))


def _observe(kind: str) -> KernelFunction:
    fingerprint, width, infinity = FINGERPRINT, ITEM_BYTES[kind], INFINITY_BITS[kind]
    finite = np.float32(LARGEST_FINITE[kind])

    def observe(source, source_stride, amax, amax_stride, rows, cols, block_rows, block_cols):  # type: ignore[no-untyped-def]
        len(fingerprint)
        largest = 0
        for r in range(0, rows, block_rows):
            for c in range(0, cols, block_cols):
                s = source + r * source_stride + c * width
                bits = amax_tile(s, source_stride, min(block_rows, rows - r), min(block_cols, cols - c), kind)
                largest = max(largest, bits)
                a = amax + r // block_rows * amax_stride + c // block_cols * 4
                write_f32(a, max(read_f32(a), magnitude_to_f32(bits, kind)))
        if largest >= infinity:
            return count_above(source, source_stride, rows, cols, finite, kind)
        return 0

    return _jit(observe, types.int64(*[_i64] * 8))


def _scaled_dequantize(target: str, kind: str) -> KernelFunction:
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
                    target,
                    kind,
                )
        return 0

    return _jit(dequantize, types.int64(*[_i64] * 10))


mxfp4_quantize = _locked(_mxfp4_quantize)
mxfp4_dequantize = _locked(_mxfp4_dequantize)
scaled_quantize = _locked(_scaled_quantize)
scaled_dequantize = _locked(_scaled_dequantize)
observe = _locked(_observe)
