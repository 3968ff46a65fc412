"""`experts` on any device: each expert's tokens through `linear`, one expert after the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..formats import WeightFormat


@dataclass(frozen=True)
class ExpertsByLinear:
    """`experts` as a loop over `linear` of the same backend (see `registry` for both)."""

    format: WeightFormat
    linear: Callable[..., torch.Tensor]

    def __call__(
        self,
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        offsets: torch.Tensor,
        n_rows: int,
        k: int,
    ) -> torch.Tensor:
        check_experts(self.format, x, codes, scales, bias, offsets, n_rows, k)
        borders: list[int] = offsets.tolist()
        out = x.new_empty(x.shape[0], n_rows)
        for expert, (start, stop) in enumerate(itertools.pairwise(borders)):
            if start < stop:
                expert_bias = None if bias is None else bias[expert]
                out[start:stop] = self.linear(x[start:stop], codes[expert], scales[expert], expert_bias, n_rows, k)
        out[borders[-1] :] = 0
        return out


def check_experts(
    fmt: WeightFormat,
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    offsets: torch.Tensor,
    n_rows: int,
    k: int,
) -> None:
    """Raise ValueError unless x [T, k], grouped by `offsets`, can meet the experts' weights [E, n_rows, k]."""
    if x.dim() != 2 or x.shape[1] != k or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"{fmt.name}: expected floating x of shape [T, {k}], got {x.dtype} {list(x.shape)}")
    experts = codes.shape[0]
    if codes.shape[1:] != fmt.code_shape(n_rows, k) or scales.shape != (experts, *fmt.scale_shape(n_rows, k)):
        raise ValueError(
            f"{fmt.name}: experts of [{n_rows}, {k}] have codes [E, *{list(fmt.code_shape(n_rows, k))}] and scales "
            f"[E, *{list(fmt.scale_shape(n_rows, k))}], got {list(codes.shape)} and {list(scales.shape)}"
        )
    if bias is not None and bias.shape != (experts, n_rows):
        raise ValueError(f"{fmt.name}: bias must have shape [{experts}, {n_rows}], got {list(bias.shape)}")
    if offsets.shape != (experts + 1,) or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{fmt.name}: offsets of {experts} experts must be int32 or int64 [{experts + 1}], "
            f"got {offsets.dtype} {list(offsets.shape)}"
        )
