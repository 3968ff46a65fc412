"""Every scheme on a dense model, two kinds of experts and a transposed linear, from every checkpoint dtype."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import Architecture, generate, is_experts, named, quantizable_modules, reference
from quantized_models import (
    assert_logits_match,
    final_bytes,
    must_be_quantized,
    quantized_modules,
    relative_error,
    weight_names,
)
from quantload import QuantizationPolicy, load_quantized

Checkpoint = Callable[[str], Path]

# Least signal to quantization noise (dB) of a scheme on Gaussian weights; each is 1.5 dB under what it should reach.
SCHEMES = {
    "quark_mxfp4": 17.5,
    "mxfp4_rows": 18.0,
    "mxfp6_e2m3": 29.5,
    "mxfp6_e3m2": 24.0,
    "mxfp8": 29.5,
    "fp8_per_tensor": 29.5,
    "fp8_per_channel": 29.5,
    "ptpc_fp8": 29.5,
    "fp8_per_block": 29.5,
    "nl4": 20.0,
    "int8_per_channel": 38.0,
    "experts_int8": 38.0,
    "int4_per_group": 18.5,
    "quark_int4fp8_moe": 16.0,
}
BFLOAT16 = named("llama", "llama_odd", "qwen3_moe", "qwen3_moe_odd", "gpt_oss", "gpt_oss_odd", "gpt2")
OTHER_DTYPES = named("llama_float16", "llama_float32", "qwen3_moe_float16", "qwen3_moe_float32")


def check(architecture: Architecture, scheme: str, path: Path) -> None:
    model = load_quantized(path, scheme)
    original = reference(path, architecture)
    required, forbidden = must_be_quantized(original, architecture, linears=scheme != "experts_int8")
    quantized = quantized_modules(model)
    assert required <= set(quantized)
    assert not forbidden & set(quantized)
    reasons = {kept["name"]: kept["reason"] for kept in model.load_report.to_dict()["kept"]}
    assert all(name in quantized or reasons.get(name) for name, _ in quantizable_modules(original))
    for name, module in quantized.items():
        twin = original.get_submodule(name)
        for weight in weight_names(twin):
            values = module.dequantize(weight)
            assert relative_error(values, twin.get_parameter(weight).detach()) < 10 ** (-SCHEMES[scheme] / 20), name
    assert model.load_report.final_bytes == final_bytes(model)
    assert_logits_match(model, path, architecture)
    inputs = architecture.inputs()
    assert generate(model, inputs, 4).shape[1] == inputs["input_ids"].shape[1] + 4


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("architecture", BFLOAT16, ids=lambda a: a.name)
def test_scheme(architecture: Architecture, scheme: str, checkpoint: Checkpoint) -> None:
    check(architecture, scheme, checkpoint(architecture.name))


@pytest.mark.parametrize(
    ("architecture", "scheme"),
    [
        # Quick: FP16 linears with FP32 experts, or the reverse; `test_kernel_bits.py` has both types in every format.
        pytest.param(
            architecture,
            scheme,
            id=f"{architecture.name}-{scheme}",
            marks=[] if i % 2 == j // 2 ^ j % 2 else [pytest.mark.slow],
        )
        for i, scheme in enumerate(SCHEMES)
        for j, architecture in enumerate(OTHER_DTYPES)
    ],
)
def test_scheme_from_other_dtypes(architecture: Architecture, scheme: str, checkpoint: Checkpoint) -> None:
    check(architecture, scheme, checkpoint(architecture.name))


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name not in ("ptpc_fp8", "experts_int8")])
def test_dtype_of_the_checkpoint_does_not_change_equal_values(
    scheme: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """BF16 weights written as FP32 are the same numbers, so their codes and scales are the same bytes."""
    architecture = named("qwen3_moe")[0]
    path = checkpoint(architecture.name)
    reference(path, architecture, dtype=torch.float32).save_pretrained(tmp_path / "wide")
    narrow, wide = load_quantized(path, scheme), load_quantized(tmp_path / "wide", scheme)
    for name, module in quantized_modules(narrow).items():
        others = wide.get_submodule(name).state_dict()
        for parameter_name, parameter in module.state_dict().items():
            other = others[parameter_name]
            assert torch.equal(parameter.view(torch.uint8), other.view(torch.uint8)), f"{name}.{parameter_name}"


def test_ptpc_fp8_is_fp8_per_channel(checkpoint: Checkpoint) -> None:
    one, other = (load_quantized(checkpoint("llama"), scheme) for scheme in ("ptpc_fp8", "fp8_per_channel"))
    for (name, got), want in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(got.reshape(-1).view(torch.uint8), want.reshape(-1).view(torch.uint8)), name


def test_policy_mixes_schemes_and_leaves_what_it_is_told_to(checkpoint: Checkpoint) -> None:
    policy = QuantizationPolicy(
        linear="fp8_per_channel",
        experts="quark_mxfp4",
        ignore=("re:.*o_proj$", "model.layers.0.self_attn.k_proj"),
        overrides=(("*.layers.1.self_attn.q_proj", "int8_per_channel"), ("*.layers.1.self_attn.o_proj", "quark_mxfp4")),
    )
    model = load_quantized(checkpoint("qwen3_moe"), policy=policy)
    schemes = {layer["name"]: layer["scheme"] for layer in model.load_report.to_dict()["layers"]}
    layer_0, layer_1 = "model.layers.0.self_attn.", "model.layers.1.self_attn."
    assert schemes == {
        layer_0 + "q_proj": "fp8_per_channel",
        layer_0 + "v_proj": "fp8_per_channel",
        layer_1 + "q_proj": "int8_per_channel",
        layer_1 + "k_proj": "fp8_per_channel",
        layer_1 + "v_proj": "fp8_per_channel",
        layer_1 + "o_proj": "quark_mxfp4",
        "model.layers.0.mlp.experts": "quark_mxfp4",
        "model.layers.1.mlp.experts": "quark_mxfp4",
    }
    kept = {entry["name"] for entry in model.load_report.to_dict()["kept"]}
    assert {layer_0 + "o_proj", layer_0 + "k_proj", "lm_head"} <= kept
    assert_logits_match(model, checkpoint("qwen3_moe"), named("qwen3_moe")[0])


def test_default_ignore_can_be_switched_off(checkpoint: Checkpoint) -> None:
    architecture = named("qwen2_moe")[0]
    policy = QuantizationPolicy(default_ignore=False)
    model = load_quantized(checkpoint(architecture.name), policy=policy)
    quantized = quantized_modules(model)
    assert "lm_head" in quantized
    assert any(is_experts(module) or "experts" in name for name, module in quantized.items())
    assert_logits_match(model, checkpoint(architecture.name), architecture)
