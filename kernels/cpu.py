"""The numba CPU kernels as operations on torch tensors: checks, addresses, scratch memory, what to compile for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import cpu_build, cpu_dequantize, cpu_linear, fp8, int8, integer, mx, mx_build, mx_mse, mxfp4, mxfp4_rows
from .compiled import KernelFunction, Needed
from .cpu_dequantize import address
from .formats import FORMATS, MX, MXFP4_ROWS, RowMultiplied, WeightFormat
from .reference import Reference, as_one_row, check_quantize, check_scales

KINDS = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


@dataclass(frozen=True)
class NumbaKernels:
    """The operations of one format on CPU (see `registry` for what each takes and returns)."""

    format: WeightFormat
    reference: Reference
    scale_mode: str = "default"

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
        function = self._quantize(KINDS[source.dtype], statistics is not None).get()
        blocks = self.format.block_rows or rows, self.format.block_cols or cols
        rows, cols = as_one_row(self.format, source, codes, scales)
        out = 0 if statistics is None else statistics.data_ptr()
        addresses = (*address(source), *address(codes), *address(scales))
        return function(*addresses, rows, cols, int(scales_known), out, *blocks)

    def observe(self, source: torch.Tensor, amax: torch.Tensor) -> int:
        check_scales(self.format, source, amax, torch.float32)
        rows, cols = source.shape
        if not rows or not cols:
            return 0
        blocks = self.format.block_rows or rows, self.format.block_cols or cols
        return self._observe(KINDS[source.dtype]).get()(*address(source), *address(amax), rows, cols, *blocks)

    def finish_scales(self, amax: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return self.reference.finish_scales(amax, out)

    def dequantize(self, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
        check_quantize(self.format, out, codes, scales)
        cpu_dequantize.dequantize(self.format, codes, scales, out)

    def linear(
        self,
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        n_rows: int,
        k: int,
    ) -> torch.Tensor:
        return cpu_linear.linear(self.format, x, codes, scales, bias, n_rows, k)

    def needed(self, kind: str, measure: bool) -> list[Needed[KernelFunction]]:
        """What loading weights of a kind will call."""
        quantize = self._quantize(kind, measure)
        return [quantize] if self.format.block_cols else [quantize, self._observe(kind)]

    def _quantize(self, kind: str, measure: bool) -> Needed[KernelFunction]:
        if self.format in MX:
            return mx_build.mx_quantize.needed(self.format.name, self.scale_mode, kind, measure)
        return cpu_build.scaled_quantize.needed(self.format.name, kind, measure)

    def _observe(self, kind: str) -> Needed[KernelFunction]:
        return cpu_build.observe.needed(kind)


def numba_kernels(format_name: str, scale_mode: str = "default") -> NumbaKernels:
    """The CPU operations of a format."""
    if format_name == MXFP4_ROWS.name:
        from .cpu_rows import NumbaRows

        return NumbaRows(MXFP4_ROWS, mxfp4_rows.reference)
    if format_name in integer.references:
        from .cpu_integer import NumbaIntegers

        return NumbaIntegers(FORMATS[format_name], integer.references[format_name], scale_mode)
    own = {"mxfp4": mxfp4.reference, "int8_channel": int8.reference, **fp8.references, **mx.references}
    references: dict[str, dict[str, Reference]] = {"default": own, "mse": {**mx_mse.references}}
    return NumbaKernels(FORMATS[format_name], references[scale_mode][format_name], scale_mode)


def needed_to_load(
    format_name: str,
    source_dtype: torch.dtype,
    statistics: bool = True,
    activation_dtype: torch.dtype | None = None,
    scale_mode: str = "default",
) -> list[Needed[Any]]:
    """What loading weights of `source_dtype` into a format will call, and `linear` on `activation_dtype`."""
    fmt = FORMATS[format_name]
    found: list[Needed[Any]] = [*numba_kernels(format_name, scale_mode).needed(KINDS[source_dtype], statistics)]
    if activation_dtype is not None:
        fmt = fmt.blocks if isinstance(fmt, RowMultiplied) else fmt
        found.append(cpu_dequantize.needed(fmt, activation_dtype))
        found.extend(cpu_linear.needed_for(fmt, activation_dtype))
    return found
