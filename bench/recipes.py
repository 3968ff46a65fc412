"""What is in the synthetic checkpoints: configuration, tensor names and shapes, and how many shards hold them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

HEAD_DIM = 128

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """One checkpoint: its `config.json`, its tensors in the order they are stored, and how many shards hold them."""

    name: str
    config: dict[str, Any]
    tensors: dict[str, Shape]
    shards: int

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(2 * math.prod(shape) for shape in self.tensors.values())


def _scaled(width: int, scale: float, multiple: int = 256) -> int:
    return max(multiple, round(width * math.sqrt(scale) / multiple) * multiple)


def _layers(count: int, scale: float) -> int:
    """A scale under 0.01 makes the one-layer checkpoint that a process warms up on."""
    return count if scale >= 0.01 else 1


def _config(architecture: str, model_type: str, hidden: int, vocab: int, layers: int, **more: Any) -> dict[str, Any]:
    heads = max(2, hidden // HEAD_DIM)
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "head_dim": hidden // heads if hidden < 2 * HEAD_DIM else HEAD_DIM,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **more,
    }


def _attention(prefix: str, config: dict[str, Any]) -> dict[str, Shape]:
    hidden, head = config["hidden_size"], config["head_dim"]
    rows = head * config["num_attention_heads"]
    kv_rows = head * config["num_key_value_heads"]
    return {
        f"{prefix}.q_proj.weight": (rows, hidden),
        f"{prefix}.k_proj.weight": (kv_rows, hidden),
        f"{prefix}.v_proj.weight": (kv_rows, hidden),
        f"{prefix}.o_proj.weight": (hidden, rows),
    }


def _gated_mlp(prefix: str, hidden: int, intermediate: int) -> dict[str, Shape]:
    return {
        f"{prefix}.gate_proj.weight": (intermediate, hidden),
        f"{prefix}.up_proj.weight": (intermediate, hidden),
        f"{prefix}.down_proj.weight": (hidden, intermediate),
    }


def _decoder(config: dict[str, Any], layer: Callable[[str], dict[str, Shape]]) -> dict[str, Shape]:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    tensors: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, hidden)}
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}"
        tensors[f"{prefix}.input_layernorm.weight"] = (hidden,)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        tensors.update(layer(prefix))
    tensors["model.norm.weight"] = (hidden,)
    tensors["lm_head.weight"] = (vocab, hidden)
    return tensors


def _llama(name: str, shards: int, intermediate: int, config: dict[str, Any]) -> Recipe:
    config = {**config, "intermediate_size": intermediate}

    def layer(prefix: str) -> dict[str, Shape]:
        mlp = _gated_mlp(f"{prefix}.mlp", config["hidden_size"], intermediate)
        return {**_attention(f"{prefix}.self_attn", config), **mlp}

    return Recipe(name, config, _decoder(config, layer), shards)


def dense(scale: float = 1.0) -> Recipe:
    """Llama, 3.1 GB at scale 1: six layers of the 8B model's shapes, in five shards."""
    config = _config("LlamaForCausalLM", "llama", _scaled(4096, scale), _scaled(32000, scale), _layers(6, scale))
    return _llama("dense", 5, _scaled(14336, scale), config)


def large(scale: float = 1.0) -> Recipe:
    """Llama, 11 GB at scale 1: `dense` with 24 layers, in eight shards."""
    config = _config("LlamaForCausalLM", "llama", _scaled(4096, scale), _scaled(32000, scale), _layers(24, scale))
    return _llama("large", 8, _scaled(14336, scale), config)


