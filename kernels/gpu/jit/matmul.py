"""The kernels of `linear` and `experts`: one tile a program, by whichever way of multiplying its formats need.

TILE names it: "mx" (`mx_matmul`), "nvfp4" (`nvfp4_matmul`), "decoded" (`decoded_matmul`) or "scaled"
(`scaled_matmul`); CODE and SCALE (the types of both), GROUP (columns that share a scale, 0 for all) and ACTIVATIONS are
its business. SCALE_2 says what else has a float32 scale, at `scale_2`: each "row" of a weight or the whole "tensor",
one expert after the other, or nothing (""); `x_scale_2` is that of each token whose activations are codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decoded_matmul import decoded_tile
from .mx_matmul import mx_tile
from .nvfp4_matmul import nvfp4_tile
from .scaled_matmul import scale_tile, scaled_tile
from .tile_matmul import find_block, rows_from, store_tile


@triton.jit
def multiply_linear(
    x,
    x_scales,
    x_scale_2,
    codes,
    scales,
    scale_2,
    bias,
    out,
    tokens,
    n_rows,
    k,
    k_step,
    x_stride,
    x_scale_stride,
    code_stride,
    scale_stride,
    out_stride,
    TILE: tl.constexpr,
    CODE: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATIONS: tl.constexpr,
    SCALE_2: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One tile of out [tokens, n_rows]; program (token tile, row tile, part): part p sums k_step columns.

    With several parts, `out` is [parts, tokens, n_rows] float32 without rows in between.
    """
    t0 = tl.program_id(0) * BT
    n0 = tl.program_id(1) * BN
    part = tl.program_id(2)
    tile = _product(
        x,
        x_scales,
        x_scale_2,
        codes,
        scales,
        scale_2,
        t0,
        tokens,
        n0,
        n_rows,
        part * k_step,
        tl.minimum((part + 1) * k_step, k),
        k,
        x_stride,
        x_scale_stride,
        code_stride,
        scale_stride,
        TILE,
        CODE,
        SCALE,
        GROUP,
        ACTIVATIONS,
        SCALE_2,
        EVEN_K,
        BT,
        BN,
        BK,
    )
    out += part.to(tl.int64) * tokens * out_stride
    store_tile(tile, out, bias, out_stride, t0, tokens, n0, n_rows, HAS_BIAS, BT, BN)


@triton.jit
def multiply_experts(
    x,
    x_scales,
    x_scale_2,
    codes,
    scales,
    scale_2,
    bias,
    out,
    offsets,
    n_experts,
    tokens,
    n_rows,
    k,
    x_stride,
    x_scale_stride,
    code_stride,
    code_expert_stride,
    scale_stride,
    scale_expert_stride,
    bias_stride,
    out_stride,
    TILE: tl.constexpr,
    CODE: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATIONS: tl.constexpr,
    SCALE_2: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """One tile of out [tokens, n_rows], of tokens of one expert; program (block of tokens, row tile).

    Rows that belong to nobody become 0. Nothing is read of an expert without tokens.
    """
    expert, t0, end = find_block(offsets, n_experts, tokens, tl.program_id(0), BT, EXPERTS)
    n0 = tl.program_id(1) * BN
    if t0 >= end:
        return
    if expert == n_experts:
        nothing = tl.zeros((BN, BT), tl.float32)
        store_tile(nothing, out, bias, out_stride, t0, end, n0, n_rows, False, BT, BN)
        return
    tile = _product(
        x,
        x_scales,
        x_scale_2,
        codes + expert.to(tl.int64) * code_expert_stride,
        scales + expert.to(tl.int64) * scale_expert_stride,
        scale_2 + expert.to(tl.int64) * (n_rows if SCALE_2 == "row" else 1),
        t0,
        end,
        n0,
        n_rows,
        0,
        k,
        k,
        x_stride,
        x_scale_stride,
        code_stride,
        scale_stride,
        TILE,
        CODE,
        SCALE,
        GROUP,
        ACTIVATIONS,
        SCALE_2,
        EVEN_K,
        BT,
        BN,
        BK,
    )
    bias += expert.to(tl.int64) * bias_stride
    store_tile(tile, out, bias, out_stride, t0, end, n0, n_rows, HAS_BIAS, BT, BN)


@triton.jit
def _product(
    x,
    x_scales,
    x_scale_2,
    codes,
    scales,
    scale_2,
    t0,
    t_end,
    n0,
    n_rows,
    k_begin,
    k_end,
    k,
    x_stride,
    x_scale_stride,
    code_stride,
    scale_stride,
    TILE: tl.constexpr,
    CODE: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATIONS: tl.constexpr,
    SCALE_2: tl.constexpr,
    EVEN_K: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """float32 [BN, BT]: rows of the weight from n0 times tokens from t0, over columns [k_begin, k_end) of k."""
    x_rows = rows_from(t0, t_end, BT)
    w_rows = rows_from(n0, n_rows, BN)
    x += t0.to(tl.int64) * x_stride
    x_scales += t0.to(tl.int64) * x_scale_stride
    codes += n0.to(tl.int64) * code_stride
    scales += (n0 // 128 if TILE == "scaled" and GROUP == 128 else n0).to(tl.int64) * scale_stride
    if TILE == "mx":
        tile = mx_tile(
            x, x_scales, codes, scales, x_rows, w_rows, k_begin, k_end, k,
            x_stride, x_scale_stride, code_stride, scale_stride,
            CODE, ACTIVATIONS, EVEN_K, BT, BN, BK,
        )  # fmt: skip
    elif TILE == "decoded":
        tile = decoded_tile(
            x, codes, scales, x_rows, w_rows, k_begin, k_end, k,
            x_stride, code_stride, scale_stride,
            CODE, SCALE, GROUP, EVEN_K, BT, BN, BK,
        )  # fmt: skip
        if SCALE_2 == "tensor":
            tile *= tl.load(scale_2)
        elif SCALE_2 == "row":
            tile *= tl.load(scale_2 + n0 + w_rows)[:, None]
    elif TILE == "nvfp4":
        tile = nvfp4_tile(
            x, x_scales, codes, scales, x_rows, w_rows, k_begin, k_end, k,
            x_stride, x_scale_stride, code_stride, scale_stride,
            EVEN_K, BT, BN, BK,
        )  # fmt: skip
        tile *= tl.load(scale_2) * tl.load(x_scale_2 + t0 + x_rows)[None, :]
    else:
        X_CODES: tl.constexpr = ACTIVATIONS == "codes"
        tile = scaled_tile(
            x, x_scales, codes, scales, x_rows, w_rows, k_begin, k_end, k,
            x_stride, x_scale_stride, code_stride, scale_stride,
            CODE, X_CODES, GROUP == 128, EVEN_K, BT, BN, BK,
        )  # fmt: skip
        tile = scale_tile(tile, scales, x_scales, w_rows, x_rows, scale_stride, x_scale_stride, X_CODES, GROUP == 128)
    return tile
