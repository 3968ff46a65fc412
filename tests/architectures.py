"""Tiny random models, one per architecture: the checkpoints the end-to-end tests load.

Every parameter is drawn anew, so that norms, biases and sinks are not the ones and zeros they start as. Sizes are
small enough that each builds in well under a second and writes under 3 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

VOCAB = 160
TOKENS = (2, 12)  # sequences, tokens of the prompt

# What every policy leaves alone unless told otherwise, besides the output head: routers and gates.
ROUTERS = r"(^|\.)(gate|router|router\.layer|shared_expert_gate|block_sparse_moe\.gate)$"

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """One tiny model: how to build it and what a quantizing load has to do with it.

    `kept` matches the linear and experts modules that are rightly left as stored besides the output head and the
    routers, each with a reason in the report.
    """

    name: str
    class_name: str
    config: Callable[[], PreTrainedConfig]
    inputs: Callable[[], Inputs]
    generates: bool = True
    kept: str | None = None
    dtype: torch.dtype = torch.bfloat16

    @property
    def model_class(self) -> type[PreTrainedModel]:
        model_class: type[PreTrainedModel] = getattr(transformers, self.class_name)
        return model_class


def save(architecture: Architecture, folder: Path, **save_options: Any) -> Path:
    """Build `architecture` with random weights and write it to `folder` in transformers' own checkpoint format."""
    torch.manual_seed(0)
    model = architecture.model_class(architecture.config())
    model.to(architecture.dtype)
    _randomize(model)
    model.eval()
    model.save_pretrained(folder, **save_options)
    return folder


def reference(path: Path, architecture: Architecture, **options: Any) -> PreTrainedModel:
    """The model as transformers itself loads it."""
    model: PreTrainedModel = architecture.model_class.from_pretrained(path, **{"dtype": "auto", **options})
    return model


# Its forward takes `image_outputs` from what its language model returns, which has none, and so fails on every input.
FAILS_IN_TRANSFORMERS = {"Llama4ForConditionalGeneration": "5.24.0"}


