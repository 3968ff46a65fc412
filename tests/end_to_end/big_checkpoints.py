"""Llama checkpoints of a few hundred MB, written in well under a second from one block of random numbers."""

from __future__ import annotations

from pathlib import Path

import raw_checkpoint
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


def llama(folder: Path, *, shards: int = 1, **sizes: int) -> Path:
    """Write a BF16 Llama of the given configuration `sizes` over `shards` files."""
    config = LlamaConfig(
        **{"vocab_size": 160, "num_attention_heads": 4, "num_key_value_heads": 4, **sizes}, tie_word_embeddings=False
    )
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "bfloat16"
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    tensors = {name: _filled(block, tensor.shape) for name, tensor in skeleton.state_dict().items()}
    names = list(tensors)
    size = -(-len(names) // shards)
    parts = [{name: tensors[name] for name in names[start : start + size]} for start in range(0, len(names), size)]
    return raw_checkpoint.write(folder, folder, parts)


def _filled(block: Tensor, shape: torch.Size) -> Tensor:
    count = shape.numel()
    return block.repeat(-(-count // block.numel()))[:count].view(shape)
