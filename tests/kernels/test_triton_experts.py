"""The experts kernels: compiled for every GPU we name (`interpreted_linear.py` checks what they compute)."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is on Linux only")

import torch
from gpu_targets import TARGETS
from matmul_kernels import MANY, check
from quantload.kernels.formats import FORMATS
from quantload.kernels.gpu.experts import TritonExperts, most_blocks
from quantload.kernels.gpu.matmuls import missing_nvfp4
from quantload.kernels.reference.experts import ExpertsByLinear
from quantload.kernels.registry import kernel_set
from triton_ways import way_of

NATIVE_FP8 = {"gfx942": "fp8_channel_fnuz", "gfx950": "fp8_channel", "sm_90": "fp8_channel", "sm_100": "fp8_channel"}


@pytest.mark.parametrize("target", TARGETS)
def test_mxfp4_weight_only(target: str) -> None:
    check("experts", "mxfp4", target, 1, False)


@pytest.mark.parametrize("target", ["gfx950", "sm_100"])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_mx_activations_too(name: str, target: str) -> None:
    check("experts", name, target, 1, True)


@pytest.mark.skipif(missing_nvfp4() is not None, reason=str(missing_nvfp4()))
def test_nvfp4_activations_too() -> None:
    check("experts", "nvfp4", "sm_100", 1, True)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["mxfp6_e2m3", "mxfp8", "nvfp4", "nl4", "int4_group128_f16", "int8_channel"])
def test_weight_only(name: str, target: str) -> None:
    check("experts", name, target, 1, False)


@pytest.mark.parametrize("target", NATIVE_FP8)
def test_fp8_activations_too(target: str) -> None:
    check("experts", NATIVE_FP8[target], target, 1, True)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "name",
    [
        "mxfp4",
        "mxfp6_e2m3",
        "mxfp8",
        "nvfp4",
        "nl4",
        "int4_group16_f16",
        "fp8_channel",
        "fp8_tensor",
        "fp8_block",
        "int8_channel",
    ],
)
def test_every_other_tile_size(name: str, target: str) -> None:
    for tokens in (1, 32, 64, MANY):
        check("experts", name, target, tokens, False)
        if name.startswith("int8") or (name in ("mxfp4", "mxfp8") and target in ("gfx950", "sm_100")):
            check("experts", name, target, tokens, True)


@pytest.mark.parametrize("block", [16, 64])
def test_there_are_never_more_blocks_than_are_launched(block: int) -> None:
    generator = torch.Generator().manual_seed(block)
    for tokens in (1, 5, 64, 300):
        for experts in (1, 8, 60):
            for _ in range(20):
                counts = torch.bincount(
                    torch.randint(experts + 1, (tokens,), generator=generator), minlength=experts + 1
                )
                assert int((-(-counts // block)).sum()) <= most_blocks(tokens, experts, block)
            worst = min(tokens, experts + 1)  # one token each, and the rest with the last of them
            assert worst - 1 + -(-(tokens - worst + 1) // block) <= most_blocks(tokens, experts, block)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e3m2", "mxfp8", "fp8_tensor", "fp8_block", "int8_channel"])
def test_experts_are_linears_one_after_the_other(name: str) -> None:
    """On any device without a kernel of its own, for every backend that has `linear`."""
    kernels = kernel_set(name, "cpu", {"linear": "torch"})
    assert kernels.names["experts"] == "torch"
    fmt, n_rows, k = FORMATS[name], 24, 128
    codes = torch.zeros(3, *fmt.code_shape(n_rows, k), dtype=torch.uint8).view(fmt.code_dtype)
    scales = torch.zeros(3, *fmt.scale_shape(n_rows, k)).to(fmt.scale_dtype)
    generator = torch.Generator().manual_seed(0)
    for expert in range(3):
        weight = torch.randn(n_rows, k, generator=generator)
        assert kernels.quantize(weight, (codes[expert], scales[expert])) == 0
    x, bias = torch.randn(7, k, generator=generator), torch.randn(3, n_rows, generator=generator)
    out = kernels.experts(x, (codes, scales), bias, torch.tensor([0, 2, 2, 6]), n_rows, k)
    assert torch.equal(out[:2], kernels.linear(x[:2], (codes[0], scales[0]), bias[0], n_rows, k))
    assert torch.equal(out[2:6], kernels.linear(x[2:6], (codes[2], scales[2]), bias[2], n_rows, k))
    assert not out[6:].any()


def test_arguments_that_do_not_fit_are_named() -> None:
    fmt = FORMATS["mxfp4"]
    codes, scales = torch.zeros(3, 8, 32, dtype=torch.uint8), torch.zeros(3, 8, 2, dtype=torch.uint8)
    x, offsets = torch.ones(4, 64), torch.tensor([0, 1, 2, 4])
    for experts in (TritonExperts(fmt, way_of("mxfp4")), ExpertsByLinear(fmt, torch.nn.functional.linear)):
        with pytest.raises(ValueError, match=r"x of shape \[T, 32\]"):
            experts(x, (codes, scales), None, offsets, 8, 32)
        with pytest.raises(ValueError, match="experts of"):
            experts(x, (codes, scales[:2]), None, offsets, 8, 64)
        with pytest.raises(ValueError, match=r"bias must have shape \[3, 8\]"):
            experts(x, (codes, scales), torch.ones(8), offsets, 8, 64)
        with pytest.raises(ValueError, match="offsets of 3 experts"):
            experts(x, (codes, scales), None, offsets[1:], 8, 64)
