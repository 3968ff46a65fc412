"""Which stored weights the parameters of a model are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..checkpoint.headers import TensorEntry
from ..errors import CheckpointError, UnsupportedCheckpointError
from ..kernels.formats import FP8_CHANNEL, FP8_TENSOR, WeightFormat
from ..schemes.stored.layouts import repeated
from ..schemes.stored.weights import Role, StoredActivations, StoredCheckpoint, StoredWeight
from . import transformers_api
from .routes import CheckpointMap


@dataclass(frozen=True)
class ModuleWeights:
    """The stored weights of one module by parameter; one that is kept as stored has them all in one format."""

    weights: Mapping[str, Sequence[StoredWeight]]

    @property
    def first(self) -> StoredWeight:
        """One of them, for what they have in common."""
        return next(iter(self.weights.values()))[0]

    @property
    def format(self) -> WeightFormat:
        """The format of all of them; raises `UnsupportedCheckpointError` where they differ, activations included."""
        kinds = {(weight.format.name, weight.activations and weight.activations.kind): weight for weight in self._all()}
        if len(kinds) > 1:
            listed = "; ".join(
                f"{weight.name} is {weight.format.name}, activations {_described(weight.activations)}"
                for weight in kinds.values()
            )
            raise UnsupportedCheckpointError(
                f"the parts of one module are quantized differently and cannot be kept as stored: {listed}; name a "
                f"quantization for them all, such as --quantization quark_mxfp4, or export them alike"
            )
        return self.first.format

    def is_in(self, *formats: str) -> bool:
        """Whether all of them are in one of these formats already."""
        return {weight.format.name for weight in self._all()} <= {*formats}

    def _all(self) -> list[StoredWeight]:
        return [weight for weights in self.weights.values() for weight in weights]

    @property
    def activations(self) -> StoredActivations | None:
        """What the config says about the module's input; the scale is that of one weight, none if any lacks its own."""
        found = (weight.activations for weight in self._all())
        return next((each for each in found if each is not None and each.lacks_scale), self.first.activations)

    def has_zero_points(self, parameter: str) -> bool:
        """Whether the weights of a parameter come with zero points of their own."""
        roles = [any(part.role == "zero_point" for part in weight.parts) for weight in self.weights[parameter]]
        if len({*roles}) > 1:
            raise CheckpointError(f"some of what {parameter} is made of has zero points and some has none")
        return roles[0]


def turn_conv1d(model: PreTrainedModel, stored: StoredCheckpoint) -> StoredCheckpoint:
    """The checkpoint with the weights of `Conv1D` layers as the model keeps them, [K, N]: GPTQ packs all as [N, K]."""
    layers = (name for name, module in model.named_modules() if isinstance(module, Conv1D))
    turned = {f"{name}.weight" for name in layers} if stored.method == "gptq" else set()
    if not turned:
        return stored
    weights = dict(stored.weights)
    for conversion in transformers_api.plan_names(model, stored.entries).conversions:
        if conversion.target in turned:
            weights |= {name: weights[name]._replace(transposed=True) for name in conversion.names() if name in weights}
    return replace(stored, weights=weights)


class StoredSources:
    """The stored weights of a checkpoint, by the parameters they go to.

    `weights` are by name, as they are to be read: some are adapted to what a parameter can hold.
    """

    def __init__(self, stored: StoredCheckpoint, mapped: CheckpointMap) -> None:
        self.weights = dict(stored.weights)
        self._plain = stored.plain
        self._names = {name: conversion.names() for name, (_, conversion) in mapped.coordinates.items()}

    @property
    def entries(self) -> dict[str, TensorEntry | StoredWeight]:
        """All that goes to parameters, as it is to be read."""
        return {**self._plain, **self.weights}

    def of(self, parameter: str) -> list[StoredWeight]:
        """What a parameter is made of; nothing if it is made of tensors that are not quantized."""
        names = self._names.get(parameter, [])
        found = [self.weights[name] for name in names if name in self.weights]
        if found and len(found) != len(names):
            plain = next(name for name in names if name not in self.weights)
            raise CheckpointError(
                f"{parameter} is one parameter in the model, but {plain} is not quantized and {found[0].name} is; all "
                f"parts of a fused parameter must be stored alike: correct the config.json, or export the model again"
            )
        return found

    def module(self, parameters: Sequence[str]) -> ModuleWeights | None:
        """The stored weights of a module with these parameters; `None` if it has none.

        Raises `CheckpointError` for a module of which only a part is quantized.
        """
        weights = {parameter: self.of(parameter) for parameter in parameters}
        together = [weight for found in weights.values() for weight in found]
        if not together:
            return None
        for parameter, found in weights.items():
            if not found:
                raise CheckpointError(f"{parameter} is not quantized, and {together[0].name} of the same module is")
        return ModuleWeights(weights)

    def linear(self, parameter: str) -> ModuleWeights | None:
        """The stored weight of a linear layer, `None` if it has none.

        Where it is made of several tensors with one scale each, every row keeps its own: nothing is merged.
        """
        module = self.module([parameter])
        fused = module is not None and module.is_in(FP8_TENSOR.name) and len(module.weights[parameter]) > 1
        return self.adapt(module, FP8_CHANNEL) if fused and module is not None else module

    def adapt(self, module: ModuleWeights, fmt: WeightFormat) -> ModuleWeights:
        """The module in the format its kernels take; lossless. What was adapted is read so from now on."""
        if fmt == module.format:
            return module
        adapted = {
            parameter: [_adapted(weight, fmt) for weight in weights] for parameter, weights in module.weights.items()
        }
        self.weights.update({weight.name: weight for weights in adapted.values() for weight in weights})
        return ModuleWeights(adapted)


def _described(activations: StoredActivations | None) -> str:
    if activations is None:
        return "as they are"
    shared = f"1x{activations.group}" if activations.granularity == "group" else activations.granularity
    return f"{activations.format} {'dynamic' if activations.dynamic else 'static'} per {shared}"


def _adapted(weight: StoredWeight, fmt: WeightFormat) -> StoredWeight:
    parts = weight.parts
    if weight.format is FP8_TENSOR and fmt.block_rows:
        parts = tuple(
            part._replace(convert=repeated(part.convert, weight.rows)) if part.role == "scale" else part
            for part in parts
        )
    if fmt.ocp is not None:
        parts = tuple(
            part._replace(convert=_to_fnuz(part.role, part.convert)) if part.role in ("codes", "scale") else part
            for part in parts
        )
    return weight._replace(format=fmt, parts=parts)


@cache
def _to_fnuz(role: Role, convert: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor]:
    """What makes E4M3 codes E4M3 FNUZ, where the same bits stand for half as much and negative zero for NaN."""

    def to_fnuz(stored: Tensor) -> Tensor:
        values = stored if convert is None else convert(stored)
        if role != "codes":
            return values * 2
        bits = values.view(torch.uint8)
        return torch.where(bits == 0x80, 0, bits).view(torch.float8_e4m3fnuz)

    return to_fnuz