def answering(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or its language model where this very transformers cannot run the forward of the whole."""
    if FAILS_IN_TRANSFORMERS.get(type(model).__name__) != transformers.__version__:
        return model
    language_model: PreTrainedModel = model.language_model
    return language_model


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """Logits of one forward; floating inputs follow the model's dtype."""
    cast = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    output: Tensor = answering(model)(**cast).logits
    return output


@torch.no_grad()
def generate(model: PreTrainedModel, inputs: Inputs, tokens: int = 16) -> Tensor:
    """Greedily generated ids, the prompt included for decoders."""
    prompt = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    prompt.pop("decoder_input_ids", None)
    output: Tensor = answering(model).generate(**prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return output


def quantizable_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every linear and experts module, found from what it is rather than from what quantload says."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) or is_experts(module):
            yield name, module


def is_experts(module: nn.Module) -> bool:
    """Whether `module` itself holds the stacked weights of all experts of a layer."""
    return any(parameter.ndim == 3 and "proj" in name for name, parameter in module.named_parameters(recurse=False))


def _randomize(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(1)

    def normal(tensor: Tensor, mean: float, std: float) -> None:
        tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator))

    persistent = set(model.state_dict())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                normal(parameter, 1.0 if name.endswith("weight") else 0.0, 0.1)
            else:
                normal(parameter, 0.0, parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name in persistent and buffer.is_floating_point():
                normal(buffer, 0.0, 0.05)


def _config(config_class: str, **values: Any) -> Callable[[], PreTrainedConfig]:
    def build() -> PreTrainedConfig:
        config: PreTrainedConfig = getattr(transformers, config_class)(**values)
        return config

    return build


def _ids(rows: int, length: int, low: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(low, VOCAB, (rows, length), generator=generator)


def _text() -> Inputs:
    ids = _ids(*TOKENS)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _encoder_decoder() -> Inputs:
    return {**_text(), "decoder_input_ids": _ids(TOKENS[0], 5)}


def _pixels(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


GEMMA3_IMAGE_TOKEN = 5
GEMMA3_TOKENS_PER_IMAGE = 4


def _gemma3_vision() -> Inputs:
    ids = _ids(*TOKENS)
    ids[:, 2 : 2 + GEMMA3_TOKENS_PER_IMAGE] = GEMMA3_IMAGE_TOKEN
    types = (ids == GEMMA3_IMAGE_TOKEN).long()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": types,
        "pixel_values": _pixels(TOKENS[0], 3, 32, 32),
    }


QWEN3_VL_IMAGE, QWEN3_VL_VIDEO, QWEN3_VL_START, QWEN3_VL_END = 3, 4, 5, 6


def _qwen3_vl() -> Inputs:
    ids = _ids(1, 14)
    ids[:, 2] = QWEN3_VL_START
    ids[:, 3:7] = QWEN3_VL_IMAGE  # a 4 x 4 grid of patches, merged 2 x 2
    ids[:, 7] = QWEN3_VL_END
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == QWEN3_VL_IMAGE).int(),
        "pixel_values": _pixels(16, 3 * 2 * 8 * 8),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


_IDS: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_DECODER: dict[str, Any] = {
    **_IDS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_QWEN3_MOE: dict[str, Any] = {
    **_DECODER,
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
_DEEPSEEK_V3: dict[str, Any] = {
    **_DECODER,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "tie_word_embeddings": False,
}
_GEMMA3_TEXT: dict[str, Any] = {
    **_DECODER,
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 16,
}
_LLAMA4_TEXT: dict[str, Any] = {
    **_DECODER,
    "intermediate_size": 32,
    "intermediate_size_mlp": 96,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 32,
    "no_rope_layers": [1, 0],
    "tie_word_embeddings": False,
}
_LLAMA4_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "vision_output_dim": 32,
}


def _llama4_conditional() -> PreTrainedConfig:
    return transformers.Llama4Config(text_config=dict(_LLAMA4_TEXT), vision_config=dict(_LLAMA4_VISION))


def _gemma3_conditional() -> PreTrainedConfig:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "vision_use_head": False,
    }
    return transformers.Gemma3Config(
        text_config=dict(_GEMMA3_TEXT),
        vision_config=vision,
        mm_tokens_per_image=GEMMA3_TOKENS_PER_IMAGE,
        image_token_id=GEMMA3_IMAGE_TOKEN,
        boi_token_index=6,
        eoi_token_index=7,
        image_token_index=GEMMA3_IMAGE_TOKEN,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=1,
    )


def _qwen3_vl_moe() -> PreTrainedConfig:
    text = {
        **_QWEN3_MOE,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    return transformers.Qwen3VLMoeConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=QWEN3_VL_IMAGE,
        video_token_id=QWEN3_VL_VIDEO,
        vision_start_token_id=QWEN3_VL_START,
        vision_end_token_id=QWEN3_VL_END,
        tie_word_embeddings=False,
    )


_T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_GPT2: dict[str, Any] = {
    **{k: v for k, v in _IDS.items() if k != "pad_token_id"},
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
}
_LLAMA: dict[str, Any] = {**_DECODER, "tie_word_embeddings": False}

ALL = (
    Architecture("llama", "LlamaForCausalLM", _config("LlamaConfig", **_LLAMA), _text),
    # K = 80 and 112: neither is a multiple of 32, and 80 / 4 heads = 20 is no multiple of 16.
    Architecture(
        "llama_odd",
        "LlamaForCausalLM",
        _config(
            "LlamaConfig",
            **{**_LLAMA, "hidden_size": 80, "intermediate_size": 112, "attention_bias": True, "mlp_bias": True},
        ),
        _text,
    ),
    Architecture(
        "llama_tied",
        "LlamaForCausalLM",
        _config("LlamaConfig", **{**_LLAMA, "tie_word_embeddings": True}),
        _text,
    ),
    Architecture("qwen3", "Qwen3ForCausalLM", _config("Qwen3Config", **_DECODER, head_dim=16), _text),
    Architecture("qwen3_moe", "Qwen3MoeForCausalLM", _config("Qwen3MoeConfig", **_QWEN3_MOE), _text),
    Architecture(
        "qwen3_moe_odd",
        "Qwen3MoeForCausalLM",
        _config("Qwen3MoeConfig", **{**_QWEN3_MOE, "hidden_size": 48, "moe_intermediate_size": 40}),
        _text,
    ),
    Architecture(
        "mixtral",
        "MixtralForCausalLM",
        _config("MixtralConfig", **_LLAMA, num_local_experts=4, num_experts_per_tok=2),
        _text,
    ),
    Architecture("deepseek_v3", "DeepseekV3ForCausalLM", _config("DeepseekV3Config", **_DEEPSEEK_V3), _text),
    Architecture(
        "gpt_oss",
        "GptOssForCausalLM",
        _config(
            "GptOssConfig",
            **{**_LLAMA, "intermediate_size": 32},
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
        _text,
    ),
    # Transposed, interleaved experts whose sizes are no multiples of 32.
    Architecture(
        "gpt_oss_odd",
        "GptOssForCausalLM",
        _config(
            "GptOssConfig",
            **{**_LLAMA, "hidden_size": 48, "intermediate_size": 40},
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
        _text,
    ),
    Architecture(
        "olmoe", "OlmoeForCausalLM", _config("OlmoeConfig", **_LLAMA, num_experts=4, num_experts_per_tok=2), _text
    ),
    Architecture(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        _config(
            "Glm4MoeConfig",
            **_LLAMA,
            head_dim=16,
            moe_intermediate_size=32,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=1,
            first_k_dense_replace=1,
            use_qk_norm=True,
            attention_bias=True,
        ),
        _text,
    ),
    Architecture("llama4_text", "Llama4ForCausalLM", _config("Llama4TextConfig", **_LLAMA4_TEXT), _text),
    Architecture("llama4", "Llama4ForConditionalGeneration", _llama4_conditional, _text),
    Architecture("phi3", "Phi3ForCausalLM", _config("Phi3Config", **_LLAMA), _text),
    Architecture("gemma3_text", "Gemma3ForCausalLM", _config("Gemma3TextConfig", **_GEMMA3_TEXT), _text),
    Architecture("gemma3", "Gemma3ForConditionalGeneration", _gemma3_conditional, _gemma3_vision),
    Architecture("gpt2", "GPT2LMHeadModel", _config("GPT2Config", **_GPT2), _text),
    Architecture(
        "bert",
        "BertForMaskedLM",
        _config(
            "BertConfig",
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
        ),
        _text,
        generates=False,
    ),
    Architecture("t5", "T5ForConditionalGeneration", _config("T5Config", **_T5), _encoder_decoder),
    # Some of T5's modules stay in float32 when the checkpoint is float16.
    Architecture(
        "t5_float16",
        "T5ForConditionalGeneration",
        _config("T5Config", **_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        _encoder_decoder,
        dtype=torch.float16,
    ),
    Architecture("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", _qwen3_vl_moe, _qwen3_vl),
    Architecture(
        "jamba",
        "JambaForCausalLM",
        _config(
            "JambaConfig",
            **_LLAMA,
            num_experts=4,
            num_experts_per_tok=2,
            expert_layer_period=2,
            expert_layer_offset=1,
            attn_layer_period=2,
            attn_layer_offset=1,
            mamba_d_state=8,
            mamba_d_conv=4,
            mamba_expand=2,
            mamba_dt_rank=4,
        ),
        _text,
        kept=r"\.dt_proj$",  # the model multiplies by its weight instead of calling it
    ),
    Architecture(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        _config("Qwen2MoeConfig", **_QWEN3_MOE, shared_expert_intermediate_size=64),
        _text,
    ),
    Architecture(
        "granite_moe",
        "GraniteMoeForCausalLM",
        _config("GraniteMoeConfig", **_LLAMA, num_local_experts=4, num_experts_per_tok=2),
        _text,
    ),
    # Routers that are linears called `router.layer`, in attention too.
    Architecture(
        "jetmoe",
        "JetMoeForCausalLM",
        _config(
            "JetMoeConfig",
            **{**_DECODER, "num_key_value_heads": 2},
            kv_channels=16,
            num_local_experts=4,
            num_experts_per_tok=2,
        ),
        _text,
    ),
    # Equal hidden and embedding sizes give the head a parameter without a single element.
    Architecture(
        "mobilebert",
        "MobileBertForMaskedLM",
        _config(
            "MobileBertConfig",
            vocab_size=VOCAB,
            hidden_size=64,
            embedding_size=64,
            true_hidden_size=64,
            intra_bottleneck_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
        ),
        _text,
        generates=False,
        kept=r"\.predictions\.dense$",
    ),
    # Experts without a gate half, and Mamba-2 layers.
    Architecture(
        "nemotron_h",
        "NemotronHForCausalLM",
        _config(
            "NemotronHConfig",
            **{k: v for k, v in _LLAMA.items() if k != "num_hidden_layers"},
            head_dim=16,
            layers_block_type=["mamba", "attention", "moe"],
            mamba_num_heads=4,
            mamba_head_dim=16,
            ssm_state_size=8,
            n_groups=2,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            moe_shared_expert_intermediate_size=32,
        ),
        _text,
        kept=r"\.out_proj$",  # a fused kernel of the model reads its weight
    ),
    # One checkpoint tensor for q, k and v: a Chunk into three parameters.
    Architecture(
        "nomic_bert",
        "NomicBertForMaskedLM",
        _config(
            "NomicBertConfig",
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
        ),
        _text,
        generates=False,
    ),
    Architecture("llama_float16", "LlamaForCausalLM", _config("LlamaConfig", **_LLAMA), _text, dtype=torch.float16),
    Architecture("llama_float32", "LlamaForCausalLM", _config("LlamaConfig", **_LLAMA), _text, dtype=torch.float32),
    Architecture(
        "qwen3_moe_float16",
        "Qwen3MoeForCausalLM",
        _config("Qwen3MoeConfig", **_QWEN3_MOE),
        _text,
        dtype=torch.float16,
    ),
    Architecture(
        "qwen3_moe_float32",
        "Qwen3MoeForCausalLM",
        _config("Qwen3MoeConfig", **_QWEN3_MOE),
        _text,
        dtype=torch.float32,
    ),
)

BY_NAME = {architecture.name: architecture for architecture in ALL}


def named(*names: str) -> list[Architecture]:
    """The architectures of these names, for `parametrize`."""
    return [BY_NAME[name] for name in names]


def inputs_for(name: str) -> Inputs:
    """Seeded inputs of one forward of the architecture called `name`."""
    return BY_NAME[name].inputs()
