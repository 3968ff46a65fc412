"""Launches the Triton kernels that make and read codes: quantize, observe, finish_scales, dequantize.

One launch a piece, and a second, of seven programs, where statistics are wanted. Nothing waits for the device except
reading the count of non-finite elements at the end of `quantize` and `observe`; `enqueue_quantize` and
`enqueue_observe` leave it there.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cached_property

import torch

from .. import statistics as st
from ..formats import FORMATS, Tensors, WeightFormat
from ..reference.arguments import check_finish, check_observe, check_quantize
from .jit import measure
from .launch import EXACT, Launches, on

MERGE = 1024


@dataclass(frozen=True)
class TritonQuantize:
    """The operations of one format that have no matmul in them (see `registry` for what each takes and returns)."""

    format: WeightFormat
    scale_mode: str = "default"

    @cached_property
    def _launches(self) -> Launches:
        return _launches(self.format, self.scale_mode)

    def quantize(
        self,
        source: torch.Tensor,
        tensors: Tensors,
        statistics: torch.Tensor | None = None,
        scales_known: bool = False,
    ) -> int:
        nonfinite = torch.zeros(1, dtype=torch.int64, device=source.device)
        measured = statistics
        if statistics is not None and statistics.device != source.device:
            measured = st.new_statistics(source.device)
        self.enqueue_quantize(source, tensors, nonfinite, measured, scales_known)
        count = int(nonfinite)
        if statistics is not None and measured is not None and measured is not statistics:
            st.merge(statistics, measured.to(statistics.device))
        return count

    def observe(self, source: torch.Tensor, amax: torch.Tensor) -> int:
        nonfinite = torch.zeros(1, dtype=torch.int64, device=source.device)
        self.enqueue_observe(source, amax, nonfinite)
        return int(nonfinite)

    def enqueue_quantize(
        self,
        source: torch.Tensor,
        tensors: Tensors,
        nonfinite: torch.Tensor,
        statistics: torch.Tensor | None = None,
        scales_known: bool = False,
    ) -> None:
        """`quantize` on the current stream, without waiting: int64 `nonfinite` [1] is raised by what it would return.

        Everything is on one device, the float64 [STATS] `statistics` too.
        """
        check_quantize(self.format, source, tensors)
        if not source.numel():
            return
        with on(source.device):
            if not scales_known and not self._launches.in_one_pass:
                scales_known = True
                amax = torch.zeros(self.format.amax_shape(*source.shape), dtype=torch.float32, device=source.device)
                self.enqueue_observe(source, amax, nonfinite)
                self.finish_scales(amax, tensors[1:])
                counted = torch.zeros_like(nonfinite)  # those of the first pass are not counted twice
            else:
                counted = nonfinite
            partials = self._launches.quantize(source, tensors, counted, statistics is not None, scales_known)
            if statistics is not None:
                measure.merge_partials[(st.STATS,)](
                    partials, statistics, partials.shape[1], source.numel(), BLOCK=MERGE, num_warps=4, **EXACT
                )

    def enqueue_observe(self, source: torch.Tensor, amax: torch.Tensor, nonfinite: torch.Tensor) -> None:
        """`observe` on the current stream, without waiting: int64 `nonfinite` [1] is raised by what it would return."""
        check_observe(self.format, source, amax)
        if not source.numel():
            return
        with on(source.device):
            self._launches.observe(source, amax, nonfinite)
            amax.clamp_(max=self.format.largest_amax(source.dtype))

    def finish_scales(self, amax: torch.Tensor, scales: Tensors) -> None:
        check_finish(self.format, amax, scales)
        if amax.numel():
            matrices = tuple(scale.view(-1, scale.shape[-1]) for scale in scales)
            with on(amax.device):
                self._launches.finish_scales(amax.view(-1, amax.shape[-1]), matrices)

    def dequantize(self, tensors: Tensors, out: torch.Tensor) -> None:
        check_quantize(self.format, out, tensors)
        if not out.numel():
            return
        with on(out.device):
            self._launches.dequantize(tensors, out)


def triton_quantize(format_name: str, scale_mode: str = "default") -> TritonQuantize:
    """The operations of a format."""
    return TritonQuantize(FORMATS[format_name], scale_mode)


def _launches(fmt: WeightFormat, scale_mode: str) -> Launches:
    if fmt.family is None or fmt.family.gpu is None:
        raise ValueError(f"{fmt.name} has no kernels for GPUs")
    module, _, attribute = fmt.family.gpu.partition(":")
    made: Launches = getattr(importlib.import_module(f".{module}", __package__), attribute)(fmt, scale_mode)
    return made
