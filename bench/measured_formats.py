"""The formats that are measured: of the integers that differ in bits, group and dtype, those that are in use."""

from __future__ import annotations

from quantload.kernels.formats import FORMATS, INTEGERS
from quantload.kernels.registry import candidates

INTEGERS_IN_USE = ("int4_group128_f16", "int4_group32_bf16", "int8_group128_f16")
MEASURED = tuple(
    name
    for name, fmt in FORMATS.items()
    if (fmt not in INTEGERS or name in INTEGERS_IN_USE)
    and any(reason is None for _, reason in candidates("quantize", name, "cpu"))
)
