"""What a layer of experts is asked for beside its codes: how transformers' modules answer; engines have their own."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ExpertsHost(Protocol):
    """Answers for a layer of experts, which it is handed, so that one object may answer for all layers.

    The codes are the layer's: the up (or gate and up) weight first, the down weight second, as `weight_layouts` has
    them. T counts pairs of a token and an expert, sorted by expert.
    """

    def is_plain(self, layer: nn.Module) -> bool:
        """Whether the layer is a SwiGLU over gate and up, one below the other, without biases or anything else."""

    def bias(self, layer: nn.Module, name: str) -> Tensor | None:
        """The bias [E, N] that goes with a weight, if there is one."""

    def activate(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """What comes out of the up weight, [T, N], as the down weight takes it, [T, K]."""

    def finish(self, layer: nn.Module, out: Tensor) -> Tensor:
        """What comes out of the down weight, [T, H], before it is weighted by the router."""

    def weighs_input(self, layer: nn.Module) -> bool:
        """Whether the router's weights scale what goes into an expert, instead of what comes out."""

    def local_ids(self, layer: nn.Module, expert_ids: Tensor) -> Tensor:
        """Which of the experts that the layer holds are meant by the router's ids; others are negative."""

    def is_transposed(self, layer: nn.Module) -> bool:
        """Whether the unquantized layer keeps its weights as [E, K, N], which `dequantize` gives back."""


class TransformersExperts(ExpertsHost):
    """Reads the attributes that transformers' experts interface gives a module."""

    def is_plain(self, layer: Any) -> bool:
        """By what the gate computes, whatever its class is called."""
        if not layer.has_gate or not layer.is_concatenated or layer.has_bias:
            return False
        if getattr(layer, "has_post_expert_norm", False) or getattr(layer, "_is_expert_parallel", False):
            return False
        gate = getattr(layer, "act_fn", None)
        if isinstance(gate, nn.Module) and next(gate.parameters(), None) is not None:
            return False
        probe = torch.linspace(-4, 4, 64, dtype=torch.float32, device="cpu").view(2, -1)
        gate, up = probe.chunk(2, dim=-1)
        return torch.allclose(layer._apply_gate(probe), F.silu(gate) * up)

    def bias(self, layer: Any, name: str) -> Tensor | None:
        return getattr(layer, f"{name}_bias") if layer.has_bias else None

    def activate(self, layer: Any, hidden: Tensor) -> Tensor:
        activated: Tensor = layer._apply_gate(hidden) if layer.has_gate else layer.act_fn(hidden)
        return activated

    def finish(self, layer: Any, out: Tensor) -> Tensor:
        finished: Tensor = layer.post_expert_norm(out) if getattr(layer, "has_post_expert_norm", False) else out
        return finished

    def weighs_input(self, layer: Any) -> bool:
        """A model whose router does so scales the tokens itself."""
        return False

    def local_ids(self, layer: Any, expert_ids: Tensor) -> Tensor:
        """transformers hands over those of the layer."""
        return expert_ids

    def is_transposed(self, layer: Any) -> bool:
        return bool(getattr(layer, "is_transposed", False))


TRANSFORMERS = TransformersExperts()
