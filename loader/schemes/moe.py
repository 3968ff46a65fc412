"""The MoE scheme for every format whose kernels follow `quantload.kernels`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..geometry.layout import Shards, WeightLayout
from ..kernels.arrangement import Arrangement
from ..kernels.formats import Tensors
from . import operators
from .base import MoEScheme, TensorStats, meta_parameter
from .experts_host import TRANSFORMERS, ExpertsHost


class QuantizedMoEScheme(MoEScheme):
    """Fused experts with codes in the format of its kernels; also the callbacks of `MoeOnlineWeightLoader`."""

    def create_weights(
        self, layer: Any, *, num_experts: int, host: ExpertsHost = TRANSFORMERS, **sizes: tuple[Shards, int]
    ) -> None:
        """Register codes and scales, on meta, for each weight in `sizes`: name -> (shards, columns).

        The up (or gate and up) weight comes first, the down weight second. `shards` are the (shard_id, rows) of one
        expert from top to bottom. A static scale of a weight's activations is `<name>_input_scale`, one for all
        experts. `host` answers what `apply` asks of the layer.
        """
        layer.experts_host = host
        multiples = self.multiples(layer)
        layer.experts_are_fused = self._fuses(layer)
        layer.weight_layouts = {
            name: WeightLayout(self.kernels.format, num_experts, shards, columns, multiples)
            for name, (shards, columns) in sizes.items()
        }
        for name, layout in self.layouts(layer).items():
            layer.register_parameter(name, meta_parameter(layout.shapes[0], self.get_quantized_dtype()))
            self.add_input_scale(layer, name)
        self.create_scale_tensors(layer, num_experts)

    def multiples(self, layer: nn.Module) -> tuple[int, int]:
        """Those that a kernel for the whole layer wants, if there is one for it."""
        return self.kernels.arrangements["experts"].multiples if self._fuses(layer) else (1, 1)

    def layouts(self, layer: nn.Module) -> dict[str, WeightLayout]:
        """The layout of each experts weight."""
        return cast("dict[str, WeightLayout]", layer.weight_layouts)

    # MoeQuantizationCallbacks

    def get_quantized_dtype(self) -> torch.dtype:
        """The dtype of the codes."""
        return self.kernels.format.code_dtype

    def create_scale_tensors(self, layer: nn.Module, num_experts: int) -> None:
        """Register `<weight>_scale`, and what else a format has, beside each experts weight, on meta."""
        for name, layout in self.layouts(layer).items():
            for scale, shape in zip(layout.format.scales, layout.shapes[1:], strict=True):
                layer.register_parameter(name + scale.suffix, meta_parameter(shape, scale.dtype))

    def quantize_expert(self, weight: Tensor, tensors: Tensors, *, scales_known: bool = False) -> TensorStats:
        """Quantize rows [R, C] of one expert's shard into `tensors`, its codes and scales."""
        return self.quantizer.quantize(weight, tensors, scales_known=scales_known)

    def observe_expert(self, weight: Tensor, amax: Tensor) -> None:
        """First pass over rows of one expert's shard, for scales that span several pieces."""
        self.quantizer.observe(weight, amax)

    def finish_scales(self, amax: Tensor, scales: Tensors) -> None:
        """Make the scales of one expert's matrix from the maxima of the first pass."""
        self.quantizer.finish_scales(amax, scales)

    def setup_kernel(self, layer: nn.Module) -> None:
        """The canonical layout is the kernels' own: nothing to move."""
        self.process_weights_after_loading(layer)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Bring the weights to where a kernel for the whole layer wants them, in place, if there is one for it."""
        arrangement = self.arrangement(layer)
        if arrangement is None:
            return
        for name, layout in self.layouts(layer).items():
            tensors = self.weight(layer, layout, name)
            layout.clear_padding(tensors)
            arrangement.arrange(tensors)

    def arrangement(self, layer: nn.Module) -> Arrangement | None:
        """What a kernel for the whole layer wants, if there is one for it."""
        return self.kernels.arrangements["experts"] if layer.experts_are_fused else None

    def _fuses(self, layer: nn.Module) -> bool:
        """Whether there is a kernel for the whole layer."""
        return "experts" in self.kernels.arrangements and self.activation is None and _host(layer).is_plain(layer)

    # forward

    def apply(self, layer: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Experts forward: tokens grouped by expert, an expert nobody was routed to is not read, no word to the host.

        `hidden_states` [T, H], `top_k_index` and `top_k_weights` [T, k]; returns [T, H] in the dtype of the input. An
        index that is negative, or past the last expert, means nobody and adds nothing; AMD's fused kernel expects none.
        The weighted sum over a token's experts runs in float32, as in transformers' grouped forward.
        """
        if layer.experts_are_fused:
            fused = self.kernels.arrangements["experts"].fused_moe
            assert fused is not None
            packed = (self.weight(layer, layout, name) for name, layout in self.layouts(layer).items())
            wanted = operators.as_autocast_wants(hidden_states)
            return fused(wanted, *packed, top_k_index, top_k_weights).to(hidden_states.dtype)
        host, layouts = _host(layer), self.layouts(layer)
        up, down = layouts
        num_experts = cast("int", layouts[up].experts)
        tokens, top_k = top_k_index.shape
        expert_ids, order = torch.sort(host.local_ids(layer, top_k_index).reshape(-1), stable=True)
        borders = torch.arange(num_experts + 1, dtype=expert_ids.dtype, device=expert_ids.device)
        offsets = torch.searchsorted(expert_ids, borders, out_int32=True)
        hidden, weights = hidden_states[order // top_k], top_k_weights.reshape(-1)[order].unsqueeze(-1)
        if host.weighs_input(layer):
            hidden, weights = hidden * weights.to(hidden.dtype), torch.ones_like(weights)
        hidden = host.activate(layer, self._experts(layer, up, hidden, offsets))
        weighted = host.finish(layer, self._experts(layer, down, hidden, offsets)) * weights
        nobody = (expert_ids < 0) | (expert_ids >= num_experts)
        weighted.masked_fill_(nobody.unsqueeze(-1), 0)  # whatever came out for them, NaN too
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        return weighted[back].view(tokens, top_k, hidden_states.shape[-1]).sum(dim=1).to(hidden_states.dtype)

    def _experts(self, layer: nn.Module, name: str, x: Tensor, offsets: Tensor) -> Tensor:
        """`x` [T, K], grouped by `offsets`, times one weight of each expert."""
        layout = self.layouts(layer)[name]
        tensors = self.weight(layer, layout, name)
        bias = _host(layer).bias(layer, name)
        x, parts = self.activations(layer, x, name), []
        for rows, own in _calls(layout, tensors):
            own_bias = None if bias is None else bias[:, rows]
            arguments = x, own, own_bias, offsets, rows.stop - rows.start, layout.columns
            parts.append(operators.call("experts", self.kernels.experts, self.quantizer.chosen, *arguments))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def dequantize(self, layer: nn.Module, name: str) -> Tensor:
        """float32 [E, N, K], or [E, K, N] where the unquantized module keeps its experts transposed."""
        layout, tensors = self.layouts(layer)[name], self.canonical(layer, name)
        assert layout.experts is not None
        out = torch.empty(layout.experts, layout.rows, layout.columns, dtype=torch.float32, device=tensors[0].device)
        for rows, own in _calls(layout, tensors):
            for expert in range(layout.experts):
                self.kernels.dequantize(tuple(each[expert] for each in own), out[expert, rows])
        return out.transpose(1, 2) if _host(layer).is_transposed(layer) else out


def _host(layer: nn.Module) -> ExpertsHost:
    return cast("ExpertsHost", layer.experts_host)


def _calls(layout: WeightLayout, tensors: Tensors) -> Iterator[tuple[slice, Tensors]]:
    """Rows, and codes and scales, of the parts of all experts that one kernel call can take."""
    for part in layout.calls(padding=False):
        yield part.rows, tuple(each[:, *index] for each, index in zip(tensors, part.index, strict=True))
