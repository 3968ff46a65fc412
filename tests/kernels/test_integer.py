"""Integers with zero points: what hand-made groups become, and how far from the weights the codes may be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantload.kernels import statistics as stats
from quantload.kernels.formats import FORMATS, INT4FP8_CHANNEL
from quantload.kernels.registry import candidates, kernel_set
from quantload.kernels.scale_rules import largest_extreme
from tested_formats import REPRESENTATIVES

KERNELS = [kernel.name for kernel, reason in candidates("quantize", "int4_group128_f16", "cpu") if reason is None]


def quantized(
    name: str, source: torch.Tensor, kernel: str = "torch", statistics: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    fmt = FORMATS[name]
    codes = torch.full(fmt.code_shape(*source.shape), 77, dtype=torch.uint8)
    scales = torch.full(fmt.scale_shape(*source.shape), 77, dtype=fmt.scale_dtype)
    assert kernel_set(name, "cpu", {"quantize": kernel}).quantize(source, (codes, scales), statistics) == 0
    return codes, scales


def dequantized(name: str, codes: torch.Tensor, scales: torch.Tensor, cols: int) -> torch.Tensor:
    out = torch.empty(len(codes), cols)
    kernel_set(name, "cpu").dequantize((codes, scales), out)
    return out


def nibbles(codes: torch.Tensor) -> list[int]:
    found: list[int] = torch.stack((codes & 15, codes >> 4), -1).flatten().tolist()
    return found


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_group_from_its_smallest_to_its_largest(kernel: str) -> None:
    row = torch.tensor([[-3.0, 12.0, 0.0, 0.5, 1.5, -0.5, -1.5, 2.5, 11.6, 3.49, 3.51, 7, 8, 9, 10, 11.0]])
    codes, scales = quantized("int4_group16_f32", row, kernel)
    assert scales.tolist() == [[1.0, 3.0]]
    #                   ties to even, before the zero point is added
    assert nibbles(codes) == [0, 15, 3, 3, 5, 3, 1, 5, 15, 6, 7, 10, 11, 12, 13, 14]


def test_zero_is_in_the_range_of_one_sided_groups(kernel: str) -> None:
    source = torch.tensor([[3.0] * 16 + [-30.0] * 16])
    codes, scales = quantized("int4_group16_f32", source, kernel)
    assert scales[0].tolist() == [torch.tensor(0.2).item(), 0.0, 2.0, 15.0]
    assert nibbles(codes) == [15] * 16 + [0] * 16
    torch.testing.assert_close(dequantized("int4_group16_f32", codes, scales, 32), source)


def test_groups_of_zeros(kernel: str) -> None:
    for name in ("int4_group32_f16", "int8_group32_bf16", "int4fp8_channel"):
        codes, scales = quantized(name, torch.zeros(2, 64, dtype=torch.bfloat16), kernel)
        zero = 8 if name == "int4fp8_channel" else 0
        assert bool((scales[:, 0::2] == 2.0**-24).all())
        assert bool((scales[:, 1::2] == zero).all())
        assert set(codes.flatten().tolist()) == {zero * 17}
        assert not dequantized(name, codes, scales, 64).any()


def test_a_short_last_group_and_an_odd_row(kernel: str) -> None:
    source = torch.tensor([[15.0] * 32 + [-15.0, 0.0, 1.0]])
    codes, scales = quantized("int4_group32_f32", source, kernel)
    assert codes.shape == (1, 18)
    assert scales[0, :2].tolist() == [1.0, 0.0]
    step = torch.tensor(16.0) / 15
    assert scales[0, 2:].tolist() == [step.item(), 14.0]
    assert codes[0].tolist() == [0xFF] * 16 + [0xE0, 0x0F]  # the nibble behind the last is zero


def test_scales_that_float16_cannot_hold(kernel: str) -> None:
    tiny = torch.full((1, 32), 2.0**-24 * 7, dtype=torch.bfloat16)  # a fifteenth of it is no float16
    codes, scales = quantized("int4_group32_f16", tiny, kernel)
    assert scales.tolist() == [[2.0**-24, 0.0]]
    assert set(nibbles(codes)) == {7}
    huge = torch.full((1, 32), 2.0**30, dtype=torch.bfloat16)
    got = stats.new_statistics()
    codes, scales = quantized("int4_group32_f16", huge, kernel, got)
    assert scales.tolist() == [[65504.0, 0.0]]
    assert set(nibbles(codes)) == {15}
    assert got[stats.SATURATED] == 32


def test_a_range_that_float32_cannot_hold(kernel: str) -> None:
    largest = torch.finfo(torch.float32).max
    source = torch.tensor([[largest, -largest] * 16])
    codes, scales = quantized("int8_group32_f32", source, kernel)
    torch.testing.assert_close(scales[0, 0], torch.tensor(largest_extreme("f32") / 127.5))  # 128 of them are finite
    assert codes[0, 0] - codes[0, 1].int() == 255


def test_symmetric_rows(kernel: str) -> None:
    source = torch.tensor([[7.0, -7.0, 0.5, 1.5, 2.5, -0.5, -1.5, 6.6], [0.0, 0, 0, 0, 0, 0, 0, -14.0]])
    codes, scales = quantized("int4fp8_channel", source, kernel)
    assert scales.tolist() == [[1.0, 8.0], [2.0, 8.0]]
    assert nibbles(codes[0]) == [15, 1, 8, 10, 10, 8, 6, 15]
    assert nibbles(codes[1]) == [8] * 7 + [1]


@pytest.mark.parametrize("name", ["int4_group32_f16", "int8_group32_bf16", "int4_group0_f32", "int4fp8_channel"])
def test_saturation_under_known_scales(name: str, kernel: str) -> None:
    kernels, fmt = kernel_set(name, "cpu", {"quantize": kernel}), FORMATS[name]
    source = torch.linspace(-1, 3, 64 * 5).view(5, 64).bfloat16()
    codes, scales = quantized(name, source, kernel)
    scales[:, 0::2] *= 0.5
    got = stats.new_statistics()
    assert kernels.quantize(source, (codes, scales), got, scales_known=True) == 0
    zero, step = (scales[:, word::2].double().repeat_interleave(fmt.block_cols or 64, 1) for word in (1, 0))
    lowest, highest = (1 if fmt is INT4FP8_CHANNEL else 0) - zero, 2**fmt.code_bits - 1 - zero
    ratio = source.double() / step
    assert got[stats.SATURATED] == ((ratio > highest + 0.5) | (ratio < lowest - 0.5)).sum() > 0
    values = dequantized(name, codes, scales, 64).double()
    assert torch.equal(values, (ratio.round().clamp(lowest, highest) * step).float().double())


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from([*REPRESENTATIVES, "int8_group16_f16", "int4fp8_channel"]),
    rows=st.integers(1, 5),
    cols=st.integers(1, 300),
    shift=st.floats(-4, 4),
    exponent=st.integers(-12, 4),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_every_kernel_agrees_and_no_weight_moves_by_more_than_half_a_scale(
    name: str, rows: int, cols: int, shift: float, exponent: int, dtype: torch.dtype
) -> None:
    fmt = FORMATS[name]
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    source = ((torch.randn(rows, cols, generator=generator) + shift) * 2.0**exponent).to(dtype)
    codes, scales = quantized(fmt.name, source)
    for kernel in KERNELS:
        measured = stats.new_statistics()
        again = quantized(fmt.name, source, kernel, measured)
        assert torch.equal(again[0], codes)
        assert torch.equal(again[1], scales)
    values = dequantized(fmt.name, codes, scales, cols)
    step = scales[:, 0::2].float().repeat_interleave(fmt.block_cols or cols, 1)[:, :cols]
    # A stored scale may be too small by its rounding; then the range has up to that many codes more than there are.
    info = torch.finfo(fmt.scale_dtype)
    rounding = 2**fmt.code_bits * torch.maximum(step * info.eps, torch.tensor(info.smallest_normal * info.eps)) / 2
    assert bool(((values - source.float()).abs() <= step * 0.50001 + rounding).all())
