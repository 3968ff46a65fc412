"""Values of quantized weights on a CPU, by one thread or by those of torch."""

from __future__ import annotations

import ctypes
import struct

import torch

from ..formats import Tensors, WeightFormat
from ..reference.operations import tensor_rows
from . import team
from .build import linear as linear_build
from .compiled import CFunction, Needed
from .processor import has

ALONE_ELEMENTS = 1 << 18
"""Weights below which one thread is done before a second one has started."""
WIDEN_ELEMENTS = 1 << 15
"""Elements of float32 scratch when a result is rounded to float16 by torch."""


def dequantize(fmt: WeightFormat, tensors: Tensors, out: torch.Tensor, threads: int = 1) -> None:
    """Values of whole scale blocks into `out` [R, C], by up to so many of torch's threads (see `registry`)."""
    rows, cols = out.shape
    if not rows or not cols:
        return
    if out.dtype == torch.float16:
        _dequantize_f16(fmt, tensors, out, threads)
        return
    (codes, scales, *outer), function = tensors, needed(fmt, out.dtype).get()
    blocks = blocks_of(fmt, rows, cols, *map(float, outer))
    if threads == 1 or rows * cols < ALONE_ELEMENTS:
        function.ctypes(*address(codes), *address(scales), *address(out), rows, cols, *blocks)
        return
    whole = max(fmt.block_rows, 1)  # a thread starts where a row of scales does
    task, step = linear_build.dequantize_task(), -(-rows // (4 * threads * whole)) * whole
    run_task(task, tensors, blocks, out, rows, cols, step, threads, 0, 0, function.address)


def needed(fmt: WeightFormat, dtype: torch.dtype) -> Needed[CFunction]:
    """The compiled function that dequantizes to `dtype`; to float16 it goes through float32."""
    faster = f"{fmt.decoder}_f16c"
    target = faster if faster in linear_build.DECODERS and has("f16c") else fmt.decoder
    return linear_build.dequantize.needed(target, "bf16" if dtype == torch.bfloat16 else "f32")


def blocks_of(fmt: WeightFormat, rows: int, cols: int, scale_2: float = 1.0) -> tuple[int, int]:
    """Rows and columns of a block, as compiled functions take them; the bits of scale_2 where a tensor has one."""
    if len(fmt.scales) > 1:
        return fmt.block_rows, int(struct.unpack("<I", struct.pack("<f", scale_2))[0])
    return fmt.block_rows or rows, fmt.block_cols or cols


def run_task(
    task: CFunction,
    tensors: Tensors,
    blocks: tuple[int, int],
    out: torch.Tensor,
    rows: int,
    cols: int,
    step: int,
    threads: int,
    *rest: int,
) -> None:
    """Run a task of `linear_build`; its arguments stand in a vector whose first element the threads count up."""
    codes, scales, *_ = tensors
    values = (0, rows, step, *address(codes), *address(scales), *blocks, *address(out), cols, *rest)
    arguments = (ctypes.c_int64 * len(linear_build.ARGUMENTS))(*values)
    team.run(task, ctypes.addressof(arguments), threads)


def address(tensor: torch.Tensor) -> tuple[int, int]:
    """Address of the first element and bytes between rows; what is handed over is read without another look."""
    if tensor.device.type != "cpu":
        raise ValueError(
            f"a CPU kernel was given a tensor on {tensor.device}; move the whole layer, or its input, to cpu"
        )
    return tensor.data_ptr(), tensor.stride(0) * tensor.element_size()


def _dequantize_f16(fmt: WeightFormat, tensors: Tensors, out: torch.Tensor, threads: int) -> None:
    """Through float32 scratch: not every processor converts to float16, and torch always can."""
    rows, cols = out.shape
    step = max(1, threads * WIDEN_ELEMENTS // max(cols, 1))
    if fmt.block_rows > 1:
        step = -(-step // fmt.block_rows) * fmt.block_rows
    scratch = torch.empty(min(step, rows), cols, dtype=torch.float32)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        part = scratch[: stop - start]
        dequantize(fmt, tensor_rows(fmt, tensors, start, stop), part, threads)
        out[start:stop].copy_(part)
