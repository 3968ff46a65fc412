"""Where a load gets its model from, on meta, and what becomes of the model after its last weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from ..checkpoint.folder import Checkpoint
from ..checkpoint.headers import TensorEntry
from . import transformers_api
from .quantized import GivenMethod, quantized_modules, refuse_to_save
from .routes import CheckpointMap
from .skeleton import find_model


class Recipe(Protocol):
    """A model that is known and not built."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of its weights will have."""

    def build(self, tensors: Iterable[TensorEntry]) -> tuple[PreTrainedModel, torch.dtype]:
        """The model on meta, and the dtype of what is not quantized; `tensors` are those that are not."""


class Building(Protocol):
    """Makes the model of a load, and completes it."""

    def find(self, checkpoint: Checkpoint, trust_remote_code: bool, tensors: Mapping[str, TensorEntry]) -> Recipe:
        """The model of a checkpoint with these tensors; called again where a load begins anew."""

    def finish(self, model: Any, mapped: CheckpointMap, device: torch.device) -> Mapping[str, str]:
        """Initialize what is missing and tie; the pairs that the checkpoint has with different values are returned."""


class FromConfig:
    """The class that the checkpoint's config names, completed by what transformers does after its own loading."""

    def find(self, checkpoint: Checkpoint, trust_remote_code: bool, tensors: Mapping[str, TensorEntry]) -> Recipe:
        """See `find_model`."""
        return find_model(checkpoint, trust_remote_code, tensors)

    def finish(self, model: Any, mapped: CheckpointMap, device: torch.device) -> Mapping[str, str]:
        """See `transformers_api.finish`."""
        untied = transformers_api.finish(model, mapped.missing, mapped.weight_conversions, device)
        if next(quantized_modules(model), None) is not None:
            model.save_pretrained = GivenMethod(refuse_to_save, model)
        return untied
