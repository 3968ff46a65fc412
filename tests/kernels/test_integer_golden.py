"""INT4 equals what SGLang quantizes to, and is next to what a checkpoint in AWQ's layout holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from quantload.kernels.registry import kernel_set
from safetensors.torch import load_file

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column that each nibble of a word stands for."""


@pytest.fixture(params=["torch", "numba"])
def kernel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def quantized(name: str, kernel: str, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes one to a byte, and scales with zero points."""
    kernels = kernel_set(name, "cpu", {"quantize": kernel})
    codes = torch.zeros(kernels.format.code_shape(*source.shape), dtype=torch.uint8)
    scales = torch.zeros(kernels.format.scale_shape(*source.shape), dtype=kernels.format.scale_dtype)
    assert kernels.quantize(source, (codes, scales)) == 0
    return torch.stack((codes & 15, codes >> 4), -1).flatten(1), scales


@pytest.mark.parametrize("name", ["gauss", "ties", "zeros"])
def test_rows_equal_those_of_sglang(vectors: dict[str, np.ndarray], name: str, kernel: str) -> None:
    source = torch.from_numpy(vectors[f"{name}|in"].astype(np.int16)).view(torch.bfloat16)
    codes, scales = quantized("int4fp8_channel", kernel, source)
    np.testing.assert_array_equal(codes.int().numpy() - 8, vectors[f"{name}|sglang:int4|channel7|c"])
    want = vectors[f"{name}|sglang:int4|channel7|s"]
    used = want > 0  # SGLang divides rows of zeros by zero
    np.testing.assert_array_equal(scales[:, 0].numpy()[used], want[used])
    fp8 = vectors[f"{name}|sglang:fp8|tensor_int4fp8|s"]  # nothing of it is left in the product that SGLang stores
    np.testing.assert_allclose(want / fp8 * fp8, scales[:, 0].numpy() * used, rtol=2.0**-22)


def unpacked(words: torch.Tensor) -> torch.Tensor:
    """Nibbles [N, K] of AWQ's words [K, N / 8]."""
    columns = torch.empty(*words.shape, 8, dtype=torch.int32)
    for nibble, column in enumerate(AWQ_COLUMNS):
        columns[:, :, column] = (words >> (4 * nibble)) & 15
    return columns.flatten(1).T


def test_groups_are_those_of_awq_to_the_rounding_of_the_scale(request: pytest.FixtureRequest, kernel: str) -> None:
    """The same scales. AutoAWQ's export divides by them before they are float16, so some ties fall the other way."""
    golden: Path = request.config.rootpath / "tests" / "data" / "golden"
    original = load_file(golden / "bf16_llama" / "model.safetensors")
    stored = load_file(golden / "native_llama_awq" / "model.safetensors")
    names = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    assert len(names) == 14
    moved = total = 0
    for name in names:
        codes, scales = quantized("int4_group128_f16", kernel, original[f"{name}.weight"])
        assert torch.equal(scales[:, 0::2], stored[f"{name}.scales"].T)
        zeros, want = unpacked(stored[f"{name}.qzeros"]), unpacked(stored[f"{name}.qweight"])
        apart = (scales[:, 1::2].int() - zeros).repeat_interleave(128, 1)
        difference = codes.int() - apart - want
        assert difference.abs().max() <= 1
        moved, total = moved + int((difference != 0).sum()), total + want.numel()
    assert moved < total / 1000