def _qwen3_moe(name: str, shards: int, experts: int, intermediate: int, config: dict[str, Any]) -> Recipe:
    """Qwen3-MoE, every layer sparse, one tensor an expert and projection."""
    sparse = {
        "moe_intermediate_size": intermediate,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    config = {**config, "intermediate_size": config.get("intermediate_size", intermediate), **sparse}

    def layer(prefix: str) -> dict[str, Shape]:
        hidden, head = config["hidden_size"], config["head_dim"]
        tensors = _attention(f"{prefix}.self_attn", config)
        tensors |= {f"{prefix}.self_attn.{name}_norm.weight": (head,) for name in ("q", "k")}
        tensors[f"{prefix}.mlp.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            tensors |= _gated_mlp(f"{prefix}.mlp.experts.{expert}", hidden, intermediate)
        return tensors

    return Recipe(name, config, _decoder(config, layer), shards)


def _sparse_config(hidden: int, vocab: int, layers: int, **more: Any) -> dict[str, Any]:
    return _config("Qwen3MoeForCausalLM", "qwen3_moe", hidden, vocab, layers, **more)


def moe(scale: float = 1.0) -> Recipe:
    """Qwen3-MoE, 3.1 GB at scale 1: four layers of 64 experts with the 30B-A3B model's shapes, one tensor an expert."""
    config = _sparse_config(_scaled(2048, scale), _scaled(65536, scale), _layers(4, scale))
    return _qwen3_moe("moe", 4, 64, _scaled(768, scale, 128), config)


def many(scale: float = 1.0, layers: int = 33) -> Recipe:
    """Qwen3-MoE, 3.3 GB in 51,000 tensors at scale 1: 33 layers of 512 experts of 64 KiB a projection."""
    kept = max(1, round(layers * scale))
    experts = 512 if layers * scale >= 1 else max(8, round(512 * layers * scale))
    return _qwen3_moe("many", 4, experts, 128, _sparse_config(256, 1024, kept))


def few(scale: float = 1.0) -> Recipe:
    """Llama with the bytes of `many` in 66 tensors: seven layers, at a smaller scale narrower ones."""
    config = _config("LlamaForCausalLM", "llama", _scaled(4096, scale), 1024, _layers(7, scale))
    return _llama("few", 4, _scaled(15872, scale), config)


def hundred_thousand() -> Recipe:
    """`many` with twice the layers, 102,000 tensors; for its headers only."""
    return many(layers=66)


def qwen3_30b(layers: int = 48) -> Recipe:
    """Qwen3-30B-A3B, 57 GiB: the published configuration, tensor names and shapes, in 16 shards."""
    config = _sparse_config(2048, 151936, layers)
    config |= {
        "head_dim": 128,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": layers,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "pad_token_id": 151643,
    }
    return _qwen3_moe("qwen3_30b", 16, 128, 768, config)


def huge(scale: float = 1.0) -> Recipe:
    """Phi-3, 3.3 GB at scale 1: one layer whose fused gate and up projection is a single tensor of 2 GiB."""
    hidden, intermediate = _scaled(4096, scale), _scaled(131072, scale)
    config = _config("Phi3ForCausalLM", "phi3", hidden, _scaled(4096, scale), 1)
    config |= {"intermediate_size": intermediate, "original_max_position_embeddings": 4096}
    rows = config["head_dim"] * config["num_attention_heads"]
    kv_rows = config["head_dim"] * config["num_key_value_heads"]

    def layer(prefix: str) -> dict[str, Shape]:
        return {
            f"{prefix}.self_attn.qkv_proj.weight": (rows + 2 * kv_rows, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, rows),
            f"{prefix}.mlp.gate_up_proj.weight": (2 * intermediate, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, intermediate),
        }

    return Recipe("huge", config, _decoder(config, layer), 1)


def tiny(scale: float = 1.0) -> Recipe:
    """Llama, 74 MB: 222 layers of width 128, which makes 2,001 tensors, whatever the scale."""
    return _llama("tiny", 1, 256, _config("LlamaForCausalLM", "llama", 128, 1024, _layers(222, scale)))


RECIPES: dict[str, Callable[[float], Recipe]] = {
    "dense": dense,
    "moe": moe,
    "huge": huge,
    "tiny": tiny,
    "large": large,
    "many": many,
    "few": few,
}
