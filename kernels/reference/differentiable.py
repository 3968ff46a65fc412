"""Gradients through a quantized matmul: of the activations and the bias; the codes themselves have none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..arrangement import Arrangement
from ..formats import Tensors, WeightFormat
from .experts import ExpertsByLinear
from .operations import tensor_rows, tile_rows

Dequantize = Callable[[Tensors, torch.Tensor], None]


@dataclass(frozen=True)
class Linear:
    """A `linear` kernel; where a gradient is wanted, the weight is dequantized tile by tile once more for it."""

    format: WeightFormat
    forward: Callable[..., torch.Tensor]
    dequantize: Dequantize
    arrangement: Arrangement | None = None

    def __call__(
        self,
        x: torch.Tensor,
        tensors: Tensors,
        bias: torch.Tensor | None,
        n_rows: int,
        k: int,
    ) -> torch.Tensor:
        if not _wanted(x, bias):
            return self.forward(x, tensors, bias, n_rows, k)
        if self.arrangement is not None:
            raise ValueError(
                f"{self.format.name}: this layer is arranged for a kernel without gradients; load with another "
                "`linear` kernel, or run the forward without gradients"
            )
        result: torch.Tensor = _Function.apply(x, bias, self, n_rows, k, *tensors)  # type: ignore[no-untyped-call]
        return result


@dataclass(frozen=True)
class Experts:
    """An `experts` kernel; where a gradient is wanted, each expert goes through `linear`."""

    forward: Callable[..., torch.Tensor]
    linear: Linear

    def __call__(self, x: torch.Tensor, tensors: Tensors, bias: torch.Tensor | None, *rest: Any) -> torch.Tensor:
        chosen = ExpertsByLinear(self.linear.format, self.linear) if _wanted(x, bias) else self.forward
        return chosen(x, tensors, bias, *rest)


def _wanted(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        kernel: Linear,
        n_rows: int,
        k: int,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        ctx.kernel, ctx.shape, ctx.bias_dtype = kernel, (n_rows, k), None if bias is None else bias.dtype
        return kernel.forward(x, tensors, bias, n_rows, k)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,), tensors, kernel, (n_rows, k) = grads, ctx.saved_tensors, ctx.kernel, ctx.shape
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            with torch.autocast(grad.device.type, enabled=False):  # as it was in the forward
                grad_x = _times_weight(kernel, grad, tensors, n_rows, k)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.sum(0, dtype=ctx.bias_dtype)
        return grad_x, grad_bias, None, None, None, *(None for _ in tensors)


def _times_weight(kernel: Linear, grad: torch.Tensor, tensors: Tensors, n_rows: int, k: int) -> torch.Tensor:
    """grad [T, n_rows] times the weight [n_rows, k], summed over tiles in float32."""
    fmt, step = kernel.format, tile_rows(kernel.format, n_rows, k)
    total = torch.zeros(grad.shape[0], k, dtype=torch.float32, device=grad.device)
    tile = torch.empty(min(step, n_rows), k, dtype=grad.dtype, device=grad.device)
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        weight = tile[: stop - start]
        kernel.dequantize(tensor_rows(fmt, tensors, start, stop), weight)
        total += grad[:, start:stop] @ weight
    return total.to(grad.dtype)
