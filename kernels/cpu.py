"""The numba CPU kernels as operations on torch tensors: checks, addresses, scratch memory, warm-up."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import cpu_build, fp8, int8, mxfp4
from .formats import FORMATS, MXFP4, WeightFormat
from .reference import (
    Reference,
    check_linear,
    check_quantize,
    check_scales,
    scale_rows,
    tile_rows,
)

KINDS = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
WIDEN_ELEMENTS = 1 << 15
"""Elements of float32 scratch when a result is rounded to float16 by torch."""

_scratch = threading.local()


@dataclass(frozen=True)
class NumbaKernels:
    """The operations of one format on CPU (see `registry` for what each takes and returns)."""

    format: WeightFormat
    reference: Reference

    def quantize(
        self,
        source: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        statistics: torch.Tensor | None = None,
        scales_known: bool = False,
    ) -> int:
        check_quantize(self.format, source, codes, scales)
        rows, cols = source.shape
        if not rows or not cols:
            return 0
        function = _quantize_function(self.format, KINDS[source.dtype], statistics is not None)
        blocks = self._blocks(rows, cols)
        if self.format is MXFP4 and cols % 32 == 0 and _dense(source) and _dense(codes) and _dense(scales):
            rows, cols = 1, rows * cols
        out = 0 if statistics is None else statistics.data_ptr()
        addresses = (*_address(source), *_address(codes), *_address(scales))
        return function(*addresses, rows, cols, int(scales_known), out, *blocks)

    def observe(self, source: torch.Tensor, amax: torch.Tensor) -> int:
        check_scales(self.format, source, amax, torch.float32)
        rows, cols = source.shape
        if not rows or not cols:
            return 0
        function = cpu_build.observe(KINDS[source.dtype])
        rows_cols = (self.format.block_rows or rows, self.format.block_cols or cols)
        return function(*_address(source), *_address(amax), rows, cols, *rows_cols)

    def finish_scales(self, amax: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return self.reference.finish_scales(amax, out)

    def dequantize(self, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
        check_quantize(self.format, out, codes, scales)
        if out.dtype == torch.float16:
            self._dequantize_f16(codes, scales, out)
            return
        rows, cols = out.shape
        if not rows or not cols:
            return
        function = _dequantize_function(self.format, KINDS[out.dtype])
        addresses = (*_address(codes), *_address(scales), *_address(out))
        function(*addresses, rows, cols, *self._blocks(rows, cols))

    def linear(
        self,
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        n_rows: int,
        k: int,
    ) -> torch.Tensor:
        check_linear(self.format, x, codes, scales, bias, n_rows, k)
        out = x.new_empty(x.shape[0], n_rows)
        step = tile_rows(self.format, n_rows, k)
        tile = _scratch_matrix(x.dtype, min(step, n_rows), k)
        for start in range(0, n_rows, step):
            stop = min(start + step, n_rows)
            weight = tile[: stop - start]
            self.dequantize(codes[start:stop], scale_rows(self.format, scales, start, stop), weight)
            out[:, start:stop] = F.linear(x, weight, None if bias is None else bias[start:stop])
        return out

    def _blocks(self, rows: int, cols: int) -> tuple[int, ...]:
        if self.format is MXFP4:
            return ()
        return self.format.block_rows or rows, self.format.block_cols or cols

    def _dequantize_f16(self, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
        """Through float32 scratch: not every processor converts to float16, and torch always can."""
        rows, cols = out.shape
        step = max(1, WIDEN_ELEMENTS // max(cols, 1))
        if self.format.block_rows > 1:
            step = -(-step // self.format.block_rows) * self.format.block_rows
        scratch = torch.empty(min(step, rows), cols)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            part = scratch[: stop - start]
            self.dequantize(codes[start:stop], scale_rows(self.format, scales, start, stop), part)
            out[start:stop].copy_(part)


def numba_kernels(format_name: str) -> NumbaKernels:
    """The CPU operations of a format."""
    references = {"mxfp4": mxfp4.reference, "int8_channel": int8.reference, **fp8.references}
    return NumbaKernels(FORMATS[format_name], references[format_name])


def warm_up(
    format_name: str, source_dtype: torch.dtype, statistics: bool = True, activation_dtype: torch.dtype | None = None
) -> None:
    """Compile what loading weights of `source_dtype` into a format will call, and `linear` on `activation_dtype`."""
    fmt, kind = FORMATS[format_name], KINDS[source_dtype]
    _quantize_function(fmt, kind, statistics)
    if fmt.block_cols == 0:
        cpu_build.observe(kind)
    if activation_dtype is not None:
        _dequantize_function(fmt, "bf16" if activation_dtype == torch.bfloat16 else "f32")


def _quantize_function(fmt: WeightFormat, kind: str, measure: bool) -> cpu_build.KernelFunction:
    if fmt is MXFP4:
        return cpu_build.mxfp4_quantize(kind, measure)
    return cpu_build.scaled_quantize(fmt.name, kind, measure)


def _dequantize_function(fmt: WeightFormat, kind: str) -> cpu_build.KernelFunction:
    if fmt is MXFP4:
        return cpu_build.mxfp4_dequantize(kind)
    return cpu_build.scaled_dequantize("int8" if fmt.code_dtype == torch.int8 else "fp8", kind)


def _address(tensor: torch.Tensor) -> tuple[int, int]:
    """Address of the first element and bytes between rows; what is handed over is read without another look."""
    if tensor.device.type != "cpu":
        raise ValueError(
            f"a CPU kernel was given a tensor on {tensor.device}; move the whole layer, or its input, to cpu"
        )
    return tensor.data_ptr(), tensor.stride(0) * tensor.element_size()


def _dense(tensor: torch.Tensor) -> bool:
    return tensor.stride(0) == tensor.shape[1]


def _scratch_matrix(dtype: torch.dtype, rows: int, cols: int) -> torch.Tensor:
    """A matrix in memory that this thread reuses."""
    buffers: dict[torch.dtype, torch.Tensor] = _scratch.__dict__.setdefault("buffers", {})
    buffer = buffers.get(dtype)
    if buffer is None or buffer.numel() < rows * cols:
        buffer = buffers[dtype] = torch.empty(rows * cols, dtype=dtype)
    return buffer[: rows * cols].view(rows, cols)
