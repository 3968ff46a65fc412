"""`--load-format quantload`: vLLM's models load themselves, from tensors that nobody has read."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from ..errors import UnsupportedCheckpointError
from ..model.leftovers import some
from ..options import LoadOptions
from ..schemes.names import AUTO
from .choices import may_stay_as_stored
from .closures import check_complete, engine_layers
from .engine_load import EngineLoad, Kept, stored_weights, tell
from .vllm_config import QuantloadConfig

logger = init_logger("vllm.quantload")


class QuantloadModelLoader(DefaultModelLoader):  # type: ignore[misc]  # vLLM's classes are not typed for us
    """Reads what a rank copies, and no more, in pieces, into layers that quantize them as they come."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        self._options = LoadOptions()
        self._quantization = "none"
        self._load: EngineLoad | None = None

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Build the model and load it, with the options of its quantization method."""
        config = vllm_config.quant_config
        if isinstance(config, QuantloadConfig):
            self._options, self._quantization = config.options, config.policy.linear
            if may_stay_as_stored(config.policy):
                config.weights = self._stored_weights(model_config)
        model: nn.Module = super().load_model(vllm_config, model_config, prefix)
        if isinstance(config, QuantloadConfig):
            config.let_stored_go()
        return model

    def _stored_weights(self, model_config: ModelConfig) -> Mapping[str, Any] | None:
        """What a quantized checkpoint stores, which is downloaded then; `None` where it is not quantized."""
        folder, _, is_safetensors, _ = self._prepare_weights(
            model_config.model, None, model_config.revision, True, None
        )
        return stored_weights(folder) if is_safetensors else None

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Have the model load itself, and report.

        Raises `MissingWeightsError` where something of a quantized layer never came.
        """
        with EngineLoad(model, self._options, torch.empty(0).device, _kept(model)) as load:
            self._load = load
            try:
                super().load_weights(model, model_config)
            finally:
                self._load = None
            load.flush()
            check_complete(layer for _, layer in engine_layers(model))
            if self._quantization == AUTO and load.as_values:
                logger.warning(
                    "quantload: stored quantized, and decoded as no quantized layer has their names: %s",
                    some(load.as_values),
                )
        tell(load.report(model_config.model, self._quantization), len(load.materialized), logger)

    def _get_weights_iterator(self, source: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors of a checkpoint, in the order of its files; none of them is read yet."""
        folder, files, is_safetensors, _ = self._prepare_weights(
            source.model_or_path,
            source.subfolder,
            source.revision,
            source.fall_back_to_pt,
            source.allow_patterns_overrides,
        )
        if not is_safetensors:
            raise UnsupportedCheckpointError(f"{folder}: the load format quantload reads safetensors files only")
        self.counter_before_loading_weights: float = self.counter_before_loading_weights or time.perf_counter()
        if self._load is not None:
            yield from ((source.prefix + name, tensor) for name, tensor in self._load.tensors(folder, files))
            return
        with EngineLoad(nn.Module(), self._options, torch.empty(0).device, {}) as reload:
            yield from ((source.prefix + name, tensor) for name, tensor in reload.tensors(folder, files))
            reload.flush()

    def _prepare_weights(self, *arguments: Any, **named: Any) -> Any:
        """Find or download the files as for `safetensors`."""
        own, self.load_config.load_format = self.load_config.load_format, "safetensors"
        try:
            return super()._prepare_weights(*arguments, **named)
        finally:
            self.load_config.load_format = own


def _kept(model: nn.Module) -> dict[str, Kept]:
    """The layers of a model that our methods left as stored: of which kind, and why."""
    from .vllm_methods import KeptExperts, KeptHead, KeptLinear  # vLLM's layers: not in each of its processes

    found: dict[str, Kept] = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, (KeptLinear, KeptHead, KeptExperts)):
            found[name] = ("experts" if isinstance(method, KeptExperts) else "linear", method.reason)
    return found
