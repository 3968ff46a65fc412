"""The kernels for GPUs that have no matmul in them, and why they cannot serve where they cannot."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..formats import FNUZ, FORMATS, WeightFormat
from .target import GpuTarget, gpu_target

TRITON_MISSING = (
    "triton is not installed, and kernels for GPUs need it: install torch for this GPU, which brings it along, "
    "or `pip install triton`"
)
"""Why a GPU that Triton kernels are for cannot have them."""
OPERATIONS = ("quantize", "observe", "finish_scales", "dequantize")


@dataclass(frozen=True)
class GpuQuantize:
    """One operation in Triton, which is imported when it is first called."""

    operation: str
    format: WeightFormat
    scale_mode: str = "default"
    name: str = "triton"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    @cached_property
    def _function(self) -> Any:
        from .quantize import triton_quantize

        return getattr(triton_quantize(self.format.name, self.scale_mode), self.operation)

    def unavailable(self, device: torch.device) -> str | None:
        """Why the kernel cannot run on a device, or None when it can."""
        return triton_unavailable(device)

    def hardware_lacks(self, target: GpuTarget | None) -> str | None:
        """Why the kernel could not run there with everything installed, or None when it could; None is a CPU."""
        return triton_lacks(target)


def gpu_quantizers(operation: str, fmt: WeightFormat, scale_mode: str = "default") -> list[GpuQuantize]:
    """The kernels of an operation of a format, best first.

    There are none with a matmul, or for families and scale modes without launches.
    """
    served = operation in OPERATIONS and fmt.family is not None and fmt.family.gpu is not None
    modes = () if fmt.family is None else fmt.family.gpu_modes
    return [GpuQuantize(operation, fmt, scale_mode)] if served and scale_mode in modes else []


def triton_unavailable(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device, or None when they can."""
    target = gpu_target(device)
    if target is None:
        return "torch finds no GPU (torch.cuda.is_available() is False)"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set, so Triton would interpret the kernels on the CPU; unset it"
    return triton_lacks(target) or (TRITON_MISSING if importlib.util.find_spec("triton") is None else None)


def triton_lacks(target: GpuTarget | None) -> str | None:
    """Why Triton kernels are not for a GPU, or None when they are; None is a CPU."""
    if target is None:
        return "needs a GPU"
    old = not target.is_amd and target.capability < 80
    return f"needs sm_80 or newer, this GPU is {target.name}" if old else None


def stored_format(format_name: str, device: torch.device) -> str:
    """The name of the format that `format_name` is stored as on a device: FP8 as E4M3 FNUZ on gfx942."""
    return format_on(format_name, gpu_target(device))


def format_on(format_name: str, target: GpuTarget | None) -> str:
    """The same on a GPU that need not be here; None is a CPU."""
    if target is None or not target.fnuz or format_name not in FORMATS:
        return format_name
    fmt = FORMATS[format_name]
    return FNUZ.get(fmt, fmt).name
