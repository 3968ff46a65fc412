"""The model before its weights: built on meta, every linear and experts module with a scheme or a reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..checkpoint.folder import CONFIG_NAME, Checkpoint
from ..checkpoint.headers import TensorEntry
from ..checkpoint.small_files import MODEL_FILES, check_small_files
from ..errors import CheckpointError
from ..schemes.base import LinearScheme, MoEScheme
from ..schemes.policy import EMBEDDING, Choice, Policy
from ..schemes.rows import why_not_by_rows
from . import config_checks, modeling_code, transformers_api
from .embeddings import QuantizedEmbedding, embedding_objection
from .experts import convert_experts, is_fused_experts, unsupported_reason
from .linears import Products
from .quantized import QuantizedLinear, say_what_codes_stand_for
from .remote_code import warn_of_code
from .roles import roles
from .stored_sources import ModuleWeights, StoredSources
from .weight_reads import weight_readers

MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes a model can be built in."""
TIED = "its weight is tied to another parameter"


@dataclass(frozen=True)
class Assignment:
    """What was decided for one linear or experts module, or an embedding that is to be quantized."""

    name: str
    kind: Literal["linear", "experts", "embedding"]
    module: nn.Module
    scheme: LinearScheme | MoEScheme | None
    reason: str
    stored: ModuleWeights | None = None
    """What the checkpoint has in this format already: it is copied, not quantized."""
    is_possible: bool = True
    """Whether a scheme could be given to it at all."""
    role: str | None = None
    """Why it is kept by default, if it is."""


