"""What every matmul kernel shares: where a tile lies, how it is stored, and the sum of the parts along K.

Every tile is computed transposed, weight rows by tokens: the weight is the left operand, where Hopper and Blackwell
take it from registers or tensor memory right after it was decoded, and few tokens fill a narrow right operand.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_from(first, count, SIZE: tl.constexpr):
    """Row indices of a tile relative to `first`; past the last row it is repeated, so that loads need no mask."""
    return tl.minimum(tl.arange(0, SIZE), count - 1 - first)


@triton.jit
def find_block(offsets, n_experts, tokens, block, BT: tl.constexpr, EXPERTS: tl.constexpr):
    """The expert, the first row and the end of its rows for the `block`-th block of BT tokens of one expert.

    `offsets` [E + 1] says where each expert's rows begin; rows from offsets[E] on belong to nobody, which is expert E.
    EXPERTS > E. Past the last block the end is not above the first row.
    """
    ids = tl.arange(0, EXPERTS)
    starts = tl.load(offsets + tl.minimum(ids, n_experts)).to(tl.int32)
    ends = tl.load(offsets + tl.minimum(ids + 1, n_experts)).to(tl.int32)
    ends = tl.where(ids < n_experts, ends, tokens)
    blocks = tl.where(ids <= n_experts, (ends - starts + BT - 1) // BT, 0)
    expert = tl.sum((tl.cumsum(blocks, 0) <= block).to(tl.int32), 0)
    before = tl.sum(tl.where(ids < expert, blocks, 0), 0)
    first = tl.sum(tl.where(ids == expert, starts, 0), 0) + (block - before) * BT
    end = tl.sum(tl.where(ids == expert, ends, 0), 0)
    return expert, first, end


@triton.jit
def store_tile(
    tile, out, bias, out_stride, t0, t_count, n0, n_count, HAS_BIAS: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr
):
    """Write a float32 tile [BN, BT] to out[t0:, n0:], plus the bias of its rows, rounded once to the type of out."""
    t = tl.arange(0, BT)
    n = tl.arange(0, BN)
    if HAS_BIAS:
        tile += tl.load(bias + n0 + n, mask=n < n_count - n0, other=0.0).to(tl.float32)[:, None]
    place = out + t0.to(tl.int64) * out_stride + n0 + (t[:, None] * out_stride + n[None, :])
    inside = (t < t_count - t0)[:, None] & (n < n_count - n0)[None, :]
    tl.store(place, tl.trans(tile).to(out.dtype.element_ty), mask=inside)


@triton.jit
def sum_parts(parts, out, bias, n_elements, n_cols, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """out [n_elements] = sum of `parts` [PARTS, n_elements] float32, plus bias [n_cols], in one fixed order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n_elements
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * n_elements + at, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + at % n_cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
