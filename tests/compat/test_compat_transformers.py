"""transformers itself reads the FP8 checkpoints that are read here, and decodes them to the same values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import BY_NAME, logits
from quantload import convert_checkpoint, load_quantized
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import FineGrainedFP8Config, PreTrainedModel

pytestmark = pytest.mark.compat
pytest.importorskip("accelerate", reason="accelerate is not installed, which transformers needs for FP8")

Checkpoint = Callable[[str], Path]
IDS = torch.arange(9, 21)[None]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def read(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint in one file."""
    return load_file(folder / "model.safetensors")


def written(folder: Path, like: Path, tensors: dict[str, Tensor]) -> Path:
    """Tensors with the config of another checkpoint."""
    folder.mkdir()
    shutil.copy(like / "config.json", folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def decoded(path: Path, model_class: type[PreTrainedModel], dtype: torch.dtype) -> PreTrainedModel:
    """What transformers makes of an FP8 checkpoint, in high precision."""
    config = FineGrainedFP8Config(dequantize=True)
    model: PreTrainedModel = model_class.from_pretrained(path, dtype=dtype, quantization_config=config).eval()
    return model


def same_values(ours: PreTrainedModel, theirs: PreTrainedModel) -> int:
    """Assert that all weights stand for the same values; how many of them are quantized."""
    quantized, plain = 0, dict(theirs.named_parameters())
    modules = {name: module for name, module in ours.named_modules() if hasattr(module, "scheme")}
    for name, tensor in plain.items():
        module, _, weight = name.rpartition(".")
        values: Any = ours.state_dict()[name]
        if module in modules and name in ours.state_dict() and f"{name}_scale" in ours.state_dict():
            values, quantized = modules[module].dequantize(weight), quantized + 1
        assert torch.equal(values.to(tensor.dtype).reshape(tensor.shape), tensor), name
    return quantized


@pytest.mark.parametrize("name", ["weight_scale_inv", "scale", "qscale_weight"])
def test_scales_under_each_name(name: str, golden: Path, tmp_path: Path) -> None:
    original = golden / "native_llama_blockfp8"
    tensors = {key.replace("weight_scale_inv", name): t for key, t in read(original).items()}
    path = written(tmp_path / name, original, tensors)
    assert same_values(load_quantized(path), decoded(path, transformers.LlamaForCausalLM, torch.float32)) == 14


def test_a_config_in_the_config_of_the_text_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    original, stored = checkpoint("gemma3"), {}
    for name, tensor in read(original).items():
        if "_proj.weight" not in name or tensor.dim() != 2 or "vision" in name:
            stored[name] = tensor
        else:
            codes, scale = _blocks(tensor.float())
            stored |= {name: codes, f"{name}_scale_inv": scale.float()}
    path = written(tmp_path / "fp8", original, stored)
    config = json.loads((path / "config.json").read_text())
    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    config["text_config"]["quantization_config"] = said
    (path / "config.json").write_text(json.dumps(config))
    ours, theirs = load_quantized(path), decoded(path, BY_NAME["gemma3"].model_class, torch.bfloat16)
    assert same_values(ours, theirs) == 14
    inputs = BY_NAME["gemma3"].inputs()
    torch.testing.assert_close(logits(ours, inputs), logits(theirs, inputs), rtol=0.05, atol=0.05)


def _blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes with an E8M0 scale for 128 x 128."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % 128, 0, -rows % 128))
    largest = padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).abs().amax((1, 3))
    scale = torch.exp2(torch.ceil(torch.log2(largest / 448)))
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    return (weight / spread).to(torch.float8_e4m3fn), scale.to(torch.float8_e8m0fnu)


def _four_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E2M1 codes, two in an `int8`, with an E8M0 scale for 32."""
    scale = torch.exp2(torch.ceil(torch.log2(weight.unflatten(1, (-1, 32)).abs().amax(2) / 6)))
    ratio = weight / scale.repeat_interleave(32, 1)
    codes = ((ratio.abs().unsqueeze(-1) - E2M1).abs().argmin(-1) + 8 * (ratio < 0)).to(torch.uint8)
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).view(torch.int8), scale.to(torch.float8_e8m0fnu)


def test_deepseek_v4_with_experts_in_four_bits(tmp_path: Path) -> None:
    config = transformers.DeepseekV4Config(
        vocab_size=512, hidden_size=512, moe_intermediate_size=256, num_hidden_layers=2, head_dim=64, q_lora_rank=128,
        o_lora_rank=128, n_routed_experts=4, qk_rope_head_dim=8, index_head_dim=16, pad_token_id=1,
        layer_types=["heavily_compressed_attention"] * 2, mlp_layer_types=["hash_moe"] * 2,
    )  # fmt: skip
    original, stored = tmp_path / "bf16", {}
    torch.manual_seed(0)
    transformers.DeepseekV4ForCausalLM(config).to(torch.bfloat16).save_pretrained(original)
    for name, tensor in read(original).items():
        attention = ".attn.w" in name and ".compressor." not in name and ".indexer." not in name
        if tensor.dim() != 2 or not (attention or "experts." in name):
            stored[name] = tensor
        else:
            codes, scale = (_four_bits if ".experts." in name else _blocks)(tensor.float())
            stored |= {name: codes, name.replace(".weight", ".scale"): scale}
    path = written(tmp_path / "fp8", original, stored)
    said: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "activation_scheme": "dynamic"}
    said |= {"weight_block_size": [128, 128], "expert_dtype": "fp4"}
    described = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**described, "quantization_config": said}))
    ours, theirs = load_quantized(path), decoded(path, transformers.DeepseekV4ForCausalLM, torch.bfloat16)
    assert {layer.format for layer in ours.load_report.layers} == {"fp8_block", "mxfp4"}
    assert same_values(ours, theirs) >= 12
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=0.02, atol=0.02)
    assert load_quantized(path, "int8_per_channel").load_report.unexpected == []


@pytest.mark.parametrize("form", ["compressed-tensors", "quark"])
def test_what_the_model_does_not_know_does_no_harm_in_what_is_written(form: str, golden: Path, tmp_path: Path) -> None:
    pytest.importorskip({"compressed-tensors": "compressed_tensors", "quark": "quark.torch"}[form])
    original = golden / "bf16_llama"
    more = {"model.layers.2.eh_proj.weight": torch.full((64, 128), torch.nan), "mtp.norm.weight": torch.ones(64)}
    tensors = read(original)
    path = written(tmp_path / "more", original, {**tensors, **more})
    for source, out in ((path, "with"), (original, "without")):
        convert_checkpoint(source, tmp_path / out, "fp8_per_channel", format=form)
    assert more.keys() <= read(tmp_path / "with").keys()
    ours, theirs = (
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / out, dtype=torch.bfloat16)
        for out in ("with", "without")
    )
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


def test_a_conversion_of_tied_weights_under_another_name(checkpoint: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    tensors = read(checkpoint("llama_tied"))
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    path = written(tmp_path / "head", checkpoint("llama_tied"), tensors)
    for source, out in ((path, "head"), (checkpoint("llama_tied"), "embedding")):
        convert_checkpoint(source, tmp_path / "out" / out, "mxfp8", format="compressed-tensors")
    models = [
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out" / out, dtype=torch.bfloat16)
        for out in ("head", "embedding")
    ]
    with torch.no_grad():
        assert torch.equal(models[0](IDS).logits, models[1](IDS).logits)
    assert torch.equal(models[0].model.embed_tokens.weight, models[0].lm_head.weight)
