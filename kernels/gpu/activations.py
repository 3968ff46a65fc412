"""Activations quantized on the device, in one launch, for matmuls of two quantized operands."""

from __future__ import annotations

import torch
import triton

from ..formats import WeightFormat
from ..nvfp4_scales import spread
from .jit.mx_matmul import quantize_tokens_mx
from .jit.nvfp4_matmul import quantize_tokens_nvfp4
from .jit.scaled_matmul import quantize_tokens, token_amax
from .launch import EXACT


def quantize_mx_activations(x: torch.Tensor, fmt: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] in MXFP4 or MXFP8, as a weight would be: codes `fmt.code_shape(T, K)` and scales [T, ceil(K/32)].

    A block that holds NaN or Inf gets scale 255, which is NaN.
    """
    tokens, k = x.shape
    codes = torch.empty(fmt.code_shape(tokens, k), dtype=fmt.code_dtype, device=x.device)
    scales = torch.empty(fmt.scale_shape(tokens, k), dtype=torch.uint8, device=x.device)
    padded = scales.shape[1] * 32
    columns = min(256, triton.next_power_of_2(padded))
    quantize_tokens_mx[(triton.cdiv(tokens, 16), triton.cdiv(padded, columns))](
        x, codes.view(torch.uint8), scales, tokens, k, x.stride(0), codes.stride(0), scales.stride(0),
        CODE=fmt.element, BT=16, BK=columns,
    )  # fmt: skip
    return codes, scales


def quantize_nvfp4_activations(x: torch.Tensor, fmt: WeightFormat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, K] in NVFP4, each token as a tensor of its own: codes [T, ceil(K / 16) * 8], E4M3 bytes, float32 [T].

    A token that holds NaN or Inf gets a NaN for the last.
    """
    tokens, k = x.shape
    codes = torch.empty(fmt.code_shape(tokens, k), dtype=torch.uint8, device=x.device)
    scales = torch.empty(fmt.scale_shape(tokens, k), dtype=torch.uint8, device=x.device)
    padded = scales.shape[1] * fmt.block_cols
    amax, scale_2 = torch.empty(2, tokens, dtype=torch.float32, device=x.device)
    token_amax[(tokens,)](x, amax, k, x.stride(0), BK=min(4096, max(128, triton.next_power_of_2(k))))
    columns = min(256, triton.next_power_of_2(padded))
    quantize_tokens_nvfp4[(triton.cdiv(tokens, 16), triton.cdiv(padded, columns))](
        x, amax, codes, scales, scale_2, tokens, k, x.stride(0), codes.stride(0), scales.stride(0),
        SPREAD=spread("default"), BT=16, BK=columns, **EXACT,
    )  # fmt: skip
    return codes, scales, scale_2


def quantize_scaled_activations(x: torch.Tensor, fmt: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] in the code type of a weight format: codes [T, K], float32 scales.

    Scales are [T, 1] per token, [1, 1] for `fp8_tensor`, [T, ceil(K/128)] for `fp8_block`; their rules are those of
    `quantload.kernels.fp8` and `int8`, twice as large for E4M3FNUZ. What is not finite makes its scale so.
    """
    tokens, k = x.shape
    codes = torch.empty(tokens, k, dtype=fmt.code_dtype, device=x.device)
    bits = codes if fmt.code_dtype == torch.int8 else codes.view(torch.uint8)
    columns = min(4096, max(128, triton.next_power_of_2(k)))
    shape, amax = (tokens, 1), x
    if fmt.block_rows == 0:
        amax = torch.empty(tokens, dtype=torch.float32, device=x.device)
        token_amax[(tokens,)](x, amax, k, x.stride(0), BK=columns)
        amax, shape = amax.amax(), (1, 1)
    elif fmt.block_cols:
        shape = (tokens, -(-k // fmt.block_cols))
    scales = torch.empty(shape, dtype=torch.float32, device=x.device)
    stride = scales.stride(0) if shape[0] == tokens and fmt.block_rows else 0
    quantize_tokens[(tokens,)](
        x,
        amax,
        bits,
        scales,
        k,
        x.stride(0),
        bits.stride(0),
        stride,
        RULE=fmt.rule,
        FNUZ=fmt.ocp is not None,
        BK=columns,
    )
    return codes, scales
