"""NL4: levels of unequal distance, signed scales of the least error, the same bytes from every kernel."""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from quantload.kernels import nl4_levels
from quantload.kernels import statistics as stats
from quantload.kernels.formats import Tensors
from quantload.kernels.nl4_levels import LEVELS, LONGEST, STEPS, THRESHOLDS, row_scale
from quantload.kernels.registry import OPERATIONS, KernelSet, candidates, kernel_set
from torch import Tensor

KERNELS = [kernel.name for kernel, reason in candidates("quantize", "nl4", "cpu") if reason is None]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SORTED = sorted(LEVELS)
WRITTEN = {torch.bfloat16: "453369b14cbade95", torch.float16: "7d6b94ceb4a38a31", torch.float32: "c954b37fef5a21e1"}
"""Beginnings of the digests of what version 1 of the own form holds of certain weights."""


def kernels_of(kernel: str) -> KernelSet:
    return kernel_set("nl4", "cpu", dict.fromkeys(OPERATIONS, kernel))


def quantize(source: Tensor, kernel: str = "numba", measured: Tensor | None = None) -> Tensors:
    kernels = kernels_of(kernel)
    tensors = kernels.format.empty(*source.shape)
    assert kernels.quantize(source, tensors, measured) == 0
    return tensors


def values_of(tensors: Tensors, shape: tuple[int, int], kernel: str = "numba") -> Tensor:
    out = torch.empty(shape)
    kernels_of(kernel).dequantize(tensors, out)
    return out


def codes_of(codes: Tensor) -> Tensor:
    return torch.stack((codes & 15, codes >> 4), -1).flatten(1)


def uneven(rows: int, cols: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator) * torch.exp(3 * torch.randn(rows, 1, generator=generator))


def assert_same(one: Tensors, other: Tensors) -> None:
    for got, want in zip(one, other, strict=True):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def test_levels_rise_with_signed_codes_and_no_integer_lies_halfway_between_two() -> None:
    assert [LEVELS[code & 15] for code in range(-8, 8)] == SORTED
    assert LEVELS[0] == 0
    assert all((low + high) % 2 == 1 for low, high in pairwise(SORTED))
    assert SORTED[0] == -LONGEST
    assert SORTED[-1] < LONGEST
    for whole in range(-127, 128):
        nearest = min(SORTED, key=lambda level: abs(level - whole))
        assert SORTED[sum(whole > threshold for threshold in THRESHOLDS)] == nearest
    assert torch.tensor(1.0) / LONGEST == nl4_levels.RECIPROCAL


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("scale", [1.0, 0.8125, 448.0, 2.0**-6])
def test_levels_times_a_scale_have_their_own_codes_and_nothing_is_lost(kernel: str, sign: float, scale: float) -> None:
    row = torch.tensor([LEVELS, LEVELS[::-1]]).flatten()[None] * scale * sign
    measured = stats.new_statistics()
    codes, scales, scale_2 = tensors = quantize(row, kernel, measured)
    assert codes_of(codes)[0, :16].tolist() == list(range(16))
    assert float(scales.float() * scale_2) == scale * sign
    assert torch.equal(values_of(tensors, (1, 32), kernel), row)
    assert measured[stats.NOISE] == measured[stats.SATURATED] == 0
    assert measured[stats.ZERO] == 2


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_largest_goes_to_the_longest_level_of_two_the_negative_one(kernel: str) -> None:
    rows = torch.zeros(4, 32)
    rows[0, 3], rows[1, 3], rows[2, :2] = 106.0, -106.0, torch.tensor([106.0, -106.0])
    rows[3] = -0.0
    codes, scales, scale_2 = quantize(rows, kernel)
    assert (scales.float() > 0).flatten().tolist() == [False, True, True, True]
    assert codes_of(codes)[[0, 1], 3].tolist() == [8, 8]
    assert not codes[3].any()
    assert scale_2[3].item() == 2.0**-112


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_best_of_four_scales(kernel: str, dtype: torch.dtype) -> None:
    source = uneven(32, 200, seed=0).clamp(-3e4, 3e4).to(dtype)
    _, scales, scale_2 = quantize(source, kernel)
    padded = torch.nn.functional.pad(source.double(), (0, 24)).view(32, 7, 32)
    amax = padded.abs().amax(-1)
    nearest = (amax / scale_2.double() / LONGEST).float().to(torch.float8_e4m3fn).view(torch.uint8).int()
    levels = torch.tensor(SORTED, dtype=torch.float64)
    chosen = scales.view(torch.uint8).int() & 0x7F
    errors = []
    for code in [*(nearest + step for step in STEPS), chosen]:
        scale = code.to(torch.uint8).view(torch.float8_e4m3fn).double() * torch.sign(scales.double()) * scale_2
        whole = (padded.float() * (1.0 / scale.float())[..., None]).round().double()
        off = (whole[..., None] - levels).abs().amin(-1).square().sum(-1) * scale.square()
        errors.append(torch.where(amax > 127.5 * scale.abs(), torch.inf, off))
    assert torch.allclose(torch.stack(errors[:-1]).amin(0), errors[-1], rtol=1e-9)
    tried = torch.stack([chosen == nearest + step for step in STEPS])
    assert tried.any(0).all()
    assert tried.any((1, 2)).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_bf16_value_as_the_largest_of_its_row(kernel: str, all_bf16: Tensor) -> None:
    finite = all_bf16[torch.isfinite(all_bf16)]
    _, _, scale_2 = quantize(finite[:, None], kernel)
    assert scale_2.flatten().tolist() == [row_scale(abs(value)) for value in finite.tolist()]
    assert (scale_2.view(torch.int32) & 0x7FFFFF == 0).all()


