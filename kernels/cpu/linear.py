"""Matmul with quantized weights on a CPU.

A few tokens meet weights that are decoded in registers, more of them rows that a core has dequantized into its own
cache, and many a dequantized tile that torch multiplies.
"""

from __future__ import annotations

import threading
from functools import cache

import torch

from ..formats import Tensors, WeightFormat
from ..reference.arguments import check_linear
from ..reference.operations import tensor_rows, tile_rows, times_tile
from . import few_tokens
from .build import linear as linear_build
from .build.panel import CHUNK, PAD, panel_task
from .compiled import CFunction, Needed
from .dequantize import ALONE_ELEMENTS, address, dequantize, run_task
from .dequantize import needed as needed_to_dequantize
from .few_tokens import FewTokens, finished, needed
from .ir.decoders import BLOCK, DECODERS
from .ir.panel import ROWS, TOKENS
from .processor import has

DECODES = 5
"""Times that decoding the weights anew, for `linear_build.most_tokens` each, beats torch's product with a tile."""
PANEL_TOKENS = 128
"""Tokens up to which rows that one core dequantizes and multiplies are faster than torch's product with a tile."""
PANEL_ROWS = 64
PANEL_BYTES = 1 << 19
"""At most, so that a panel stays in the cache of one core beside the tokens that come by."""

_reused = threading.local()


def linear(
    fmt: WeightFormat,
    x: torch.Tensor,
    tensors: Tensors,
    bias: torch.Tensor | None,
    n_rows: int,
    k: int,
) -> torch.Tensor:
    """x [T, k] times the transposed weight [n_rows, k], plus bias: [T, n_rows] in the type of x (see `registry`)."""
    check_linear(fmt, x, tensors, bias, n_rows, k)
    if not x.shape[0] or not n_rows or not k:
        return times_tile(x, x.new_zeros(n_rows, k), bias).to(x.dtype)
    tokens, together = x.shape[0], linear_build.most_tokens()
    whole = _has_whole_blocks(fmt, tensors, k)
    in_registers = whole and _in_registers(fmt, x.dtype)
    if in_registers and tokens <= together:
        return FewTokens(fmt, tensors, n_rows, k, x.dtype)(x, tensors, bias, (tokens, n_rows))
    if whole and tokens <= most_in_panels(fmt, x.dtype):
        return _in_panels(fmt, x, tensors, bias, n_rows, k)
    if in_registers and tokens <= DECODES * together:
        weight = FewTokens(fmt, tensors, n_rows, k, x.dtype)
        return torch.cat([weight(part, tensors, bias, (len(part), n_rows)) for part in torch.split(x, together)])
    return _many_tokens(fmt, x, tensors, bias, n_rows, k)


def prepare(fmt: WeightFormat, tensors: Tensors, n_rows: int, k: int, dtype: torch.dtype) -> FewTokens | None:
    """`linear` of this weight for a few tokens of a dtype, checked, or None where that has no kernel of its own.

    Raises ValueError where `linear` would.
    """
    check_linear(fmt, torch.empty(1, k, dtype=dtype), tensors, None, n_rows, k)
    serves = n_rows and k and _has_whole_blocks(fmt, tensors, k) and _in_registers(fmt, dtype)
    return FewTokens(fmt, tensors, n_rows, k, dtype) if serves else None


def most_in_panels(fmt: WeightFormat, dtype: torch.dtype) -> int:
    """Tokens up to which `_in_panels` serves: none without products of BF16, few where torch has those of tiles."""
    if not few_tokens.decoder_of(fmt, dtype).endswith("_bf16"):
        return 0
    return DECODES * linear_build.most_tokens() if has("amx-bf16") else PANEL_TOKENS


def needed_for(fmt: WeightFormat, dtype: torch.dtype) -> list[Needed[CFunction]]:
    """What one token of a type, or many, will call beside what dequantizes."""
    besides = few_tokens.needed_besides(fmt, dtype)
    return [needed(fmt, dtype, 1), *besides, *([panel_task.needed()] if most_in_panels(fmt, dtype) else [])]


