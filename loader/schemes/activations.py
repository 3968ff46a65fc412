"""What the input of a matmul is rounded to: the formats that go with each format of weights, and the rounding."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CheckpointError, PolicyError
from ..kernels import formats
from ..kernels import registry as kernel_registry
from ..kernels.formats import WeightFormat
from ..kernels.reference.choose import reference
from .stored.weights import StoredActivations

logger = logging.getLogger("quantload")


@dataclass(frozen=True)
class ActivationFormat:
    """What activations [T, K] are rounded to.

    `granularity` is what shares a scale: everything (tensor), a row (token) or `group` elements of a row. A static
    scale comes with the checkpoint, a dynamic one is found anew for every input.
    """

    format: str
    granularity: Literal["tensor", "token", "group"]
    group: int = 0
    static: bool = False

    def __str__(self) -> str:
        if self == MX_ACTIVATIONS.get(self.format):
            return self.format
        if self.static and self.granularity == "tensor":
            return f"{self.format} static"
        shared = f"1x{self.group} group" if self.granularity == "group" else self.granularity
        return f"{self.format} {'static ' if self.static else ''}per {shared}"


MX_ACTIVATIONS: Mapping[str, ActivationFormat] = MappingProxyType(
    {
        fmt.name: ActivationFormat(fmt.name, "group", fmt.block_cols)
        for fmt in formats.FORMATS.values()
        if fmt.family is formats.MX
    }
)
"""Those with the blocks and the scales of an MX format of weights, by its name."""
MXFP4, MXFP6_E2M3, MXFP6_E3M2, MXFP8 = (
    MX_ACTIVATIONS[fmt.name] for fmt in (formats.MXFP4, formats.MXFP6_E2M3, formats.MXFP6_E3M2, formats.MXFP8)
)
FP8_STATIC = ActivationFormat("fp8", "tensor", static=True)
FP8_TENSOR = ActivationFormat("fp8", "tensor")
FP8_TOKEN = ActivationFormat("fp8", "token")
FP8_GROUP = ActivationFormat("fp8", "group", 128)
INT8_STATIC = ActivationFormat("int8", "tensor", static=True)
INT8_TOKEN = ActivationFormat("int8", "token")

ACTIVATIONS: Mapping[str, ActivationFormat] = MappingProxyType(
    {
        str(each): each
        for each in (
            *MX_ACTIVATIONS.values(),
            *(FP8_STATIC, FP8_TENSOR, FP8_TOKEN, FP8_GROUP, INT8_STATIC, INT8_TOKEN),
        )
    }
)
"""What activations may be beside high precision, as `WeightFormat.activations` names them."""

KERNEL_FORMATS: Mapping[ActivationFormat, str] = MappingProxyType(
    {
        **{each: name for name, each in MX_ACTIVATIONS.items()},
        FP8_TENSOR: formats.FP8_TENSOR.name,
        FP8_TOKEN: formats.FP8_CHANNEL.name,
        INT8_TOKEN: formats.INT8_CHANNEL.name,
    }
)
"""The format of weights that has the same blocks and the same rule for scales."""


def pairs(weights: WeightFormat) -> tuple[ActivationFormat, ...]:
    """The activations that weights of a format go with, the format's own first.

    The own one is what `emulate` means, and which kernels of two quantized operands take. Those of MXFP4 and MXFP6 are
    what vLLM runs checkpoints of AMD Quark with.
    """
    return tuple(ACTIVATIONS[name] for name in weights.activations)


@dataclass(frozen=True)
class Activation:
    """Rounds activations to a format and back, for the numerics of hardware with such matrix instructions."""

    format: ActivationFormat
    device: torch.device

    @property
    def static(self) -> bool:
        """Whether a layer holds the scale of its input."""
        return self.format.static

    def __call__(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """`x` [T, K] as the matmul is to see it, in its dtype; `scale` is the static one, float32 [1].

        NaN and Inf, which have no code, stay what they are. The gradient passes as if nothing had been rounded.
        """
        if not x.numel():
            return x
        rounded: Tensor = _StraightThrough.apply(x, self._round, scale)  # type: ignore[no-untyped-call]
        return rounded

    def _round(self, x: Tensor, scale: Tensor | None) -> Tensor:
        finite = torch.isfinite(x)
        clean = torch.where(finite, x, 0).contiguous()
        if scale is not None:
            rounded = _to_given_scale(clean, self.format.format, scale)
        elif self.format == FP8_GROUP:
            rounded = _in_groups(clean, self.format.group)
        else:
            rounded = _through_kernels(clean, kernels_of(self.format, self.device))
        return torch.where(finite, rounded, x)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rounding: Callable[[Tensor, Tensor | None], Tensor], scale: Tensor | None
    ) -> Tensor:
        return rounding(x, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None


@cache
def kernels_of(activations: ActivationFormat, device: torch.device) -> kernel_registry.KernelSet:
    """The kernels that round to a dynamic format; raises `NoKernel` where a device has none."""
    return kernel_registry.kernel_set(KERNEL_FORMATS[activations], device)


def _through_kernels(x: Tensor, kernels: kernel_registry.KernelSet) -> Tensor:
    tensors, rounded = kernels.format.empty(x.shape[0], x.shape[1], x.device), torch.empty_like(x)
    kernels.quantize(x, tensors)
    kernels.dequantize(tensors, rounded)
    return rounded


def _in_groups(x: Tensor, group: int) -> Tensor:
    """E4M3 with a scale for each 1 x `group` elements, by the rule of `fp8_block` weights."""
    codec = reference(formats.FP8_BLOCK.name).codec
    groups = F.pad(x, (0, -x.shape[1] % group)).view(-1, group).float()
    scales = codec.scales_from_amax(groups.abs().amax(1, keepdim=True))
    rounded = codec.decode(codec.encode(codec.ratio(groups, scales), scales), scales, group)
    return rounded.view(x.shape[0], -1)[:, : x.shape[1]].to(x.dtype)


def _to_given_scale(x: Tensor, name: str, scale: Tensor) -> Tensor:
    """E4M3 within +-448 or INT8 within -128..127, times a scale that is known."""
    ratio = x.float() / scale
    codes = ratio.clamp(-448, 448).to(torch.float8_e4m3fn).float() if name == "fp8" else ratio.round().clamp(-128, 127)
    return (codes * scale).to(x.dtype)


@dataclass(frozen=True)
class ActivationChoice:
    """What becomes of the activations of a layer.

    `emulated` rounds them before the matmul; `None`: nothing does, or the matmul's own kernel. `kernels` are the
    overrides for `kernel_set` that go with it.
    """

    emulated: Activation | None
    kernels: Mapping[str, str] = field(default_factory=dict)


def choose_activations(
    weights: WeightFormat,
    stored: StoredActivations | None,
    option: str,
    device: torch.device,
    *,
    name: str,
    online: bool = False,
) -> ActivationChoice:
    """What becomes of the activations in front of `weights`, by `LoadOptions.activations`.

    `stored` is what the config of a quantized checkpoint says, None where it leaves them alone; for weights that are
    quantized `online` no config does, and kernels may do what they do on their own. `name` is the scheme or layer, for
    error messages. Raises `PolicyError` for a pair that does not exist, `CheckpointError` for a static scale that is
    not there, `NoKernel` where nothing can round on the device.
    """
    weight_only = kernel_registry.weight_only(weights.name, device)
    if option == "none":
        return ActivationChoice(None, weight_only)
    own, configured = pairs(weights)[:1], None if stored is None else _configured(weights, stored, name)
    if option == "auto":  # what kernels do on their own is right only if it is what the config asks for
        as_kernels_do = online if configured is None else (configured,) == own
        return ActivationChoice(None, {} if as_kernels_do else weight_only)
    wanted = _wanted(weights, configured, option, name)
    native = kernel_registry.quantizing(weights.name, device) if (wanted,) == own and option != "emulate" else {}
    if native:
        return ActivationChoice(None, native)
    if not wanted.static and wanted in KERNEL_FORMATS:
        kernels_of(wanted, device)
    return ActivationChoice(Activation(wanted, device), weight_only)


def _configured(weights: WeightFormat, stored: StoredActivations, name: str) -> ActivationFormat:
    """What a config asks for; raises if it does not go with the weights or lacks its scale."""
    found = ActivationFormat(stored.format, stored.granularity, stored.group, not stored.dynamic)
    if found not in pairs(weights):
        raise _no_such_pair(weights, str(found), name)
    if stored.lacks_scale:
        raise CheckpointError(
            f"{name}: the config says that activations are {found}, and the checkpoint has no {name}.input_scale; "
            f"export the model again with its input scales, or load it with --activations none (activations='none'), "
            f"which leaves the inputs of layers as they are"
        )
    return found


def _wanted(weights: WeightFormat, configured: ActivationFormat | None, option: str, name: str) -> ActivationFormat:
    """What is to be emulated: the config's word first, then the weights' own format, or one that was named."""
    named = [each for each in pairs(weights) if option in ("emulate", each.format)]
    if configured in named:
        return configured
    if not named:
        raise _no_such_pair(weights, "emulated" if option == "emulate" else option, name)
    dynamic = [each for each in named if not each.static]
    if not dynamic:
        raise PolicyError(
            f"{name}: {option} activations of {weights.name} weights have static scales, which only a checkpoint with "
            f"input_scale tensors has; choose {_listed(weights, static=False)}"
        )
    return dynamic[0]


def _no_such_pair(weights: WeightFormat, given: str, name: str) -> PolicyError:
    return PolicyError(
        f"{name}: {weights.name} weights do not go with {given} activations, only with {_listed(weights, static=True)}"
    )


def _listed(weights: WeightFormat, static: bool) -> str:
    return ", ".join([str(each) for each in pairs(weights) if static or not each.static] + ["none"])


def check_input_scales(name: str, scales: Tensor) -> None:
    """Raise `CheckpointError` for static scales of activations that are not finite or not positive, or for none."""
    values = scales.float()
    if not values.numel() or not bool((torch.isfinite(values) & (values > 0)).all()):
        raise CheckpointError(
            f"{name} is {values.flatten().tolist()}; static scales of activations are finite numbers above zero: copy "
            f"or export the checkpoint again, or load it with activations='none', which uses none of them"
        )


class InputScales:
    """The static input scales of one load, made one a layer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._warned = False

    def collapse(self, values: Tensor, name: str) -> Tensor:
        """The largest of the static scales of parameter `name`, whatever their shape; float32 [1].

        Where they differ, as those of experts do, values of the others keep less precision: one warning a load.
        Raises `CheckpointError` for a scale that is not finite or not positive, or if there is none.
        """
        scales = values.detach().float().reshape(-1)
        check_input_scales(name, scales)
        largest = scales.max().reshape(1)
        if bool((scales != largest).any()):
            self._warn(name, scales)
        return largest

    def _warn(self, name: str, scales: Tensor) -> None:
        with self._lock:
            first, self._warned = not self._warned, True
        if first:
            logger.warning(
                "Static input scales that one matmul shares differ (%s: %g to %g); the largest is used, here and in "
                "all layers like it",
                name,
                scales.min().item(),
                scales.max().item(),
            )
