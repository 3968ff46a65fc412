"""MX operands for `tl.dot_scaled`: MXFP4 and MXFP8 weights, with activations as they are or in the weight's format."""

from __future__ import annotations

import triton
import triton.language as tl

from .elements import encode_float


@triton.jit
def round_to_mx(x, CODE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A float tile [ROWS, COLS] in MXFP4 ("e2m1") or MXFP8 ("e4m3"): codes uint8, scales uint8 [ROWS, COLS / 32].

    Codes are [ROWS, COLS], MXFP4 two to a byte. The scale rules, and rounding to nearest even, of
    `quantload.kernels.mxfp4` and `mx`; a block with NaN or Inf gets scale 255, which is NaN, so that it stays visible
    in the product.
    """
    EMAX: tl.constexpr = 2 if CODE == "e2m1" else 8
    THRESHOLD: tl.constexpr = 0x600000 if CODE == "e2m1" else 0x600001
    TOP: tl.constexpr = 142 if x.dtype == tl.float16 else 254
    blocks = x.to(tl.float32).reshape(ROWS, COLS // 32, 32)
    amax_bits = tl.max(blocks.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2)
    byte = (amax_bits >> 23) - EMAX + ((amax_bits & 0x7FFFFF) >= THRESHOLD).to(tl.int32)
    byte = tl.minimum(tl.maximum(byte, 0), TOP - EMAX)
    ratio = blocks * ((254 - byte) << 23).to(tl.float32, bitcast=True)[:, :, None]
    if CODE == "e2m1":
        low, high = tl.split(_signed(encode_float(tl.abs(ratio), 1, 1, 6.0), ratio, 3).reshape(ROWS, COLS // 2, 2))
        made = low | (high << 4)
    else:
        made = _signed(encode_float(tl.abs(ratio), 3, 7, 448.0), ratio, 7).reshape(ROWS, COLS)
    return made.to(tl.uint8), tl.where(amax_bits >= 0x7F800000, 255, byte).to(tl.uint8)


@triton.jit
def _signed(code, ratio, SIGN: tl.constexpr):
    """int32 codes with bit SIGN set where the float32 ratio has a sign."""
    return code | ((ratio.to(tl.int32, bitcast=True) >> (31 - SIGN)) & (1 << SIGN))


@triton.jit
def mx_tile(
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
    CODE: tl.constexpr,
    ACTIVATIONS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """float32 [BN, BT]: weight rows times tokens over columns [k_begin, k_end) of k; the pointers are at their rows.

    CODE: "e2m1" or "e4m3". ACTIVATIONS: "bf16" or "fp16" (x as it is, the target's own decoding of weights), "quantize"
    (x to the weight's format in registers), "codes" (x is in the weight's format).
    EVEN_K: every step is a whole one. k_begin and BK are multiples of 32.
    """
    PACKED: tl.constexpr = 2 if CODE == "e2m1" else 1
    columns = tl.arange(0, BK)
    bytes_ = tl.arange(0, BK // PACKED)
    blocks = tl.arange(0, BK // 32)
    total_blocks = (k + 31) // 32
    tile = tl.zeros((BN, BT), tl.float32)
    for at in range(k_begin, k_end, BK):
        w_place = codes + at // PACKED + (w_rows[:, None] * code_stride + bytes_[None, :])
        s_place = scales + at // 32 + (w_rows[:, None] * scale_stride + blocks[None, :])
        x_place = x + at + (x_rows[:, None] * x_stride + columns[None, :])
        if ACTIVATIONS == "codes":
            x_place = x + at // PACKED + (x_rows[:, None] * x_stride + bytes_[None, :])
        xs_place = x_scales + at // 32 + (x_rows[:, None] * x_scale_stride + blocks[None, :])
        if EVEN_K:
            w = tl.load(w_place)
            s = tl.load(s_place)
            a = tl.load(x_place)
        else:
            byte_in = bytes_[None, :] < (total_blocks * 32 - at) // PACKED
            block_in = blocks[None, :] < total_blocks - at // 32
            w = tl.load(w_place, mask=byte_in, other=0)
            s = tl.load(s_place, mask=block_in, other=0)
            if ACTIVATIONS == "codes":
                a = tl.load(x_place, mask=byte_in, other=0)
            else:
                a = tl.load(x_place, mask=columns[None, :] < k - at, other=0.0)
        if ACTIVATIONS == "codes":
            a_scale = tl.load(xs_place) if EVEN_K else tl.load(xs_place, mask=block_in, other=0)
            tile = tl.dot_scaled(w, s, CODE, tl.trans(a), a_scale, CODE, tile)
        elif ACTIVATIONS == "quantize":
            a, a_scale = round_to_mx(a, CODE, BT, BK)
            tile = tl.dot_scaled(w, s, CODE, tl.trans(a), a_scale, CODE, tile)
        else:
            tile = tl.dot_scaled(w, s, CODE, tl.trans(a), None, ACTIVATIONS, tile, fast_math=True)
    return tile


@triton.jit
def quantize_tokens_mx(
    x,
    codes,
    scales,
    tokens,
    k,
    x_stride,
    code_stride,
    scale_stride,
    CODE: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """x [tokens, k] to codes and scales of `round_to_mx`, padded to whole blocks; program (token tile, column tile)."""
    PACKED: tl.constexpr = 2 if CODE == "e2m1" else 1
    t0 = tl.program_id(0) * BT
    at = tl.program_id(1) * BK
    t = tl.arange(0, BT)
    t_in = (t < tokens - t0)[:, None]
    columns = at + tl.arange(0, BK)[None, :]
    bytes_ = at // PACKED + tl.arange(0, BK // PACKED)[None, :]
    blocks = at // 32 + tl.arange(0, BK // 32)[None, :]
    row = t0.to(tl.int64) + t[:, None]
    tile = tl.load(x + row * x_stride + columns, mask=t_in & (columns < k), other=0.0)
    made, scale = round_to_mx(tile, CODE, BT, BK)
    total_blocks = (k + 31) // 32
    tl.store(codes + row * code_stride + bytes_, made, mask=t_in & (bytes_ < total_blocks * 32 // PACKED))
    tl.store(scales + row * scale_stride + blocks, scale, mask=t_in & (blocks < total_blocks))
