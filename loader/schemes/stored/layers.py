"""What a config says about a layer: its layout and its activations, or that it is kept as it is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

from ...kernels.formats import WeightFormat
from .layouts import Layout, zero_points
from .modules import FLOATS, ONE, StoredModule
from .weights import StoredActivations, StoredWeight


@dataclass(frozen=True)
class Activations:
    """How the input of a layer is quantized; a static scale is in the first of the tensors `scales` that is there."""

    format: str
    dynamic: bool
    granularity: Literal["tensor", "token", "group"]
    group: int = 0
    scales: tuple[str, ...] = ("input_scale",)

    def of(self, module: StoredModule) -> StoredActivations:
        """What a module's tensors make of it: without a scale where a static one is missing, which who uses it says."""
        tensor = None if self.dynamic else next((name for name in self.scales if name in module), None)
        if tensor is None:
            return self._without_scale
        scale = module.shaped(tensor, FLOATS, ONE, why="a static scale of activations")
        return StoredActivations(self.format, self.dynamic, self.granularity, self.group, scale)

    @cached_property
    def _without_scale(self) -> StoredActivations:
        return StoredActivations(self.format, self.dynamic, self.granularity, self.group)


@dataclass(frozen=True)
class Layer:
    """A layer that is stored quantized; of its inputs `activations` speak, but for weights in `weight_only` formats."""

    layout: Layout
    activations: Activations | None = None
    weight_only: frozenset[WeightFormat] = frozenset()

    def read(self, module: StoredModule) -> StoredWeight:
        """The weight that a module's tensors stand for."""
        weight = self.layout(module)
        if self.activations is None or weight.format in self.weight_only:
            return weight
        zeros = zero_points(module, "input_zero_point", ONE, 0)
        return weight._replace(activations=self.activations.of(module), parts=(*weight.parts, *zeros))


@dataclass(frozen=True)
class Kept:
    """A layer that a config leaves in high precision, and where it says so."""

    reason: str


class Family(Protocol):
    """The checkpoints of one tool."""

    @property
    def method(self) -> str:
        """The name of the tool."""

    @property
    def tensors(self) -> frozenset[str]:
        """Names of tensors that only quantized layers have."""

    @property
    def formats(self) -> frozenset[WeightFormat]:
        """All that the weights of its layers can be."""

    def layer(self, module: str) -> Layer | Kept:
        """What the config says about the layer of that name."""
