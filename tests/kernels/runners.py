"""Every kernel that the registry says can run here, each with all operations of one format."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from quantload.kernels.formats import Tensors, WeightFormat
from quantload.kernels.registry import OPERATIONS, KernelSet, candidates, kernel_set
from tested_formats import QUANTIZED, TRITON, filled

INTERPRETED = ("quantize", "observe", "finish_scales", "dequantize")
"""The operations that the tests here check in Triton's interpreter as well."""
CALLED: set[str] = set()
"""The interpreted kernels that the test which is running has called."""


@dataclass(frozen=True)
class Runner:
    """The operations of one format by one backend on one device, with outputs as CPU tensors of bytes."""

    kernels: KernelSet
    device: str

    @property
    def format(self) -> WeightFormat:
        return self.kernels.format

    def empty(self, rows: int, cols: int) -> Tensors:
        return filled(self.format, rows, cols, device=self.device)

    def quantize(self, source: torch.Tensor, statistics: torch.Tensor | None = None) -> Tensors:
        tensors = self.empty(*source.shape)
        assert self.kernels.quantize(source.to(self.device), tensors, statistics) == 0
        return tuple(tensor.cpu() for tensor in tensors)

    def dequantize(self, tensors: Tensors, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        out = torch.full(shape, 77.0, dtype=dtype, device=self.device)
        self.kernels.dequantize(tuple(tensor.to(self.device) for tensor in tensors), out)
        return out.cpu()


def runners() -> list[Runner]:
    found = interpreted()
    if found:
        return found
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for name in QUANTIZED:
            can_run = [{k.name for k, reason in candidates(op, name, device) if reason is None} for op in OPERATIONS]
            for kernel in sorted(set.intersection(*can_run)):
                found.append(Runner(kernel_set(name, device, dict.fromkeys(OPERATIONS, kernel)), device))
    return found


def interpreted() -> list[Runner]:
    """The Triton kernels on the CPU, where this process was started to interpret them; see `gpu_targets.interpret`."""
    if os.environ.get("TRITON_INTERPRET", "0") == "0":
        return []
    from quantload.kernels.gpu.quantize import triton_quantize

    found = []
    for name in TRITON:
        plain, own = kernel_set(name, "cpu", dict.fromkeys(OPERATIONS, "torch")), triton_quantize(name)
        functions: dict[str, Any] = {op: partial(_noted, f"{op} {name}", getattr(own, op)) for op in INTERPRETED}
        found.append(
            Runner(replace(plain, names={**plain.names, **dict.fromkeys(INTERPRETED, "triton")}, **functions), "cpu")
        )
    return found


def _noted(label: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    CALLED.add(label)
    return function(*args, **kwargs)
