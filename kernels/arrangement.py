"""Other places for codes and scales than the canonical ones, for kernels that want them so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Arrangement:
    """What a loaded weight goes through before a kernel sees it; shapes and bytes stay what they are.

    `fits(n_rows, k)` says which weights it is for; the others stay canonical, and `arrange` leaves them alone.
    `arrange(codes, scales, n_rows, k)` works in place, `canonical(codes, scales, n_rows, k)` gives canonical copies;
    both take one matrix or [E, ...] of them. `fused_moe(x, (codes, scales) of gate and up, (codes, scales) of down,
    top_k_index, top_k_weights)` is a whole SwiGLU experts layer on arranged weights, where there is one.
    """

    fits: Callable[[int, int], bool]
    arrange: Callable[[torch.Tensor, torch.Tensor, int, int], None]
    canonical: Callable[[torch.Tensor, torch.Tensor, int, int], tuple[torch.Tensor, torch.Tensor]]
    fused_moe: Callable[..., torch.Tensor] | None = None
