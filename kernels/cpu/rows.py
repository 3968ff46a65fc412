"""`mxfp4_rows` on a CPU: the numba kernel that quantizes rows, as an operation on torch tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats import MULTIPLIER_BYTES, MXFP4
from ..reference import mxfp4
from ..reference.arguments import check_observe
from .build import rows as rows_build
from .compiled import KernelFunction, Needed
from .operations import NumbaKernels, NumbaMx


@dataclass(frozen=True)
class NumbaRows(NumbaKernels):
    """The operations of the format on CPU that do not read codes (see `registry` for what each takes and returns)."""

    def observe(self, source: torch.Tensor, amax: torch.Tensor) -> int:
        check_observe(self.format, source, amax)
        return NumbaMx(MXFP4, mxfp4.reference).observe(source, amax[:, :-MULTIPLIER_BYTES])

    def needed(self, kind: str, measure: bool) -> list[Needed[KernelFunction]]:
        return [self._quantize(kind, measure)]

    def _quantize(self, kind: str, measure: bool) -> Needed[KernelFunction]:
        return rows_build.quantize_rows.needed(kind, measure)
