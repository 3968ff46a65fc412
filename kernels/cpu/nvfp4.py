"""NVFP4 on a CPU: the numba kernels as operations on torch tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats import Tensors
from ..nvfp4_scales import spread, tensor_scale
from ..reference.arguments import check_finish, check_quantize
from ..reference.operations import as_one_row
from .build import nvfp4 as nvfp4_build
from .compiled import KernelFunction, Needed
from .dequantize import address
from .operations import KINDS, NumbaKernels


@dataclass(frozen=True)
class NumbaNvfp4(NumbaKernels):
    """The operations of the format on CPU (see `registry` for what each takes and returns)."""

    def quantize(
        self,
        source: torch.Tensor,
        tensors: Tensors,
        statistics: torch.Tensor | None = None,
        scales_known: bool = False,
    ) -> int:
        check_quantize(self.format, source, tensors)
        codes, scale, scale_2 = tensors
        rows, cols = source.shape
        if not scales_known:
            amax = torch.zeros_like(scale_2)
            if nonfinite := self.observe(source, amax):
                return nonfinite
            self.finish_scales(amax, (scale, scale_2))
        if not rows or not cols:
            return 0
        function = self._quantize(KINDS[source.dtype], statistics is not None).get()
        rows, cols = as_one_row(self.format, source, codes, scale)
        out = 0 if statistics is None else statistics.data_ptr()
        addresses = (*address(source), *address(codes), *address(scale))
        return function(*addresses, rows, cols, address(scale_2)[0], out)

    def finish_scales(self, amax: torch.Tensor, scales: Tensors) -> None:
        if amax.numel() != 1:
            self.reference.finish_scales(amax, scales)
            return
        check_finish(self.format, amax, scales)
        scales[1].fill_(tensor_scale(float(amax), spread(self.scale_mode)))

    def _quantize(self, kind: str, measure: bool) -> Needed[KernelFunction]:
        return nvfp4_build.nvfp4_quantize.needed(self.scale_mode, kind, measure)
