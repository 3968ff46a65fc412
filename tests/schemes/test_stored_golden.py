"""What the tools wrote, read back to the values that they define."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import stored_tensors
import torch
from quantload.schemes.stored.weights import StoredCheckpoint
from safetensors.torch import load_file
from torch import Tensor

DATA = Path(__file__).parents[1] / "data" / "stored"
FORMATS = {
    "ct_llama_fp8_block": "fp8_block",
    "ct_llama_fp8_dynamic": "fp8_channel",
    "ct_llama_mxfp4": "mxfp4",
    "ct_llama_mxfp8a16": "mxfp8",
    "ct_llama_w4a16": "int4_group128_bf16",
    "ct_llama_w8a8": "int8_channel",
    "native_gptoss_mxfp4": "mxfp4",
    "native_llama_awq": "int4_group128_f16",
    "native_llama_blockfp8": "fp8_block",
    "native_llama_gptq": "int4_group64_f16",
    "quark_llama_fp8": "fp8_tensor",
    "quark_llama_int4_fp8": "int4_group0_f32",
    "quark_llama_int8": "int8_channel",
    "quark_llama_mxfp4": "mxfp4",
    "quark_llama_mxfp6_e2m3": "mxfp6_e2m3",
    "quark_llama_mxfp6_e3m2": "mxfp6_e3m2",
    "quark_llama_ptpc_fp8": "fp8_channel",
    "quark_qwen3moe_mxfp4": "mxfp4",
}
ACTIVATIONS = {
    "ct_llama_fp8_block": ("fp8", True, "group", 128),
    "ct_llama_fp8_dynamic": ("fp8", True, "token", 0),
    "ct_llama_mxfp4": ("mxfp4", True, "group", 32),
    "ct_llama_w8a8": ("int8", True, "token", 0),
    "native_llama_blockfp8": ("fp8", True, "group", 128),
    "quark_llama_fp8": ("fp8", False, "tensor", 0),
    "quark_llama_int4_fp8": ("fp8", True, "tensor", 0),
    "quark_llama_int8": ("int8", False, "tensor", 0),
    "quark_llama_mxfp4": ("mxfp4", True, "group", 32),
    "quark_llama_mxfp6_e2m3": ("mxfp6_e2m3", True, "group", 32),
    "quark_llama_mxfp6_e3m2": ("mxfp6_e3m2", True, "group", 32),
    "quark_llama_ptpc_fp8": ("fp8", True, "token", 0),
    "quark_qwen3moe_mxfp4": ("mxfp4", True, "group", 32),
}
NOT_EXACT = {"quark_llama_int4_fp8"}
"""Quark multiplies a code by one scale and then by the other; here it is multiplied by their product."""


def stored(name: str) -> tuple[dict[str, Tensor], StoredCheckpoint]:
    tensors = load_file(DATA / name / "model.safetensors")
    config = json.loads((DATA / name / "config.json").read_text())
    return tensors, stored_tensors.read(config.pop("quantization_config"), tensors, **config)


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_those_of_the_tool(name: str) -> None:
    tensors, checkpoint = stored(name)
    expected = np.load(DATA / name / "expected.npz")
    assert set(checkpoint.weights) == set(expected.files)
    for weight_name, weight in checkpoint.weights.items():
        assert weight.name == weight_name
        assert weight.format.name == FORMATS[name]
        want, got = torch.from_numpy(expected[weight_name]), stored_tensors.dequantized(weight, tensors)
        if name in NOT_EXACT:
            torch.testing.assert_close(got, want, rtol=2**-22, atol=0)
        else:
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", FORMATS)
def test_every_tensor_is_accounted_for(name: str) -> None:
    tensors, checkpoint = stored(name)
    parts = [entry.name for weight in checkpoint.weights.values() for entry in weight.entries()]
    accounted = [*parts, *checkpoint.plain, *checkpoint.unused]
    assert sorted(accounted) == sorted(tensors)
    assert all(tensors[plain].dtype is torch.bfloat16 or "norm" in plain for plain in checkpoint.plain)


@pytest.mark.parametrize("name", FORMATS)
def test_activations_are_as_the_config_says(name: str) -> None:
    _, checkpoint = stored(name)
    for weight in checkpoint.weights.values():
        found = weight.activations
        described = None if found is None else (found.format, found.dynamic, found.granularity, found.group)
        assert described == ACTIVATIONS.get(name)
        if found is not None and not found.dynamic:
            assert found.scale is not None
            assert found.scale.name == weight.name.removesuffix("weight") + "input_scale"


def test_dtype_is_that_of_the_model() -> None:
    assert {weight.dtype for weight in stored("native_llama_awq")[1].weights.values()} == {torch.float16}
    assert {weight.dtype for weight in stored("ct_llama_mxfp4")[1].weights.values()} == {torch.bfloat16}
