"""What a scheme is: weight init, quantization and post-load processing of one kind of layer, for one format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self, cast, runtime_checkable

import torch
from torch import Tensor, nn

from ..geometry.layout import Shards, WeightLayout
from ..kernels.arrangement import Arrangement
from ..kernels.formats import Tensors
from ..kernels.registry import KernelSet, kernel_set
from ..kernels.statistics import new_statistics
from . import operators
from .activations import Activation
from .experts_host import TRANSFORMERS, ExpertsHost
from .opaque import plain, replaced


class NonFiniteError(ValueError):
    """A piece holds NaN or Inf; the loader that knows its name and place turns this into a user's error."""


@dataclass(frozen=True, slots=True)
class TensorStats:
    """Accumulated statistics of quantized elements, or nothing when statistics are off.

    `values` is the float64 vector `quantload.kernels.statistics` describes.
    """

    values: Tensor | None


class Quantizer:
    """Quantizes pieces with one kernel set; has no state of its own, so every thread and copy may use it.

    `device` is the one the kernels were chosen for. A pickled quantizer chooses the same kernels where it is unpickled.
    """

    def __init__(self, kernels: KernelSet, stats: bool = True, device: torch.device | str = "cpu") -> None:
        self.kernels = kernels
        self.stats = stats
        self.device = torch.device(device)
        self.chosen = operators.describe_kernels(kernels, self.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Callable[..., Quantizer], tuple[Any, ...]]:
        chosen = self.kernels.format.name, dict(self.kernels.names), self.kernels.scale_mode
        return _chosen_again, (type(self), *chosen, self.stats, self.device)

    def quantize(self, weight: Tensor, tensors: Tensors, *, scales_known: bool = False) -> TensorStats:
        """Write the codes of `weight` [R, C] to the first of `tensors`, and the scales unless they are known already.

        Raises `NonFiniteError` if an element is NaN or Inf.
        """
        values = new_statistics(weight.device) if self.stats else None
        if self.kernels.quantize(weight, tensors, values, scales_known=scales_known):
            raise NonFiniteError
        return TensorStats(values)

    def observe(self, weight: Tensor, amax: Tensor) -> None:
        """First pass of a tensor whose scales span several pieces: raise `amax` to that of the piece."""
        if self.kernels.observe(weight, amax):
            raise NonFiniteError

    def finish_scales(self, amax: Tensor, scales: Tensors) -> None:
        """Make the scales of a matrix from the maxima of the first pass."""
        self.kernels.finish_scales(amax, scales)


def _chosen_again(
    cls: type[Quantizer], format_name: str, names: dict[str, str], scale_mode: str, stats: bool, device: torch.device
) -> Quantizer:
    return cls(kernel_set(format_name, device, names, scale_mode), stats, device)


