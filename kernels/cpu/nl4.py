"""NL4 on a CPU: the numba kernels as operations on torch tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats import Tensors
from ..reference.arguments import check_quantize
from .build import nl4 as nl4_build
from .compiled import KernelFunction, Needed
from .dequantize import address
from .operations import KINDS, NumbaKernels


@dataclass(frozen=True)
class NumbaNl4(NumbaKernels):
    """The operations of the format on CPU (see `registry` for what each takes and returns)."""

    def quantize(
        self,
        source: torch.Tensor,
        tensors: Tensors,
        statistics: torch.Tensor | None = None,
        scales_known: bool = False,
    ) -> int:
        check_quantize(self.format, source, tensors)
        rows, cols = source.shape
        if not rows or not cols:
            return 0
        function = self._quantize(KINDS[source.dtype], statistics is not None).get()
        out = 0 if statistics is None else statistics.data_ptr()
        addresses = [part for tensor in (source, *tensors) for part in address(tensor)]
        return function(*addresses, rows, cols, int(scales_known), out)

    def _quantize(self, kind: str, measure: bool) -> Needed[KernelFunction]:
        return nl4_build.nl4_quantize.needed(kind, measure)
