"""Matmul with quantized weights on a CPU: fused dot products for a few tokens, dequantized tiles for many."""

from __future__ import annotations

import threading

import torch

from . import linear_build
from .compiled import CFunction, Needed
from .cpu_dequantize import ALONE_ELEMENTS, address, dequantize, family, run_task
from .dot_ir import BLOCK, DECODERS
from .formats import WeightFormat
from .processor import has
from .reference import check_linear, scale_rows, tile_rows, times_tile

DECODES = 5
"""Times that decoding the weights anew is worth it, for `linear_build.most_tokens` each; else a tile is stored."""
ROW_STEP = 8
"""Threads take rows in multiples of it: of the rows that are worked on together, inside blocks of rows."""

_reused = threading.local()


def linear(
    fmt: WeightFormat,
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    n_rows: int,
    k: int,
) -> torch.Tensor:
    """x [T, k] times the transposed weight [n_rows, k], plus bias: [T, n_rows] in the type of x (see `registry`)."""
    check_linear(fmt, x, codes, scales, bias, n_rows, k)
    if not x.shape[0] or not n_rows or not k:
        return times_tile(x, x.new_zeros(n_rows, k), bias).to(x.dtype)
    together = linear_build.most_tokens()
    whole = fmt.pads_cols or k % BLOCK == fmt.block_cols % BLOCK == 0
    if x.shape[0] <= DECODES * together and whole:
        parts = [_few_tokens(fmt, part, codes, scales, bias, n_rows, k) for part in torch.split(x, together)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    return _many_tokens(fmt, x, codes, scales, bias, n_rows, k)


def needed(fmt: WeightFormat, dtype: torch.dtype, tokens: int) -> Needed[CFunction]:
    """The compiled task that multiplies up to `tokens` tokens of `dtype`."""
    return linear_build.dot_task.needed(_decoder(fmt, dtype), _slots(tokens))


def _few_tokens(
    fmt: WeightFormat,
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    n_rows: int,
    k: int,
) -> torch.Tensor:
    tokens, slots = x.shape[0], _slots(x.shape[0])
    prepared = _activations(x, slots, _decoder(fmt, x.dtype))
    out = torch.empty(slots, n_rows, dtype=torch.float32)
    threads = torch.get_num_threads() if n_rows * k >= ALONE_ELEMENTS else 1
    step = max(1, n_rows // (8 * threads * ROW_STEP)) * ROW_STEP
    blocks = fmt.block_rows or n_rows, fmt.block_cols or k
    cols = -(-k // BLOCK) * BLOCK
    task = needed(fmt, x.dtype, tokens).get()
    run_task(task, codes, scales, blocks, out, n_rows, cols, step, threads, *address(prepared), 0)
    return (out[:tokens] if bias is None else out[:tokens].add_(bias)).to(x.dtype)


def _many_tokens(
    fmt: WeightFormat,
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    n_rows: int,
    k: int,
) -> torch.Tensor:
    out = x.new_empty(x.shape[0], n_rows)
    step = tile_rows(fmt, n_rows, k)
    tile = _scratch(x.dtype, min(step, n_rows), k)
    threads = torch.get_num_threads()
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        weight = tile[: stop - start]
        dequantize(fmt, codes[start:stop], scale_rows(fmt, scales, start, stop), weight, threads)
        out[:, start:stop] = times_tile(x, weight, None if bias is None else bias[start:stop])
    return out


def _activations(x: torch.Tensor, slots: int, decoder: str) -> torch.Tensor:
    """`x` as the kernel reads it: [slots, K'] with rows of zeros for the slots that no token has, K' whole blocks."""
    tokens, k = x.shape
    cols = -(-k // BLOCK) * BLOCK
    dtype = torch.bfloat16 if decoder.endswith("_bf16") else torch.float32
    if (tokens, k) != (slots, cols):
        padded = x.new_zeros(slots, cols, dtype=dtype)
        padded[:tokens, :k] = x
        x = padded
    if DECODERS[decoder].even_first:
        x = x.view(slots, cols // BLOCK, BLOCK // 2, 2).transpose(2, 3).reshape(slots, cols)
    return x.to(dtype).contiguous()


def _decoder(fmt: WeightFormat, dtype: torch.dtype) -> str:
    """The best of `dot_ir.DECODERS` for this processor."""
    kind = family(fmt)
    if dtype == torch.bfloat16 and has("avx512bw") and has("avx512bf16"):
        return f"{kind}_bf16"
    return f"{kind}_f16c" if has("f16c") and f"{kind}_f16c" in DECODERS else f"{kind}_f32"


def _slots(tokens: int) -> int:
    """Tokens a compiled kernel takes: the next power of two."""
    return 1 << (tokens - 1).bit_length()


def _scratch(dtype: torch.dtype, rows: int, cols: int) -> torch.Tensor:
    """A matrix in memory that this thread reuses."""
    buffers: dict[torch.dtype, torch.Tensor] = _reused.__dict__.setdefault("buffers", {})
    buffer = buffers.get(dtype)
    if buffer is None or buffer.numel() < rows * cols:
        with torch.inference_mode(False):  # it is written to in either mode
            buffer = buffers[dtype] = torch.empty(rows * cols, dtype=dtype)
    return buffer[: rows * cols].view(rows, cols)
