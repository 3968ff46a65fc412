"""The `linear` and `experts` kernels there are for GPUs, and why each cannot serve on one that lacks what it needs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from ..arrangement import Arrangement
from ..formats import (
    FORMATS,
    FP8,
    FP8_FNUZ,
    INT4_GROUPS,
    INT8,
    INTEGER,
    MX,
    NON_LINEAR,
    TENSOR_SCALED,
    Family,
    WeightFormat,
)
from . import aiter
from .quantizers import triton_lacks, triton_unavailable
from .target import GpuTarget, gpu_target

TRITON_WITH_NVFP4 = (3, 8)
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


@dataclass(frozen=True)
class Row:
    """A kernel for GPUs, and the codes of each family of formats that it serves (None: all)."""

    name: str
    serves: Mapping[Family, tuple[str, ...] | None]
    where: Mapping[str, tuple[str, str, tuple[Any, ...]]]
    """Module, class, and what that takes beside the format, for each operation it has."""
    lacks: Reason
    more: Mapping[str, Any] = field(default_factory=dict)
    """What else a `GpuMatmul` has."""

    def makes(self, operation: str, fmt: WeightFormat) -> bool:
        """Whether it is a kernel of an operation of a format."""
        if operation not in self.where or fmt.family is None or fmt.family not in self.serves:
            return False
        elements = self.serves[fmt.family]
        return elements is None or fmt.element in elements


def gpu_matmuls(operation: str, fmt: WeightFormat) -> list[GpuMatmul]:
    """Kernels of `linear` or `experts` for a format on GPUs, best first; none for other operations."""
    rows = (row for row in ROWS if row.makes(operation, fmt))
    return [GpuMatmul(row.name, fmt, *row.where[operation], row.lacks, **row.more) for row in rows]


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


def _lacks_nvfp4(fmt: WeightFormat, target: GpuTarget) -> str | None:
    return None if target.native_nvfp4 else f"{target.name} has no NVFP4 matrix instructions; sm_100 has"


def _lacks_fp8(fmt: WeightFormat, target: GpuTarget) -> str | None:
    if not target.native_fp8:
        return f"{target.name} has no matrix instructions for FP8; sm_89, gfx942 and newer have"
    wanted = torch.float8_e4m3fnuz if target.fnuz else torch.float8_e4m3fn
    if fmt.code_dtype != wanted:
        return f"the matrix instructions of {target.name} take {wanted}, and {fmt.name} is {fmt.code_dtype}"
    return None


def missing_nvfp4() -> str | None:
    """Why the Triton here makes no block-scaled instruction of scales in E4M3; it multiplies decoded values instead."""
    import triton

    version = str(triton.__version__)
    old = tuple(int(part) for part in version.split(".")[:2]) < TRITON_WITH_NVFP4
    return f"Triton {version} has no block-scaled products with scales in E4M3; 3.8 and newer have" if old else None


def _missing_scaled_mm() -> str | None:
    return None if hasattr(torch, "_scaled_mm") else "this torch has no _scaled_mm"


def _lacks_scaled_mm(fmt: WeightFormat, target: GpuTarget) -> str | None:
    if target.is_amd or target.capability < 90:
        return f"used on sm_90 and newer, this GPU is {target.name}"
    if fmt.block_rows > 1:
        return "what torch._scaled_mm takes as 128 x 128 scales depends on its version and the GPU"
    return _lacks_fp8(fmt, target)


def _triton(way: str) -> dict[str, tuple[str, str, tuple[Any, ...]]]:
    """By a way of `ways.WAYS`."""
    return {"linear": ("linear", "TritonLinear", (way,)), "experts": ("experts", "TritonExperts", (way,))}


_ROUNDS = {"rounds_activations": True}
_AITER = {**_ROUNDS, "arrangement": aiter.ARRANGEMENT, "missing": aiter.missing, "needs": "AMD's aiter"}
_NVFP4 = {**_ROUNDS, "missing": missing_nvfp4}
_SCALED_MM = {**_ROUNDS, "missing": _missing_scaled_mm}

# aiter fuses a whole experts layer; layers it cannot fuse stay canonical and multiply through Triton. Activations are
# quantized too where that is what the format is for (FP8, and MXFP4, NVFP4 and MXFP8 with matrix instructions for
# them); those of INT8 only on request, because its activations lose more than its weights.
ROWS = (
    Row("aiter", {MX: ("e2m1",)}, {**_triton("mx codes"), "linear": ("aiter", "AiterLinear", ())}, aiter.lacks, _AITER),
    Row("triton_w4a4", {MX: ("e2m1",)}, _triton("mx codes"), _lacks_mx, _ROUNDS),
    Row("triton_w4a4", {TENSOR_SCALED: ("e2m1",)}, _triton("nvfp4 codes"), _lacks_nvfp4, _NVFP4),
    Row("scaled_mm", {FP8: None}, {"linear": ("scaled_mm", "ScaledMmLinear", ())}, _lacks_scaled_mm, _SCALED_MM),
    Row("triton_w8a8", {MX: ("e4m3",)}, _triton("mx codes"), _lacks_mx, _ROUNDS),
    Row("triton_w8a8", {FP8: None, FP8_FNUZ: None}, _triton("scaled codes"), _lacks_fp8, _ROUNDS),
    Row("triton", {MX: ("e2m1",)}, _triton("mx"), _lacks_nothing),
    Row(
        "triton",
        {
            MX: ("e2m3", "e3m2", "e4m3"),
            **dict.fromkeys((TENSOR_SCALED, NON_LINEAR, INTEGER, INT4_GROUPS)),
        },
        _triton("decoded"),
        _lacks_nothing,
    ),
    Row("triton", {FP8: None, FP8_FNUZ: None, INT8: None}, _triton("scaled"), _lacks_nothing),
    Row("triton_w8a8", {INT8: None}, _triton("scaled codes"), _lacks_nothing, _ROUNDS),
)
"""Best first."""
