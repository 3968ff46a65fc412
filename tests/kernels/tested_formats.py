"""The formats that tests of all formats run on: of the integers that differ in bits, group and dtype only a few."""

from __future__ import annotations

import torch
from quantload.kernels.formats import FORMATS, INT8_CHANNEL, INTEGERS, MXFP4, MXFP6_E2M3, MXFP6_E3M2, MXFP8, NVFP4
from quantload.kernels.gpu.quantizers import gpu_quantizers

REPRESENTATIVES = ("int4_group128_f16", "int4_group32_bf16", "int8_group64_f32", "int4_group0_f32")
TESTED = tuple(name for name, fmt in FORMATS.items() if fmt not in INTEGERS or name in REPRESENTATIVES)
QUANTIZED = tuple(name for name in TESTED if name != NVFP4.name)
"""Those that weights can be quantized to."""
TRITON = tuple(name for name in QUANTIZED if gpu_quantizers("quantize", FORMATS[name]))
"""Those that have Triton kernels."""

MXFP6 = (MXFP6_E2M3.name, MXFP6_E3M2.name)
MX = (MXFP4.name, *MXFP6, MXFP8.name)
FP8_E4M3FN = tuple(name for name in QUANTIZED if name not in MX and FORMATS[name].code_dtype == torch.float8_e4m3fn)
FP8_FNUZ = tuple(name for name in QUANTIZED if FORMATS[name].code_dtype == torch.float8_e4m3fnuz)
FP8 = (*FP8_E4M3FN, *FP8_FNUZ)
INT8 = INT8_CHANNEL.name
"""What tests say they are about, with `@pytest.mark.formats`."""
