"""The model that gets new weights: a skeleton of it whose parameters are its own, and a lock on its forward.

A reload plans a load like any other, with closures on a skeleton built from the config of the model. Before a weight is
read, the skeleton gets the parameters of the model in place of its own, so that the closures write there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint.folder import Checkpoint
from ..checkpoint.headers import TensorEntry
from ..errors import IncompleteModelError, PolicyError, QuantloadError
from ..geometry.regions import Region
from ..model import transformers_api
from ..model.attach import WeightLoaders
from ..model.leftovers import some
from ..model.routes import CheckpointMap
from ..online.storage import FinalStorage
from ..schemes.opaque import plain

Regions = dict[str, list[Region]]
"""Parts of parameters, by name."""


class HeldStorage(FinalStorage):
    """Stands where a load takes memory for final tensors: there is memory for all of them."""

    def expect(self, sizes: Mapping[int, int]) -> None:
        """Take nothing."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor without elements; one with some is a `QuantloadError`, as the model must have it already."""
        if torch.Size(shape).numel():
            raise QuantloadError(
                f"a reload was about to take memory for a tensor of shape {shape}; load the model anew"
            )
        return super().empty(shape, dtype)


class LivingModel:
    """Builds the skeleton of a model again, from its class and its config (see `model.building.Building`)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._config = copy.deepcopy(model.config)
        transformers_api.forget_quantization(self._config)

    @property
    def root(self) -> Path:
        """The folder that it says it comes from."""
        return Path(str(self._config.name_or_path))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of its weights have."""
        dtype: Any = self._config.dtype
        return dtype if isinstance(dtype, torch.dtype) else torch.float32

    def find(self, checkpoint: Checkpoint, trust_remote_code: bool, tensors: Mapping[str, TensorEntry]) -> LivingModel:
        """See `Building.find`: whatever the checkpoint says, the model stays what it is."""
        return self

    def build(self, tensors: Iterable[TensorEntry]) -> tuple[PreTrainedModel, torch.dtype]:
        """See `Recipe.build`."""
        skeleton = transformers_api.rebuilt(self._model, self._config)
        untied: Mapping[str, str] = getattr(self._model, "untied_parameters", {})
        if untied:  # as the class ties them: the policy takes them apart again
            skeleton.all_tied_weights_keys = dict(untied)
        return skeleton, self.dtype

    def finish(self, model: Any, mapped: CheckpointMap, device: torch.device) -> Mapping[str, str]:
        """Nothing: what is initialized was so at the first load."""
        return {}


def bind(skeleton: nn.Module, model: nn.Module, loaders: WeightLoaders) -> None:
    """Put the parameters and buffers of `model` where `skeleton` has its own on meta.

    Raises `PolicyError` where they are not of the same names, shapes and dtypes: nothing has been written then.
    """
    wanted, held = skeleton.state_dict(keep_vars=True), model.state_dict(keep_vars=True)
    unlike = [name for name in {**wanted, **held} if not _alike(name, wanted, held, loaders)]
    if unlike:
        raise PolicyError(
            f"{len(unlike)} tensors of the model are not what the new weights would be in it: "
            f"{some(_said(name, wanted, held, loaders) for name in unlike)}; was it changed after its load, or is the "
            f"checkpoint quantized otherwise? Load it anew"
        )
    modules: Mapping[str, Any] = dict(skeleton.named_modules(remove_duplicate=False))
    for name in wanted:
        path, _, attribute = name.rpartition(".")
        own = modules[path]
        place = own._parameters if own._parameters.get(attribute) is not None else own._buffers
        place[attribute] = held[name]


def _alike(name: str, wanted: Mapping[str, Any], held: Mapping[str, Any], loaders: WeightLoaders) -> bool:
    if name not in wanted or name not in held or not isinstance(held[name], Tensor):
        return name in wanted and name in held
    return _kind(name, wanted, loaders) == _kind(name, held, None) and not held[name].is_meta


def _kind(name: str, tensors: Mapping[str, Any], loaders: WeightLoaders | None) -> tuple[torch.dtype, tuple[int, ...]]:
    tensor = plain(tensors[name])
    sink = None if loaders is None else loaders.sinks.get(name)
    kept_as = None if sink is None else sink.values_dtype
    return kept_as or tensor.dtype, tuple(tensor.shape)


def _said(name: str, wanted: Mapping[str, Any], held: Mapping[str, Any], loaders: WeightLoaders) -> str:
    def said(tensors: Mapping[str, Any], loaders: WeightLoaders | None) -> str:
        if name not in tensors:
            return "nothing"
        dtype, shape = _kind(name, tensors, loaders)
        return f"{str(dtype).removeprefix('torch.')} {list(shape)}"

    return f"{name} ({said(held, None)} in the model, {said(wanted, loaders)} by the weights)"


class _Refusal:
    """A hook before the forward of a model that is half of one checkpoint and half of another."""

    def __init__(self, reason: str, broken: Regions | None) -> None:
        self.reason, self.broken = reason, broken

    def __call__(self, module: nn.Module, *_: Any, **__: Any) -> None:
        raise IncompleteModelError(
            f"{type(module).__name__} has been given a part of its new weights only: {self.reason}; give it the whole "
            f"of them with quantload.reload_weights, or load it anew"
        )


def refuse_forward(model: Any, reason: str, broken: Regions | None) -> None:
    """Mark a model as incomplete: its report says so, and its forward raises `IncompleteModelError` with the reason.

    `broken` are the regions that may hold anything, `None`: all.
    """
    allow_forward(model)
    model.load_report.state = "incomplete"
    refusal = _Refusal(reason, broken)
    for part in {id(part): part for part in (model, model.base_model)}.values():
        part.register_forward_pre_hook(refusal)


def allow_forward(model: Any) -> None:
    """Undo `refuse_forward`."""
    model.load_report.state = "complete"
    for part in (model, model.base_model):
        for key in [key for key, hook in part._forward_pre_hooks.items() if isinstance(hook, _Refusal)]:
            del part._forward_pre_hooks[key]


def broken_regions(model: Any) -> Regions | None:
    """What reloads that failed have left in any state; `None`: all of the model."""
    refusals = [hook for hook in model._forward_pre_hooks.values() if isinstance(hook, _Refusal)]
    return refusals[0].broken if refusals else {}


def refusal(model: Any) -> str | None:
    """Why the forward of a model raises `IncompleteModelError`; `None` where it does not."""
    refusals = [hook for hook in model._forward_pre_hooks.values() if isinstance(hook, _Refusal)]
    return refusals[0].reason if refusals else None