@dataclass(frozen=True)
class ModelRecipe:
    """The class and config of the model of the checkpoint folder `root`, imported but not built.

    `most_modules` is how many modules and parameters it may have at most, if that is known.
    """

    cls: type[PreTrainedModel]
    config: Any
    root: Path
    most_modules: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the config names, which most of its weights will have; BF16 if it names none."""
        dtype = getattr(self.config, "dtype", None)
        return dtype if dtype in (torch.bfloat16, torch.float16, torch.float32) else torch.bfloat16

    def build(self, tensors: Iterable[TensorEntry]) -> tuple[PreTrainedModel, torch.dtype]:
        """The model on the meta device, and the dtype of what is not quantized; `tensors` are those that are not.

        It has its generation config already: what is wrong with that file is a `CheckpointError` here, before a weight.
        """
        dtype = transformers_api.settle_dtype(self.config, (entry.dtype for entry in tensors))
        with config_checks.modules_limited(self.most_modules, self.root):
            model = transformers_api.meta_model(self.cls, self.config, self.root, dtype)
        transformers_api.adopt_generation_config(model, self.root)
        return model, dtype


def find_model(
    checkpoint: Checkpoint, trust_remote_code: bool, tensors: Mapping[str, TensorEntry] | None = None
) -> ModelRecipe:
    """The model a checkpoint's config names; raises `CheckpointError` or `UnsupportedCheckpointError`.

    One that is larger than `tensors` can fill is an error before it takes memory.
    """
    check_small_files(checkpoint.root, MODEL_FILES)
    said = checkpoint.config()
    _check_dtype(checkpoint)
    config_checks.check_counts(said, checkpoint.root, tensors)
    if trust_remote_code:
        warn_of_code(checkpoint.root, checkpoint.model_id)
    else:
        config_checks.check_code(said, checkpoint.root)
    config = transformers_api.load_config(checkpoint.root, trust_remote_code)
    cls = transformers_api.model_class(config, checkpoint.root, trust_remote_code)
    config.name_or_path = checkpoint.model_id
    transformers_api.forget_quantization(config)
    most = None if tensors is None else config_checks.most_modules(tensors.values())
    return ModelRecipe(cls, config, checkpoint.root, most)


def _check_dtype(checkpoint: Checkpoint) -> None:
    """Raise `CheckpointError` for a dtype in the config that no model can be built in."""
    config = checkpoint.config()
    field = "torch_dtype" if config.get("dtype") is None else "dtype"
    named = config.get(field)
    for value in named.values() if isinstance(named, dict) else (named,):
        dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
        if value is not None and dtype not in MODEL_DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in MODEL_DTYPES)
            raise CheckpointError(
                f"{checkpoint.root / CONFIG_NAME}: `{field}` is {named!r}; models are built in one of {allowed}: "
                f"give the dtype of the weights, or the one they had before they were quantized, or remove the field "
                f"for the dtype of the tensors"
            )


def assign_schemes(
    model: PreTrainedModel,
    policy: Policy,
    dtype: torch.dtype,
    strict: bool,
    sources: StoredSources,
    reasons: Mapping[str, str] | None = None,
) -> list[Assignment]:
    """Give every linear and experts module of `model` a scheme or a reason, and replace those with a scheme.

    `dtype` is the one activations have, `sources` what the checkpoint has quantized already, `reasons` what `roles`
    says of the model, which it cannot once that was divided among ranks. A module that appears under several names is
    decided once, by its first.
    """
    assigner = _Assigner(model, policy, dtype, sources, roles(model) if reasons is None else reasons)
    assignments = [
        assigner.experts(name, module)
        if is_fused_experts(module)
        else assigner.embedding(name, module, parent)
        if isinstance(module, nn.Embedding)
        else assigner.linear(name, module, parent)
        for name, module, parent in list(_candidates(model))
        if not isinstance(module, nn.Embedding) or assigner.is_asked_for(name)
    ]
    policy.check_patterns(strict)
    return assignments


def _candidates(model: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    parents: dict[str, nn.Module] = {"": model}
    for name, module in model.named_modules():
        parents[name] = module
        if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)) or is_fused_experts(module):
            yield name, module, parents[name.rpartition(".")[0]]


class _Assigner:
    """Decides about the modules of one model, one by one."""

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        dtype: torch.dtype,
        sources: StoredSources,
        reasons: Mapping[str, str],
    ) -> None:
        self._model, self._policy, self._sources = model, policy, sources
        self._dtype_of = transformers_api.DtypePlan(model, dtype)
        self._roles, self._products = reasons, Products()
        self._tied = transformers_api.tied_parameters(model)
        self._readers = weight_readers(model)
        self._no_kernel = "the model computes in float64, and no kernel does" if dtype == torch.float64 else None

    def experts(self, name: str, module: Any) -> Assignment:
        impossible = unsupported_reason(module) or self._no_kernel
        weights = [f"{name}.{key}" for key, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3]
        stored = None if impossible is not None else self._sources.module(weights)
        choice = self._policy.experts(name, None, stored)
        if impossible is not None or choice.scheme is None:
            return Assignment(
                name, "experts", module, None, impossible or choice.reason, is_possible=impossible is None
            )
        assert isinstance(choice.scheme, MoEScheme)
        dtype = self._dtype_of(weights[0], module.get_parameter(weights[0].rpartition(".")[2]).dtype)
        convert_experts(module, choice.scheme)
        say_what_codes_stand_for(module, name, dtype)
        return Assignment(name, "experts", module, choice.scheme, "", self._kept(stored, choice))

    def linear(self, name: str, module: Any, parent: nn.Module) -> Assignment:
        child = name.rpartition(".")[2]
        impossible = self._impossible(name, module, parent, child)
        stored = None if impossible is not None else self._sources.linear(f"{name}.weight")
        role = self._roles.get(name)
        choice = self._policy.linear(name, role, stored)
        if impossible is not None or choice.scheme is None:
            reason = impossible or choice.reason
            return Assignment(name, "linear", module, None, reason, is_possible=impossible is None, role=role)
        assert isinstance(choice.scheme, LinearScheme)
        quantized = self._quantized(name, module, choice.scheme)
        setattr(parent, child, quantized)
        if id(module) in self._readers:
            transformers_api.tell_quantized(parent)
        return Assignment(name, "linear", quantized, choice.scheme, "", self._kept(stored, choice), role=role)

    def is_asked_for(self, name: str) -> bool:
        """Whether an embedding is to be quantized, or is stored so: all others are none of what schemes are for."""
        return self._policy.scheme_by_name(name) is not None or self._sources.linear(f"{name}.weight") is not None

    def embedding(self, name: str, module: nn.Embedding, parent: nn.Module) -> Assignment:
        impossible = self._no_kernel or embedding_objection(module)
        if f"{name}.weight" in self._tied:
            impossible = TIED
        stored = None if impossible is not None else self._sources.linear(f"{name}.weight")
        choice = self._policy.linear(name, EMBEDDING, stored)
        scheme = choice.scheme
        if impossible is None and scheme is not None:
            impossible = why_not_by_rows(scheme.kernels.format)
        if impossible is not None or scheme is None:
            reason = impossible or choice.reason
            return Assignment(name, "embedding", module, None, reason, is_possible=impossible is None, role=EMBEDDING)
        assert isinstance(scheme, LinearScheme)
        quantized = QuantizedEmbedding(scheme, module.num_embeddings, module.embedding_dim, module.padding_idx)
        say_what_codes_stand_for(quantized, name, self._dtype_of(f"{name}.weight", module.weight.dtype))
        setattr(parent, name.rpartition(".")[2], quantized.train(module.training))
        return Assignment(name, "embedding", quantized, scheme, "", self._kept(stored, choice), role=EMBEDDING)

    def _kept(self, stored: ModuleWeights | None, choice: Choice) -> ModuleWeights | None:
        """What is copied into a module as it is stored, in the format its kernels take."""
        if stored is None or not choice.keeps:
            return None
        assert choice.scheme is not None
        return self._sources.adapt(stored, choice.scheme.kernels.format)

    def _quantized(self, name: str, module: Any, scheme: LinearScheme) -> QuantizedLinear:
        transposed = isinstance(module, Conv1D)
        rows, columns = reversed(module.weight.shape) if transposed else module.weight.shape
        quantized = QuantizedLinear(scheme, int(columns), int(rows), module.bias, transposed).train(module.training)
        say_what_codes_stand_for(quantized, name, self._dtype_of(f"{name}.weight", module.weight.dtype))
        return quantized

    def _impossible(self, name: str, module: nn.Module, parent: nn.Module, child: str) -> str | None:
        if f"{name}.weight" in self._tied:
            return TIED
        if not module.weight.numel():  # type: ignore[operator]
            return "it has no elements"
        objection = self._no_kernel or self._products.objection(module)
        if objection is not None:
            return objection
        reader = self._readers.get(id(module))
        if reader is not None and not (reader is type(parent) and modeling_code.asks_if_quantized(parent)):
            return f"the forward of {reader.__name__} reads its weight instead of calling it"
        if modeling_code.writes_weight(self._model, child):
            return f"{type(self._model).__name__} changes its weight in place"
        return None