def needed_for_any(fmt: WeightFormat, dtype: torch.dtype) -> list[Needed[CFunction]]:
    """What any number of tokens of a type will call."""
    found = [needed(fmt, dtype, tokens) for tokens in range(1, linear_build.most_tokens() + 1)]
    found = [*dict.fromkeys(found), *few_tokens.needed_besides(fmt, dtype)]
    if not _in_registers(fmt, dtype):
        found = []
    found += [panel_task.needed()] if most_in_panels(fmt, dtype) else []
    return [*found, linear_build.dequantize_task.needed(), needed_to_dequantize(fmt, dtype)]


def _has_whole_blocks(fmt: WeightFormat, tensors: Tensors, k: int) -> bool:
    filled = fmt.pads_cols and tensors[0].shape[1] * 8 // fmt.code_bits % BLOCK == 0
    return filled or k % BLOCK == 0


def _in_registers(fmt: WeightFormat, dtype: torch.dtype) -> bool:
    return DECODERS[few_tokens.decoder_of(fmt, dtype)].serves(fmt.block_cols)


def _in_panels(
    fmt: WeightFormat,
    x: torch.Tensor,
    tensors: Tensors,
    bias: torch.Tensor | None,
    n_rows: int,
    k: int,
) -> torch.Tensor:
    tokens, cols = x.shape[0], -(-k // BLOCK) * BLOCK
    slots, threads = -(-tokens // TOKENS) * TOKENS, torch.get_num_threads() if n_rows * k >= ALONE_ELEMENTS else 1
    prepared = _in_chunks(x, slots)
    out = torch.empty(slots, -(-n_rows // ROWS) * ROWS, dtype=torch.float32)
    row_bytes = 2 * cols + PAD
    most = min(PANEL_ROWS, PANEL_BYTES // row_bytes, n_rows // (8 * threads))
    step = max(ROWS, 1 << max(most, 1).bit_length() - 1)  # a power of two divides the height of blocks of rows
    panels = _scratch(torch.uint8, threads * step, row_bytes)
    function = needed_to_dequantize(fmt, x.dtype).get()
    rest = (*address(prepared), function.address, slots, panels.data_ptr(), 0)
    of_blocks = (
        *tensors[:2],
        *(_one().expand_as(each) for each in tensors[2:]),
    )  # what BF16 holds exactly; `_finished` has the rest
    run_task(panel_task(), fmt, of_blocks, out, n_rows, cols, step, threads, *rest)
    return finished(out[:tokens, :n_rows], tensors[2:], bias).to(x.dtype)


@cache
def _one() -> torch.Tensor:
    """The scale of a whole tensor, or of all rows, for whoever applies those there are to sums instead."""
    with torch.inference_mode(False):
        return torch.ones(1, 1, dtype=torch.float32)


def _many_tokens(
    fmt: WeightFormat,
    x: torch.Tensor,
    tensors: Tensors,
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
        dequantize(fmt, tensor_rows(fmt, tensors, start, stop), weight, threads)
        out[:, start:stop] = times_tile(x, weight, None if bias is None else bias[start:stop])
    return out


def _in_chunks(x: torch.Tensor, slots: int) -> torch.Tensor:
    """x [T, K] as `panel_build` reads it: [chunks, slots, CHUNK], filled up with zeros."""
    tokens, k = x.shape
    padded = x.new_zeros(slots, -(-k // CHUNK) * CHUNK)
    padded[:tokens, :k] = x
    return padded.view(slots, -1, CHUNK).transpose(0, 1).contiguous()


def _scratch(dtype: torch.dtype, rows: int, cols: int) -> torch.Tensor:
    """A matrix in memory that this thread reuses."""
    buffers: dict[torch.dtype, torch.Tensor] = _reused.__dict__.setdefault("buffers", {})
    buffer = buffers.get(dtype)
    if buffer is None or buffer.numel() < rows * cols:
        with torch.inference_mode(False):  # it is written to in either mode
            buffer = buffers[dtype] = torch.empty(rows * cols, dtype=dtype)
    return buffer[: rows * cols].view(rows, cols)
