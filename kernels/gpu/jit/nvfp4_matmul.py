"""NVFP4 operands for `tl.dot_scaled`, which takes E4M3 scales of 16 elements where there is an instruction for them."""

from __future__ import annotations

import triton
import triton.language as tl

from .nvfp4 import encode_blocks, tensor_scale


@triton.jit
def nvfp4_tile(
    x,
    x_scales,
    codes,
    scales,
    x_rows,
    w_rows,
    k_begin,
    k_end,
    k,
    x_stride,
    x_scale_stride,
    code_stride,
    scale_stride,
    EVEN_K: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """float32 [BN, BT]: weight rows times tokens, both codes with E4M3 scales, without the scales of their tensors.

    Over columns [k_begin, k_end) of k; the pointers are at their rows. EVEN_K: every step is a whole one. k_begin and
    BK are multiples of 16.
    """
    bytes_ = tl.arange(0, BK // 2)[None, :]
    blocks = tl.arange(0, BK // 16)[None, :]
    total_blocks = (k + 15) // 16
    tile = tl.zeros((BN, BT), tl.float32)
    for at in range(k_begin, k_end, BK):
        w_place = codes + at // 2 + (w_rows[:, None] * code_stride + bytes_)
        s_place = scales + at // 16 + (w_rows[:, None] * scale_stride + blocks)
        x_place = x + at // 2 + (x_rows[:, None] * x_stride + bytes_)
        xs_place = x_scales + at // 16 + (x_rows[:, None] * x_scale_stride + blocks)
        if EVEN_K:
            w = tl.load(w_place)
            s = tl.load(s_place)
            a = tl.load(x_place)
            a_scale = tl.load(xs_place)
        else:
            byte_in = bytes_ < (total_blocks * 16 - at) // 2
            block_in = blocks < total_blocks - at // 16
            w = tl.load(w_place, mask=byte_in, other=0)
            s = tl.load(s_place, mask=block_in, other=0)
            a = tl.load(x_place, mask=byte_in, other=0)
            a_scale = tl.load(xs_place, mask=block_in, other=0)
        s = s.to(tl.float8e4nv, bitcast=True)
        a_scale = a_scale.to(tl.float8e4nv, bitcast=True)
        tile = tl.dot_scaled(w, s, "e2m1", tl.trans(a), a_scale, "e2m1", tile)
    return tile


@triton.jit
def quantize_tokens_nvfp4(
    x,
    amax,
    codes,
    scales,
    token_scales,
    tokens,
    k,
    x_stride,
    code_stride,
    scale_stride,
    SPREAD: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """x [tokens, k] as a weight would be, but that each token has a scale as a tensor has, made of float32 `amax`.

    What is not finite makes that scale NaN. Padded to whole blocks; program (token tile, column tile).
    """
    t0 = tl.program_id(0) * BT
    at = tl.program_id(1) * BK
    t = tl.arange(0, BT)
    t_in = t < tokens - t0
    columns = at + tl.arange(0, BK)[None, :]
    bytes_ = at // 2 + tl.arange(0, BK // 2)[None, :]
    blocks = at // 16 + tl.arange(0, BK // 16)[None, :]
    row = t0.to(tl.int64) + t
    part = tl.load(x + row[:, None] * x_stride + columns, mask=t_in[:, None] & (columns < k), other=0.0)
    top = tl.load(amax + row, mask=t_in, other=1.0)
    scale_2 = tensor_scale(top, SPREAD)
    finite = (top.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000
    signed = part.to(tl.float32).to(tl.int32, bitcast=True).reshape(BT, BK // 16, 16)
    code, byte = encode_blocks(signed, scale_2[:, None], SPREAD, False, BT, BK // 16)
    low, high = tl.split(code.reshape(BT, BK // 2, 2))
    total_blocks = (k + 15) // 16
    packed, made = (low | (high << 4)).to(tl.uint8), byte.to(tl.uint8)
    tl.store(codes + row[:, None] * code_stride + bytes_, packed, mask=t_in[:, None] & (bytes_ < total_blocks * 8))
    tl.store(scales + row[:, None] * scale_stride + blocks, made, mask=t_in[:, None] & (blocks < total_blocks))
    if at == 0:
        tl.store(token_scales + row, tl.where(finite, scale_2, float("nan")), mask=t_in)
