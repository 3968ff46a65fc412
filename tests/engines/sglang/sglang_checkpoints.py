"""A small MoE checkpoint with random weights, of an architecture that SGLang's text-only parts run on a CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCAB = 512
PROMPTS = [[5, 17, 99, 256], [300, 2, 41]]


def save(folder: Path, seed: int) -> Path:
    """Write it; the head is not tied, which SGLang's class for it does not know."""
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="2MB")
    return folder


def quantized(folder: Path, original: Path, method: str) -> Path:
    """The checkpoint as a tool stores it, by the names of `quantized_copies`."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "end_to_end"))
    from quantized_copies import METHODS, quantized_copy

    copy, _ = quantized_copy(folder / "copies", original, *METHODS[method])
    return copy
