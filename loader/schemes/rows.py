"""Rows of a quantized table, decoded where they are asked for: what an embedding computes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.formats import FormatTensor, Tensors, WeightFormat
from ..kernels.registry import KernelSet

AT_ONCE = 1 << 20
"""Elements that are decoded at once, in float32: 4 MiB."""


def why_not_by_rows(fmt: WeightFormat) -> str | None:
    """Why rows of a weight in a format cannot be decoded one by one; `None` if they can."""
    if all(scale.block_rows in (0, 1) for scale in fmt.scales):
        return None
    return f"an embedding is read row by row, and several rows share a scale in {fmt.name}"


def decode_rows(kernels: KernelSet, ids: Tensor, tensors: Tensors, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows `ids` [T] of a weight in the canonical layout as `dtype` [T, columns]; `IndexError` for one it has not."""
    out = torch.empty(ids.shape[0], columns, dtype=dtype, device=tensors[0].device)
    step = max(1, AT_ONCE // columns)
    values = torch.empty(min(step, ids.shape[0]), columns, dtype=torch.float32, device=out.device)
    for start in range(0, ids.shape[0], step):
        some = ids[start : start + step]
        own = (_rows_of(part, tensor, some) for part, tensor in zip(kernels.format.tensors, tensors, strict=True))
        kernels.dequantize(tuple(own), values[: some.shape[0]])
        out[start : start + step].copy_(values[: some.shape[0]])
    return out


def _rows_of(part: FormatTensor, tensor: Tensor, ids: Tensor) -> Tensor:
    """What of one tensor belongs to some rows: all of it where there is one for the whole weight."""
    if not part.block_rows:
        return tensor
    if tensor.dtype.itemsize > 1:
        return tensor.index_select(0, ids)
    return tensor.view(torch.uint8).index_select(0, ids).view(tensor.dtype)  # torch moves no FP8 by index
