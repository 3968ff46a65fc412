"""What generating holds beside the model: keys and values of the tokens so far, from the config alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

_UNEVEN = "global_head_dim", "num_global_key_value_heads", "num_kv_shared_layers"
"""Fields of configs by which not all layers keep the same for a token."""


def context_length(config: PreTrainedConfig) -> int | None:
    """The most tokens that the model was made for, if the config says so."""
    tokens = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return tokens if isinstance(tokens, int) and tokens > 0 else None


def attention_cache_bytes(config: PreTrainedConfig, tokens: int, dtype: torch.dtype) -> int | None:
    """Bytes of the attention cache of one sequence of so many tokens, in the dtype that the model computes in.

    As transformers' `DynamicCache` keeps it: a layer with a sliding window holds one token less than that, and what
    linear attention and Mamba keep, which does not grow, is not counted. `None` where the config does not say what a
    layer keeps for a token, and for models with an encoder, which keep that of the input too.
    """
    text: Any = config.get_text_config(decoder=True)
    per_token = _numbers_per_token(text)
    if per_token is None or getattr(config, "is_encoder_decoder", False) or not hasattr(text, "num_hidden_layers"):
        return None
    try:
        layers = DynamicCache(config=config).layers or [None] * text.num_hidden_layers
    except (AttributeError, KeyError, TypeError, ValueError):  # layers of a kind that only the model's own code knows
        return None
    held = sum(_tokens_held(layer, tokens) for layer in layers)
    return held * per_token * dtype.itemsize


def _tokens_held(layer: Any, tokens: int) -> int:
    if layer is not None and not isinstance(layer, DynamicLayer):
        return 0
    window = getattr(layer, "sliding_window", None)
    return tokens if window is None else min(tokens, window - 1)


def _numbers_per_token(text: Any) -> int | None:
    """Elements of keys and values of one token in one layer."""
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int) or heads < 1 or any(getattr(text, name, None) for name in _UNEVEN):
        return None
    latent, rotated = getattr(text, "kv_lora_rank", None), getattr(text, "qk_rope_head_dim", None)
    if isinstance(latent, int) and isinstance(rotated, int):  # MLA: one of each for all heads
        return latent + rotated
    keys = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or getattr(text, "hidden_size", 0) // heads
    return 2 * keys * width if isinstance(width, int) and width else None
