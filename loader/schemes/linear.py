"""The linear scheme for every format whose kernels follow `quantload.kernels`: codes, scales, one matmul."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ..geometry.layout import WeightLayout
from . import operators
from .base import LinearScheme, meta_parameter


class QuantizedLinearScheme(LinearScheme):
    """A linear layer with codes in `format_name`, and activations as its `activation` says."""

    def create_weights(self, layer: nn.Module, *, in_features: int, out_features: int) -> None:
        """Register `weight` (codes [N, K/codes per byte]), `weight_scale` and, where static, `input_scale`, on meta."""
        arrangement = self.kernels.arrangements.get("linear")
        multiples = (1, 1) if arrangement is None else arrangement.multiples
        layout = WeightLayout(self.kernels.format, None, (("", out_features),), in_features, multiples)
        layer.weight_layout = layout  # type: ignore[assignment]  # torch types every attribute as a tensor or module
        layer.register_parameter("weight", meta_parameter(layout.code_shape, layout.format.code_dtype))
        layer.register_parameter("weight_scale", meta_parameter(layout.scale_shape, layout.format.scale_dtype))
        self.add_input_scale(layer, "weight")

    def layouts(self, layer: nn.Module) -> dict[str, WeightLayout]:
        """The layout of `weight`."""
        return {"weight": cast("WeightLayout", layer.weight_layout)}

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Bring the weight to where the kernel of `linear` wants it, in place."""
        arrangement, (codes, scales) = self.kernels.arrangements.get("linear"), self.weight(layer, "weight")
        if arrangement is not None:
            self.layouts(layer)["weight"].clear_padding(codes.data, scales.data)
            arrangement.arrange(codes.data, scales.data)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` [..., K] times the layer's weight, plus bias; [..., N] in the dtype of `x`."""
        layout, (codes, scales) = self.layouts(layer)["weight"], self.weight(layer, "weight")
        flat = self.activations(layer, x.reshape(-1, layout.columns), "weight")
        out = operators.call(
            "linear", self.kernels.linear, self.quantizer.chosen, flat, codes, scales, bias, layout.rows, layout.columns
        )
        return out.view(*x.shape[:-1], layout.rows)

    def dequantize(self, layer: nn.Module, name: str) -> Tensor:
        """float32 [N, K]."""
        layout = self.layouts(layer)[name]
        codes, scales = self.weight(layer, name)
        arrangement = self.kernels.arrangements.get("linear")
        if arrangement is not None:
            codes, scales = arrangement.canonical(codes, scales)
        (part,) = layout.parts()
        out = torch.empty(layout.rows, layout.columns, dtype=torch.float32, device=codes.device)
        self.kernels.dequantize(codes[part.codes], scales[part.scales], out)
        return out
