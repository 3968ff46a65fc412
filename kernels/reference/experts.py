"""`experts` on any device: each expert's tokens through `linear`, one expert after the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..formats import Tensors, WeightFormat
from .arguments import check_experts


@dataclass(frozen=True)
class ExpertsByLinear:
    """`experts` as a loop over `linear` of the same backend (see `registry` for both)."""

    format: WeightFormat
    linear: Callable[..., torch.Tensor]

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
        borders: list[int] = offsets.tolist()
        out = x.new_empty(x.shape[0], n_rows)
        for expert, (start, stop) in enumerate(itertools.pairwise(borders)):
            if start < stop:
                own, own_bias = tuple(each[expert] for each in tensors), None if bias is None else bias[expert]
                out[start:stop] = self.linear(x[start:stop], own, own_bias, n_rows, k)
        out[borders[-1] :] = 0
        return out
