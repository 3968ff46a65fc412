"""Integers with zero points on a CPU: the numba kernels as operations on torch tensors."""

from __future__ import annotations

from dataclasses import dataclass

from ..formats import SHORT
from .build import integer as integer_build
from .compiled import KernelFunction, Needed
from .operations import NumbaKernels


@dataclass(frozen=True)
class NumbaIntegers(NumbaKernels):
    """The operations of one format on CPU (see `registry` for what each takes and returns)."""

    def _quantize(self, kind: str, measure: bool) -> Needed[KernelFunction]:
        fmt = self.format
        rule = "searched" if self.scale_mode == "mse" else fmt.rule
        return integer_build.quantize.needed(fmt.code_bits, SHORT[fmt.scale_dtype], rule, self._lanes, kind, measure)

    def _observe(self, kind: str) -> Needed[KernelFunction]:
        return integer_build.observe.needed(self._lanes, kind)

    @property
    def _lanes(self) -> int:
        """Elements that are worked on together: 32, or 16 where groups are that short."""
        return 16 if self.format.block_cols == 16 else 32
