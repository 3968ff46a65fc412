"""Tiny models whose checkpoints have other names than their modules: with images or audio, and Mixtral.

transformers renames what it loads, and back what it saves. The sizes are such that every format can hold all layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import torch
import transformers
from architectures import VOCAB, Architecture, Inputs
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

IMAGE_TOKEN = 3

_IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TEXT: dict[str, Any] = {
    **_IDS,
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_MROPE: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
}
_TOWER: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_PATCHES: dict[str, Any] = {**_TOWER, "image_size": 16, "patch_size": 8}
_PIXTRAL: dict[str, Any] = {**_TOWER, "image_size": 16, "patch_size": 4, "head_dim": 32}
_GRID: dict[str, Any] = {"depth": 2, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
_TOKENS: dict[str, Any] = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 4,
    "vision_start_token_id": 5,
    "vision_end_token_id": 6,
}


def _text() -> Inputs:
    ids = torch.randint(8, VOCAB, (2, 12), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _llava(*, tied: bool = False) -> PreTrainedConfig:
    return transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**_TEXT),
        vision_config=transformers.CLIPVisionConfig(**_PATCHES, projection_dim=64),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=4,
        tie_word_embeddings=tied,
    )


def _pixtral() -> PreTrainedConfig:
    return transformers.LlavaConfig(
        text_config=transformers.MistralConfig(**_TEXT),
        vision_config=transformers.PixtralVisionConfig(**_PIXTRAL),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )


def _qwen2_vl() -> PreTrainedConfig:
    vision = {**_GRID, "embed_dim": 128, "hidden_size": 128, "mlp_ratio": 2}
    return transformers.Qwen2VLConfig(
        text_config={**_TEXT, **_MROPE}, vision_config=vision, **_TOKENS, tie_word_embeddings=False
    )


def _qwen2_5_vl() -> PreTrainedConfig:
    vision = {
        **_GRID,
        "hidden_size": 128,
        "intermediate_size": 128,
        "out_hidden_size": 128,
        "fullatt_block_indexes": [1],
        "window_size": 32,
    }
    return transformers.Qwen2_5_VLConfig(
        text_config={**_TEXT, **_MROPE}, vision_config=vision, **_TOKENS, tie_word_embeddings=False
    )


def _gemma3() -> PreTrainedConfig:
    text = {
        **_TEXT,
        "head_dim": 32,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 32,
    }
    return transformers.Gemma3Config(
        text_config=text,
        vision_config={**_PATCHES, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
        **_IDS,
    )


def _mistral3() -> PreTrainedConfig:
    return transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**_TEXT),
        vision_config=transformers.PixtralVisionConfig(**_PIXTRAL),
        image_token_index=IMAGE_TOKEN,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )


def _paligemma() -> PreTrainedConfig:
    vision = {"model_type": "siglip_vision_model", "projection_dim": 128, "vision_use_head": False, **_PATCHES}
    return transformers.PaliGemmaConfig(
        text_config={"model_type": "gemma", **_TEXT, "head_dim": 32},
        vision_config=vision,
        image_token_index=IMAGE_TOKEN,
        projection_dim=128,
        hidden_size=128,
        num_image_tokens=4,
    )


def _internvl() -> PreTrainedConfig:
    return transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(**_TEXT),
        vision_config={**_TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
        image_token_id=IMAGE_TOKEN,
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )


def _mllama() -> PreTrainedConfig:
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "vision_output_dim": 128,
        "intermediate_layers_indices": [0],
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
    }
    text = {
        **_TEXT,
        "cross_attention_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    return transformers.MllamaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN, tie_word_embeddings=False
    )


def _qwen2_audio() -> PreTrainedConfig:
    audio = {
        "model_type": "qwen2_audio_encoder",
        "d_model": 128,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 128,
        "num_mel_bins": 16,
        "max_source_positions": 8,
    }
    return transformers.Qwen2AudioConfig(
        text_config=transformers.Qwen2Config(**_TEXT, tie_word_embeddings=False),
        audio_config=audio,
        audio_token_index=IMAGE_TOKEN,
    )


def _fuyu() -> PreTrainedConfig:
    text = {key: value for key, value in _TEXT.items() if key != "num_key_value_heads"}
    return transformers.FuyuConfig(**text, image_size=16, patch_size=8, tie_word_embeddings=False)


def _mixtral() -> PreTrainedConfig:
    return transformers.MixtralConfig(**_TEXT, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False)


ALL = tuple(
    Architecture(name, class_name, config, _text)
    for name, class_name, config in (
        ("llava", "LlavaForConditionalGeneration", _llava),
        ("llava_tied", "LlavaForConditionalGeneration", lambda: _llava(tied=True)),
        ("pixtral", "LlavaForConditionalGeneration", _pixtral),
        ("qwen2_vl", "Qwen2VLForConditionalGeneration", _qwen2_vl),
        ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", _qwen2_5_vl),
        ("gemma3", "Gemma3ForConditionalGeneration", _gemma3),
        ("mistral3", "Mistral3ForConditionalGeneration", _mistral3),
        ("paligemma", "PaliGemmaForConditionalGeneration", _paligemma),
        ("internvl", "InternVLForConditionalGeneration", _internvl),
        ("mllama", "MllamaForConditionalGeneration", _mllama),
        ("qwen2_audio", "Qwen2AudioForConditionalGeneration", _qwen2_audio),
        ("fuyu", "FuyuForCausalLM", _fuyu),
        ("mixtral", "MixtralForCausalLM", _mixtral),
    )
)
BY_NAME = {architecture.name: architecture for architecture in ALL}


_HAD_A_LEVEL_MORE = {"llava", "llava_tied", "gemma3", "paligemma"}
"""Those whose towers of CLIP and SigLIP have a name of their own in the files of the hub, which transformers drops."""


def save(name: str, folder: Path) -> Path:
    """Write the architecture `name` to `folder`, with the names that its checkpoints have on the hub."""
    architectures.save(BY_NAME[name], folder)
    if name in _HAD_A_LEVEL_MORE:
        (shard,) = folder.glob("*.safetensors")
        tensors = {_on_the_hub(tensor): value for tensor, value in load_file(shard).items()}
        save_file(tensors, shard, metadata={"format": "pt"})
    return folder


def _on_the_hub(tensor: str) -> str:
    tower, vision = "vision_tower.", "vision_tower.vision_model."
    return vision + tensor.removeprefix(tower) if tensor.startswith(tower) else tensor
