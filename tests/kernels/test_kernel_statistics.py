"""What the kernels measure equals a float64 computation from the source and the dequantized codes."""

from __future__ import annotations

import math

import pytest
import torch
from quantload.kernels import statistics as stats
from runners import Runner
from tested_formats import FP8, FP8_E4M3FN, INT8, MXFP6


def measured(runner: Runner, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the kernel says, what float64 says), entry SATURATED left out."""
    got = stats.new_statistics(runner.device)
    rows, cols = source.shape
    values = runner.dequantize(runner.quantize(source, got), (rows, cols)).double()
    x = source.double()
    error = (x - values).abs()
    want = stats.new_statistics()
    want[stats.COUNT] = x.numel()
    want[stats.SIGNAL] = x.square().sum()
    want[stats.NOISE] = error.square().sum()
    want[stats.MAX_ERROR] = error.max()
    want[stats.AMAX] = x.abs().max()
    want[stats.ZERO] = (values == 0).sum()
    want[stats.SATURATED] = got[stats.SATURATED]
    return got.cpu(), want


def assert_measured(got: torch.Tensor, want: torch.Tensor) -> None:
    """Noise may be a difference of float32 sums that are up to a thousand times as large: 0.001 dB."""
    torch.testing.assert_close(got[stats.NOISE], want[stats.NOISE], rtol=2e-4, atol=0)
    for index in set(range(len(want))) - {stats.NOISE}:
        torch.testing.assert_close(got[index], want[index], rtol=1e-5, atol=0)


SHAPES = {
    torch.bfloat16: [(1, 32), (5, 70), (130, 300), (2, 20000)],
    torch.float16: [(1, 32), (5, 70), (130, 300)],
    torch.float32: [(1, 32), (5, 70), (2, 20000)],
}
"""One block, odd ends, more rows than a block has, rows longer than what is summed in float32 at once."""


@pytest.mark.interpreted(dtype=torch.bfloat16, shape=(5, 70))
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [pytest.param(d, s, id=f"{d}-{s[0]}x{s[1]}") for d, shapes in SHAPES.items() for s in shapes],
)
def test_against_float64(runner: Runner, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    source = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
    source[0, :7] = 0
    got, want = measured(runner, source)
    assert_measured(got, want)
    assert got[stats.COUNT] == want[stats.COUNT]
    assert got[stats.ZERO] == want[stats.ZERO]
    assert got[stats.AMAX] == want[stats.AMAX]


@pytest.mark.parametrize("exponent", [-70, -35, 65, 100, 119])
def test_magnitudes_whose_squares_leave_float32(contender: Runner, exponent: int) -> None:
    generator = torch.Generator().manual_seed(1)
    source = (torch.randn(128, 256, generator=generator) * 2.0**exponent).bfloat16()
    got, want = measured(contender, source)
    assert_measured(got, want)


def test_statistics_accumulate(runner: Runner) -> None:
    source = torch.randn(4, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    once, twice = stats.new_statistics(runner.device), stats.new_statistics(runner.device)
    runner.quantize(source, once)
    runner.quantize(source, twice)
    runner.quantize(source, twice)
    want = once.clone()
    stats.merge(want, once)
    torch.testing.assert_close(twice, want, rtol=1e-12, atol=0)
    assert want[stats.AMAX] == once[stats.AMAX]
    assert want[stats.COUNT] == 2 * 256


@pytest.mark.formats(*MXFP6)
def test_mxfp6_counts_what_lies_above_the_largest_value(runner: Runner) -> None:
    values = {"mxfp6_e2m3": [7.5, 7.6875, -7.5625, 7.25], "mxfp6_e3m2": [28.0, 29.0, -28.25, 27.0]}
    block = torch.zeros(1, 32, dtype=torch.bfloat16)
    block[0, :4] = torch.tensor(values[runner.format.name])
    got = stats.new_statistics(runner.device)
    runner.quantize(block, got)
    assert got[stats.SATURATED] == 2


@pytest.mark.formats("mxfp4")
def test_mxfp4_counts_what_lies_above_the_largest_value(runner: Runner) -> None:
    block = torch.zeros(1, 32, dtype=torch.bfloat16)
    block[0, :4] = torch.tensor([6.0, 6.5, -6.9375, 5.9])
    got = stats.new_statistics(runner.device)
    runner.quantize(block, got)
    assert got[stats.SATURATED] == 2


@pytest.mark.formats(*FP8)
@pytest.mark.interpreted(formats=FP8_E4M3FN)
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_fp8_saturation_under_known_scales(runner: Runner, factor: float) -> None:
    check_saturation(runner, 224.0 if runner.format.name.endswith("fnuz") else 448.0, factor)


@pytest.mark.formats(INT8)
@pytest.mark.interpreted
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_int8_saturation_under_known_scales(runner: Runner, factor: float) -> None:
    check_saturation(runner, 127.0, factor)


def check_saturation(runner: Runner, largest: float, factor: float) -> None:
    source = torch.linspace(-1, 1, 128 * 7).view(7, 128).bfloat16().to(runner.device)
    codes, scales = runner.empty(7, 128)
    amax = torch.zeros(scales.shape, device=runner.device)
    runner.kernels.observe(source, amax)
    runner.kernels.finish_scales(amax, (scales,))
    scales.mul_(factor)
    got = stats.new_statistics(runner.device)
    assert runner.kernels.quantize(source, (codes, scales), got, scales_known=True) == 0
    above = source.double().abs() > scales.double() * largest * (1 + stats.SATURATION_SLACK)
    assert got[stats.SATURATED] == above.sum()
    assert bool(above.any()) == (factor < 1)
    values = runner.dequantize((codes.cpu(), scales.cpu()), (7, 128))
    assert (values.abs() <= largest * scales.cpu() * (1 + 2.0**-20)).all()


def test_sqnr() -> None:
    vector = stats.new_statistics()
    assert math.isnan(stats.sqnr_db(vector))
    vector[stats.SIGNAL] = 1000.0
    assert stats.sqnr_db(vector) == math.inf
    vector[stats.NOISE] = 1.0
    assert stats.sqnr_db(vector) == pytest.approx(30.0)


def gaussian_sqnr(runner: Runner) -> float:
    source = (torch.randn(256, 2048, generator=torch.Generator().manual_seed(5)) * 0.02).bfloat16()
    got = stats.new_statistics(runner.device)
    runner.quantize(source, got)
    return stats.sqnr_db(got.cpu())


@pytest.mark.formats("mxfp4")
def test_mxfp4_sqnr_of_gaussian_weights(runner: Runner) -> None:
    assert gaussian_sqnr(runner) == pytest.approx(19.0, abs=0.2)


@pytest.mark.formats(*FP8)
def test_fp8_sqnr_of_gaussian_weights(runner: Runner) -> None:
    assert gaussian_sqnr(runner) == pytest.approx(31.5, abs=0.3)


@pytest.mark.formats(INT8)
def test_int8_sqnr_of_gaussian_weights(runner: Runner) -> None:
    assert gaussian_sqnr(runner) == pytest.approx(41.0, abs=1.0)


@pytest.mark.formats("mxfp4")
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5])
def test_mxfp4_largest_error_is_exact_wherever_it_is(contender: Runner, seed: int, share: float) -> None:
    """The fast path looks only at blocks that can hold it: rows of very different sizes, outliers, several pieces."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(torch.randint(-6, 6, (96, 1), generator=generator).float())
    source = torch.randn(96, 2048, generator=generator) * sizes
    outliers = torch.rand(source.shape, generator=generator) < share
    source = torch.where(outliers, source * 16, source).bfloat16()
    got, largest = stats.new_statistics(contender.device), torch.zeros((), dtype=torch.float64)
    for piece in source.split([1, 31, 64]):
        codes, scales = contender.quantize(piece, got)
        values = contender.dequantize((codes, scales), tuple(piece.shape)).double()
        largest = torch.maximum(largest, (piece.double() - values).abs().max())
        assert got[stats.MAX_ERROR].cpu() == largest


@pytest.mark.formats("mxfp4")
@pytest.mark.parametrize("error", [2.0**-7, 2.0**-5, 0.0])
def test_mxfp4_little_noise_keeps_its_digits(contender: Runner, error: float) -> None:
    values = torch.tensor([0.5, 1, 1.5, 2, 3, 4, 6, -6]).repeat(64, 64)
    source = values.clone()
    source[::7, ::5] += error * source[::7, ::5]
    got, want = measured(contender, source.bfloat16())
    assert_measured(got, want)
    assert (want[stats.NOISE] > 0) == (error > 0)
    assert want[stats.NOISE] < 1e-3 * want[stats.SIGNAL]


@pytest.mark.parametrize("size", [1e-30, 1e-38])
def test_what_is_lost_altogether_has_no_ratio_left(runner: Runner, size: float) -> None:
    got = stats.new_statistics(runner.device)
    source = (torch.randn(64, 256, generator=torch.Generator().manual_seed(5)) * size).bfloat16()
    if bool((runner.dequantize(runner.quantize(source, got), (64, 256)) == 0).all()):
        assert stats.sqnr_db(got) == 0.0
    else:
        assert stats.sqnr_db(got) > 15.0
    assert math.isnan(stats.sqnr_db(stats.new_statistics()))
