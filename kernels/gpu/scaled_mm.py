"""FP8 linear layers through `torch._scaled_mm`, the vendor's own matmul of two FP8 operands."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats import Tensors, WeightFormat
from ..reference.arguments import check_linear
from .activations import quantize_scaled_activations
from .linear import TritonLinear, on_device
from .target import GpuTarget
from .tiles import FEW_TOKENS


@dataclass(frozen=True)
class ScaledMmLinear:
    """`linear` of FP8 with a scale per row or per tensor; activations are quantized per token, or per tensor.

    What `torch._scaled_mm` does not take (sizes that are no multiples of 16, results other than BF16 for scales per
    row) and few tokens, where a split along K reads the weight faster, go to Triton, with the same codes and scales.
    """

    format: WeightFormat
    target: GpuTarget | None = None

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
        if not self.takes(x, codes, n_rows, k):
            return TritonLinear(self.format, "scaled codes", self.target)(x, tensors, bias, n_rows, k)
        with on_device(x):
            x_codes, x_scales = quantize_scaled_activations(x.contiguous(), self.format)
            by_row = self.format.block_rows == 1
            fused_bias = bias if bias is not None and bias.dtype == x.dtype != torch.float32 else None
            out = torch._scaled_mm(
                x_codes,
                codes.t(),
                scale_a=x_scales if by_row else x_scales.reshape(()),
                scale_b=scales.view(1, n_rows) if by_row else scales.reshape(()),
                bias=fused_bias,
                out_dtype=x.dtype,
            )
        return out if bias is None or fused_bias is not None else (out.float() + bias).to(x.dtype)

    def takes(self, x: torch.Tensor, codes: torch.Tensor, n_rows: int, k: int) -> bool:
        """Whether the product goes to `torch._scaled_mm`."""
        if x.shape[0] <= FEW_TOKENS or n_rows % 16 or k % 16 or codes.stride(0) % 16:
            return False
        return self.format.block_rows == 0 or x.dtype == torch.bfloat16
