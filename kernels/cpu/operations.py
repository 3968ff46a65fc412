"""The numba CPU kernels as operations on torch tensors: checks, addresses, scratch memory, what to compile for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from ..formats import Tensors, WeightFormat
from ..reference.arguments import check_observe, check_quantize
from ..reference.operations import Reference, as_one_row
from . import dequantize as cpu_dequantize
from . import linear as cpu_linear
from .build import mx as mx_build
from .build import scaled as cpu_build
from .compiled import KernelFunction, Needed
from .dequantize import address

KINDS = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


@dataclass(frozen=True)
class NumbaKernels(ABC):
    """The operations of one format on CPU (see `registry` for what each takes and returns)."""

    format: WeightFormat
    reference: Reference
    scale_mode: str = "default"

    def quantize(
        self,
        source: torch.Tensor,
        tensors: Tensors,
        statistics: torch.Tensor | None = None,
        scales_known: bool = False,
    ) -> int:
        check_quantize(self.format, source, tensors)
        codes, scales = tensors
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
        check_observe(self.format, source, amax)
        rows, cols = source.shape
        if not rows or not cols:
            return 0
        blocks = self.format.maxima.block_rows or rows, self.format.maxima.block_cols or cols
        found = self._observe(KINDS[source.dtype]).get()(*address(source), *address(amax), rows, cols, *blocks)
        amax.clamp_(max=self.format.largest_amax(source.dtype))
        return found

    def finish_scales(self, amax: torch.Tensor, scales: Tensors) -> None:
        self.reference.finish_scales(amax, scales)

    def dequantize(self, tensors: Tensors, out: torch.Tensor) -> None:
        check_quantize(self.format, out, tensors)
        cpu_dequantize.dequantize(self.format, tensors, out)

    def linear(
        self,
        x: torch.Tensor,
        tensors: Tensors,
        bias: torch.Tensor | None,
        n_rows: int,
        k: int,
    ) -> torch.Tensor:
        return cpu_linear.linear(self.format, x, tensors, bias, n_rows, k)

    def needed(self, kind: str, measure: bool) -> list[Needed[KernelFunction]]:
        """What loading weights of a kind will call."""
        quantize = self._quantize(kind, measure)
        return [quantize] if self.format.maxima.block_cols else [quantize, self._observe(kind)]

    @abstractmethod
    def _quantize(self, kind: str, measure: bool) -> Needed[KernelFunction]:
        """The compiled function that quantizes sources of a kind."""

    def _observe(self, kind: str) -> Needed[KernelFunction]:
        return cpu_build.observe.needed(kind)


class NumbaMx(NumbaKernels):
    """Of MX formats."""

    def _quantize(self, kind: str, measure: bool) -> Needed[KernelFunction]:
        return mx_build.mx_quantize.needed(self.format.mx_element.name, self.scale_mode, kind, measure)


class NumbaScaled(NumbaKernels):
    """Of FP8 and INT8 with float32 scales."""

    def _quantize(self, kind: str, measure: bool) -> Needed[KernelFunction]:
        return cpu_build.scaled_quantize.needed(self.format.rule, kind, measure)
