"""The formats that are measured: of the integers that differ in bits, group and dtype, those that are in use."""

from __future__ import annotations

from quantload.kernels.formats import FORMATS, INTEGERS, NVFP4

INTEGERS_IN_USE = ("int4_group128_f16", "int4_group32_bf16", "int8_group128_f16")
MEASURED = tuple(
    name for name, fmt in FORMATS.items() if fmt is not NVFP4 and (fmt not in INTEGERS or name in INTEGERS_IN_USE)
)
