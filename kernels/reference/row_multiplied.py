"""Kernels of formats whose rows have a multiplier, made of any kernel of the same format without.

The multiplier stands outside of the sum over K, so a matmul is that of the blocks, times the multipliers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..formats import RowMultiplied, Tensors
from .arguments import check_experts, check_linear, check_quantize
from .mxfp4_rows import split
from .operations import IN_CACHE, row_chunks


@dataclass(frozen=True)
class MultipliedDequantize:
    """`dequantize` (see `registry`); `inner` is that of the blocks."""

    format: RowMultiplied
    inner: Callable[..., None]

    def __call__(self, tensors: Tensors, out: torch.Tensor) -> None:
        check_quantize(self.format, out, tensors)
        codes, scales = tensors
        for start, stop in row_chunks(*out.shape):
            bytes_, multipliers = split(scales[start:stop])
            target = out[start:stop]
            values = target if out.dtype == torch.float32 else torch.empty_like(target, dtype=torch.float32)
            self.inner((codes[start:stop], bytes_), values)
            values *= multipliers
            if values is not target:
                target.copy_(values)


@dataclass(frozen=True)
class MultipliedLinear:
    """`linear` (see `registry`); `inner` is that of the blocks. The product is rounded to the type of x once more."""

    format: RowMultiplied
    inner: Callable[..., torch.Tensor]

    def __call__(
        self,
        x: torch.Tensor,
        tensors: Tensors,
        bias: torch.Tensor | None,
        n_rows: int,
        k: int,
    ) -> torch.Tensor:
        check_linear(self.format, x, tensors, bias, n_rows, k)
        codes, scales = tensors
        bytes_, multipliers = split(scales)
        out = self.inner(x, (codes, bytes_), None, n_rows, k)
        for start, stop in row_chunks(len(out), n_rows, IN_CACHE):
            part = out[start:stop].float()
            part *= multipliers.T
            out[start:stop] = part if bias is None else part.add_(bias)
        return out


@dataclass(frozen=True)
class MultipliedExperts:
    """`experts` (see `registry`); `inner` is that of the blocks. The product is rounded to the type of x once more."""

    format: RowMultiplied
    inner: Callable[..., torch.Tensor]

    def __call__(
        self,
        x: torch.Tensor,
        tensors: Tensors,
        bias: torch.Tensor | None,
        offsets: torch.Tensor,
        n_rows: int,
        k: int,
    ) -> torch.Tensor:
        check_experts(self.format, x, tensors, bias, offsets, n_rows, k)
        codes, scales = tensors
        bytes_, multipliers = split(scales)
        out = self.inner(x, (codes, bytes_), None, offsets, n_rows, k)
        tokens = torch.arange(x.shape[0], dtype=offsets.dtype, device=x.device)
        expert = torch.searchsorted(offsets[1:].contiguous(), tokens, right=True)
        nobody = expert >= codes.shape[0]
        expert = expert.clamp_(max=codes.shape[0] - 1)
        for start, stop in row_chunks(len(out), n_rows, IN_CACHE):
            own, part = expert[start:stop], out[start:stop].float()
            part *= multipliers[own, :, 0]
            if bias is not None:
                part += bias[own].masked_fill(nobody[start:stop, None], 0)
            out[start:stop] = part
        return out


MULTIPLIED: dict[str, Callable[..., Callable[..., Any]]] = {
    "dequantize": MultipliedDequantize,
    "linear": MultipliedLinear,
    "experts": MultipliedExperts,
}
"""The operations that read codes."""
