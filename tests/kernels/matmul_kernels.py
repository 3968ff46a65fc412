"""Compiles the matmul kernels for GPUs that are not here, with the tile sizes and constants their launchers choose."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import triton
from gpu_targets import Compiled, add_compiled, compile_for
from quantload.kernels.formats import FORMATS
from quantload.kernels.gpu.jit import matmul
from quantload.kernels.gpu.linear import constants
from quantload.kernels.gpu.target import GpuTarget
from quantload.kernels.gpu.ways import WAYS
from triton_ways import way_of

K, MANY = 4096, 512
SIXTEENTHS = ("k", "k_step", "n_rows", "x_stride", "code_stride", "code_expert_stride", "bias_stride", "out_stride")
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*u8",
}
MFMA_MX = r"v_mfma_scale_f32_\w+_f8f6f4"
TCGEN05_MX = {
    "mxfp4": r"tcgen05\.mma\.\S+mxf4\S*",
    "nvfp4": r"tcgen05\.mma\.\S+mxf4nvf4\S+block16",
    "mxfp8": r"tcgen05\.mma\.\S+mxf8f6f4\S*",
}
DECODE_FP4 = r"v_cvt_scalef32_pk_b?f16_fp4"
MATRIX = {
    torch.bfloat16: r"v_mfma_f32_\w+_bf16|mma\.sync\.\S+\.bf16\.\S+|wgmma\S+bf16|tcgen05\.mma\S+f16",
    torch.float16: r"v_mfma_f32_\w+x\d+_f16|mma\.sync\.\S+\.f16\.f16\.\S+|wgmma\S+\.f16\.f16|tcgen05\.mma\S+f16",
    torch.float32: r"v_mfma_f32_\w+_f32|fma\.rn\.f32",
}
TCGEN05_TF32 = r"tcgen05\.mma\S+tf32"
"""What Triton before 3.8 makes of float32 on sm_100, although the kernels ask for IEEE arithmetic."""
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
MATRIX_FP8 = {
    "gfx942": r"v_mfma_f32_\w+_fp8_fp8",
    "gfx950": r"v_mfma_f32_\w+_f8f6f4",
    "sm_90": r"wgmma\S+e4m3",
    "sm_100": r"tcgen05\.mma\S+f8f6f4",
}
MATRIX_INT8 = {
    "gfx942": r"v_mfma_i32_\w+_i8",
    "gfx950": r"v_mfma_i32_\w+_i8",
    "sm_80": r"mma\.sync\.\S+s8\.s8\S+",
    "sm_90": r"wgmma\S+s8\.s8",
    "sm_100": r"tcgen05\.mma\S+i8|mma\.sync\.\S+s8\.s8\S+",
}


def compiled(
    operation: str, name: str, target: str, tokens: int, is_quantized: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Compiled:
    """What `linear` or `experts` launches for `tokens` activations of a type, and a weight of `K` columns."""
    fmt, gpu = FORMATS[name], GpuTarget(target)
    kernel = getattr(matmul, f"multiply_{operation}")
    way = WAYS[way_of(name, is_quantized)]
    options: dict[str, Any] = constants(way.tiles(fmt, gpu, tokens, K, dtype.itemsize), K)
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    options |= way.constants(fmt, gpu, dtype, tokens)
    float_type = POINTERS[dtype]
    code_type = "*i32" if fmt.code_bits == 6 else "*i8" if fmt.code_dtype == torch.int8 else "*u8"
    scale_type = POINTERS[fmt.scale_dtype]
    pointers = {
        "x": code_type if options["ACTIVATIONS"] == "codes" else float_type,
        "x_scales": scale_type,
        "codes": code_type,
        "scales": scale_type,
        "scale_2": "*fp32",
        "x_scale_2": "*fp32",
        "bias": float_type,
        "out": float_type,
        "offsets": "*i32",
    }
    if operation == "experts":
        options["EXPERTS"] = 256
    signature = {}
    for argument in kernel.arg_names:
        if argument in pointers:
            signature[argument] = f"{pointers[argument]}:16"
        elif argument != "HAS_BIAS" and argument not in options:
            signature[argument] = "i32:16" if argument in SIXTEENTHS else "i32"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton warns of a future default of an option that matters to no matmul
        return compile_for(
            kernel,
            signature,
            target,
            constants={**options, "HAS_BIAS": True},
            num_warps=warps,
            num_stages=stages,
        )


def label(operation: str, name: str, is_quantized: bool, tokens: int) -> str:
    """As the tests in `interpreted_linear.py` name the kernel, with its tile size where there are two."""
    return f"{name} {operation}, {'activations too' if is_quantized else 'weight-only'}" + (
        ", many tokens" if tokens == MANY else ""
    )


def native_instruction(name: str, target: str, is_quantized: bool, dtype: torch.dtype = torch.bfloat16) -> str:
    """A pattern for the matrix instruction, or decoding instruction, that the kernel is for."""
    if name in TCGEN05_MX and is_quantized:
        return MFMA_MX if target == "gfx950" else TCGEN05_MX[name]
    if is_quantized:
        return (MATRIX_INT8 if name.startswith("int8") else MATRIX_FP8)[target]
    if name == "mxfp4" and target == "gfx950" and dtype != torch.float32:
        return DECODE_FP4
    if dtype == torch.float32 and target == "sm_100" and TRITON < (3, 8):
        return TCGEN05_TF32
    return MATRIX[dtype]


def check(
    operation: str, name: str, target: str, tokens: int, is_quantized: bool, dtype: torch.dtype = torch.bfloat16
) -> None:
    """The kernel compiles, has its native instruction, spills nothing; that for BF16 has a row in the table."""
    built = compiled(operation, name, target, tokens, is_quantized, dtype)
    native = native_instruction(name, target, is_quantized, dtype)
    found = built.find(native)
    if dtype == torch.bfloat16:
        add_compiled(label(operation, name, is_quantized, tokens), built, found)
    assert found, f"no {native} in the code of {name} {operation} for {target}"
    assert built.spills == 0
