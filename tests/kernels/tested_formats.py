"""The formats that tests of all formats run on: of the integers that differ in bits, group and dtype only a few."""

from __future__ import annotations

import torch
from quantload.kernels import formats
from quantload.kernels.formats import FORMATS, INTEGERS, Tensors, WeightFormat
from quantload.kernels.gpu.quantizers import gpu_quantizers
from quantload.kernels.registry import candidates, platform_kernels

REPRESENTATIVES = ("int4_group128_f16", "int4_group32_bf16", "int8_group64_f32", "int4_group0_f32")
TESTED = tuple(name for name, fmt in FORMATS.items() if fmt not in INTEGERS or name in REPRESENTATIVES)
QUANTIZED = tuple(name for name in TESTED if any(reason is None for _, reason in candidates("quantize", name, "cpu")))
"""Those that weights can be quantized to."""
NUMBA_FORMATS = tuple(
    name for name in TESTED if any(kernel.name == "numba" for kernel in platform_kernels("quantize", name, "cpu"))
)
"""Those that have kernels for CPUs."""
TRITON = tuple(name for name in QUANTIZED if gpu_quantizers("quantize", FORMATS[name]))
"""Those that have Triton kernels."""

MX = tuple(name for name in QUANTIZED if FORMATS[name].family is formats.MX)
MXFP6 = tuple(name for name in MX if FORMATS[name].code_bits == 6)
FP8_E4M3FN = tuple(name for name in QUANTIZED if FORMATS[name].family is formats.FP8)
FP8_FNUZ = tuple(name for name in QUANTIZED if FORMATS[name].family is formats.FP8_FNUZ)
FP8 = (*FP8_E4M3FN, *FP8_FNUZ)
INT8 = formats.INT8_CHANNEL.name
"""What tests say they are about, with `@pytest.mark.formats`."""


def filled(fmt: WeightFormat, rows: int, cols: int, value: int = 77, device: str = "cpu") -> Tensors:
    """Tensors of a weight that hold what no kernel has written: the codes bytes, the scales numbers."""
    codes, *scales = fmt.tensors
    first = torch.full(codes.shape(rows, cols), value, dtype=torch.uint8, device=device).view(codes.dtype)
    return first, *(torch.full(each.shape(rows, cols), value, device=device).to(each.dtype) for each in scales)
