"""What is written, read back by its own config: the codes and scales of an online load, for every pair there is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stored_tensors
import torch
from quantload import QuantizationPolicy, convert_checkpoint, load_quantized
from quantload.errors import PolicyError
from quantload.schemes.exported.registry import EXPORT_FORMATS, formats_of
from quantload.schemes.registry import ENTRIES
from safetensors.torch import load_file
from torch import Tensor

PAIRS = [(entry.name, name) for entry in ENTRIES for name in formats_of(entry)]
LINEAR_PAIRS = [(scheme, form) for scheme, form in PAIRS if scheme != "experts_int8"]
# The experts of the tiny model have fewer columns than a group of INT4 weights.
MOE_PAIRS = [(scheme, form) for scheme, form in PAIRS if scheme != "int4_per_group"]


def read_back(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Values of the quantized weights as the config says, and the config."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    stored = stored_tensors.read(config["quantization_config"], tensors, dtype=config["dtype"])
    assert {name.rpartition(".")[2] for name in stored.unused} <= {"weight_shape"}
    return {name: stored_tensors.dequantized(weight, tensors) for name, weight in stored.weights.items()}, config


def loaded(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Values of the quantized weights of a loaded model, under the names of the checkpoint."""
    for name, module in model.named_modules():
        if not hasattr(module, "scheme"):
            continue
        if hasattr(module, "weight_layout"):
            yield f"{name}.weight", module.dequantize()
            continue
        gate_up, down = module.dequantize("gate_up_proj"), module.dequantize("down_proj")
        for expert in range(len(down)):
            gate, up = gate_up[expert].chunk(2)
            yield f"{name}.{expert}.gate_proj.weight", gate
            yield f"{name}.{expert}.up_proj.weight", up
            yield f"{name}.{expert}.down_proj.weight", down[expert]


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert got
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize(("scheme", "form"), LINEAR_PAIRS)
def test_linears_stand_for_what_is_loaded_online(scheme: str, form: str, golden: Path, tmp_path: Path) -> None:
    convert_checkpoint(golden / "bf16_llama", tmp_path / "out", scheme, format=form)
    got, config = read_back(tmp_path / "out")
    assert_same(got, dict(loaded(load_quantized(golden / "bf16_llama", scheme))))
    assert config["quantization_config"]["quant_method"] == form


@pytest.mark.parametrize(("scheme", "form"), MOE_PAIRS)
def test_experts_stand_for_what_is_loaded_online(scheme: str, form: str, golden: Path, tmp_path: Path) -> None:
    convert_checkpoint(golden / "bf16_qwen3moe", tmp_path / "out", scheme, format=form)
    got, _ = read_back(tmp_path / "out")
    assert_same(got, dict(loaded(load_quantized(golden / "bf16_qwen3moe", scheme))))


@pytest.mark.parametrize("form", EXPORT_FORMATS)
def test_several_schemes_in_one_checkpoint(form: str, golden: Path, tmp_path: Path) -> None:
    policy = QuantizationPolicy(
        linear="fp8_per_channel", experts="quark_mxfp4", ignore=("*.k_proj",), overrides=(("*.1.*.q_proj", "none"),)
    )
    convert_checkpoint(golden / "bf16_qwen3moe", tmp_path / "out", policy=policy, format=form)
    got, config = read_back(tmp_path / "out")
    assert_same(got, dict(loaded(load_quantized(golden / "bf16_qwen3moe", policy=policy))))
    assert config["quantization_config"]["exclude" if form == "quark" else "ignore"] == [
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.mlp.gate",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.mlp.gate",
        "lm_head",
    ]


@pytest.mark.parametrize("form", EXPORT_FORMATS)
def test_kept_experts_are_one_name(form: str, golden: Path, tmp_path: Path) -> None:
    policy = QuantizationPolicy(experts="none")
    convert_checkpoint(golden / "bf16_qwen3moe", tmp_path / "out", policy=policy, format=form)
    got, config = read_back(tmp_path / "out")
    assert_same(got, dict(loaded(load_quantized(golden / "bf16_qwen3moe", policy=policy))))
    kept = config["quantization_config"]["exclude" if form == "quark" else "ignore"]
    assert len([name for name in kept if "experts" in name]) == 2 * 3


@pytest.mark.parametrize("form", EXPORT_FORMATS)
def test_nothing_to_quantize_gives_a_copy(form: str, golden: Path, tmp_path: Path) -> None:
    convert_checkpoint(golden / "bf16_llama", tmp_path / "out", "none", format=form)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == json.loads((golden / "bf16_llama/config.json").read_text())
    got, want = load_file(tmp_path / "out/model.safetensors"), load_file(golden / "bf16_llama/model.safetensors")
    assert_same(got, want)


def test_a_pair_that_does_not_exist_names_those_that_do(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(
        PolicyError,
        match=r"mxfp6_e3m2 cannot be written as compressed-tensors, .*; there are: quark: quark_mxfp4, .*; "
        r"compressed-tensors: quark_mxfp4, mxfp6_e2m3, mxfp8, ",
    ):
        convert_checkpoint(golden / "bf16_llama", tmp_path / "out", "mxfp6_e3m2", format="compressed-tensors")
    with pytest.raises(PolicyError, match="format is 'gguf'; choose one of quark, compressed-tensors"):
        convert_checkpoint(golden / "bf16_llama", tmp_path / "out", format="gguf")
    assert not list(tmp_path.iterdir())
