"""Which numba kernels a format has on a CPU, and which functions a load will call: what has to be compiled for it."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from ..formats import FORMATS
from ..reference.choose import reference
from . import dequantize as cpu_dequantize
from . import linear as cpu_linear
from .compiled import Needed
from .operations import KINDS, NumbaKernels


def numba_kernels(format_name: str, scale_mode: str = "default") -> NumbaKernels:
    """The CPU operations of a format; `KeyError` for one that has none."""
    fmt = FORMATS[format_name]
    if fmt.family is None or fmt.family.cpu is None:
        raise KeyError(format_name)
    module, _, attribute = fmt.family.cpu.partition(":")
    made: NumbaKernels = getattr(importlib.import_module(f".{module}", __package__), attribute)(
        fmt, reference(format_name, scale_mode), scale_mode
    )
    return made


def needed_to_load(
    format_name: str,
    source_dtype: torch.dtype,
    statistics: bool = True,
    activation_dtype: torch.dtype | None = None,
    scale_mode: str = "default",
) -> list[Needed[Any]]:
    """What loading weights of `source_dtype` into a format will call, and `linear` on `activation_dtype`."""
    fmt = FORMATS[format_name]
    found: list[Needed[Any]] = [*numba_kernels(format_name, scale_mode).needed(KINDS[source_dtype], statistics)]
    if activation_dtype is not None:
        found.append(cpu_dequantize.needed(fmt.read_as, activation_dtype))
        found.extend(cpu_linear.needed_for(fmt.read_as, activation_dtype))
    return found


def needed_to_serve(format_name: str, activation_dtype: torch.dtype) -> list[Needed[Any]]:
    """What products of weights in a format with any number of tokens will call."""
    return [*cpu_linear.needed_for_any(FORMATS[format_name].read_as, activation_dtype)]
