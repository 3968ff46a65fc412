"""`mxfp4_rows` on a CPU: the numba kernel that quantizes rows, as an operation on torch tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import rows_build
from .compiled import KernelFunction, Needed
from .cpu import KINDS, NumbaKernels, numba_kernels
from .cpu_dequantize import address
from .formats import MULTIPLIER_BYTES
from .reference import check_quantize, check_scales


@dataclass(frozen=True)
class NumbaRows(NumbaKernels):
    """The operations of the format on CPU that do not read codes (see `registry` for what each takes and returns)."""

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
        out = 0 if statistics is None else statistics.data_ptr()
        addresses = (*address(source), *address(codes), *address(scales))
        function = rows_build.quantize_rows(KINDS[source.dtype], statistics is not None)
        return function(*addresses, rows, cols, int(scales_known), out)

    def observe(self, source: torch.Tensor, amax: torch.Tensor) -> int:
        check_scales(self.format, source, amax, torch.float32)
        return numba_kernels("mxfp4").observe(source, amax[:, :-MULTIPLIER_BYTES])

    def needed(self, kind: str, measure: bool) -> list[Needed[KernelFunction]]:
        """What loading weights of a kind will call."""
        return [rows_build.quantize_rows.needed(kind, measure)]
