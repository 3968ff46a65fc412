"""How tools decide from a `quantization_config` whether a module is quantized and as what: their rules, written out.

Each takes the config and the name the tool has for a linear layer, and returns the description of its format, or `None`
where the layer is not quantized.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

Config = Mapping[str, Any]


def compressed_tensors(config: Config, name: str) -> Any:
    """compressed-tensors 0.20, which transformers asks: `ignore`, then the name, then expressions, then the class."""

    def fits(target: str) -> bool:
        return re.match(target[3:], name) is not None if target.startswith("re:") else target == name

    if any(map(fits, config["ignore"])):
        return None
    groups = {target: group for group in config["config_groups"].values() for target in group["targets"]}
    for target in sorted(groups, key=lambda target: ("re:" in target, target)):
        if fits(target):
            return groups[target]
    return groups.get("Linear")


def quark(config: Config, name: str) -> Any:
    """AMD Quark 0.13, which transformers asks: globs, `exclude` before all, then the first of the layers that fits."""
    if any(fnmatch(name, pattern) for pattern in config["exclude"]):
        return None
    layers = config["layer_quant_config"]
    return next((layers[pattern] for pattern in layers if fnmatch(name, pattern)), config["global_quant_config"])


def modelopt(config: Config, name: str) -> Any:
    """ModelOpt: globs."""
    ignored = any(fnmatch(name, pattern) for pattern in config["ignore"])
    return None if ignored else config["config_groups"]["group_0"]


def vllm_compressed_tensors(config: Config, name: str, prefixes: Mapping[str, str]) -> Any:
    """vLLM: names with a dot are translated, expressions are not; the first target that fits, then the class."""

    def translated(target: str) -> str:
        return vllm_name(target, prefixes) if "." in target and not target.startswith("re:") else target

    def fits(target: str) -> bool:
        return re.match(target[3:], name) is not None if target.startswith("re:") else target == name

    if any(fits(translated(target)) for target in config["ignore"]):
        return None
    groups = {translated(target): group for group in config["config_groups"].values() for target in group["targets"]}
    return next((groups[target] for target in groups if fits(target)), groups.get("Linear"))


def vllm_quark(config: Config, name: str, prefixes: Mapping[str, str]) -> Any:
    """vLLM: names are translated and not taken for globs in `exclude`; a layer's name may be a part of a pattern."""
    if name in (vllm_name(pattern, prefixes) for pattern in config["exclude"]):
        return None
    for pattern, layer in config["layer_quant_config"].items():
        own = vllm_name(pattern, prefixes)
        if fnmatch(name, own) if "*" in own else name in own:
            return layer
    return config["global_quant_config"]


def vllm_name(name: str, prefixes: Mapping[str, str]) -> str:
    """A name as vLLM's `WeightsMapper` translates it: every prefix that fits, one after the other."""
    for prefix, own in prefixes.items():
        if name.startswith(prefix):
            name = own + name.removeprefix(prefix)
    return name


_NESTED = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}
_QWEN_VL = {
    "model.language_model.": "language_model.model.",
    "model.visual.": "visual.",
    "lm_head.": "language_model.lm_head.",
    "model.": "language_model.model.",
}
VLLM_PREFIXES: Mapping[str, Mapping[str, str]] = {
    **dict.fromkeys(("llava", "llava_tied", "pixtral", "gemma3", "paligemma", "internvl"), _NESTED),
    "mistral3": {**_NESTED, "model.": "language_model.model."},
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), _QWEN_VL),
    "qwen2_audio": {},
    "mixtral": {},
}
"""What vLLM 0.33 makes of the names of the architectures it serves (not Mllama and Fuyu)."""
