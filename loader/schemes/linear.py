"""The linear scheme for every format whose kernels follow `quantload.kernels`: codes, scales, one matmul."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ..geometry.layout import Shards, WeightLayout
from ..kernels.arrangement import Arrangement
from ..kernels.formats import Tensors
from . import operators
from .base import LinearScheme
from .eager import is_eager, is_plain
from .prepared import PreparedProduct

PREPARED = "prepared_product"
"""Where a layer keeps its `PreparedProduct`."""


class QuantizedLinearScheme(LinearScheme):
    """A linear layer with codes in the format of its kernels, and activations as its `activation` says."""

    def create_weights(self, layer: nn.Module, *, shards: Shards, in_features: int) -> None:
        """Register `weight` (codes [N, K/codes per byte]), its scales and, where static, `input_scale`, on meta.

        `shards` are the (shard_id, rows) of the weight from top to bottom, each of which is quantized on its own.
        """
        layout = WeightLayout(self.kernels.format, None, shards, in_features, self.multiples(layer))
        layer.weight_layout = layout  # type: ignore[assignment]  # torch types every attribute as a tensor or module
        self.register_tensors(layer, layout, "weight")
        self.add_input_scale(layer, "weight")

    def arrangement(self, layer: nn.Module) -> Arrangement | None:
        """What the kernel of `linear` wants; a table that is looked up in has none."""
        return None if getattr(layer, "is_looked_up", False) else self.kernels.arrangements.get("linear")

    def multiples(self, layer: nn.Module) -> tuple[int, int]:
        """Those that the kernel of `linear` wants."""
        arrangement = self.arrangement(layer)
        return (1, 1) if arrangement is None else arrangement.multiples

    def layouts(self, layer: nn.Module) -> dict[str, WeightLayout]:
        """The layout of `weight`."""
        return {"weight": cast("WeightLayout", layer.weight_layout)}

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Bring the weight to where the kernel of `linear` wants it, in place."""
        arrangement = self.arrangement(layer)
        if arrangement is not None:
            layout = self.layouts(layer)["weight"]
            tensors = self.weight(layer, layout, "weight")
            layout.clear_padding(tensors)
            arrangement.arrange(tensors)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` [..., K] times the layer's weight, plus bias; [..., N] in the dtype of `x`."""
        if is_eager() and is_plain(x) and (bias is None or is_plain(bias)):
            kept: PreparedProduct | None = layer.__dict__.get(PREPARED)
            out = None if kept is None else kept(x, layer._parameters, bias)
            if out is not None:
                return out
        layout = cast("WeightLayout", layer.weight_layout)
        tensors = self.weight(layer, layout, "weight")
        flat = self.activations(layer, x.reshape(-1, layout.columns), "weight")
        if len(layout.shards) == 1:
            self._prepare(layer, layout, tensors, x)
            out = self._product(flat, tensors, bias, layout.rows, layout.columns)
        else:
            out = self._of_shards(flat, tensors, bias, layout)
        return out.view(*x.shape[:-1], layout.rows)

    def _prepare(self, layer: nn.Module, layout: WeightLayout, tensors: Tensors, x: Tensor) -> None:
        """Have the layer keep what its next products with a few tokens will call, unless it does or has no such."""
        if not (is_eager() and is_plain(x)) or self.kernels.prepare is None or self.activation is not None:
            return
        kept: PreparedProduct | None = layer.__dict__.get(PREPARED)
        if kept is None or not kept.is_for(x.dtype, layer._parameters):
            run, names = (
                self.kernels.prepare(tensors, layout.rows, layout.columns, x.dtype),
                layout.format.names("weight"),
            )
            layer.__dict__[PREPARED] = PreparedProduct(run, x.dtype, names, tensors, layout.rows)

    def _of_shards(self, x: Tensor, tensors: Tensors, bias: Tensor | None, layout: WeightLayout) -> Tensor:
        parts = []
        for part in layout.calls(padding=True):
            own = tuple(each[index] for each, index in zip(tensors, part.index, strict=True))
            own_bias = None if bias is None else bias[part.rows]
            parts.append(self._product(x, own, own_bias, part.rows.stop - part.rows.start, layout.columns))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _product(self, x: Tensor, tensors: Tensors, bias: Tensor | None, rows: int, columns: int) -> Tensor:
        return operators.call("linear", self.kernels.linear, self.quantizer.chosen, x, tensors, bias, rows, columns)

    def rows(self, layer: nn.Module, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `ids` [T] of the weight of a table that is looked up in, as `dtype` [T, K]."""
        layout = cast("WeightLayout", layer.weight_layout)
        tensors = self.weight(layer, layout, "weight")
        return operators.look_up(self.kernels, self.quantizer.chosen, ids, tensors, layout.columns, dtype)

    def dequantize(self, layer: nn.Module, name: str) -> Tensor:
        """float32 [N, K]."""
        layout, tensors = self.layouts(layer)[name], self.canonical(layer, name)
        out = torch.empty(layout.rows, layout.columns, dtype=torch.float32, device=tensors[0].device)
        for part in layout.calls(padding=False):
            own = tuple(each[index] for each, index in zip(tensors, part.index, strict=True))
            self.kernels.dequantize(own, out[part.rows])
        return out
