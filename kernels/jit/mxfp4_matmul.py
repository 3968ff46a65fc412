"""MXFP4 weights times activations: dequantized in registers (W4A16), or with activations in MXFP4 too (W4A4)."""

from __future__ import annotations

import triton
import triton.language as tl

from .tile_matmul import find_block, rows_from, store_tile


@triton.jit
def quantize_mxfp4(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A float tile [ROWS, COLS] in MXFP4: codes uint8 [ROWS, COLS / 2], scales uint8 [ROWS, COLS / 32].

    The EVEN rule and rounding to nearest even of `quantload.kernels.mxfp4`; a block with NaN or Inf gets scale 255,
    which is NaN, so that it stays visible in the product.
    """
    blocks = x.to(tl.float32).reshape(ROWS, COLS // 32, 32)
    amax_bits = tl.max(blocks.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2)
    byte = tl.maximum((amax_bits >> 23) - 2 + (((amax_bits & 0x7FFFFF) + 0x200000) >> 23), 0)
    ratio = blocks * ((254 - byte) << 23).to(tl.float32, bitcast=True)[:, :, None]  # below 7: EVEN saturates little
    y = tl.abs(ratio)
    y_bits = y.to(tl.int32, bitcast=True)
    # one bit of mantissa is kept from 1 up, multiples of 0.5 (the ulp of 2^22) below; both round ties to even
    normal = ((y_bits + 0x1FFFFF + ((y_bits >> 22) & 1)) >> 22) - 252
    code = tl.where(y < 1.0, (y + 4194304.0).to(tl.int32, bitcast=True) & 7, tl.minimum(normal, 7))
    code |= (ratio.to(tl.int32, bitcast=True) >> 28) & 8
    low, high = tl.split(code.reshape(ROWS, COLS // 2, 2))
    scale = tl.where(amax_bits >= 0x7F800000, 255, byte)
    return (low | (high << 4)).to(tl.uint8), scale.to(tl.uint8)


@triton.jit
def decode_mxfp4(codes, scales, ROWS: tl.constexpr, COLS: tl.constexpr):
    """float32 [ROWS, COLS] of codes [ROWS, COLS / 2] and scales [ROWS, COLS / 32]; exact."""
    nibbles = tl.join(codes & 15, codes >> 4).reshape(ROWS, COLS).to(tl.int32)
    bits = ((nibbles & 7) << 22) | ((nibbles & 8) << 28)
    # exponent and mantissa of E2M1 at the lower end of those of float32: 2^126 away from the value, subnormals too
    values = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37
    power = scales.to(tl.int32)
    power = tl.where(power == 0, 0x400000, power << 23).to(tl.float32, bitcast=True)
    return (values.reshape(ROWS, COLS // 32, 32) * power[:, :, None]).reshape(ROWS, COLS)


@triton.jit
def mxfp4_tile(
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
    ACTIVATIONS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """float32 [BN, BT]: weight rows times tokens over columns [k_begin, k_end) of k; the pointers are at their rows.

    ACTIVATIONS: "bf16" or "fp16" (x as it is, the target's own decoding of weights), "decode" (x as it is, weights
    decoded by arithmetic, for any type), "quantize" (x to MXFP4 in registers), "codes" (x is MXFP4).
    EVEN_K: every step is a whole one. k_begin and BK are multiples of 32.
    """
    columns = tl.arange(0, BK)
    pairs = tl.arange(0, BK // 2)
    blocks = tl.arange(0, BK // 32)
    total_blocks = (k + 31) // 32
    tile = tl.zeros((BN, BT), tl.float32)
    for at in range(k_begin, k_end, BK):
        w_place = codes + at // 2 + (w_rows[:, None] * code_stride + pairs[None, :])
        s_place = scales + at // 32 + (w_rows[:, None] * scale_stride + blocks[None, :])
        x_place = x + at + (x_rows[:, None] * x_stride + columns[None, :])
        if ACTIVATIONS == "codes":
            x_place = x + at // 2 + (x_rows[:, None] * x_stride + pairs[None, :])
        xs_place = x_scales + at // 32 + (x_rows[:, None] * x_scale_stride + blocks[None, :])
        if EVEN_K:
            w = tl.load(w_place)
            s = tl.load(s_place)
            a = tl.load(x_place)
        else:
            pair_in = pairs[None, :] < total_blocks * 16 - at // 2
            block_in = blocks[None, :] < total_blocks - at // 32
            w = tl.load(w_place, mask=pair_in, other=0)
            s = tl.load(s_place, mask=block_in, other=0)
            if ACTIVATIONS == "codes":
                a = tl.load(x_place, mask=pair_in, other=0)
            else:
                a = tl.load(x_place, mask=columns[None, :] < k - at, other=0.0)
        if ACTIVATIONS == "codes":
            a_scale = tl.load(xs_place) if EVEN_K else tl.load(xs_place, mask=block_in, other=0)
            tile = tl.dot_scaled(w, s, "e2m1", tl.trans(a), a_scale, "e2m1", tile)
        elif ACTIVATIONS == "quantize":
            a, a_scale = quantize_mxfp4(a, BT, BK)
            tile = tl.dot_scaled(w, s, "e2m1", tl.trans(a), a_scale, "e2m1", tile)
        elif ACTIVATIONS == "decode":
            w = decode_mxfp4(w, s, BN, BK).to(a.dtype)
            tile = tl.dot(w, tl.trans(a), tile, input_precision="ieee")
        else:
            tile = tl.dot_scaled(w, s, "e2m1", tl.trans(a), None, ACTIVATIONS, tile, fast_math=True)
    return tile


@triton.jit
def mxfp4_linear(
    x,
    x_scales,
    codes,
    scales,
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
    ACTIVATIONS: tl.constexpr,
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
    tile = mxfp4_tile(
        x + t0.to(tl.int64) * x_stride,
        x_scales + t0.to(tl.int64) * x_scale_stride,
        codes + n0.to(tl.int64) * code_stride,
        scales + n0.to(tl.int64) * scale_stride,
        rows_from(t0, tokens, BT),
        rows_from(n0, n_rows, BN),
        part * k_step,
        tl.minimum((part + 1) * k_step, k),
        k,
        x_stride,
        x_scale_stride,
        code_stride,
        scale_stride,
        ACTIVATIONS,
        EVEN_K,
        BT,
        BN,
        BK,
    )
    out += part.to(tl.int64) * tokens * out_stride
    store_tile(tile, out, bias, out_stride, t0, tokens, n0, n_rows, HAS_BIAS, BT, BN)


@triton.jit
def mxfp4_experts(
    x,
    x_scales,
    codes,
    scales,
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
    ACTIVATIONS: tl.constexpr,
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
    tile = mxfp4_tile(
        x + t0.to(tl.int64) * x_stride,
        x_scales + t0.to(tl.int64) * x_scale_stride,
        codes + expert.to(tl.int64) * code_expert_stride + n0.to(tl.int64) * code_stride,
        scales + expert.to(tl.int64) * scale_expert_stride + n0.to(tl.int64) * scale_stride,
        rows_from(t0, end, BT),
        rows_from(n0, n_rows, BN),
        0,
        k,
        k,
        x_stride,
        x_scale_stride,
        code_stride,
        scale_stride,
        ACTIVATIONS,
        EVEN_K,
        BT,
        BN,
        BK,
    )
    bias += expert.to(tl.int64) * bias_stride
    store_tile(tile, out, bias, out_stride, t0, end, n0, n_rows, HAS_BIAS, BT, BN)


@triton.jit
def mxfp4_quantize_tokens(
    x,
    codes,
    scales,
    tokens,
    k,
    x_stride,
    code_stride,
    scale_stride,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """x [tokens, k] to MXFP4 codes and scales, padded to whole blocks; program (token tile, column tile)."""
    t0 = tl.program_id(0) * BT
    at = tl.program_id(1) * BK
    t = tl.arange(0, BT)
    t_in = (t < tokens - t0)[:, None]
    columns = at + tl.arange(0, BK)[None, :]
    pairs = at // 2 + tl.arange(0, BK // 2)[None, :]
    blocks = at // 32 + tl.arange(0, BK // 32)[None, :]
    row = t0.to(tl.int64) + t[:, None]
    tile = tl.load(x + row * x_stride + columns, mask=t_in & (columns < k), other=0.0)
    packed, bytes_ = quantize_mxfp4(tile, BT, BK)
    total_blocks = (k + 31) // 32
    tl.store(codes + row * code_stride + pairs, packed, mask=t_in & (pairs < total_blocks * 16))
    tl.store(scales + row * scale_stride + blocks, bytes_, mask=t_in & (blocks < total_blocks))
