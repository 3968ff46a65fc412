"""Every model class of transformers, shrunk until it builds in a second, and inputs that its forward takes."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

VOCABULARY = 512
LARGEST = 60_000_000
"""Parameters that a shrunk model may have: 240 MB in float32."""

DIVISORS = (8, 16, 4, 2, 1)
"""By what dimensions are divided; where a model does not build or run, the next one is tried."""

NEEDED: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 8}, "informer": {"prediction_length": 8},
    "time_series_transformer": {"prediction_length": 8},
    "hunyuan_v1_dense": {"head_dim": 128}, "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 4, "moe_topk": 2},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8}, "ministral": {"head_dim": 128},
    "esm": {"vocab_size": 512, "pad_token_id": 1},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "reformer": {"is_decoder": True}, "wav2vec2-bert": {"vocab_size": 32}, "wav2vec2-conformer": {"vocab_size": 32},
    "chameleon": {"vocabulary_map": {"<image>": 11}},
    "perceiver": {"num_latents": 16, "d_latents": 64, "d_model": 64},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "dots1": {"moe_intermediate_size": 128, "n_routed_experts": 4, "first_k_dense_replace": 1,
              "n_shared_experts": 1, "num_experts_per_tok": 2},
}  # fmt: skip
"""What the config of a type needs beside its defaults before any model of it builds."""

_LAYERS = re.compile(r"(^|_)(layers?|n_layer|depth|num_blocks|num_stages?)$|num_hidden_layers|^layers$")
_EXPERTS = re.compile(r"(num|n)_.*experts$|^(num_experts|moe_num_experts)$")
_DIMENSION = re.compile(
    r"hidden|dim(s)?$|dim_|ffn|intermediate|embed|width|d_model|d_ff|d_kv|inner|n_embd|rank|channels|_units$|state_size"
    r"|projection_size|proj_size|output_size|head_size|feedforward|embedding_size|stem_|filters"
)
_NO_DIMENSION = re.compile(
    r"layers?$|_heads|position|token|num_channels|kernel|stride|_index|_id$|vocab|patch|image|num_emb|groups"
    r"|embed_act|hidden_act|num_hidden_groups|channels_in|in_chans|mel|num_queries|audio_channels|dropout|bucket"
)
_IDS = re.compile(r"(token|start|end|bos|eos|pad|sep|mask|cls|blank)_?(token_)?(id|index)$|_token_(id|index)$")


@dataclass(frozen=True)
class ModelClass:
    """One class that a config's `architectures` may name, with the type of that config."""

    model_type: str
    class_name: str

    @property
    def cls(self) -> type[PreTrainedModel]:
        found: type[PreTrainedModel] = getattr(transformers, self.class_name)
        return found

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        """What the class is built from: a part of the model that `model_type` names may have a config of its own."""
        found: type[PreTrainedConfig] = self.cls.config_class or CONFIG_MAPPING[self.model_type]
        return found


def model_classes(pattern: str = "") -> list[ModelClass]:
    """The model classes of the auto mappings whose names `pattern` finds, each once, by type and name."""
    found: dict[str, ModelClass] = {}
    for mapping in sorted(name for name in dir(modeling_auto) if name.endswith("MAPPING_NAMES")):
        for model_type, names in getattr(modeling_auto, mapping).items():
            for name in (names,) if isinstance(names, str) else names:
                if not re.search(pattern, name, re.IGNORECASE):
                    continue
                cls = getattr(transformers, name, None)
                if inspect.isclass(cls) and issubclass(cls, PreTrainedModel) and model_type in CONFIG_MAPPING:
                    found.setdefault(name, ModelClass(model_type, name))
    return sorted(found.values(), key=lambda each: (each.model_type, each.class_name))


def best_of(classes: list[ModelClass]) -> ModelClass:
    """The class of a type that has the most in it: one that generates, else any that has more than the bare model."""
    kinds = ("ForConditionalGeneration", "ForCausalLM", "LMHeadModel", "ForMaskedLM", "For", "")
    return min(classes, key=lambda each: next(n for n, kind in enumerate(kinds) if kind in each.class_name))


def shrunk_configs(model: ModelClass) -> Iterator[PreTrainedConfig]:
    """Configs of `model` from the smallest that may work to the one that only has fewer layers."""
    for divisor, everything in itertools.product(DIVISORS, (False, True)):
        try:
            config = model.config_class(**NEEDED.get(model.model_type, {}))
            shrunk = _shrunk(config, divisor, everything)
            if getattr(shrunk, "pad_token_id", 0) is None:
                shrunk.pad_token_id = 1
            yield shrunk
        except Exception:  # a config's own checks refuse it: the next one
            continue


