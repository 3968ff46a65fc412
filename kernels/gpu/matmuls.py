"""The `linear` and `experts` kernels there are for GPUs, and why each cannot serve on one that lacks what it needs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ..arrangement import Arrangement
from ..formats import FORMATS, MXFP4, MXFP6_E2M3, MXFP6_E3M2, MXFP8, NVFP4, WeightFormat
from . import aiter
from .quantizers import triton_lacks, triton_unavailable
from .target import GpuTarget, gpu_target

Reason = Callable[[WeightFormat, GpuTarget], str | None]


def _nothing_is_missing() -> str | None:
    return None


@dataclass(frozen=True)
class GpuMatmul:
    """One of them; its module, which imports Triton, is imported when it is first called.

    `lacks` says what a GPU has not that the kernel needs, `missing` what is not installed here,
    `needs` which package it takes that installing quantload does not bring.
    """

    name: str
    format: WeightFormat
    module: str
    attribute: str
    arguments: tuple[Any, ...]
    lacks: Reason
    arrangement: Arrangement | None = None
    rounds_activations: bool = False
    missing: Callable[[], str | None] = _nothing_is_missing
    needs: str = ""

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        result: torch.Tensor = _made(self.module, self.attribute, self.format.name, self.arguments)(*args, **kwargs)
        return result

    def unavailable(self, device: torch.device) -> str | None:
        """Why the kernel cannot run on a device, or None when it can."""
        reason, target = triton_unavailable(device), gpu_target(device)
        if reason is not None or target is None:
            return reason
        return self.hardware_lacks(target) or self.missing()

    def hardware_lacks(self, target: GpuTarget | None) -> str | None:
        """Why the kernel could not run there with everything installed, or None when it could; None is a CPU."""
        return "needs a GPU" if target is None else triton_lacks(target) or self.lacks(self.format, target)


def gpu_matmuls(operation: str, fmt: WeightFormat) -> list[GpuMatmul]:
    """Kernels of `linear` or `experts` for a format on GPUs, best first; none for other operations.

    Activations are quantized too where that is what the format is for (FP8, and MXFP4 and MXFP8 with matrix
    instructions for them); INT8 only on request, because its activations lose more than its weights.
    """
    attributes = {"linear": ("linear", "TritonLinear"), "experts": ("experts", "TritonExperts")}
    if operation not in attributes or fmt is NVFP4:
        return []
    module, attribute = attributes[operation]
    weight_only = GpuMatmul("triton", fmt, module, attribute, (False,), _lacks_nothing)
    if fmt is MXFP4:
        w4a4 = GpuMatmul("triton_w4a4", fmt, module, attribute, (True,), _lacks_mx, rounds_activations=True)
        return [_through_aiter(operation, fmt, w4a4), w4a4, weight_only]
    if fmt in (MXFP6_E2M3, MXFP6_E3M2) or fmt.scale_words == 2:
        return [weight_only]
    lacks = _lacks_mx if fmt is MXFP8 else _lacks_fp8
    both = GpuMatmul("triton_w8a8", fmt, module, attribute, (True,), lacks, rounds_activations=True)
    if fmt.code_dtype == torch.int8:
        return [weight_only, both]
    if operation == "linear" and fmt.code_dtype == torch.float8_e4m3fn and fmt is not MXFP8:
        scaled_mm = GpuMatmul(
            *("scaled_mm", fmt, "scaled_mm", "ScaledMmLinear", (), _lacks_scaled_mm),
            rounds_activations=True,
            missing=_missing_scaled_mm,
        )
        return [scaled_mm, both, weight_only]
    return [both, weight_only]


def _through_aiter(operation: str, fmt: WeightFormat, w4a4: GpuMatmul) -> GpuMatmul:
    """aiter fuses a whole experts layer; layers it cannot fuse stay canonical and multiply through Triton."""
    made = ("aiter", "AiterLinear", ()) if operation == "linear" else (w4a4.module, w4a4.attribute, w4a4.arguments)
    return GpuMatmul("aiter", fmt, *made, aiter.lacks, aiter.ARRANGEMENT, True, aiter.missing, "AMD's aiter")


@cache
def _made(module: str, attribute: str, format_name: str, arguments: tuple[Any, ...]) -> Callable[..., torch.Tensor]:
    made: Callable[..., torch.Tensor] = getattr(importlib.import_module(f".{module}", __package__), attribute)(
        FORMATS[format_name], *arguments
    )
    return made


def _lacks_nothing(fmt: WeightFormat, target: GpuTarget) -> str | None:
    return None


def _lacks_mx(fmt: WeightFormat, target: GpuTarget) -> str | None:
    return None if target.native_mx else f"{target.name} has no MX matrix instructions; gfx950 and sm_100 have"


def _lacks_fp8(fmt: WeightFormat, target: GpuTarget) -> str | None:
    if fmt.code_dtype == torch.int8:
        return None
    if not target.native_fp8:
        return f"{target.name} has no matrix instructions for FP8; sm_89, gfx942 and newer have"
    wanted = torch.float8_e4m3fnuz if target.fnuz else torch.float8_e4m3fn
    if fmt.code_dtype != wanted:
        return f"the matrix instructions of {target.name} take {wanted}, and {fmt.name} is {fmt.code_dtype}"
    return None


def _missing_scaled_mm() -> str | None:
    return None if hasattr(torch, "_scaled_mm") else "this torch has no _scaled_mm"


def _lacks_scaled_mm(fmt: WeightFormat, target: GpuTarget) -> str | None:
    if target.is_amd or target.capability < 90:
        return f"used on sm_90 and newer, this GPU is {target.name}"
    if fmt.block_rows > 1:
        return "what torch._scaled_mm takes as 128 x 128 scales depends on its version and the GPU"
    return _lacks_fp8(fmt, target)
