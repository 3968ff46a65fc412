"""NVFP4: the bytes of compressed-tensors, the rules at their ends, and the better of two scales of a block."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from quantload.kernels import statistics as stats
from quantload.kernels.formats import NVFP4, Tensors
from quantload.kernels.nvfp4_scales import spread, tensor_scale
from quantload.kernels.reference import nvfp4
from quantload.kernels.registry import OPERATIONS, KernelSet, candidates, kernel_set
from tested_formats import filled

KERNELS = [kernel.name for kernel, reason in candidates("quantize", "nvfp4", "cpu") if reason is None]
MODES = ("default", "mse")
GRID = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)]


def kernels_of(kernel: str, mode: str = "default") -> KernelSet:
    return kernel_set("nvfp4", "cpu", dict.fromkeys(OPERATIONS, kernel), mode)


def quantized(source: torch.Tensor, kernel: str, mode: str = "default", scale_2: float | None = None) -> Tensors:
    """Under the tensor's own scale, or under one that is given."""
    tensors = filled(NVFP4, *source.shape)
    if scale_2 is not None:
        tensors[2].fill_(scale_2)
    assert kernels_of(kernel, mode).quantize(source, tensors, None, scale_2 is not None) == 0
    return tensors


def values_of(tensors: Tensors, shape: tuple[int, int]) -> torch.Tensor:
    out = torch.empty(shape)
    kernels_of("torch").dequantize(tensors, out)
    return out


def same(left: Tensors, right: Tensors) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parents[1] / "data" / "vectors_nvfp4.npz") as stored:
        return dict(stored)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bytes_are_those_of_compressed_tensors(kernel: str, dtype: torch.dtype, golden: dict[str, np.ndarray]) -> None:
    names = [key.removesuffix("|in") for key in golden if key.endswith("|in")]
    assert len(names) > 40
    for name in names:
        source = torch.from_numpy(golden[f"{name}|in"]).view(torch.bfloat16).to(dtype)
        codes, scale, scale_2 = quantized(source, kernel)
        np.testing.assert_array_equal(scale.view(torch.uint8).numpy(), golden[f"{name}|scales"], err_msg=name)
        np.testing.assert_array_equal(codes.numpy(), golden[f"{name}|codes"], err_msg=name)
        made = nvfp4.Nvfp4Codec().multiplier(scale_2).numpy().ravel()
        np.testing.assert_array_equal(made, golden[f"{name}|global"], err_msg=name)


