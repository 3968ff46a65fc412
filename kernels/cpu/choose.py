"""Which numba kernels a format has on a CPU, and which functions a load will call: what has to be compiled for it."""

from __future__ import annotations

from typing import Any

import torch

from ..formats import FORMATS, MXFP4_ROWS, RowMultiplied
from ..reference import fp8, int8, integer, mx, mx_mse, mxfp4, mxfp4_rows
from ..reference.operations import Reference
from . import dequantize as cpu_dequantize
from . import linear as cpu_linear
from .compiled import Needed
from .integer import NumbaIntegers
from .operations import KINDS, NumbaKernels
from .rows import NumbaRows


def numba_kernels(format_name: str, scale_mode: str = "default") -> NumbaKernels:
    """The CPU operations of a format."""
    if format_name == MXFP4_ROWS.name:
        return NumbaRows(MXFP4_ROWS, mxfp4_rows.reference)
    if format_name in integer.references:
        return NumbaIntegers(FORMATS[format_name], integer.references[format_name], scale_mode)
    own = {"mxfp4": mxfp4.reference, "int8_channel": int8.reference, **fp8.references, **mx.references}
    references: dict[str, dict[str, Reference]] = {"default": own, "mse": {**mx_mse.references}}
    return NumbaKernels(FORMATS[format_name], references[scale_mode][format_name], scale_mode)


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
        fmt = fmt.blocks if isinstance(fmt, RowMultiplied) else fmt
        found.append(cpu_dequantize.needed(fmt, activation_dtype))
        found.extend(cpu_linear.needed_for(fmt, activation_dtype))
    return found
