"""Rows with a multiplier: the best of sixteen, the same bytes from every kernel, never worse than MXFP4."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantload.kernels import statistics as stats
from quantload.kernels.formats import MXFP4_ROWS
from quantload.kernels.reference.mxfp4 import VALUES
from quantload.kernels.reference.mxfp4_rows import split
from quantload.kernels.registry import NoKernel, candidates, kernel_set, platform_kernels
from quantload.kernels.scale_rules import CANDIDATES

KERNELS = [kernel.name for kernel, reason in candidates("quantize", "mxfp4_rows", "cpu") if reason is None]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def quantize(
    source: torch.Tensor, kernel: str = "numba", measured: torch.Tensor | None = None, name: str = "mxfp4_rows"
) -> tuple[torch.Tensor, torch.Tensor]:
    kernels = kernel_set(name, "cpu", {"quantize": kernel})
    codes = torch.full(kernels.format.code_shape(*source.shape), 77, dtype=torch.uint8)
    scales = torch.full(kernels.format.scale_shape(*source.shape), 77, dtype=torch.uint8)
    assert kernels.quantize(source, (codes, scales), measured) == 0
    return codes, scales


def values_of(codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    out = torch.empty(shape)
    kernel_set("mxfp4_rows", "cpu").dequantize((codes, scales), out)
    return out


def uneven_rows(rows: int, cols: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator) * torch.exp(3 * torch.randn(rows, 1, generator=generator))


def test_sixteenths_of_an_octave() -> None:
    assert CANDIDATES[0] == 1.0
    assert CANDIDATES[8] == torch.tensor(2.0).sqrt().item()
    assert [a < b for a, b in zip(CANDIDATES, (*CANDIDATES[1:], 2.0), strict=True)] == [True] * 16
    assert 255 not in torch.tensor(CANDIDATES).view(torch.uint8)  # a scale byte of 255 is NaN where scales are read


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("j", range(16))
def test_a_row_of_codes_times_a_candidate_has_that_multiplier(kernel: str, j: int) -> None:
    """Two blocks with scales 2^0 and 2^-3 and every code, one a block of zeros."""
    code = torch.tensor([*VALUES, *(-value for value in VALUES)]).repeat(2)
    row = torch.cat((code, torch.zeros(32), code / 8))[None] * CANDIDATES[j]
    codes, scales = quantize(row, kernel)
    bytes_, multiplier = split(scales)
    assert multiplier.item() == CANDIDATES[j]
    assert bytes_.tolist() == [[127, 0, 124]]
    every = [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2
    assert codes[0, :16].tolist() == codes[0, 32:].tolist() == every
    torch.testing.assert_close(values_of(codes, scales, (1, 96)), row, rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_bytes_of_the_multiplier_are_little_endian_behind_the_scales(kernel: str) -> None:
    source = torch.zeros(3, 40)
    source[1, :3] = torch.tensor([6.0, 2.0, 1.0]) * CANDIDATES[8]
    _, scales = quantize(source, kernel)
    assert scales.tolist() == [
        [0, 0, 0x00, 0x00, 0x80, 0x3F],
        [127, 0, 0xF3, 0x04, 0xB5, 0x3F],
        [0, 0, 0x00, 0x00, 0x80, 0x3F],
    ]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_tie_goes_to_the_smallest(kernel: str) -> None:
    """A row with one weight is exact under few candidates, and one that all keep exactly has multiplier 1."""
    codes, scales = quantize(torch.tensor([[0.0] * 31 + [-3.0]]), kernel)
    assert split(scales)[1].item() == 1.0
    assert split(scales)[0].item() == 126  # 3 is 6 * 2^-1
    assert codes[0, 15] == 0xF0


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_best_of_all_candidates(kernel: str, dtype: torch.dtype) -> None:
    source = uneven_rows(24, 200, seed=0).clamp(-6e4, 6e4).to(dtype)
    codes, scales = quantize(source, kernel)
    wide = source.double()
    own = (wide - values_of(codes, scales, (24, 200)).double()).square().sum(1)
    for candidate in CANDIDATES:
        plain_codes, plain_bytes = quantize((wide / candidate).float(), name="mxfp4")
        values = torch.empty(24, 200)
        kernel_set("mxfp4", "cpu").dequantize((plain_codes, plain_bytes), values)
        error = (wide - values.double() * candidate).square().sum(1)
        assert (own <= error * (1 + 1e-5)).all()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 700),
    seed=st.integers(0, 1 << 20),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-120, 110),
)
def test_every_kernel_gives_the_same_bytes(rows: int, cols: int, seed: int, dtype: torch.dtype, exponent: int) -> None:
    source = uneven_rows(rows, cols, seed) * 2.0 ** (exponent if dtype != torch.float16 else exponent / 16)
    source[rows // 2] = 0
    source = source.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    got, want = stats.new_statistics(), stats.new_statistics()
    codes, scales = quantize(source, "numba", got)
    expected_codes, expected_scales = quantize(source, "torch", want)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(codes, expected_codes)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("cols", [1, 40, 333, 4096])
def test_no_row_loses_more_than_in_mxfp4(cols: int) -> None:
    source = uneven_rows(64, cols, seed=1).bfloat16()
    for row in source.split(1):
        own, plain = stats.new_statistics(), stats.new_statistics()
        quantize(row, measured=own)
        quantize(row, "torch", plain, "mxfp4")  # which measures exactly
        assert own[stats.NOISE] <= plain[stats.NOISE] * (1 + 1e-5)


@pytest.mark.parametrize(("cols", "gain"), [(64, 0.8), (512, 0.35), (4096, 0.1)])
def test_decibels_over_mxfp4(cols: int, gain: float) -> None:
    source = torch.randn(256, cols, generator=torch.Generator().manual_seed(2)).bfloat16()
    own, plain = stats.new_statistics(), stats.new_statistics()
    quantize(source, measured=own)
    quantize(source, measured=plain, name="mxfp4")
    assert stats.sqnr_db(own) > stats.sqnr_db(plain) + gain


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_multiplier_that_is_known_is_left_alone(kernel: str) -> None:
    source = torch.full((1, 32), 9.0)
    scales = torch.tensor([[127, *torch.tensor([1.5]).view(torch.uint8).tolist()]], dtype=torch.uint8)
    known, codes = scales.clone(), torch.zeros(1, 16, dtype=torch.uint8)
    assert kernel_set("mxfp4_rows", "cpu", {"quantize": kernel}).quantize(source, (codes, scales), None, True) == 0
    assert torch.equal(scales, known)
    assert (values_of(codes, scales, (1, 32)) == 9.0).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_amax_alone_is_not_enough(kernel: str) -> None:
    kernels = kernel_set("mxfp4_rows", "cpu", {"finish_scales": kernel})
    with pytest.raises(ValueError, match="mxfp4_rows: the multiplier of a row cannot be told from maxima"):
        kernels.finish_scales(torch.ones(2, 6), (torch.zeros(2, 6, dtype=torch.uint8),))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_dtype", [None, torch.bfloat16, torch.float32], ids=str)
def test_experts_are_as_many_linears(kernel: str, dtype: torch.dtype, bias_dtype: None) -> None:
    kernels = kernel_set("mxfp4_rows", "cpu", dict.fromkeys(("linear", "experts"), kernel))
    experts, rows, cols = 3, 40, 72
    codes, scales = map(torch.stack, zip(*(quantize(uneven_rows(rows, cols, seed)) for seed in range(3)), strict=True))
    generator = torch.Generator().manual_seed(5)
    bias = None if bias_dtype is None else torch.randn(experts, rows, generator=generator).to(bias_dtype)
    x, offsets = torch.randn(9, cols, generator=generator).to(dtype), torch.tensor([0, 4, 4, 7], dtype=torch.int32)
    got = kernels.experts(x, (codes, scales), bias, offsets, rows, cols)
    for expert, (start, stop) in enumerate([(0, 4), (4, 4), (4, 7)]):
        own = None if bias is None else bias[expert]
        want = kernels.linear(x[start:stop], (codes[expert], scales[expert]), own, rows, cols)
        torch.testing.assert_close(got[start:stop], want)
    assert (got[7:] == 0).all()  # tokens of nobody


def test_matmuls_are_those_of_mxfp4() -> None:
    for operation in ("linear", "experts", "dequantize"):
        own = [
            (kernel.name, kernel.rounds_activations) for kernel in platform_kernels(operation, "mxfp4_rows", "gfx950")
        ]
        blocks = platform_kernels(operation, "mxfp4", "gfx950")
        assert own == [(k.name, k.rounds_activations) for k in blocks if k.arrangement is None]
    (aiter,) = (reason for kernel, reason in candidates("linear", "mxfp4_rows", "cuda") if kernel.name == "aiter")
    assert aiter == "brings scales into an order of its own, where multipliers of rows have no place"


def test_scales_have_no_other_mode() -> None:
    with pytest.raises(NoKernel, match="mxfp4_rows has no scale mode 'mse'; it has default"):
        kernel_set("mxfp4_rows", "cpu", scale_mode="mse")


def test_the_format_is_read_by_rows() -> None:
    codes, scales = quantize(uneven_rows(8, 100, seed=3))
    assert torch.equal(values_of(codes[2:5], scales[2:5], (3, 100)), values_of(codes, scales, (8, 100))[2:5])
    assert scales.shape == MXFP4_ROWS.scale_shape(8, 100)
