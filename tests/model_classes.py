"""Every model class of the installed transformers on meta, with the widths that its config class has of itself.

Two layers of those widths take milliseconds, and no two sizes are the same by accident. `bench/shrunk_models.py` has
small widths, for models with weights.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from quantload.model import transformers_api
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

LAYERS = 2
DEPTH = re.compile(r"(?:num_(?:hidden_|encoder_|decoder_)?layers|n_layers?|depth|(?:encoder|decoder)_layers)")
NUMBER = re.compile(r"\.\d+(?=\.|$)")

# What a config class has to be told before a model can be built of it.
TOLD: dict[str, dict[str, Any]] = {
    "AutoformerConfig": {"prediction_length": 4},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 8}},
    "DeepseekOcr2Config": {
        "text_config": {"num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}
    },
    "DiffusionGemmaConfig": {"text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 128}},
    "DogeConfig": {"is_moe": True},
    "Dots1Config": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "Emu3Config": {"vocabulary_map": {"<image>": 8}},
    "EsmConfig": {"vocab_size": 33, "pad_token_id": 1},
    "HunYuanDenseV1Config": {"head_dim": 128},
    "HunYuanMoEV1Config": {"head_dim": 128, "num_experts": 8},
    "HunYuanVLConfig": {"text_config": {"head_dim": 128}},
    "HunYuanVLTextConfig": {"head_dim": 128},
    "InformerConfig": {"prediction_length": 4},
    "Lfm2MoeConfig": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "MinistralConfig": {"head_dim": 128},
    "NemotronConfig": {"num_key_value_heads": 8},
    "TimeSeriesTransformerConfig": {"prediction_length": 4},
    "Wav2Vec2BertConfig": {"vocab_size": 32},
    "Wav2Vec2ConformerConfig": {"vocab_size": 32},
}
NOT_INSTALLED = ("timm", "natten", "detectron2", "scipy", "PIL")
"""What some classes need besides transformers."""


def model_classes() -> dict[str, type[PreTrainedModel]]:
    """By name, all classes with a config class; a base that only its subclasses complete is none."""
    found: dict[str, type[PreTrainedModel]] = {}
    for name in sorted(dir(transformers)):
        if name.endswith("PreTrainedModel"):
            continue
        try:
            cls: Any = getattr(transformers, name)
        except (ImportError, RuntimeError):  # needs a package that is not installed
            continue
        if not inspect.isclass(cls) or not issubclass(cls, PreTrainedModel):
            continue
        model_class: Any = cls
        if model_class.config_class is not None:
            found[name] = model_class
    return found


def shallow(cls: type[PreTrainedModel]) -> PreTrainedConfig:
    """The config that `cls` has of itself with two layers; its own depth where it does not take another."""
    told = TOLD.get(cls.config_class.__name__, {})
    config = cls.config_class(**told)
    try:
        fewer: PreTrainedConfig = cls.config_class.from_dict(_fewer_layers(config.to_dict()))
    except Exception:  # a config whose parts have to agree in a way that is its own
        return config
    return fewer


def on_meta(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model without numbers."""
    return transformers_api.meta_model(cls, config, Path(cls.__name__), torch.bfloat16)


def built() -> Iterator[tuple[str, PreTrainedModel | Exception]]:
    """Every class with its model on meta, or with what it raises."""
    for name, cls in model_classes().items():
        try:
            yield name, _built(cls)
        except Exception as error:
            yield name, error


def _built(cls: type[PreTrainedModel]) -> PreTrainedModel:
    try:
        return on_meta(cls, shallow(cls))
    except Exception:
        return on_meta(cls, cls.config_class(**TOLD.get(cls.config_class.__name__, {})))


def _fewer_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    layers = config.get("num_hidden_layers")
    fewer: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            fewer[key] = _fewer_layers(value)
        elif isinstance(value, (list, tuple)) and isinstance(layers, int) and len(value) == layers > LAYERS:
            fewer[key] = [value[0], value[-1]]
        elif isinstance(key, str) and DEPTH.fullmatch(key) and type(value) is int:
            fewer[key] = min(value, LAYERS)
        else:
            fewer[key] = copy.copy(value)
    return fewer


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def without_numbers(name: str) -> str:
    """A module's name with `*` for the numbers of layers."""
    return NUMBER.sub(".*", name)
