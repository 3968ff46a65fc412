"""The attention cache as the config has it, beside what transformers keeps."""

from __future__ import annotations

import pytest
import torch
from architectures import ALL, Architecture, answering, named
from quantload.model.attention_cache import attention_cache_bytes, context_length
from transformers import LlamaConfig

DECODERS = [each for each in ALL if each.generates and each.dtype == torch.bfloat16 and "t5" not in each.name]


@pytest.mark.parametrize("architecture", DECODERS, ids=lambda each: each.name)
@torch.no_grad()
def test_it_is_what_a_forward_keeps(architecture: Architecture) -> None:
    model = architecture.model_class(architecture.config()).eval()
    for tokens in (5, 40):  # within a sliding window, and beyond it
        output = answering(model)(input_ids=torch.full((1, tokens), 9), use_cache=True)
        held = (getattr(layer, key, None) for layer in output.past_key_values.layers for key in ("keys", "values"))
        kept = sum(tensor.numel() * 4 for tensor in held if tensor is not None)
        assert attention_cache_bytes(model.config, tokens, torch.float32) == kept > 0


def test_nothing_is_said_of_a_model_of_which_it_is_not_known() -> None:
    assert attention_cache_bytes(named("t5")[0].config(), 5, torch.float32) is None
    uneven = LlamaConfig(global_head_dim=512)
    assert attention_cache_bytes(uneven, 5, torch.float32) is None
    own = LlamaConfig()
    object.__setattr__(own, "layer_types", ["of its own"] * own.num_hidden_layers)
    assert attention_cache_bytes(own, 5, torch.float32) is None


def test_the_context_is_what_the_config_says() -> None:
    assert context_length(LlamaConfig(max_position_embeddings=777)) == 777
    assert context_length(LlamaConfig(max_position_embeddings=0)) is None