def test_every_bf16_value_under_scales_of_all_sizes(all_bf16: Tensor) -> None:
    """Neighbours in a block, and each block under larger and larger maxima of its row."""
    values = all_bf16[torch.isfinite(all_bf16)]
    blocks = torch.cat((values, values.new_zeros(-len(values) % 32))).view(-1, 32)
    for lift in (0, 7, 15, 30):
        top = (blocks.float().abs().amax(1, keepdim=True) * 2.0**lift).clamp(max=3.0e38)
        rows = torch.cat((blocks, top.bfloat16()), 1)
        assert_same(quantize(rows), quantize(rows, "torch"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_under_scales_of_every_size(dtype: torch.dtype, all_bf16: Tensor, all_f16: Tensor) -> None:
    values = all_bf16 if dtype == torch.bfloat16 else all_f16
    blocks = torch.cat((values, values.new_zeros(-len(values) % 32))).view(-1, 32)
    shuffled = blocks.flatten()[torch.randperm(blocks.numel(), generator=torch.Generator().manual_seed(0))].view(-1, 32)
    largest = float(torch.finfo(dtype).max)
    for lift in range(34):
        for each in (blocks, shuffled):
            top = (each.float().abs().amax(1, keepdim=True) * 2.0**lift).clamp(max=largest)
            rows = torch.cat((each, top.to(dtype)), 1)
            assert_same(quantize(rows), quantize(rows, "torch"))


def e4m3_of(byte: int) -> float:
    """What a byte stands for, worked out from its bits."""
    exponent, fraction = byte >> 3 & 15, byte & 7
    value = math.ldexp(8 + fraction, exponent - 10) if exponent else math.ldexp(fraction, -9)
    return -value if byte & 0x80 else value


FINITE = [byte for byte in range(256) if byte & 0x7F != 0x7F]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", [1.0, 2.0**-112, 2.0**100])
def test_every_code_under_every_scale_stands_for_its_level(kernel: str, dtype: torch.dtype, row: float) -> None:
    codes = torch.arange(256).to(torch.uint8).expand(len(FINITE), 256)
    scales = torch.tensor(FINITE).to(torch.uint8).view(torch.float8_e4m3fn)[:, None].expand(len(FINITE), 16)
    tensors = codes.contiguous(), scales.contiguous(), torch.full((len(FINITE), 1), row)
    out = torch.empty(len(FINITE), 512, dtype=dtype)
    kernels_of(kernel).dequantize(tensors, out)
    levels = torch.tensor([LEVELS[half] for byte in range(256) for half in (byte & 15, byte >> 4)], dtype=torch.float64)
    units = torch.tensor([e4m3_of(byte) * row for byte in FINITE], dtype=torch.float64)
    want = units[:, None] * levels
    assert torch.equal(want, want.float().double())  # float32 holds them all
    assert torch.equal(out, want.float().to(dtype))


def codes_by_hand(source: Tensor, scales: Tensor, scale_2: Tensor) -> list[list[int]]:
    """Codes of float32 [r, 32] under the scales of their blocks, by the rule, a number at a time."""
    found = []
    for row, scale, of_row in zip(source.tolist(), scales.float().flatten(), scale_2.flatten(), strict=True):
        inverse = float(torch.tensor(1.0) / (scale * of_row))
        codes = []
        for value in row:
            y = float(torch.tensor(value * inverse, dtype=torch.float64).float())  # the product of two has 48 bits
            whole = round(min(max(y, -127.0), 127.0))  # ties to even
            level = min(SORTED, key=lambda each: abs(each - whole))
            codes.append(LEVELS.index(level))
        found.append(codes)
    return found


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("unit", [1.0, 2.0**-20, 1.375 * 2.0**8])
def test_every_tie_between_integers_goes_to_the_even_one(kernel: str, sign: float, unit: float) -> None:
    ties = torch.arange(-105, 106) + 0.5
    blocks = torch.cat((ties, torch.zeros(-len(ties) % 31))).view(-1, 31)
    source = torch.cat((blocks, torch.full((len(blocks), 1), -106.0)), 1) * sign * unit
    codes, scales, scale_2 = quantize(source, kernel)
    assert codes_of(codes).tolist() == codes_by_hand(source, scales, scale_2)
    if unit == 1.0:
        assert (scales.float().abs() * scale_2 == 1.0).any()  # some stay ties


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_are_those_of_checkpoints_and_caches_that_were_written(kernel: str, dtype: torch.dtype) -> None:
    """A change of them is another format."""
    number = torch.arange(96 * 320)
    spread = 2.0 ** ((number // 320 * 5 + number % 320 // 32 * 3) % 23 - 16).float()
    source = ((number * 7919 % 8191 - 4095).float() / 4096 * spread).view(96, 320)[:, :310].to(dtype)
    digest = hashlib.sha256()
    for tensor in quantize(source, kernel):
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest()[:16] == WRITTEN[dtype]


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 20),
    cols=st.integers(1, 70) | st.sampled_from([96, 128, 512, 544, 1024, 1100]),
    seed=st.integers(0, 1 << 20),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-120, 110),
    strided=st.booleans(),
)
@example(rows=12, cols=1100, seed=5198, dtype=torch.bfloat16, exponent=-105, strided=False)  # a block under code 3
def test_every_kernel_gives_the_same_bytes(
    rows: int, cols: int, seed: int, dtype: torch.dtype, exponent: int, strided: bool
) -> None:
    wide = uneven(rows, cols + 3, seed) * 2.0 ** (exponent if dtype != torch.float16 else exponent / 16)
    wide[rows // 2] = 0
    wide = wide.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    source = wide[:, :cols] if strided else wide[:, :cols].contiguous()
    got, want = stats.new_statistics(), stats.new_statistics()
    tensors, expected = quantize(source, "numba", got), quantize(source, "torch", want)
    assert_same(tensors, expected)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    assert_same(
        (values_of(tensors, (rows, cols)),),
        (values_of(expected, (rows, cols), "torch"),),
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_pieces_of_rows_under_their_scales_are_those_of_the_whole(kernel: str) -> None:
    kernels, source = kernels_of(kernel), uneven(12, 416, seed=4).bfloat16()
    whole, pieces = quantize(source, kernel), kernels.format.empty(12, 416)
    amax = torch.zeros(12, 1)
    for first, last in ((160, 416), (0, 160)):
        assert kernels.observe(source[:, first:last], amax) == 0
    kernels.finish_scales(amax, pieces[1:])
    for first, last in ((0, 32), (224, 416), (32, 224)):
        part = pieces[0][:, first // 2 : last // 2], pieces[1][:, first // 32 : last // 32], pieces[2]
        assert kernels.quantize(source[:, first:last], part, scales_known=True) == 0
    assert_same(whole, pieces)


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_beyond_a_scale_that_is_known_saturates(kernel: str) -> None:
    source = torch.cat((torch.full((1, 31), -1e6), torch.full((1, 1), 1e6)), 1)
    tensors = kernels_of(kernel).format.empty(1, 32)
    tensors[2].fill_(1.0)
    measured = stats.new_statistics()
    assert kernels_of(kernel).quantize(source, tensors, measured, scales_known=True) == 0
    assert tensors[1].float().item() == 448.0
    assert codes_of(tensors[0]).tolist() == [[8] * 31 + [7]]
    assert measured[stats.SATURATED] == 32


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_counted(kernel: str, value: float) -> None:
    source = torch.ones(20, 64)
    source[3, 40], source[19, 0], source[19, 63] = value, value, -value
    assert kernels_of(kernel).quantize(source, kernels_of(kernel).format.empty(20, 64)) == 3


def test_decibels_over_mxfp4() -> None:
    source = torch.randn(256, 1024, generator=torch.Generator().manual_seed(2)).bfloat16()
    own, plain = stats.new_statistics(), stats.new_statistics()
    quantize(source, measured=own)
    mxfp4 = kernel_set("mxfp4", "cpu")
    mxfp4.quantize(source, mxfp4.format.empty(256, 1024), plain)
    assert stats.sqnr_db(own) > stats.sqnr_db(plain) + 3.2
