"""The model before its weights: built on meta, every linear and experts module with a scheme or a reason."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..checkpoint.index import CheckpointIndex
from ..checkpoint.resolve import Checkpoint
from ..errors import UnsupportedCheckpointError
from ..schemes.base import LinearScheme, MoEScheme
from ..schemes.policy import Policy, name_reason
from . import transformers_api
from .experts import convert_experts, is_fused_experts, unsupported_reason
from .quantized import QuantizedLinear, QuantizedLinearReadByDtype

# A method that only initializes or ties does not read a weight while the model runs.
_NOT_RUNNING = frozenset({"__init__", "_init_weights", "tie_weights", "_tie_weights", "reset_parameters"})
_READS_WEIGHT = re.compile(
    r"(?<!isinstance\()\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|ndim|is_meta)\b)(?!\s*=[^=])"
)
_READS_DTYPE = re.compile(r"\bself\.(\w+)\.weight\.dtype\b")


@dataclass(frozen=True)
class Assignment:
    """What was decided for one linear or experts module."""

    name: str
    kind: Literal["linear", "experts"]
    module: nn.Module
    scheme: LinearScheme | MoEScheme | None
    reason: str


@dataclass(frozen=True)
class ModelRecipe:
    """The class and config of a checkpoint's model, imported but not built."""

    cls: type[PreTrainedModel]
    config: Any

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the config names, which most of its weights will have; BF16 if it names none."""
        dtype = getattr(self.config, "dtype", None)
        return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16

    def build(self, index: CheckpointIndex) -> tuple[PreTrainedModel, torch.dtype]:
        """The model on the meta device, and the dtype of what is not quantized."""
        dtype = transformers_api.settle_dtype(self.config, (entry.dtype for entry in index.tensors.values()))
        return transformers_api.meta_model(self.cls, self.config, dtype), dtype


def find_model(checkpoint: Checkpoint, trust_remote_code: bool) -> ModelRecipe:
    """The model a checkpoint's config names; raises `CheckpointError` or `UnsupportedCheckpointError`."""
    stored = checkpoint.config()
    if stored.get("quantization_config") is not None:
        method = stored["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedCheckpointError(
            f"{checkpoint.model_id!r} is quantized already ({method}); quantload quantizes BF16, FP16 and FP32 "
            f"checkpoints: give the original one"
        )
    config = transformers_api.load_config(checkpoint.root, trust_remote_code)
    cls = transformers_api.model_class(config, checkpoint.root, trust_remote_code)
    config.name_or_path = checkpoint.model_id
    return ModelRecipe(cls, config)


def assign_schemes(model: PreTrainedModel, policy: Policy, dtype: torch.dtype, strict: bool) -> list[Assignment]:
    """Give every linear and experts module of `model` a scheme or a reason, and replace those with a scheme.

    A module that appears under several names is decided once, by its first name.
    """
    head, tied = transformers_api.output_head(model), transformers_api.tied_parameters(model)
    assignments = []
    for name, module, parent in list(_candidates(model)):
        if is_fused_experts(module):
            assignments.append(_assign_experts(name, module, policy))
        else:
            assignments.append(_assign_linear(name, module, parent, policy, dtype, module is head, tied))
    policy.check_patterns(strict)
    return assignments


def _candidates(model: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    parents: dict[str, nn.Module] = {"": model}
    for name, module in model.named_modules():
        parents[name] = module
        if isinstance(module, (nn.Linear, Conv1D)) or is_fused_experts(module):
            yield name, module, parents[name.rpartition(".")[0]]


def _assign_experts(name: str, module: Any, policy: Policy) -> Assignment:
    impossible = unsupported_reason(module)
    choice = policy.experts(name, None)
    if impossible is not None or choice.scheme is None:
        return Assignment(name, "experts", module, None, impossible or choice.reason)
    assert isinstance(choice.scheme, MoEScheme)
    convert_experts(module, choice.scheme)
    return Assignment(name, "experts", module, choice.scheme, "")


def _assign_linear(
    name: str, module: Any, parent: nn.Module, policy: Policy, dtype: torch.dtype, is_head: bool, tied: set[str]
) -> Assignment:
    child = name.rpartition(".")[2]
    choice = policy.linear(name, "output head" if is_head else name_reason(name))
    impossible = "its weight is tied to another parameter" if f"{name}.weight" in tied else None
    impossible = impossible or _impossible(module, parent, child)
    if impossible is not None or choice.scheme is None:
        return Assignment(name, "linear", module, None, impossible or choice.reason)
    assert isinstance(choice.scheme, LinearScheme)
    transposed = isinstance(module, Conv1D)
    rows, columns = reversed(module.weight.shape) if transposed else module.weight.shape
    cls = QuantizedLinearReadByDtype if _is_read(_READS_DTYPE, parent, child) else QuantizedLinear
    quantized = cls(choice.scheme, int(columns), int(rows), module.bias, transposed)
    if isinstance(quantized, QuantizedLinearReadByDtype):
        quantized.compute_dtype = dtype
    quantized.training = module.training
    setattr(parent, child, quantized)
    return Assignment(name, "linear", quantized, choice.scheme, "")


def _impossible(module: nn.Module, parent: nn.Module, child: str) -> str | None:
    if type(module) not in (nn.Linear, Conv1D):
        return f"{type(module).__name__} is a linear layer with code of its own"
    if _is_read(_READS_WEIGHT, parent, child):
        return f"the forward of {type(parent).__name__} reads its weight instead of calling it"
    return None


def _is_read(pattern: re.Pattern[str], parent: nn.Module, child: str) -> bool:
    return any(
        child in _names_read(pattern, cls) for cls in type(parent).__mro__ if cls.__module__ != nn.Module.__module__
    )


@functools.cache
def _names_read(pattern: re.Pattern[str], cls: type) -> frozenset[str]:
    names: set[str] = set()
    for name, method in vars(cls).items():
        if inspect.isfunction(method) and name not in _NOT_RUNNING:
            try:
                source = inspect.getsource(inspect.unwrap(method))
            except (OSError, TypeError):  # made at run time: there is no text to look into
                continue
            names.update(pattern.findall(source))
    return frozenset(names)
