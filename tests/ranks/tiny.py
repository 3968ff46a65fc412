"""Tiny models whose sizes four ranks can divide into whole scale blocks of every scheme."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from architectures import BY_NAME, Architecture, save

_SIZES: dict[str, Any] = {
    "vocab_size": 160, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_size": 128,
    "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
    "head_dim": 128, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
_LOCAL_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
_EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 512}


def _model(name: str, family: str, **more: Any) -> Architecture:
    config = getattr(transformers, f"{family}Config")(**{**_SIZES, **more})
    return Architecture(name, f"{family}ForCausalLM", lambda: config, BY_NAME["llama"].inputs)


MODELS = {
    model.name: model
    for model in (
        _model("llama", "Llama", attention_bias=True, mlp_bias=True),
        _model("few_kv_heads", "Qwen3", num_key_value_heads=1),
        _model("qwen3_moe", "Qwen3Moe", **_EXPERTS),
        _model("mixtral", "Mixtral", **_LOCAL_EXPERTS),
        _model("gpt_oss", "GptOss", **_LOCAL_EXPERTS),
    )
}


def folder(name: str, root: Path) -> Path:
    """The checkpoint of one of them, or of an architecture of the other tests, below `root`."""
    path = root / name
    return path if path.exists() else save(MODELS.get(name) or BY_NAME[name], path)
