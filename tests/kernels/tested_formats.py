"""The formats that tests of all formats run on: of the integers that differ in bits, group and dtype only a few."""

from __future__ import annotations

from quantload.kernels.formats import FORMATS, INTEGERS, NVFP4
from quantload.kernels.gpu.quantizers import gpu_quantizers

REPRESENTATIVES = ("int4_group128_f16", "int4_group32_bf16", "int8_group64_f32", "int4_group0_f32")
TESTED = tuple(name for name, fmt in FORMATS.items() if fmt not in INTEGERS or name in REPRESENTATIVES)
QUANTIZED = tuple(name for name in TESTED if name != NVFP4.name)
"""Those that weights can be quantized to."""
TRITON = tuple(name for name in QUANTIZED if gpu_quantizers("quantize", FORMATS[name]))
"""Those that have Triton kernels."""
