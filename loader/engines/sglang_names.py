"""What SGLang knows us by: names of quantization methods, and the places where our hooks are."""

from __future__ import annotations

from .names import PREFIX, SCHEMES

NAMES = {f"{PREFIX}{name}": name for name in SCHEMES}
"""Schemes by the names that are ours beyond doubt."""

_LOADER = "sglang.srt.model_loader.loader.DefaultModelLoader"
VERIFY = "sglang.srt.configs.model_config.ModelConfig._verify_quantization"
WEIGHTS = f"{_LOADER}._get_weights_iterator"
LOAD = f"{_LOADER}.load_weights_only"
