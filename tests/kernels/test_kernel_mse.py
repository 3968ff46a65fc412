"""Scales of MX formats of the least squared error: the better of two, the smaller on a tie, from every kernel."""

from __future__ import annotations

import pytest
import torch
from quantload.kernels import statistics as stats
from quantload.kernels.formats import FORMATS
from quantload.kernels.mx_elements import ELEMENTS
from quantload.kernels.registry import NoKernel, candidates, kernel_set
from tested_formats import MX
from torch import Tensor

NAMES = MX
KERNELS = [kernel.name for kernel, reason in candidates("quantize", "mxfp4", "cpu", "mse") if reason is None]


def quantize(
    name: str, source: torch.Tensor, kernel: str, measured: torch.Tensor | None = None
) -> tuple[Tensor, Tensor]:
    kernels = kernel_set(name, "cpu", {"quantize": kernel}, "mse")
    codes = torch.full(kernels.format.code_shape(*source.shape), 77, dtype=torch.uint8).view(kernels.format.code_dtype)
    scales = torch.full(kernels.format.scale_shape(*source.shape), 77, dtype=torch.uint8)
    assert kernels.quantize(source, (codes, scales), measured) == 0
    return codes, scales


def squared_errors(name: str, source: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Of each block under given scales, float64."""
    kernels = kernel_set(name, "cpu")
    codes = torch.zeros(kernels.format.code_shape(*source.shape), dtype=torch.uint8).view(kernels.format.code_dtype)
    values = torch.empty(source.shape)
    assert kernels.quantize(source, (codes, scales.clone()), scales_known=True) == 0
    kernels.dequantize((codes, scales), values)
    return (source.double() - values.double()).square().view(*scales.shape, 32).sum(-1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_mxfp4_blocks_worked_out_by_hand(kernel: str) -> None:
    """Cutting 7 off at 6 costs 1. Without the room above 6 the others would be exact, with it 3 becomes 4."""
    source = torch.zeros(4, 32)
    source[0, :3] = torch.tensor([7.0, 3.0, 3.0])  # scale 1: 1; scale 2: 7 -> 8 and 3 -> 4 twice: 3
    source[1, 0] = 7.0  # 7 -> 6 or 7 -> 8: a tie
    source[2, 0] = -7.5  # 7.5 -> 6: 2.25; 7.5 -> 8: 0.25
    source[3, 5] = 4.0  # nothing is lost under either
    codes, scales = quantize("mxfp4", source, kernel)
    assert scales[:, 0].tolist() == [127, 127, 128, 127]
    assert codes[0, :2].tolist() == [7 | 5 << 4, 5]
    assert codes[2, 0] == 0x8 | 6


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", NAMES)
def test_the_better_of_two_scales(name: str, kernel: str) -> None:
    generator = torch.Generator().manual_seed(0)
    source = (torch.randn(64, 512, generator=generator) * torch.randn(64, 1, generator=generator).exp()).bfloat16()
    _, scales = quantize(name, source, kernel)
    amax = source.float().abs().view(64, 16, 32).amax(-1)
    floor = (torch.frexp(amax).exponent - 1 + 127 - ELEMENTS[name].emax).to(torch.uint8)
    here, there = (squared_errors(name, source, floor + step) for step in (0, 1))
    assert ((scales == floor) | (scales == floor + 1)).all()
    assert (scales == floor).any()
    assert (scales != floor).any()
    clear = (here - there).abs() > 1e-5 * here.clamp(min=there)
    assert torch.equal((scales != floor)[clear], (here > there)[clear])


@pytest.mark.parametrize("name", NAMES)
def test_less_is_lost_than_by_the_rule_of_the_format(name: str) -> None:
    source = torch.randn(256, 1024, generator=torch.Generator().manual_seed(1)).bfloat16()
    least, usual = stats.new_statistics(), stats.new_statistics()
    codes, scales = quantize(name, source, "numba", least)
    assert kernel_set(name, "cpu").quantize(source, (codes, scales), usual) == 0
    assert least[stats.NOISE] < usual[stats.NOISE] * (0.995 if name == "mxfp4" else 1.0 + 1e-6)
    assert least[stats.SIGNAL] == pytest.approx(float(usual[stats.SIGNAL]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_gives_the_same_bytes(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    source = torch.randn(40, 333, generator=generator) * torch.exp(3 * torch.randn(40, 1, generator=generator))
    source[3] = 0
    source[4] *= 1e-30
    source[5, ::2] = 0.0
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0]).repeat(42)[:333]
    source[6:8] = torch.stack((ties, -ties * 0.875))
    source = source.to(dtype)
    got, want = stats.new_statistics(), stats.new_statistics()
    codes, scales = quantize(name, source, "numba", got)
    expected_codes, expected_scales = quantize(name, source, "torch", want)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(codes.view(torch.uint8), expected_codes.view(torch.uint8))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_every_bf16_value_as_the_largest_of_its_block(name: str, kernel: str, all_bf16: Tensor) -> None:
    source = torch.randn(len(all_bf16), 32, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)
    source = (source * all_bf16[:, None].float()).bfloat16()
    source[:, 7] = all_bf16
    codes, scales = quantize(name, source, kernel)
    expected_codes, expected_scales = quantize(name, source, "torch")
    assert torch.equal(scales, expected_scales)
    assert torch.equal(codes.view(torch.uint8), expected_codes.view(torch.uint8))


@pytest.mark.parametrize("kernel", KERNELS)
def test_scales_that_are_known_are_left_alone(kernel: str) -> None:
    kernels = kernel_set("mxfp6_e2m3", "cpu", {"quantize": kernel}, "mse")
    source = torch.full((1, 32), 7.75)
    codes, scales = torch.zeros(1, 24, dtype=torch.uint8), torch.full((1, 1), 129, dtype=torch.uint8)
    assert kernels.quantize(source, (codes, scales), scales_known=True) == 0
    assert scales.item() == 129
    values = torch.empty(1, 32)
    kernels.dequantize((codes, scales), values)
    assert (values == 8.0).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_amax_alone_is_not_enough(kernel: str) -> None:
    kernels = kernel_set("mxfp8", "cpu", {"finish_scales": kernel}, "mse")
    with pytest.raises(ValueError, match="mxfp8: scales of the least squared error cannot be told from amax alone"):
        kernels.finish_scales(torch.ones(2, 3), (torch.zeros(2, 3, dtype=torch.uint8),))


def test_formats_without_the_mode_say_which_they_have() -> None:
    with pytest.raises(NoKernel, match="fp8_channel has no scale mode 'mse'; it has default"):
        kernel_set("fp8_channel", "cpu", scale_mode="mse")
    with pytest.raises(NoKernel, match="mxfp4 has no scale mode 'least'; it has default, mse"):
        kernel_set("mxfp4", "cpu", scale_mode="least")


def test_only_choosing_scales_differs_between_the_modes() -> None:
    for name in NAMES:
        usual, least = kernel_set(name, "cpu"), kernel_set(name, "cpu", scale_mode="mse")
        assert least.format is FORMATS[name]
        assert least.names == usual.names
        assert (least.scale_mode, usual.scale_mode) == ("mse", "default")
        assert least.dequantize is usual.dequantize


def test_a_gpu_without_a_kernel_of_its_own_falls_back_to_torch() -> None:
    found = candidates("quantize", "mxfp4", "cuda", "mse")
    assert [kernel.name for kernel, reason in found if reason is None] == ["torch"]
