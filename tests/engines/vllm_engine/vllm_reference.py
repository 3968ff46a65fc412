"""Small checkpoints, and what `load_quantized` makes of them, in a process of its own, as vLLM changes transformers.

python vllm_reference.py FOLDER NAME=SCHEME... writes FOLDER/NAME for each, and FOLDER/NAME.SCHEME.json with the log
probabilities of the tokens of a text. With `+lora` behind the scheme they are those with the adapter that is in
FOLDER/NAME.lora.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from quantload import QuantizationPolicy, convert_checkpoint, load_quantized
from quantload.cli import DEMO_MODEL
from safetensors.torch import load_file, save_file
from vllm_running import SEEN, TOKENS, picture

COMMON: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    "tie_word_embeddings": False, "initializer_range": 0.08,
}  # fmt: skip
LORA_MODULES = ("q_proj", "o_proj")
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("Phi3", COMMON),
    "large": ("Llama", {**COMMON, "hidden_size": 1024, "intermediate_size": 16384}),
    "mixtral": ("Mixtral", {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt2": ("GPT2", {**COMMON, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "llama4": (
        "Llama4Text",
        {
            **COMMON, "head_dim": 32, "intermediate_size": 128, "intermediate_size_mlp": 256, "num_local_experts": 4,
            "num_experts_per_tok": 1, "interleave_moe_layer_step": 1,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            **COMMON, "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128,
            "sliding_window": 128, "layer_types": ["full_attention", "full_attention"],
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **COMMON, **EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
            "first_k_dense_replace": 2, "kv_lora_rank": 512, "q_lora_rank": 64, "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128, "v_head_dim": 128, "n_shared_experts": 1, "topk_method": "noaux_tc",
        },
    ),
    "qwen3_next": (
        "Qwen3Next",
        {
            **COMMON, **EXPERTS, "hidden_size": 256, "head_dim": 64, "num_experts": 4,
            "shared_expert_intermediate_size": 128, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
            "linear_key_head_dim": 64, "linear_value_head_dim": 64,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "falcon_h1": (
        "FalconH1",
        {
            **COMMON, "head_dim": 32, "mamba_d_ssm": 256, "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_n_groups": 1,
            "mamba_d_state": 16, "mamba_chunk_size": 64,
        },
    ),
}  # fmt: skip


def make(folder: Path, name: str) -> Path:
    """A checkpoint of that name; `demo` is the model of the package, `demo-b` the same with other weights."""
    target = folder / name
    if target.exists():
        return target / "model" if name in QUANTIZED else target
    if name in ("demo", "demo-b"):
        shutil.copytree(DEMO_MODEL, target)
        torch.manual_seed(1)
        for file in target.glob("*.safetensors") if name == "demo-b" else ():
            noisy = {key: _noisy(tensor) for key, tensor in load_file(file).items()}
            save_file(noisy, file, metadata={"format": "pt"})
        return target
    if name in QUANTIZED:
        target.mkdir()
        return QUANTIZED[name](folder, target)
    if name == "idefics3":
        return _make_seeing(make(folder, "demo"), target)
    kind, fields = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**fields)
    config.dtype = torch.bfloat16
    classes = {"Llama4Text": "Llama4ForCausalLM", "GPT2": "GPT2LMHeadModel"}
    model = getattr(transformers, classes.get(kind, f"{kind}ForCausalLM"))(config).to(torch.bfloat16)
    model.save_pretrained(target)
    return target


def _make_seeing(demo: Path, target: Path) -> Path:
    """A model of text and pictures whose processor, and vLLM's class for it, need no torchvision."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = transformers.AutoTokenizer.from_pretrained(demo)
    special = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    size = {"longest_edge": 56}
    images = Idefics3ImageProcessorPil(size=size, max_image_size=size, do_image_splitting=False)
    transformers.Idefics3Processor(images, tokenizer, image_seq_len=4).save_pretrained(target)
    tower = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 56, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Idefics3Config(
        vision_config=tower,
        text_config=transformers.LlamaConfig(**{**COMMON, "vocab_size": len(tokenizer) + 64}),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=2,
    )
    config.dtype = torch.bfloat16
    torch.manual_seed(0)
    transformers.Idefics3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(target)
    return target


