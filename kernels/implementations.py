"""Every implementation of every operation: which backends there are for a format, best first.

What the operations take and return stands in `registry`, which chooses among them; nothing is imported here that an
operation needs before it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from .arrangement import Arrangement
from .formats import FORMATS, RowMultiplied, WeightFormat
from .gpu.matmuls import GpuMatmul, gpu_matmuls
from .gpu.quantizers import GpuQuantize, gpu_quantizers
from .gpu.target import GpuTarget
from .reference.choose import reference
from .reference.experts import ExpertsByLinear
from .reference.row_multiplied import MULTIPLIED

SCALING = ("quantize", "finish_scales")
"""The operations that differ between the scale modes."""


@dataclass(frozen=True)
class Kernel:
    """One implementation of one operation of one format; `device_type` None serves every device."""

    name: str
    operation: str
    format: str
    device_type: str | None
    function: Callable[..., Any]
    unavailable: Callable[[torch.device], str | None]
    """Why the kernel cannot run on a device, or None when it can."""
    lacks: Callable[[GpuTarget | None], str | None]
    """The same of hardware that need not be here, with everything installed; None is a CPU."""
    arrangement: Arrangement | None = None
    """What loaded weights go through for `linear` or `experts`; None: they stay canonical."""
    rounds_activations: bool = False
    """Whether a matmul rounds its activations to what goes with the format, dynamically."""
    needs: str = ""
    """A package that installing quantload does not bring."""
    prepare: Callable[..., Any] | None = None
    """(tensors, n_rows, k, dtype) -> `Prepared` or None, of a `linear` that is faster for what is known before."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


@cache
def implementations(operation: str, format_name: str, scale_mode: str) -> tuple[Kernel, ...]:
    """All kernels of an operation of a format, best first; a backend for another device is one more entry here."""
    fmt = FORMATS[format_name]
    if isinstance(fmt, RowMultiplied) and operation in MULTIPLIED:
        return tuple(_multiplied(kernel, fmt) for kernel in implementations(operation, fmt.blocks.name, scale_mode))
    on_cpu = _numba_function(operation, format_name, scale_mode)
    return (
        *_gpu_kernels(operation, format_name, scale_mode),
        Kernel(
            *("numba", operation, format_name, "cpu", on_cpu, _numba_reason(format_name), _numba_lacks(format_name)),
            prepare=partial(_prepare_numba, fmt) if operation == "linear" else None,
        ),
        _torch_kernel(operation, format_name, scale_mode),
    )


def _multiplied(kernel: Kernel, fmt: RowMultiplied) -> Kernel:
    """A kernel of the blocks of a format, with the multipliers; arranged scales have no place for them."""
    made = replace(kernel, format=fmt.name, function=MULTIPLIED[kernel.operation](fmt, kernel.function), prepare=None)
    if kernel.arrangement is None:
        return made
    return replace(made, unavailable=_arranged, lacks=_arranged, arrangement=None)


def _arranged(where: torch.device | GpuTarget | None) -> str:
    return "brings scales into an order of its own, where multipliers of rows have no place"


def _gpu_kernels(operation: str, format_name: str, scale_mode: str) -> tuple[Kernel, ...]:
    fmt = FORMATS[format_name]
    found: list[GpuMatmul | GpuQuantize] = [*gpu_matmuls(operation, fmt), *gpu_quantizers(operation, fmt, scale_mode)]
    return tuple(
        Kernel(
            k.name,
            operation,
            format_name,
            "cuda",
            k,
            k.unavailable,
            k.hardware_lacks,
            getattr(k, "arrangement", None),
            getattr(k, "rounds_activations", False),
            getattr(k, "needs", ""),
        )
        for k in found
    )


def _numba_function(operation: str, format_name: str, scale_mode: str) -> Callable[..., Any]:
    if operation == "experts":
        return ExpertsByLinear(FORMATS[format_name], _Numba("linear", format_name, scale_mode))
    return _Numba(operation, format_name, scale_mode)


class _Numba:
    """A CPU operation that imports numba when it is first called."""

    def __init__(self, operation: str, format_name: str, scale_mode: str) -> None:
        self.operation, self.format_name, self.scale_mode = operation, format_name, scale_mode
        self.function: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.function is None:
            from .cpu.choose import numba_kernels

            self.function = getattr(numba_kernels(self.format_name, self.scale_mode), self.operation)
        return self.function(*args, **kwargs)


def _prepare_numba(fmt: WeightFormat, *weight: Any) -> Any:
    from .cpu.linear import prepare

    return prepare(fmt, *weight)


def _torch_kernel(operation: str, format_name: str, scale_mode: str) -> Kernel:
    plain = reference(format_name, scale_mode)
    function: Callable[..., Any] = (
        ExpertsByLinear(plain.codec.format, plain.linear) if operation == "experts" else getattr(plain, operation)
    )
    return Kernel("torch", operation, format_name, None, function, _torch_unavailable, _lacks_nothing)


def _lacks_nothing(target: GpuTarget | None) -> str | None:
    return None


def _numba_reason(format_name: str) -> Callable[[torch.device], str | None]:
    return numba_unavailable if _has_numba(format_name) else _no_numba_kernels


def _numba_lacks(format_name: str) -> Callable[[GpuTarget | None], str | None]:
    no_kernels = None if _has_numba(format_name) else "has no kernels for this format"
    return lambda target: no_kernels if target is None else "runs on cpu only"


def _has_numba(format_name: str) -> bool:
    family = FORMATS[format_name].family
    return family is not None and family.cpu is not None


def _no_numba_kernels(device: torch.device) -> str | None:
    return "has no kernels for this format"


@cache
def numba_unavailable(device: torch.device) -> str | None:
    """Why kernels that numba compiles cannot run in this process, or None when they can."""
    import importlib.util
    import os
    import sys

    if importlib.util.find_spec("numba") is None:
        return "numba is not installed"
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return "NUMBA_DISABLE_JIT is set"
    if sys.byteorder != "little":
        return "the kernels assume a little-endian processor"
    return None


def _torch_unavailable(device: torch.device) -> str | None:
    return "the meta device holds no data" if device.type == "meta" else None
