"""Compiles the matmul kernels for GPUs that are not here, with the tile sizes and constants their launchers choose."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from gpu_targets import TABLE, Compiled, compile_for
from quantload.kernels.formats import FORMATS, MXFP4
from quantload.kernels.gpu_target import GpuTarget
from quantload.kernels.jit import mxfp4_matmul, scaled_matmul
from quantload.kernels.triton_linear import CODE_NAMES, constants, float_kind, tiles_for

K, MANY = 4096, 512
SIXTEENTHS = ("k", "k_step", "n_rows", "x_stride", "code_stride", "code_expert_stride", "bias_stride", "out_stride")
MFMA_MX = r"v_mfma_scale_f32_\w+_f8f6f4"
TCGEN05_MX = r"tcgen05\.mma\.\S+mxf4\S*"
DECODE_FP4 = r"v_cvt_scalef32_pk_bf16_fp4"
MATRIX = r"v_mfma_f32_\w+_bf16|mma\.sync\.\S+\.bf16\.\S+|wgmma\S+bf16|tcgen05\.mma\S+f16"
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
    module = mxfp4_matmul if fmt is MXFP4 else scaled_matmul
    kernel = getattr(module, f"{'mxfp4' if fmt is MXFP4 else 'scaled'}_{operation}")
    options: dict[str, Any] = constants(tiles_for(fmt, gpu, torch.empty(0, K, dtype=dtype), tokens, is_quantized), K)
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    float_type = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    x_type = float_type
    if fmt is MXFP4:
        kind = float_kind(gpu, dtype) if not is_quantized else "quantize" if tokens < MANY else "codes"
        options["ACTIVATIONS"] = kind
        x_type = "*u8" if kind == "codes" else float_type
    else:
        options |= {"CODE": CODE_NAMES[fmt.code_dtype], "X_CODES": is_quantized, "BLOCKS": fmt.block_rows > 1}
        if is_quantized:
            x_type = "*i8" if fmt.code_dtype == torch.int8 else "*u8"
    scale_type = "*u8" if fmt is MXFP4 else "*fp32"
    pointers = {
        "x": x_type,
        "x_scales": scale_type,
        "codes": "*i8" if fmt.code_dtype == torch.int8 else "*u8",
        "scales": scale_type,
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


def native_instruction(name: str, target: str, is_quantized: bool) -> str:
    """A pattern for the matrix instruction, or decoding instruction, that the kernel is for."""
    if name == "mxfp4" and is_quantized:
        return MFMA_MX if target == "gfx950" else TCGEN05_MX
    if is_quantized:
        return (MATRIX_INT8 if name.startswith("int8") else MATRIX_FP8)[target]
    return DECODE_FP4 if name == "mxfp4" and target == "gfx950" else MATRIX


def check(operation: str, name: str, target: str, tokens: int, is_quantized: bool) -> None:
    """The kernel compiles, has its native instruction, spills nothing; its row goes to the table."""
    built, native = (
        compiled(operation, name, target, tokens, is_quantized),
        native_instruction(name, target, is_quantized),
    )
    found = built.find(native)
    TABLE.add(label(operation, name, is_quantized, tokens), built, found)
    assert found, f"no {native} in the code of {name} {operation} for {target}"
    assert built.spills == 0
