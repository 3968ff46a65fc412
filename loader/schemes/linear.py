"""The linear scheme for every format whose kernels follow `quantload.kernels`: codes, scales, one matmul."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .base import LinearScheme, meta_parameter
from .layout import WeightLayout


class QuantizedLinearScheme(LinearScheme):
    """A linear layer with codes in `format_name`, and activations as its `activation` says."""

    def create_weights(self, layer: nn.Module, *, in_features: int, out_features: int) -> None:
        """Register `weight` (codes [N, K/codes per byte]), `weight_scale` and, where static, `input_scale`, on meta."""
        layout = WeightLayout(self.kernels.format, None, (("", out_features),), in_features)
        layer.weight_layout = layout  # type: ignore[assignment]  # torch types every attribute as a tensor or module
        layer.register_parameter("weight", meta_parameter(layout.code_shape, layout.format.code_dtype))
        layer.register_parameter("weight_scale", meta_parameter(layout.scale_shape, layout.format.scale_dtype))
        self.add_input_scale(layer, "weight")

    def layouts(self, layer: nn.Module) -> dict[str, WeightLayout]:
        """The layout of `weight`."""
        return {"weight": cast("WeightLayout", layer.weight_layout)}

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Bring the weight to where the kernel of `linear` wants it, in place."""
        arrangement, layout = self.kernels.arrangements.get("linear"), self.layouts(layer)["weight"]
        codes, scales = layer._parameters["weight"], layer._parameters["weight_scale"]
        if arrangement is not None and codes is not None and scales is not None:
            arrangement.arrange(codes.data, scales.data, layout.rows, layout.columns)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` [..., K] times the layer's weight, plus bias; [..., N] in the dtype of `x`."""
        layout = self.layouts(layer)["weight"]
        codes, scales = layer._parameters["weight"], layer._parameters["weight_scale"]
        flat = self.activations(layer, x.reshape(-1, layout.columns), "weight")
        out: Tensor = self.kernels.linear(flat, codes, scales, bias, layout.rows, layout.columns)
        return out.view(*x.shape[:-1], layout.rows)

    def dequantize(self, layer: nn.Module, name: str) -> Tensor:
        """float32 [N, K]."""
        layout = self.layouts(layer)[name]
        codes, scales = (cast("Tensor", layer._parameters[each]) for each in (name, f"{name}_scale"))
        arrangement = self.kernels.arrangements.get("linear")
        if arrangement is not None:
            codes, scales = arrangement.canonical(codes, scales, layout.rows, layout.columns)
        out = torch.empty(layout.rows, layout.columns, dtype=torch.float32, device=codes.device)
        self.kernels.dequantize(codes, scales, out)
        return out