class _Scheme(ABC):
    """What linear and MoE schemes share: a name, and a quantizer, which has the format."""

    def __init__(self, name: str, quantizer: Quantizer, activation: Activation | None = None) -> None:
        self.name = name
        self.quantizer = quantizer
        self.activation = activation
        self._rounding = "" if activation is None else operators.describe_activation(activation)
        self.called = self.name
        """The name in messages, which has the alias with it that a user gave."""

    @property
    def kernels(self) -> KernelSet:
        """The kernels this scheme runs on."""
        return self.quantizer.kernels

    @property
    def kernel_names(self) -> str:
        """The kernels behind this scheme, for the report, and where scales or activations are not the usual ones."""
        names: Mapping[str, str] = self.kernels.names
        distinct = list(dict.fromkeys(names.values()))
        kernels = distinct[0] if len(distinct) == 1 else ", ".join(f"{op}={name}" for op, name in names.items())
        scales = "" if self.kernels.scale_mode == "default" else f", {self.kernels.scale_mode} scales"
        emulated = "" if self.activation is None else f", {self.activation.format} activations emulated"
        return f"{kernels}{scales}{emulated}"

    @staticmethod
    @abstractmethod
    def input_scale_name(weight: str) -> str:
        """What the static scale of the activations that meet a weight is called, as a parameter of the layer."""

    def add_input_scale(self, layer: nn.Module, weight: str) -> None:
        """Register the input scale of a weight, float32 [1] on meta, if activations have a static one."""
        if self.activation is not None and self.activation.static:
            layer.register_parameter(self.input_scale_name(weight), meta_parameter((1,), torch.float32))

    def activations(self, layer: nn.Module, x: Tensor, weight: str) -> Tensor:
        """`x` [T, K] as the matmul with a weight is to see it: rounded where activations are emulated."""
        if self.activation is None:
            return x
        scale = None
        if self.activation.static:
            scale = plain(cast("Tensor", layer._parameters[self.input_scale_name(weight)]))
        return operators.call("rounded", self.activation, self._rounding, x, scale)

    @staticmethod
    def weight(layer: nn.Module, layout: WeightLayout, name: str) -> Tensors:
        """The codes and scales of a parameter as the layer holds them, in ordinary tensors.

        Raises `QuantizedWeightError` where somebody put other numbers in their place, such as codes cast to floats.
        """
        held, fmt = layer._parameters, layout.format
        tensors = [plain(held[name + suffix]) for suffix in fmt.suffixes]  # type: ignore[arg-type]
        if [tensor.dtype for tensor in tensors] != fmt.dtypes:
            raise replaced(name, fmt.name, [tensor.dtype for tensor in tensors], fmt.dtypes)
        return tuple(tensors)

    def arrangement(self, layer: nn.Module) -> Arrangement | None:
        """Where the layer's codes and scales are, if a kernel wants them elsewhere than in the canonical layout."""
        return None

    def multiples(self, layer: nn.Module) -> tuple[int, int]:
        """What rows of a shard, and columns, are rounded up to in the tensors, where a kernel wants it."""
        return 1, 1

    def canonical(self, layer: nn.Module, name: str) -> Tensors:
        """The codes and scales of a parameter in the canonical layout, padding included; copies if they were not."""
        tensors = self.weight(layer, self.layouts(layer)[name], name)
        arrangement = self.arrangement(layer)
        return tensors if arrangement is None else arrangement.canonical(tensors)

    @staticmethod
    def register_tensors(layer: nn.Module, layout: WeightLayout, name: str) -> None:
        """Register all tensors of a parameter on the layer, on meta."""
        for each, tensor, shape in zip(layout.format.names(name), layout.format.tensors, layout.shapes, strict=True):
            layer.register_parameter(each, meta_parameter(shape, tensor.dtype))

    def kept_exactly(self, layer: nn.Module) -> set[str]:
        """The parameters that are no numbers to be rounded when the layer is cast: codes and their scales."""
        names = {each for name, layout in self.layouts(layer).items() for each in layout.format.names(name)}
        return names | ({self.input_scale_name(name) for name in self.layouts(layer)} & set(layer._parameters))

    @abstractmethod
    def layouts(self, layer: nn.Module) -> dict[str, WeightLayout]:
        """The layout of each quantized parameter of the layer, by parameter name."""

    @abstractmethod
    def dequantize(self, layer: nn.Module, name: str) -> Tensor:
        """The float32 values the codes of one parameter stand for, shaped as in the unquantized module."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:  # noqa: B027  # canonical needs nothing
        """Bring codes and scales into the layout the kernel wants: the canonical one unless overridden."""


class LinearScheme(_Scheme):
    """A scheme for linear layers."""

    @staticmethod
    def input_scale_name(weight: str) -> str:
        """`input_scale`."""
        return "input_scale"

    @abstractmethod
    def create_weights(self, layer: nn.Module, *, shards: Shards, in_features: int) -> None:
        """Register meta parameters `weight` and `weight_scale` on the layer.

        `shards` are the (shard_id, rows) that lie in its weight from top to bottom: q, k and v, say, or a single one.
        """

    @abstractmethod
    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` [..., K] times the layer's weight, plus bias; [..., N] in the dtype of `x`."""

    @abstractmethod
    def rows(self, layer: nn.Module, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `ids` [T] of the weight of a table that is looked up in, as `dtype` [T, K]."""


class MoEScheme(_Scheme):
    """A scheme for fused experts."""

    @staticmethod
    def input_scale_name(weight: str) -> str:
        """`<weight>_input_scale`, one for all experts."""
        return f"{weight}_input_scale"

    @abstractmethod
    def create_weights(
        self, layer: Any, *, num_experts: int, host: ExpertsHost = TRANSFORMERS, **sizes: tuple[Shards, int]
    ) -> None:
        """Register meta parameters for the codes and scales of every experts weight."""

    @abstractmethod
    def apply(self, layer: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Experts forward: `hidden_states` [T, H], routing [T, k] of expert ids and weights; [T, H]."""


@runtime_checkable
class MoeQuantizationCallbacks(Protocol):
    """What `MoeOnlineWeightLoader` asks of a scheme."""

    def get_quantized_dtype(self) -> torch.dtype:
        """The dtype of the codes."""

    def create_scale_tensors(self, layer: nn.Module, num_experts: int) -> None:
        """Register meta scale parameters beside each experts weight."""

    def quantize_expert(self, weight: Tensor, tensors: Tensors, *, scales_known: bool = False) -> TensorStats:
        """Quantize rows [R, C] of one expert's shard into `tensors`, its codes and scales."""

    def observe_expert(self, weight: Tensor, amax: Tensor) -> None:
        """First pass over rows of one expert's shard, for scales that span several pieces."""

    def finish_scales(self, amax: Tensor, scales: Tensors) -> None:
        """Make the scales of one expert's matrix from the maxima of the first pass."""

    def setup_kernel(self, layer: nn.Module) -> None:
        """The layer is complete: bring it into the layout its kernel wants."""


def meta_parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    """A parameter without storage, to be materialized when its first piece arrives."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
