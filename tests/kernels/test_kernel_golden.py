"""Bytes equal those of the reference tools (tests/data/vectors.npz, see the `vectors` fixture)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from runners import Runner
from tested_formats import FP8, INT8

SETS = ("gauss", "ties", "zeros")
ENGINES = {"fp8_channel": "vllm:fp8|ptpc", "fp8_tensor": "sglang:fp8|tensor", "fp8_block": "vllm:fp8|block128"}


def bf16(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits.astype(np.int16)).view(torch.bfloat16)


def without_negative_zero(packed: np.ndarray) -> np.ndarray:
    low, high = packed & 15, packed >> 4
    found: np.ndarray = np.where(low == 8, 0, low) | np.where(high == 8, 0, high) << 4
    return found


def assert_same_mxfp4(codes: np.ndarray, scales: np.ndarray, want: np.ndarray, want_scales: np.ndarray) -> None:
    codes, want = without_negative_zero(codes), without_negative_zero(want)
    np.testing.assert_array_equal(codes, want)
    nonzero = codes.reshape(len(codes), -1, 16).any(-1)
    assert nonzero.any()
    np.testing.assert_array_equal(scales[nonzero], want_scales[nonzero])


@pytest.mark.formats("mxfp4")
@pytest.mark.interpreted(dtype=torch.bfloat16)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SETS)
def test_mxfp4_equals_every_even_vector(
    runner: Runner, vectors: dict[str, np.ndarray], name: str, dtype: torch.dtype
) -> None:
    codes, scales = runner.quantize(bf16(vectors[f"{name}|in"]).to(dtype))
    tools = [key.split("|")[1] for key in vectors if key.startswith(f"{name}|") and key.endswith(":fp4|even|c")]
    assert len(tools) >= 6
    for tool in tools:
        want, want_scales = (vectors[f"{name}|{tool}|even|{part}"] for part in "cs")
        if tool.startswith("torchao018") and name == "zeros":  # differs on blocks of BF16 subnormals
            normal = np.abs(vectors[f"{name}|in"].astype(np.int32) & 0x7FFF).reshape(16, 8, 32).max(-1) >= 0x180
            mask = np.repeat(normal, 16, 1)
            got, want = np.where(mask, codes.numpy(), 0), np.where(mask, want, 0)
            assert_same_mxfp4(got, scales.numpy(), want, want_scales)
        else:
            assert_same_mxfp4(codes.numpy(), scales.numpy(), want, want_scales)


@pytest.mark.formats("mxfp4")
@pytest.mark.interpreted
@pytest.mark.parametrize("layer", ["mlp.down_proj", "self_attn.k_proj"])
def test_mxfp4_equals_a_checkpoint_exported_by_quark(
    runner: Runner, vectors: dict[str, np.ndarray], layer: str
) -> None:
    codes, scales = runner.quantize(bf16(vectors[f"quark_llama:{layer}|in"]))
    assert_same_mxfp4(
        codes.numpy(), scales.numpy(), vectors[f"quark_llama:{layer}|c"], vectors[f"quark_llama:{layer}|s"]
    )


@pytest.mark.formats(*FP8)
@pytest.mark.interpreted
@pytest.mark.parametrize("name", SETS)
def test_fp8_equals_the_serving_engines(runner: Runner, vectors: dict[str, np.ndarray], name: str) -> None:
    source = bf16(vectors[f"{name}|in"])
    codes, scales = runner.quantize(source)
    key = f"{name}|{ENGINES[runner.format.name.removesuffix('_fnuz')]}"
    want_codes, want_scales = vectors[f"{key}|c"], vectors[f"{key}|s"]
    if runner.format.code_dtype == torch.float8_e4m3fnuz:  # the same bits mean half as much, and -0 would be NaN
        want_codes, want_scales = np.where(want_codes == 0x80, 0, want_codes), want_scales * 2
    np.testing.assert_array_equal(scales.numpy().ravel(), want_scales.ravel())
    np.testing.assert_array_equal(codes.view(torch.uint8).numpy(), want_codes)


@pytest.mark.formats(INT8)
@pytest.mark.interpreted
@pytest.mark.parametrize("name", SETS)
def test_int8_follows_its_rule_and_is_near_vllm(runner: Runner, vectors: dict[str, np.ndarray], name: str) -> None:
    source = bf16(vectors[f"{name}|in"])
    codes, scales = runner.quantize(source)
    amax = source.float().abs().amax(1, keepdim=True).numpy()
    np.testing.assert_array_equal(scales.numpy(), np.where(amax == 0, np.float32(1), amax / np.float32(127)))
    want = np.clip(np.rint(source.float().numpy() / scales.numpy()), -127, 127)
    np.testing.assert_array_equal(codes.numpy(), want)
    theirs = vectors[f"{name}|vllm:int8|experts_int8_bf16|c"].astype(int)  # made with a bfloat16 scale
    used = amax[:, 0] > 0
    assert np.abs(theirs[used] - codes.numpy().astype(int)[used]).max() <= 1


def test_nonfinite_weights_are_counted(runner: Runner, vectors: dict[str, np.ndarray]) -> None:
    source = bf16(vectors["nonfin|in"])
    bad = int((~torch.isfinite(source.float())).sum())
    assert bad > 0
    assert runner.kernels.quantize(source.to(runner.device), runner.empty(*source.shape)) == bad