@pytest.mark.parametrize("mode", MODES)
@given(bits=st.integers(0, 0x7F7FFFFF))
def test_the_tensor_scale_of_one_number_is_that_of_a_tensor(mode: str, bits: int) -> None:
    amax = torch.tensor([[bits]], dtype=torch.int32).view(torch.float32)
    want = nvfp4.Nvfp4Codec(mode).scales_from_amax(amax)
    assert torch.tensor(tensor_scale(float(amax), spread(mode))).view(torch.int32) == want.view(torch.int32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_multiplier_is_told_from_the_tensor_scale_alone(mode: str, dtype: torch.dtype) -> None:
    """R * (1 / amax) to the bit, for every maximum that BF16 and FP16 have, where that is a number."""
    amax = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    amax = amax[torch.isfinite(amax) & (amax > 0)][None]
    codec, want = nvfp4.Nvfp4Codec(mode), amax.reciprocal() * spread(mode)
    usable = torch.isfinite(want) & (amax >= 2.0**-126)
    got = codec.multiplier(codec.scales_from_amax(amax))
    assert torch.equal(got[usable], want[usable])
    assert (got[~usable] == 1).all()


@settings(max_examples=60, deadline=None)
@example(
    rows=4, cols=49, dtype=torch.bfloat16, mode="mse", exponent=-118, seed=0
)  # a multiplier over a scale overflows
@given(
    rows=st.integers(1, 5),
    cols=st.integers(1, 600),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    mode=st.sampled_from(MODES),
    exponent=st.integers(-140, 120),
    seed=st.integers(0, 1 << 30),
)
def test_the_cpu_kernel_gives_the_bytes_of_the_reference(
    rows: int, cols: int, dtype: torch.dtype, mode: str, exponent: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.exp(3 * torch.randn(rows, -(-cols // 16), generator=generator)).repeat_interleave(16, 1)
    source = torch.randn(rows, cols, generator=generator).double() * blocks[:, :cols] * 2.0**exponent
    source[torch.rand(rows, cols, generator=generator) < 0.1] *= 0.0
    source = source.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    assert same(quantized(source, "numba", mode), quantized(source, "torch", mode))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_quotients_without_a_division_are_on_the_right_side_of_every_border(dtype: torch.dtype) -> None:
    """Every significand over a few binades, under many tensor scales."""
    steps = torch.finfo(dtype).eps
    significands = 1 + torch.arange(round(1 / steps)) * steps
    every = torch.cat([significands * 2.0**exponent for exponent in (-3, -2, -1, 0, 1)])
    source = torch.nn.functional.pad(every, (0, -len(every) % 15)).view(-1, 15)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        top = 4 * significands[torch.randint(len(significands), (1,), generator=generator)]
        weights = torch.cat((source, top.expand(len(source), 1)), 1).view(1, -1).to(dtype)
        scale_2 = float(torch.rand(1, generator=generator) + 1) * 2.0**-8
        assert same(*(quantized(weights, kernel, scale_2=scale_2) for kernel in ("numba", "torch")))


@pytest.mark.parametrize("kernel", KERNELS)
def test_codes_are_the_nearest_values_with_ties_to_even(kernel: str) -> None:
    """A largest weight of 6 * 448 makes the scale of the tensor 1, and the block of 6 has a scale of 1."""
    source = torch.zeros(2, 32)
    source[0, 0], source[0, 16] = 2688.0, 6.0
    borders = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    source[0, 17:32] = torch.tensor([*borders, 0.26, -0.25, -0.75, -5.0, 4.9, 0.0, -0.0, 2.0])
    codes, scale, scale_2 = quantized(source, kernel)
    assert (scale_2.item(), scale[0].tolist()) == (1.0, [448.0, 1.0])
    for k in range(16, 32):
        exact = Fraction(abs(float(source[0, k])))
        best = min(range(8), key=lambda c: (abs(GRID[c] - exact), c % 2))
        code = int(codes[0, k // 2]) >> (4 * (k % 2)) & 15
        assert code == best | (8 if source[0, k] < 0 else 0), float(source[0, k])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", MODES)
def test_blocks_without_a_scale(kernel: str, mode: str) -> None:
    """Zeros, and blocks whose scale would be below half of 2^-9, have 0.125; above that it is subnormal.

    A target of 4 makes a scale of a block for which a target of 6 makes none.
    """
    largest, lifted = spread(mode) / 6, 0.125 if mode == "default" else 2.0**-9
    source = torch.zeros(1, 80)
    source[0, 0] = 6 * largest  # scale_2 is 1
    source[0, 32], source[0, 48], source[0, 64] = 6 * 2.0**-10 * 0.99, 6 * 2.0**-10 * 1.01, 6 * 2.0**-9
    codes, scale, scale_2 = quantized(source, kernel, mode)
    assert scale_2.item() == 1.0
    assert scale[0].tolist() == [largest, 0.125, lifted, 2.0**-9, 2.0**-9]
    assert values_of((codes, scale, scale_2), (1, 80))[0, [16, 64]].tolist() == [0.0, 6 * 2.0**-9]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [0.0, 1e-45, 2.0**-126, 7e-36, 3e-35, 1e-20, 3e38])
def test_tensors_of_any_size_have_finite_scales(kernel: str, mode: str, value: float) -> None:
    source = torch.full((3, 40), value)
    codes, scale, scale_2 = quantized(source, kernel, mode)
    assert torch.isfinite(scale.float()).all()
    assert 0 < scale_2.item() < torch.inf
    got = values_of((codes, scale, scale_2), (3, 40))
    if value > 1e-35:
        torch.testing.assert_close(got, source, rtol=0.07, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_codes_of_a_last_block_are_filled_up_with_zeros(kernel: str) -> None:
    codes, scale, _ = quantized(torch.full((2, 17), -1.0), kernel)
    assert (codes.shape, scale.shape) == ((2, 16), (2, 2))
    assert codes[:, 8].tolist() == [0x0F, 0x0F]
    assert not codes[:, 9:].any()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", MODES)
def test_any_part_of_a_tensor_once_its_scale_is_known(kernel: str, mode: str) -> None:
    generator = torch.Generator().manual_seed(4)
    source = (torch.randn(40, 200, generator=generator) * 0.02).bfloat16()
    kernels, whole, parts = kernels_of(kernel, mode), quantized(source, kernel, mode), filled(NVFP4, 40, 200)
    amax = torch.zeros(NVFP4.amax_shape(40, 200))
    for rows in (slice(0, 7), slice(7, 40)):
        assert kernels.observe(source[rows], amax) == 0
    kernels.finish_scales(amax, parts[1:])
    for rows in (slice(7, 40), slice(0, 7)):
        for first, last in ((112, 200), (0, 112)):
            kinds = zip(NVFP4.tensors, parts, strict=True)
            own = tuple(
                part[slice(*kind.rows(rows.start, rows.stop)), kind.columns(first, last, 200)] for kind, part in kinds
            )
            assert kernels.quantize(source[rows, first:last], own, None, True) == 0
    assert same(parts, whole)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_better_of_four_and_six(kernel: str) -> None:
    """The scale that has the smaller squared error, each worked out from the values that codes stand for."""
    generator = torch.Generator().manual_seed(0)
    source = (torch.randn(64, 512, generator=generator) * 0.02).bfloat16()
    _, scale, scale_2 = quantized(source, kernel, "mse")
    multiplier = spread("mse") / float(source.float().abs().max())
    amax = source.float().view(64, 32, 16).abs().amax(-1)
    choices = [(multiplier * amax / target).to(torch.float8_e4m3fn).float() for target in (6.0, 4.0)]
    errors = []
    for choice in choices:
        unit = (choice * scale_2)[..., None]
        ratio = source.float().view(64, 32, 16) / unit
        grid = torch.tensor([float(value) for value in GRID])
        nearest = grid[(ratio.abs()[..., None] - grid).abs().argmin(-1)]
        errors.append(((ratio.abs() - nearest) * unit).double().square().sum(-1))
    six, four = (scale.float() == choice for choice in choices)
    assert (six | four).all()
    assert 0.2 < four.float().mean() < 0.7
    clear = (errors[0] - errors[1]).abs() > 1e-4 * errors[0]
    assert torch.equal(four[clear], (errors[1] < errors[0])[clear])


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_tie_between_four_and_six_keeps_six(kernel: str) -> None:
    source = torch.zeros(1, 32)
    source[0, 0], source[0, 16] = spread("mse"), 12.0  # nothing else: both targets lose nothing
    _, scale, _ = quantized(source, kernel, "mse")
    assert scale[0].tolist() == [256.0, 2.0]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("mode", "expected"), [("default", 20.43), ("mse", 21.2)])
def test_sqnr_of_gaussian_weights(kernel: str, mode: str, expected: float) -> None:
    source = (torch.randn(256, 2048, generator=torch.Generator().manual_seed(5)) * 0.02).bfloat16()
    got, tensors = stats.new_statistics(), filled(NVFP4, 256, 2048)
    assert kernels_of(kernel, mode).quantize(source, tensors, got) == 0
    assert stats.sqnr_db(got) == pytest.approx(expected, abs=0.1)
    error = source.double() - values_of(tensors, (256, 2048)).double()
    assert got[stats.NOISE] == pytest.approx(float(error.square().sum()), rel=1e-5)
    assert got[stats.MAX_ERROR] == pytest.approx(float(error.abs().max()), rel=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_elements_above_the_largest_code_are_counted(kernel: str) -> None:
    source = torch.zeros(1, 32)
    source[0, 0] = 2688.0
    source[0, 16:20] = torch.tensor([6 * 1.03, 6 * 1.03, 6.0, 1.0])  # a scale of 1.03 is 1 in E4M3
    got = stats.new_statistics()
    assert kernels_of(kernel).quantize(source, filled(NVFP4, 1, 32), got) == 0
    assert got[[stats.SATURATED, stats.ZERO, stats.COUNT]].tolist() == [2, 27, 32]


@pytest.mark.parametrize("kernel", KERNELS)
def test_maxima_that_do_not_fit_are_named(kernel: str) -> None:
    tensors = filled(NVFP4, 2, 32)
    with pytest.raises(ValueError, match=r"scales of maxima \[2, 2\] must be written"):
        kernels_of(kernel).finish_scales(torch.zeros(2, 2), tensors[1:])
    with pytest.raises(ValueError, match=r"a weight is the tensors weight, weight_scale, weight_scale_2"):
        kernels_of(kernel).quantize(torch.zeros(2, 32), tensors[:2])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_tensor_scale_is_told_from_the_multiplier(mode: str, dtype: torch.dtype) -> None:
    """For every maximum of weights in BF16 and FP16 whose multiplier is finite, though the mode is not known."""
    codec = nvfp4.Nvfp4Codec(mode)
    amax = torch.arange(1, 1 << 15, dtype=torch.int16).view(dtype).float()
    scale_2 = codec.scales_from_amax(amax[torch.isfinite(amax)])
    multiplier = codec.multiplier(scale_2)
    usable = torch.isfinite(multiplier) & (multiplier.reciprocal() != 0)
    assert torch.equal(nvfp4.Nvfp4Codec().scale_2_of(multiplier[usable]), scale_2[usable])


def test_any_other_multiplier_is_divided_by() -> None:
    multiplier = torch.tensor([3.0, 1234.5678, 0.1])
    got = nvfp4.Nvfp4Codec().scale_2_of(multiplier)
    torch.testing.assert_close(got, multiplier.reciprocal(), rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("multiplier", [0.0, -1.0, float("inf"), float("-inf"), float("nan")])
def test_a_multiplier_that_is_none_has_no_tensor_scale(multiplier: float) -> None:
    assert nvfp4.Nvfp4Codec().scale_2_of(torch.tensor([multiplier])).isnan().all()
