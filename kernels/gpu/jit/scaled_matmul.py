"""FP8 (E4M3) and INT8 weights times activations: weight-only, or with activations in the same type (W8A8)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_fp8(codes, CODE: tl.constexpr, dtype: tl.constexpr):
    """The values of "e4m3" or "fnuz" codes (uint8, no NaN) in a float type that holds them exactly."""
    code = codes.to(tl.int32)
    # exponent and mantissa at the lower end of those of float32: 2^120 (E4M3) or 2^119 (E4M3FNUZ) away from the value,
    # subnormals too
    bits = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
    distance: tl.constexpr = 6.64613997892458e35 if CODE == "fnuz" else 1.329227995784916e36
    return (bits.to(tl.float32, bitcast=True) * distance).to(dtype)


@triton.jit
def encode_e4m3(ratio):
    """E4M3 codes (uint8) of float32 within +-448, nearest, ties to even."""
    y = tl.abs(ratio)
    y_bits = y.to(tl.int32, bitcast=True)
    # three bits of mantissa are kept from 2^-6 up, multiples of 2^-9 (the ulp of 2^14) below
    normal = ((y_bits + 0x7FFFF + ((y_bits >> 20) & 1)) >> 20) - 960
    code = tl.where(y < 0.015625, (y + 16384.0).to(tl.int32, bitcast=True) & 15, normal)
    return (code | ((ratio.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def as_operand(codes, CODE: tl.constexpr):
    """Codes as the type that a dot of two quantized operands takes."""
    if CODE == "int8":
        return codes
    return codes.to(tl.float8e4b8 if CODE == "fnuz" else tl.float8e4nv, bitcast=True)


@triton.jit
def scaled_tile(
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
    X_CODES: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """[BN, BT]: weight codes times x over columns [k_begin, k_end) of k; the pointers are at their rows.

    CODE: "int8", "e4m3" or "fnuz" (E4M3FNUZ), the last two as uint8. X_CODES: x is codes of the same type, else a float
    type to which the weight is decoded. BLOCKS: `scales` is per
    128 x 128, `x_scales` (of X_CODES) per 128 columns, both are applied here and BK divides 128; the rows of `scales`
    come as w_rows // 128. Otherwise scales are left to `scale_tile`. int32 for two int8 operands, else float32.
    """
    columns = tl.arange(0, BK)
    integer: tl.constexpr = X_CODES and CODE == "int8"
    imprecise: tl.constexpr = BK if X_CODES and not integer else None  # Hopper adds up FP8 products in fewer bits
    tile = tl.zeros((BN, BT), tl.int32 if integer else tl.float32)
    for at in range(k_begin, k_end, BK):
        w_place = codes + at + (w_rows[:, None] * code_stride + columns[None, :])
        x_place = x + at + (x_rows[:, None] * x_stride + columns[None, :])
        if EVEN_K:
            w = tl.load(w_place)
            a = tl.load(x_place)
        else:
            w = tl.load(w_place, mask=columns[None, :] < k - at, other=0)
            a = tl.load(x_place, mask=columns[None, :] < k - at, other=0)
        if integer:
            tile = tl.dot(w, tl.trans(a), tile, out_dtype=tl.int32)
        else:
            if X_CODES:
                w = as_operand(w, CODE)
                a = as_operand(a, CODE)
            elif CODE == "int8":
                w = w.to(a.dtype)
            else:
                w = decode_fp8(w, CODE, a.dtype)
            if BLOCKS:
                block_scale = tl.load(scales + (w_rows // 128) * scale_stride + at // 128)
                part = tl.dot(w, tl.trans(a), input_precision="ieee") * block_scale[:, None]
                if X_CODES:
                    part *= tl.load(x_scales + x_rows * x_scale_stride + at // 128)[None, :]
                tile += part
            else:
                tile = tl.dot(w, tl.trans(a), tile, input_precision="ieee", max_num_imprecise_acc=imprecise)
    return tile


@triton.jit
def scale_tile(
    tile,
    scales,
    x_scales,
    w_rows,
    x_rows,
    scale_stride,
    x_scale_stride,
    X_CODES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """float32: the tile times the scales of its weight rows and tokens, where `scaled_tile` left them.

    A stride of 0 is one scale for all rows.
    """
    tile = tile.to(tl.float32)
    if not BLOCKS:
        tile *= tl.load(scales + w_rows * scale_stride)[:, None]
        if X_CODES:
            tile *= tl.load(x_scales + x_rows * x_scale_stride)[None, :]
    return tile


@triton.jit
def token_amax(x, amax, k, x_stride, BK: tl.constexpr):
    """amax [tokens] float32 = the largest |x| of each row of x [tokens, k], NaN if one is; program (token)."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BK)
    largest = tl.zeros((BK,), tl.int32)
    for at in range(0, k, BK):
        part = tl.load(x + token * x_stride + at + columns, mask=columns < k - at, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, part.to(tl.int32, bitcast=True) & 0x7FFFFFFF)  # orders magnitudes, NaN on top
    tl.store(amax + token, tl.max(largest, 0).to(tl.float32, bitcast=True))