def _copied(method: str) -> Callable[[Path, Path], Path]:
    """Makes a checkpoint of the demo model as a tool stores it."""

    def copy(folder: Path, target: Path) -> Path:
        sys.path.insert(0, str(Path(__file__).parents[2] / "end_to_end"))
        from quantized_copies import METHODS, quantized_copy

        quantized, _ = quantized_copy(target / "copies", make(folder, "demo"), *METHODS[method])
        return quantized.rename(target / "model")

    return copy


def _converted(original: str, policy: QuantizationPolicy, format: str) -> Callable[[Path, Path], Path]:
    def convert(folder: Path, target: Path) -> Path:
        convert_checkpoint(make(folder, original), target / "model", policy=policy, format=format, progress=False)
        return target / "model"

    return convert


QUANTIZED = {
    "awq": _copied("awq"),
    "gptq": _copied("gptq"),
    "fp8": _copied("fp8 blocks"),
    "quark": _converted("demo", QuantizationPolicy("quark_mxfp4"), "quark"),
    "compressed-tensors": _converted("demo", QuantizationPolicy("int8_per_channel"), "compressed-tensors"),
    "modelopt": _converted("demo", QuantizationPolicy("nvfp4"), "modelopt"),
    "mxfp4": _converted("gpt_oss", QuantizationPolicy("none", experts="quark_mxfp4"), "mxfp4"),
}
"""Checkpoints that are quantized already, by their `quant_method`."""


def _noisy(tensor: torch.Tensor) -> torch.Tensor:
    values = tensor.float()
    return (values + 0.1 * values.std() * torch.randn_like(values)).to(tensor.dtype)


def make_adapter(target: Path, model: Any) -> dict[str, torch.Tensor]:
    """An adapter of rank 4 on the queries and outputs of attention, as PEFT writes it; its tensors."""
    torch.manual_seed(2)
    found = {}
    for name, module in model.named_modules():
        if name.endswith(LORA_MODULES):
            down, up = torch.randn(4, module.in_features), torch.randn(module.out_features, 4)
            found[f"base_model.model.{name}.lora_A.weight"] = (down / module.in_features**0.5).to(torch.bfloat16)
            found[f"base_model.model.{name}.lora_B.weight"] = up.to(torch.bfloat16) / 4
    target.mkdir()
    save_file(found, target / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [*LORA_MODULES], "bias": "none"}
    (target / "adapter_config.json").write_text(json.dumps(settings))
    return found


def put_on(model: Any, adapter: dict[str, torch.Tensor]) -> None:
    """Have modules add what the adapter makes of their inputs."""
    for name, module in model.named_modules():
        down, up = (adapter.get(f"base_model.model.{name}.lora_{each}.weight") for each in "AB")
        if down is not None and up is not None:
            module.register_forward_hook(lambda _, x, out, a=down, b=up: out + 2 * (x[0] @ a.T) @ b.T)


def log_probabilities(folder: Path, scheme: str) -> list[float]:
    """Of each token after the first, given those before it."""
    scheme, _, with_lora = scheme.partition("+")
    model = load_quantized(folder, scheme, progress=False)
    if with_lora:
        put_on(model, make_adapter(folder.with_suffix(".lora"), model))
    inputs = {"input_ids": torch.tensor([TOKENS])}
    if (folder / "processor_config.json").exists():
        processor = transformers.AutoProcessor.from_pretrained(folder)
        inputs = dict(processor(images=picture(), text=SEEN, return_tensors="pt"))
    with torch.inference_mode():
        logits = model(**inputs).logits[0].float()
    return torch.log_softmax(logits[:-1], -1).gather(1, inputs["input_ids"][0, 1:, None])[:, 0].tolist()


if __name__ == "__main__":
    root = Path(sys.argv[1])
    for asked in sys.argv[2:]:
        checkpoint, _, quantization = asked.partition("=")
        path = make(root, checkpoint)
        if quantization:
            found = log_probabilities(path, quantization)
            (root / f"{checkpoint}.{quantization}.json").write_text(json.dumps(found))
