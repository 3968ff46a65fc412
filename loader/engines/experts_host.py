"""What experts of an engine compute beside their products: gates, biases, the router's weights, ids of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..schemes.experts_host import ExpertsHost

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}
"""By the names that engines give them."""


@dataclass(frozen=True)
class Gate:
    """What makes of the outputs of the up weight the inputs of the down weight, in their dtype.

    With a gate, `x` [..., 2 I] holds gate and up one after the other, or in turns where they are `interleaved`:
    activation(gate) * (up + `shift`); without one it is activation(x). `limit` bounds the gate from above and up on
    both sides before that; `bounds_activated` bounds activation(gate) instead of the gate. Where `slope` is not 1,
    which only silu has, the gate is gate * sigmoid(slope * gate). gpt-oss has slope 1.702, limit 7 and shift 1 (its
    `GptOssExperts` in transformers), Step the bound behind the activation (`SwigluStepAndMul` in vLLM).
    """

    activation: str = "silu"
    gated: bool = True
    interleaved: bool = False
    limit: float | None = None
    slope: float = 1.0
    shift: float = 0.0
    bounds_activated: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"experts with the activation {self.activation!r}; known are {', '.join(ACTIVATIONS)}")
        if self.slope != 1.0 and self.activation != "silu":
            raise ValueError(f"experts with {self.activation} have no slope; silu has one")
        if not self.gated and (self.interleaved or self.limit is not None or self.shift or self.bounds_activated):
            raise ValueError("experts without a gate have nothing to interleave, to bound or to shift")

    def __call__(self, x: Tensor) -> Tensor:
        """[..., I] of `x` [..., 2 I], or of [..., I] without a gate."""
        if not self.gated:
            return self._activated(x)
        gate, up = (x[..., ::2], x[..., 1::2]) if self.interleaved else x.chunk(2, dim=-1)
        if self.limit is not None:
            gate = gate if self.bounds_activated else gate.clamp(max=self.limit)
            up = up.clamp(-self.limit, self.limit)
        gate = self._activated(gate)
        if self.limit is not None and self.bounds_activated:
            gate = gate.clamp(max=self.limit)
        return gate * (up + self.shift if self.shift else up)

    @property
    def is_swiglu(self) -> bool:
        """Whether this is silu(gate) * up, one below the other, and nothing else."""
        return self == Gate()

    def shards(self, rows: int) -> tuple[tuple[str, int], ...]:
        """The shards of the up weight of an expert with so many rows: gate and up, which are quantized each for itself.

        Interleaved they are one.
        """
        if not self.gated:
            return (("w3", rows),)
        return (("w13", rows),) if self.interleaved else (("w1", rows // 2), ("w3", rows // 2))

    def _activated(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.slope * x) if self.slope != 1.0 else ACTIVATIONS[self.activation](x)


@dataclass(frozen=True)
class EngineExperts(ExpertsHost):
    """Answers for the experts of an engine's layer.

    `biases` are the names of the layer's biases [E, N] by those of its weights. `weigh_input`: the router's weights
    scale what goes into an expert. `expert_map` gives, for a layer, which of its experts an id of all ranks means
    (int [experts of all ranks], -1 for those of others), or `None` where the layer has all.
    """

    gate: Gate = Gate()
    biases: Mapping[str, str] = field(default_factory=dict)
    weigh_input: bool = False
    expert_map: Callable[[nn.Module], Tensor | None] = lambda _: None

    def is_plain(self, layer: nn.Module) -> bool:
        """Also not where other ranks have experts: a kernel for the whole layer expects no ids of those."""
        return self.gate.is_swiglu and not self.biases and not self.weigh_input and self.expert_map(layer) is None

    def bias(self, layer: nn.Module, name: str) -> Tensor | None:
        return layer._parameters[self.biases[name]] if name in self.biases else None

    def activate(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        return self.gate(hidden)

    def finish(self, layer: nn.Module, out: Tensor) -> Tensor:
        """Nothing stands between the down weight and the router's weights."""
        return out

    def weighs_input(self, layer: nn.Module) -> bool:
        return self.weigh_input

    def local_ids(self, layer: nn.Module, expert_ids: Tensor) -> Tensor:
        """int64; ids that are negative already stay so."""
        expert_ids = expert_ids.long()
        own = self.expert_map(layer)
        if own is None:
            return expert_ids
        return torch.where(expert_ids < 0, expert_ids, own[expert_ids.clamp(min=0)].long())

    def is_transposed(self, layer: nn.Module) -> bool:
        """Engines keep [E, N, K]."""
        return False
