"""Values of quantized weights on a CPU, by one thread or by those of torch."""

from __future__ import annotations

from array import array

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
    function = needed(fmt, out.dtype).get()
    if threads == 1 or rows * cols < ALONE_ELEMENTS:
        scales = scale_arguments(fmt, tensors, rows, cols)
        function.ctypes(*address(tensors[0]), scales.buffer_info()[0], *address(out), 0, rows, cols)
        return
    whole = max(fmt.block_rows, 1)  # a thread starts where a row of scales does
    task, step = linear_build.dequantize_task(), -(-rows // (4 * threads * whole)) * whole
    run_task(task, fmt, tensors, out, rows, cols, step, threads, 0, 0, function.address)


def needed(fmt: WeightFormat, dtype: torch.dtype) -> Needed[CFunction]:
    """The compiled function that dequantizes to `dtype`; to float16 it goes through float32."""
    faster = f"{fmt.decoder}_f16c"
    target = faster if faster in linear_build.DECODERS and has("f16c") else fmt.decoder
    return linear_build.dequantize.needed(target, "bf16" if dtype == torch.bfloat16 else "f32")


def scale_arguments(fmt: WeightFormat, tensors: Tensors, rows: int, cols: int) -> array[int]:
    """`linear_build.SCALE_ARGUMENTS` of each scale tensor, as compiled functions take them by its address."""
    values: list[int] = []
    for tensor, scale in zip(tensors[1:], fmt.scales, strict=True):
        values += (*address(tensor), scale.block_rows or rows, scale.block_cols or cols)
    return array("q", values)


def run_task(
    task: CFunction,
    fmt: WeightFormat,
    tensors: Tensors,
    out: torch.Tensor,
    rows: int,
    cols: int,
    step: int,
    threads: int,
    *rest: int,
) -> None:
    """Run a task of `linear_build`; its arguments stand in a vector whose first element the threads count up."""
    scales = scale_arguments(fmt, tensors, rows, cols)
    values = (0, rows, step, *address(tensors[0]), scales.buffer_info()[0], *address(out), cols, *rest)
    arguments = array("q", values)
    team.run(task, arguments.buffer_info()[0], threads)


def address(tensor: torch.Tensor) -> tuple[int, int]:
    """Address of the first element and bytes between rows; what is handed over is read without another look."""
    if not tensor.is_cpu:
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
