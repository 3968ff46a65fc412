"""Integers with zero points on a CPU: the numba kernels as operations on torch tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import integer_build
from .compiled import KernelFunction, Needed
from .cpu import KINDS, NumbaKernels, is_dense
from .cpu_dequantize import address
from .formats import INT4FP8_CHANNEL
from .reference import check_quantize, check_scales


@dataclass(frozen=True)
class NumbaIntegers(NumbaKernels):
    """The operations of one format on CPU (see `registry` for what each takes and returns)."""

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
        group = self.format.block_cols or cols
        function = self._quantize(KINDS[source.dtype], statistics is not None).get()
        if self.format.block_cols and cols % group == 0 and all(map(is_dense, (source, codes, scales))):
            rows, cols = 1, rows * cols
        out = 0 if statistics is None else statistics.data_ptr()
        addresses = (*address(source), *address(codes), *address(scales))
        return function(*addresses, rows, cols, int(scales_known), out, group)

    def observe(self, source: torch.Tensor, amax: torch.Tensor) -> int:
        check_scales(self.format, source, amax, torch.float32)
        rows, cols = source.shape
        if not rows or not cols:
            return 0
        function = integer_build.observe(self._lanes, KINDS[source.dtype])
        return function(*address(source), *address(amax), rows, cols, self.format.block_cols or cols)

    def needed(self, kind: str, measure: bool) -> list[Needed[KernelFunction]]:
        """What loading weights of a kind will call."""
        quantize = self._quantize(kind, measure)
        return [quantize] if self.format.block_cols else [quantize, integer_build.observe.needed(self._lanes, kind)]

    def _quantize(self, kind: str, measure: bool) -> Needed[KernelFunction]:
        fmt = self.format
        rule = fmt.code_bits, KINDS[fmt.scale_dtype], fmt is INT4FP8_CHANNEL
        return integer_build.quantize.needed(*rule, self._lanes, kind, measure)

    @property
    def _lanes(self) -> int:
        """Elements that are worked on together: 32, or 16 where groups are that short."""
        return 16 if self.format.block_cols == 16 else 32