@triton.jit
def quantize_tokens(
    x,
    amax,
    codes,
    scales,
    k,
    x_stride,
    code_stride,
    scale_stride,
    RULE: tl.constexpr,
    FNUZ: tl.constexpr,
    BK: tl.constexpr,
):
    """x [tokens, k] to codes and float32 scales by the rules of `quantload.kernels.fp8` and `int8`; program (token).

    RULE: "int8" and "fp8_channel" (a scale per token; `amax` is ignored), "fp8_tensor" (one scale from `amax` [1]),
    "fp8_block" (a scale per 128 columns; BK is a multiple of 128). Codes are int8, or uint8 with the bits of E4M3;
    FNUZ: as E4M3FNUZ, in which the same bits mean half as much and there is no negative zero, with twice the scale.
    A scale of NaN or Inf keeps what is not finite visible in the product.
    """
    token = tl.program_id(0).to(tl.int64)
    x += token * x_stride
    codes += token * code_stride
    scales += token * scale_stride
    columns = tl.arange(0, BK)
    if RULE == "fp8_tensor":
        scale = tl.div_rn(1.0, tl.div_rn(1.0, tl.maximum(tl.load(amax), 1e-12, tl.PropagateNan.ALL)) * 448.0)
    elif RULE != "fp8_block":
        largest = tl.zeros((BK,), tl.int32)
        for at in range(0, k, BK):
            part = tl.load(x + at + columns, mask=columns < k - at, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, part.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        row = tl.max(largest, 0).to(tl.float32, bitcast=True)
        if RULE == "int8":
            scale = tl.div_rn(row, 127.0)
            scale = tl.where(scale == 0.0, 1.0, scale)
        else:
            scale = tl.maximum(tl.div_rn(row, 448.0), 4.359654017857143e-06, tl.PropagateNan.ALL)
    if RULE != "fp8_block":
        tl.store(scales, scale * 2.0 if FNUZ else scale)
    for at in range(0, k, BK):
        inside = columns < k - at
        part = tl.load(x + at + columns, mask=inside, other=0.0).to(tl.float32)
        if RULE == "fp8_block":
            blocks = part.reshape(BK // 128, 128)
            largest = tl.max(blocks.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
            scale = tl.div_rn(tl.maximum(largest, 1e-4, tl.PropagateNan.ALL), 448.0)
            block = at // 128 + tl.arange(0, BK // 128)
            tl.store(scales + block, scale * 2.0 if FNUZ else scale, mask=block < (k + 127) // 128)
            ratio = (blocks * tl.div_rn(1.0, scale)[:, None]).reshape(BK)
        else:
            ratio = tl.div_rn(part, scale)
        if RULE == "int8":
            # to nearest even by the ulp of 1.5 * 2^23, which is 1
            whole = (tl.minimum(tl.maximum(ratio, -127.0), 127.0) + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
            tl.store(codes + at + columns, whole.to(tl.int8), mask=inside)
        else:
            code = encode_e4m3(tl.minimum(tl.maximum(ratio, -448.0), 448.0))
            if FNUZ:
                code = tl.where(code == 0x80, 0, code).to(tl.uint8)
            tl.store(codes + at + columns, code, mask=inside)
