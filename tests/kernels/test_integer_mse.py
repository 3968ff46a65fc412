"""Scales and zero points of INT4 groups of the least squared error: the best pair, the same from every kernel."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from quantload.kernels import statistics as stats
from quantload.kernels.formats import FORMATS, INTEGERS
from quantload.kernels.group_search import FACTORS, FURTHEST, LARGEST, SHIFTS, UNIT, searched_extreme
from quantload.kernels.registry import SCALE_MODES, candidates, kernel_set
from tested_formats import filled
from torch import Tensor

NAME = "int4_group128_f16"
KERNELS = [kernel.name for kernel, reason in candidates("quantize", NAME, "cpu", "mse") if reason is None]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SEARCHED = [fmt.name for fmt in INTEGERS if fmt.name in SCALE_MODES["mse"]]


def quantized(
    name: str, source: Tensor, kernel: str, measured: Tensor | None = None, mode: str = "mse"
) -> tuple[Tensor, Tensor]:
    kernels = kernel_set(name, "cpu", {"quantize": kernel}, mode)
    codes, scales = filled(kernels.format, *source.shape)
    assert kernels.quantize(source, (codes, scales), stats.new_statistics() if measured is None else measured) == 0
    return codes, scales


def nibbles(codes: Tensor) -> Tensor:
    return torch.stack((codes & 15, codes >> 4), -1).flatten(1)


def uneven(rows: int, cols: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator) * torch.exp(3 * torch.randn(rows, 1, generator=generator))


def test_every_format_of_four_bits_in_groups_has_the_mode_and_no_other_integers() -> None:
    assert len(SEARCHED) == 15
    assert all(FORMATS[name].code_bits == 4 and FORMATS[name].block_cols for name in SEARCHED)
    assert "int4fp8_channel" not in SCALE_MODES["mse"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_group_that_codes_hold_exactly_keeps_the_scale_of_its_range(kernel: str) -> None:
    row = torch.arange(-3.0, 13.0).repeat(8)[None]
    measured = stats.new_statistics()
    codes, scales = quantized(NAME, row, kernel, measured)
    assert scales.tolist() == [[1.0, 3.0]]
    assert nibbles(codes)[0, :16].tolist() == list(range(16))
    assert measured[stats.NOISE] == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_range_is_cut_off_where_that_costs_less(kernel: str) -> None:
    """Of 16 beside 127 of 1.93: steps of 16 / 15 lose 5.1 in squares, of 0.93 times that 0.3, and 1.3 of the 16."""
    row = torch.cat((torch.full((1, 127), 1.9333), torch.full((1, 1), 16.0)), 1)
    codes, scales = quantized(NAME, row, kernel)
    assert scales.tolist() == [[torch.tensor(16 / 15 * (1 - 9 / 128)).half().item(), 0.0]]
    assert nibbles(codes)[0].tolist() == [2] * 127 + [15]


@pytest.mark.parametrize("kernel", KERNELS)
def test_groups_of_zeros_and_short_rows(kernel: str) -> None:
    codes, scales = quantized(NAME, torch.zeros(2, 133), kernel)
    assert scales.tolist() == [[2.0**-24, 0.0, 2.0**-24, 0.0]] * 2
    assert not codes.any()
    codes, scales = quantized(NAME, torch.tensor([[-15.0, 0.0, -1.0]]), kernel)
    assert scales.tolist() == [[1.0, 15.0]]
    assert codes.tolist() == [[0xF0, 0x0E]]  # the nibble behind the last is zero


def pairs_and_errors(source: Tensor, group: int, dtype: torch.dtype) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """What the rule says is tried of each group, and the squared errors in float64, without the grid of 32nds."""
    groups = source.float().view(len(source), -1, group)
    high, low = groups.amax(-1).clamp(min=0), (-groups.amin(-1)).clamp(min=0)
    pairs, errors = [], []
    for factor, shift in zip(FACTORS, SHIFTS, strict=True):
        scale = ((high * 0.5 + low * 0.5) / 7.5 * factor).to(dtype).float()
        for step in (0, 1):
            zero = ((low / scale - shift).round() + step).clamp(0, LARGEST)
            code = (groups.double() / scale[..., None].double()).round()
            code = code.clamp(-zero[..., None].double(), LARGEST - zero[..., None].double())
            off = groups.double() - code * scale[..., None].double()
            pairs.append((scale, zero))
            errors.append(off.square().sum(-1))
    return pairs, torch.stack(errors)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", [NAME, "int4_group32_bf16"])
def test_the_best_of_all_that_are_tried(name: str, kernel: str) -> None:
    fmt, source = FORMATS[name], uneven(24, 256, seed=0).bfloat16()
    _, scales = quantized(name, source, kernel)
    pairs, errors = pairs_and_errors(source, fmt.block_cols, fmt.scale_dtype)
    chosen = torch.stack(
        [(scales[:, 0::2].float() == scale) & (scales[:, 1::2].float() == zero) for scale, zero in pairs]
    )
    assert chosen.any(0).all()
    own = torch.where(chosen, errors, torch.inf).amin(0)
    assert (own <= errors.amin(0) * 1.05).all()  # they are counted in 32nds of a step
    assert (own < errors.amin(0) * (1 + 1e-9)).double().mean() > 0.7
    assert (own <= errors[:2].amin(0) * 1.05).all()
    assert chosen.any((1, 2)).sum() >= 8


@pytest.mark.parametrize(("name", "gain"), [("int4_group256_f16", 0.6), (NAME, 0.45), ("int4_group32_bf16", 0.2)])
def test_less_is_lost_than_by_the_range(name: str, gain: float) -> None:
    source = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1)).bfloat16()
    least, usual = stats.new_statistics(), stats.new_statistics()
    quantized(name, source, "numba", least)
    quantized(name, source, "numba", usual, "default")
    assert stats.sqnr_db(least) > stats.sqnr_db(usual) + gain
    assert least[stats.SIGNAL] == pytest.approx(float(usual[stats.SIGNAL]))


CASES = {
    "rows": st.integers(1, 20),
    "cols": st.integers(1, 300) | st.sampled_from([512, 1024, 2304]),
    "seed": st.integers(0, 1 << 20),
    "shift": st.floats(-3, 3),
    "dtype": st.sampled_from(DTYPES),
    "exponent": st.integers(-120, 110),
    "strided": st.booleans(),
}


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from([NAME, "int4_group256_f16", "int4_group32_bf16"]), **CASES)
@example(  # more groups than are worked on at once, beyond what float16 scales hold
    name=NAME, rows=2, cols=2304, seed=3, shift=0.0, dtype=torch.float32, exponent=40, strided=False
)
def test_every_kernel_gives_the_same_bytes(
    name: str, rows: int, cols: int, seed: int, shift: float, dtype: torch.dtype, exponent: int, strided: bool
) -> None:
    wide = (uneven(rows, cols + 3, seed) + shift) * 2.0 ** (exponent if dtype != torch.float16 else exponent / 16)
    wide[rows // 2] = 0
    wide[:, ::5] = wide[:, ::5].abs().amax(1, keepdim=True) / 2  # ties
    wide = wide.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    source = wide[:, :cols] if strided else wide[:, :cols].contiguous()
    for got, want in zip(quantized(name, source, "numba"), quantized(name, source, "torch"), strict=True):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(SEARCHED), **CASES)
def test_every_kernel_gives_the_same_bytes_of_every_format(name: str, **case: Any) -> None:
    test_every_kernel_gives_the_same_bytes.hypothesis.inner_test(name=name, **case)  # type: ignore[attr-defined]


def test_the_bytes_are_the_same_where_nothing_is_measured() -> None:
    source, kernels = uneven(8, 300, seed=6).bfloat16(), kernel_set(NAME, "cpu", {"quantize": "numba"}, "mse")
    plain = kernels.format.empty(8, 300)
    assert kernels.quantize(source, plain) == 0
    assert all(torch.equal(one, other) for one, other in zip(plain, quantized(NAME, source, "numba"), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_measured_is_what_codes_stand_for(dtype: torch.dtype) -> None:
    source, got, want = uneven(20, 333, seed=5).to(dtype), stats.new_statistics(), stats.new_statistics()
    tensors = quantized(NAME, source, "numba", got)
    quantized(NAME, source, "torch", want)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=0)
    values = torch.empty(source.shape)
    kernel_set(NAME, "cpu").dequantize(tensors, values)
    assert got[stats.NOISE] == pytest.approx(float((source.double() - values.double()).square().sum()), rel=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_bf16_value_as_the_largest_of_its_group(kernel: str, all_bf16: Tensor) -> None:
    picked = all_bf16[:: 1 if kernel == "numba" else 16]
    source = torch.randn(len(picked), 32, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)
    source = (source * picked[:, None].float()).bfloat16()
    source[:, 7] = picked
    tensors = quantized("int4_group32_bf16", source, kernel)
    values = torch.empty(source.shape)
    kernel_set("int4_group32_bf16", "cpu").dequantize(tensors, values)
    assert torch.isfinite(values).all()
    assert torch.isfinite(values.bfloat16()).all()
    amax = picked.float().abs().clamp(max=searched_extreme("bf16"))[:, None]
    # Half a step is lost, up to two of what is cut off, and a fifteenth of the range where there are no finer scales.
    assert ((source.float() - values).abs() <= amax * 0.3 + 2.0**-24).logical_or(picked[:, None].abs() > amax).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_pieces_of_whole_groups_are_those_of_the_whole(kernel: str) -> None:
    kernels, source = kernel_set(NAME, "cpu", {"quantize": kernel}, "mse"), uneven(12, 700, seed=4).bfloat16()
    whole, pieces = quantized(NAME, source, kernel), kernels.format.empty(12, 700)
    for first, last in ((512, 700), (0, 256), (256, 512)):
        part = pieces[0][:, first // 2 : -(-last // 2)], pieces[1][:, first // 64 : 2 * -(-last // 128)]
        assert kernels.quantize(source[:, first:last], part) == 0
    assert all(torch.equal(one, other) for one, other in zip(whole, pieces, strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
def test_scales_that_are_known_are_left_alone(kernel: str) -> None:
    kernels = kernel_set(NAME, "cpu", {"quantize": kernel}, "mse")
    source, (codes, scales) = torch.full((1, 128), 7.75), kernels.format.empty(1, 128)
    scales.copy_(torch.tensor([[2.0, 5.0]]))
    assert kernels.quantize(source, (codes, scales), scales_known=True) == 0
    assert scales.tolist() == [[2.0, 5.0]]
    assert set(nibbles(codes).flatten().tolist()) == {9}


@pytest.mark.parametrize("kernel", KERNELS)
def test_extremes_alone_are_not_enough(kernel: str) -> None:
    kernels = kernel_set(NAME, "cpu", {"finish_scales": kernel}, "mse")
    with pytest.raises(ValueError, match=f"{NAME}: scales and zero points of the least squared error cannot be told"):
        kernels.finish_scales(torch.ones(2, 6), (torch.zeros(2, 6, dtype=torch.float16),))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_counted(kernel: str, value: float) -> None:
    source = torch.ones(20, 140)
    source[3, 40], source[19, 0], source[19, 139] = value, value, -value
    kernels = kernel_set(NAME, "cpu", {"quantize": kernel}, "mse")
    assert kernels.quantize(source, kernels.format.empty(20, 140)) == 3


def test_the_sums_of_squares_are_exact() -> None:
    """Of a group of 256, sixteen in each lane: float32 holds them in units of a square of 1/32."""
    assert (FURTHEST / UNIT) ** 2 * 256 / 16 <= 2**24
    assert (FURTHEST / UNIT) ** 2 * 256 < 2**31
    assert max(fmt.block_cols for fmt in INTEGERS) == 256
    assert all(first > second for first, second in itertools.pairwise(FACTORS))
