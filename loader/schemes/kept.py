"""Linear layers that are kept, on a CPU: their products of a few tokens are made by a kernel that streams the weight.

The output head is the largest matrix of many models, and what a token waits for longest: torch reads it at about half
of what the memory gives.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import registry as kernel_registry
from .eager import is_eager, is_plain


class KeptLinear(nn.Linear):
    """`nn.Linear` with the same weight and bias; what only torch can do is left to it.

    That is: more than a few tokens, gradients, autocast, graphs, weights that were moved, cast or put into a subclass.
    """

    def forward(self, input: Tensor) -> Tensor:
        """`input` [..., K] to [..., N], in their dtype: products and sums in float32, rounded once."""
        kernel = plain_kernel()
        if kernel is not None and is_eager():
            weight, bias = self.weight, self.bias
            operands = (input, weight) if bias is None else (input, weight, bias)
            if (
                all(map(is_plain, operands))
                and {each.dtype for each in operands} == {weight.dtype}
                and kernel.serves(weight)
            ):
                rows, columns = weight.shape
                most = kernel.most_tokens(weight.dtype)
                if input.dim() and input.shape[-1] == columns and 0 < input.numel() // columns <= most:
                    return kernel.linear(input.reshape(-1, columns), weight, bias).view(*input.shape[:-1], rows)
        return super().forward(input)


@cache
def plain_kernel() -> kernel_registry.PlainLinear | None:
    """The kernel of `KeptLinear`, if a CPU has it."""
    return kernel_registry.plain_linear(torch.device("cpu"))


def needed_by_kept(modules: Iterable[nn.Module]) -> list[Any]:
    """The compiled functions that products of `KeptLinear` layers among some modules call."""
    kernel = plain_kernel()
    dtypes = {module.weight.dtype for module in modules if isinstance(module, KeptLinear)}
    if kernel is None:
        return []
    found = [kernel.needed(dtype, tokens) for dtype in dtypes for tokens in range(1, kernel.most_tokens(dtype) + 1)]
    return list(dict.fromkeys(found))