def _shrunk(config: PreTrainedConfig, divisor: int, everything: bool) -> PreTrainedConfig:
    """`config` made anew, from the fields that change or, what some need, from all of them."""
    given: dict[str, Any] = {}
    fields = set(inspect.signature(type(config).__init__).parameters)
    ids = iter(range(VOCABULARY - 8, 8, -1))
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            given[name] = _shrunk(value, divisor, everything)
        elif name.startswith("_") or name not in fields:
            continue
        elif type(value) is int:
            given[name] = _number(name, value, divisor, ids)
        elif isinstance(value, (list, tuple)) and value and all(type(each) is int for each in value):
            given[name] = type(value)(_listed(name, each, divisor) for each in value)
        elif everything and not _derived(name, value):
            given[name] = value
    if not everything:
        given = {name: value for name, value in given.items() if value != getattr(config, name)}
    return type(config)(**given)


def _derived(name: str, value: Any) -> bool:
    """Whether the config makes this anew from the number of layers."""
    return (isinstance(value, (list, tuple)) and "type" in name) or name in ("layer_types", "layers_block_type")


def _number(name: str, value: int, divisor: int, ids: Iterator[int]) -> int:
    if "vocab" in name and value > VOCABULARY:
        return VOCABULARY
    if _IDS.search(name):
        return value if 0 <= value < 8 else next(ids)
    if _LAYERS.search(name):
        return min(value, 2)
    if _EXPERTS.search(name):
        return min(value, 4)
    if _DIMENSION.search(name) and not _NO_DIMENSION.search(name) and value >= 32 and value % (2 * divisor) == 0:
        return value // divisor
    return value


def _listed(name: str, value: int, divisor: int) -> int:
    if name in ("depths", "num_blocks", "layer_depths", "num_hidden_layers", "stage_num_blocks"):
        return min(value, 2)
    if _DIMENSION.search(name) and not _NO_DIMENSION.search(name) and value >= 32 and value % (2 * divisor) == 0:
        return value // divisor
    return value


def built(model: ModelClass, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model with random weights in `dtype`; raises `ValueError` where it would have too many."""
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model.cls(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    return model.cls(config).to(dtype).eval()


def candidate_inputs(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Keyword arguments that the forward of `model` may take, the likeliest first."""
    accepted = inspect.signature(model.forward).parameters
    config, generator = model.config, torch.Generator().manual_seed(3)
    tokens = torch.randint(9, 100, (2, 12), generator=generator)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    shared: dict[str, Any] = {}
    if "decoder_input_ids" in accepted:
        shared["decoder_input_ids"] = tokens[:, :5]
    if "bbox" in accepted:
        shared["bbox"] = torch.tensor([1, 2, 30, 40]).expand(2, 12, 4).contiguous()
    image = _image_size(config)
    channels = _first(config, "num_channels", "in_channels", "in_chans", default=3)
    mels = _first(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "input_dim", default=80)
    kinds: dict[str, list[torch.Tensor]] = {
        "input_ids": [tokens],
        "pixel_values": [noise(2, channels, *image), noise(2, 4, channels, *image), noise(2, channels, 4, *image)],
        "input_values": [noise(2, 8000), noise(2, 1, 8000), noise(2, 1024, 128), noise(2, 64, mels)],
        "input_features": [
            noise(2, mels, 2 * _first(config, "max_source_positions", default=1500)),
            noise(2, 200, mels), noise(2, mels, 200), noise(2, 200, 160),
        ],
        "pixel_values_videos": [noise(2, _first(config, "num_frames", "frames_per_clip", default=8), channels, *image)],
        "past_values": [noise(2, _first(config, "context_length", default=32))],
        "hidden_states": [noise(2, 12, _first(config, "hidden_size", default=64))],
        "inputs_embeds": [noise(2, 12, _first(config, "hidden_size", "d_model", default=64))],
    }  # fmt: skip
    own = model.main_input_name if isinstance(model.main_input_name, list) else [model.main_input_name]
    main = [name for name in (*own, *kinds) if name in accepted and name in kinds]
    for name in dict.fromkeys(main):
        for value in kinds[name]:
            yield {name: value, **shared}
            if name == "pixel_values" and "input_ids" in accepted:
                yield {name: value, "input_ids": tokens, **shared}


def _first(config: Any, *names: str, default: int) -> int:
    places = [config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))]
    for name in names:
        for place in places:
            value = getattr(place, name, None)
            if isinstance(value, int):
                return value
    return default


def _image_size(config: Any) -> tuple[int, int]:
    for place in (config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))):
        value = getattr(place, "image_size", None)
        if isinstance(value, int):
            return value, value
        if isinstance(value, (list, tuple)) and len(value) >= 2:
            return int(value[-2]), int(value[-1])
    return 224, 224
