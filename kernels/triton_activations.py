"""Activations quantized on the device, in one launch, for matmuls of two quantized operands."""

from __future__ import annotations

import torch
import triton

from .formats import WeightFormat
from .jit.mxfp4_matmul import mxfp4_quantize_tokens
from .jit.scaled_matmul import quantize_tokens, token_amax


def quantize_mxfp4_activations(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] in MXFP4, as `quantload.kernels.mxfp4` would: codes [T, ceil(K/32) * 16] and scales [T, ceil(K/32)].

    A block that holds NaN or Inf gets scale 255, which is NaN.
    """
    tokens, k = x.shape
    blocks = -(-k // 32)
    codes = torch.empty(tokens, blocks * 16, dtype=torch.uint8, device=x.device)
    scales = torch.empty(tokens, blocks, dtype=torch.uint8, device=x.device)
    columns = min(256, triton.next_power_of_2(blocks * 32))
    grid = (triton.cdiv(tokens, 16), triton.cdiv(blocks * 32, columns))
    mxfp4_quantize_tokens[grid](
        x, codes, scales, tokens, k, x.stride(0), codes.stride(0), scales.stride(0), BT=16, BK=columns
    )
    return codes, scales


def quantize_scaled_activations(x: torch.Tensor, fmt: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] in the code type of a weight format: codes [T, K], float32 scales.

    Scales are [T, 1] per token, [1, 1] for `fp8_tensor`, [T, ceil(K/128)] for `fp8_block`; their rules are those of
    `quantload.kernels.fp8` and `int8`, twice as large for E4M3FNUZ. What is not finite makes its scale so.
    """
    tokens, k = x.shape
    codes = torch.empty(tokens, k, dtype=fmt.code_dtype, device=x.device)
    bits = codes if fmt.code_dtype == torch.int8 else codes.view(torch.uint8)
    columns = min(4096, max(128, triton.next_power_of_2(k)))
    rule, shape, amax = fmt.name.removesuffix("_fnuz"), (tokens, 1), x
    if fmt.block_rows == 0:
        amax = torch.empty(tokens, dtype=torch.float32, device=x.device)
        token_amax[(tokens,)](x, amax, k, x.stride(0), BK=columns)
        amax, shape = amax.amax(), (1, 1)
    elif fmt.block_cols:
        shape = (tokens, -(-k // fmt.block_cols))
    elif fmt.code_dtype == torch.int8:
        rule = "int8"
    scales = torch.empty(shape, dtype=torch.float32, device=x.device)
    stride = scales.stride(0) if shape[0] == tokens and fmt.block_rows else 0
    fnuz = fmt.code_dtype == torch.float8_e4m3fnuz
    quantize_tokens[(tokens,)](
        x, amax, bits, scales, k, x.stride(0), bits.stride(0), stride, RULE=rule, FNUZ=fnuz, BK=columns
    )
    return codes, scales
