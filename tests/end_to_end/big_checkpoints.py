"""Checkpoints of a few hundred MB, written in well under a second from one block of random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import raw_checkpoint
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM


def llama(folder: Path, *, shards: int = 1, **sizes: int) -> Path:
    """Write a BF16 Llama of the given configuration `sizes` over `shards` files."""
    config = LlamaConfig(
        **{"vocab_size": 160, "num_attention_heads": 4, "num_key_value_heads": 4, **sizes}, tie_word_embeddings=False
    )
    return _write(folder, config, LlamaForCausalLM, shards)


def qwen3_moe(folder: Path, *, shards: int = 1, **sizes: int) -> Path:
    """Write a BF16 Qwen3-MoE of the given configuration `sizes` over `shards` files, experts apart."""
    given = {"vocab_size": 160, "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts_per_tok": 2, **sizes}
    return _write(folder, Qwen3MoeConfig(**given, tie_word_embeddings=False), Qwen3MoeForCausalLM, shards)


def _write(folder: Path, config: Any, cls: type[PreTrainedModel], shards: int) -> Path:
    config.architectures = [cls.__name__]
    config.dtype = "bfloat16"
    with torch.device("meta"):
        skeleton = cls(config)
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    sizes = (size for name, tensor in skeleton.state_dict().items() for size in _stored(name, tensor.shape))
    tensors = {name: _filled(block, shape) for name, shape in sizes}
    names = list(tensors)
    size = -(-len(names) // shards)
    parts = [{name: tensors[name] for name in names[start : start + size]} for start in range(0, len(names), size)]
    return raw_checkpoint.write(folder, folder, parts)


def _stored(name: str, shape: torch.Size) -> Iterator[tuple[str, torch.Size]]:
    """The tensors of a checkpoint that a tensor of a model is made of: experts are apart, gate and up too."""
    module, _, key = name.rpartition(".experts.")
    for expert in range(shape[0] if module else 0):
        prefix = f"{module}.experts.{expert}"
        if key == "gate_up_proj":
            for part in ("gate_proj", "up_proj"):
                yield f"{prefix}.{part}.weight", torch.Size((shape[1] // 2, shape[2]))
        else:
            yield f"{prefix}.{key}.weight", shape[1:]
    if not module:
        yield name, shape


def _filled(block: Tensor, shape: torch.Size) -> Tensor:
    count = shape.numel()
    return block.repeat(-(-count // block.numel()))[:count].view(shape)
