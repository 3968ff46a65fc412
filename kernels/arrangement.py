"""Other places for codes and scales than the canonical ones, for kernels that want them so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .formats import Tensors


@dataclass(frozen=True)
class Arrangement:
    """What a loaded weight goes through before a kernel sees it; shapes and bytes stay what they are.

    The tensors come padded: with zeros up to `multiples` of the rows of each shard, and of the columns.
    `arrange(tensors)` works in place, `canonical(tensors)` gives canonical copies, padding included; both take the
    tensors of one matrix, or [E, ...] of them. `fused_moe(x, tensors of gate and up, tensors of down, top_k_index,
    top_k_weights)` is a whole SwiGLU experts layer on arranged weights, where there is one.
    """

    multiples: tuple[int, int]
    arrange: Callable[[Tensors], None]
    canonical: Callable[[Tensors], Tensors]
    fused_moe: Callable[..., torch.Tensor] | None = None
