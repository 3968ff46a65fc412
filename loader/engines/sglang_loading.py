"""Loads that SGLang's `DefaultModelLoader` drives: the first one, and updates from a folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from sglang.srt.configs.load_config import LoadFormat
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_loader.weight_utils import maybe_add_mtp_safetensors
from torch import nn

from ..checkpoint.quantization_config import FIELD
from ..errors import UnsupportedCheckpointError
from .choices import DECODED
from .closures import check_complete, engine_layers
from .engine_load import EngineLoad, tell
from .sglang_methods import QuantloadConfig
from .sglang_names import NAMES

logger = logging.getLogger("sglang.quantload")

_running: ContextVar[EngineLoad | None] = ContextVar("quantload_running", default=None)


def load_weights(original: Callable[..., None], model: nn.Module, weights: Any, target_device: torch.device) -> None:
    """Load a model that is ours, and report; raises `MissingWeightsError` where something of it never came."""
    config = _config_of(model)
    if config is None:
        original(model, weights, target_device)
        return
    with EngineLoad(model, config.options, target_device, config.kept) as load:
        token = _running.set(load)
        try:
            original(model, weights, target_device)
        finally:
            _running.reset(token)
        load.flush()
        layers = [layer for _, layer in engine_layers(model)]
        check_complete(layer for layer in layers if layer.bytes_in or not config.is_loaded)
        if load.names:
            check_head(model, load.names)
        config.is_loaded = True
        report = load.report(type(model).__name__, config.policy.linear)
    tell(report, len(load.materialized), logger)


def weights_iterator(original: Callable[..., Any], loader: Any, source: Any, **named: Any) -> Iterator[Any]:
    """The tensors of a checkpoint for a model that is ours; SGLang's own for others, and for its other formats."""
    config = source.model_config
    formats = (LoadFormat.AUTO, LoadFormat.SAFETENSORS)
    if config is None or config.quantization not in NAMES or loader.load_config.load_format not in formats:
        return original(loader, source, **named)  # type: ignore[no-any-return]
    return _lazy(original, loader, source, named)


def _lazy(original: Callable[..., Any], loader: Any, source: Any, named: dict[str, Any]) -> Iterator[Any]:
    folder, files, is_safetensors = _files(loader, source, named.get("resolved_source"))
    load = _running.get()
    if not is_safetensors or load is None:
        tool = (getattr(source.model_config.hf_config, FIELD, None) or {}).get(DECODED)
        if tool is not None:
            raise UnsupportedCheckpointError(f"{folder}: of checkpoints by {tool} only safetensors files are read")
        yield from original(loader, source, **named)
        return
    tensors = load.tensors(folder, files)
    draft = loader.load_config.draft_model_idx
    if draft is not None:
        yield from loader._filter_mtp_weights(tensors, source.prefix, draft)
        return
    for name, tensor in tensors:
        yield source.prefix + name, tensor


def _files(loader: Any, source: Any, resolved: Any) -> tuple[str, list[str], bool]:
    """The folder and the files of a checkpoint, found or downloaded as SGLang does; whether they are safetensors."""
    if resolved is not None:
        return resolved.hf_folder, list(resolved.weight_files), resolved.use_safetensors
    folder, files, is_safetensors = loader._prepare_weights(
        source.model_or_path, source.revision, source.fall_back_to_pt, source.allow_patterns_overrides
    )
    if is_safetensors:
        index = "model.safetensors.index.json"
        files = maybe_add_mtp_safetensors(files, folder, index, source.model_config.hf_config)
    return folder, list(files), is_safetensors


def check_head(model: nn.Module, names: set[str]) -> None:
    """Raise `UnsupportedCheckpointError` where the output head is tied in the checkpoint and not in SGLang's model.

    It would have no weights at all, and every logit would be zero.
    """
    config: Any = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    if not getattr(config, "tie_word_embeddings", False) or any(name.endswith("lm_head.weight") for name in names):
        return
    heads = {name: module.weight for name, module in model.named_modules() if isinstance(module, ParallelLMHead)}
    embeddings = {
        module.weight.data_ptr()
        for module in model.modules()
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    }
    for name, weight in heads.items():
        if embeddings and weight.data_ptr() not in embeddings:
            raise UnsupportedCheckpointError(
                f"{name} is tied to the embedding in this checkpoint (tie_word_embeddings), and SGLang's "
                f"{type(model).__name__} does not tie it: it would stay without weights, and every token would be as "
                f"likely as any other. Store the head as a tensor of its own, with tie_word_embeddings false"
            )


def _config_of(model: nn.Module) -> QuantloadConfig | None:
    """Our configuration, if the model was built with one."""
    for module in model.modules():
        config = getattr(module, "quant_config", None)
        if isinstance(config, QuantloadConfig):
            return config
        config = getattr(getattr(module, "quant_method", None), "config", None)
        if isinstance(config, QuantloadConfig):
            return config
    return None
