"""Every kernel gives the bytes of the plain arithmetic, for every value a source type can hold."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

import pytest
import torch
from quantload.kernels.formats import Tensors
from quantload.kernels.nl4_levels import FURTHEST, LEAST_ROW_EXPONENT, LEVELS
from quantload.kernels.registry import kernel_set
from runners import Runner
from tested_formats import FP8, FP8_E4M3FN, INT8, MX
from torch import Tensor

GRID = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)]


def plain(contender: Runner, source: torch.Tensor) -> Tensors:
    """Codes and scales by the torch reference on the CPU."""
    tensors = tuple(t.cpu() for t in contender.empty(*source.shape))
    assert kernel_set(contender.format.name, "cpu", {"quantize": "torch"}).quantize(source, tensors) == 0
    return tensors


def assert_same_bytes(contender: Runner, source: torch.Tensor) -> None:
    for got, want in zip(contender.quantize(source), plain(contender, source), strict=True):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def blocks_of_each_value(values: torch.Tensor) -> torch.Tensor:
    """Rows of 32: runs of neighbours, random mixtures, and each value under every block maximum of its scale range."""
    generator = torch.Generator().manual_seed(0)
    padded = torch.cat((values, values.new_zeros(-len(values) % 32)))
    neighbours = padded.view(-1, 32)
    mixed = padded[torch.randperm(len(padded), generator=generator)].view(-1, 32)
    parts = [neighbours, mixed]
    for lift in (0, 1, 2, 3, 5):
        lifted = neighbours.clone()
        top = lifted[:, 31].float().abs() * 2.0**lift
        lifted[:, 0] = top.clamp(max=torch.finfo(values.dtype).max).to(values.dtype)
        parts.append(lifted)
    return torch.cat(parts)


@pytest.mark.formats(*MX)
@pytest.mark.interpreted(formats=("mxfp4",), dtype="bf16")
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_mx_of_every_value(contender: Runner, all_bf16: Tensor, all_f16: Tensor, dtype: str) -> None:
    source = blocks_of_each_value(all_bf16 if dtype == "bf16" else all_f16)
    assert_same_bytes(contender, source)
    assert_same_bytes(contender, source.view(8, -1))


@pytest.mark.formats("mxfp4")
def test_mxfp4_is_the_nearest_value_with_ties_to_even(runner: Runner) -> None:
    """Against exact rational arithmetic: thresholds, their neighbours, and random values, at small and large scales."""
    steps = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 6.5])
    near = torch.cat((steps, steps * (1 + 2.0**-7), steps * (1 - 2.0**-8), torch.zeros(4)))
    block = torch.cat((near, torch.tensor([6.9375]))).bfloat16()
    for exponent in (-133, -128, -126, -125, -124, -60, 0, 60, 120, 125):
        source = (block.double() * 2.0**exponent).to(torch.bfloat16).view(1, 32)
        codes, scales = runner.quantize(source)
        byte = int(scales[0, 0])
        for k, value in enumerate(source[0].double().tolist()):
            exact = Fraction(abs(value)) / Fraction(2) ** (byte - 127)
            best = min(range(8), key=lambda c: (abs(GRID[c] - exact), c % 2))
            code = int(codes[0, k // 2]) >> (4 * (k % 2)) & 15
            assert code & 7 == best, (exponent, k, value, byte)
            assert (code >> 3 == 1) == (value < 0)


@pytest.mark.formats("mxfp4")
def test_mxfp4_zero_blocks(runner: Runner) -> None:
    source = torch.zeros(2, 96, dtype=torch.bfloat16)
    source[0, 3] = -0.0
    source[1, 40] = 1.0
    codes, scales = runner.quantize(source)
    assert scales.tolist() == [[0, 0, 0], [0, 125, 0]]
    assert codes[0, 1] == 0x80
    assert int(codes.ne(0).sum()) == 2


@pytest.mark.formats(*FP8)
@pytest.mark.interpreted(formats=("fp8_channel",), dtype="bf16")
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_fp8_of_every_value_under_many_scales(contender: Runner, all_bf16: Tensor, all_f16: Tensor, dtype: str) -> None:
    assert_same_bytes_under_many_maxima(contender, all_bf16 if dtype == "bf16" else all_f16)


@pytest.mark.formats(INT8)
@pytest.mark.interpreted(dtype="bf16")
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_int8_of_every_value_under_many_scales(
    contender: Runner, all_bf16: Tensor, all_f16: Tensor, dtype: str
) -> None:
    assert_same_bytes_under_many_maxima(contender, all_bf16 if dtype == "bf16" else all_f16)


def assert_same_bytes_under_many_maxima(contender: Runner, values: torch.Tensor) -> None:
    """Rows (or matrices, or blocks) that hold all values up to one maximum, for maxima over the whole range.

    A block of a row holds neighbours, which a maximum elsewhere does not change: one row of all values is enough there.
    """
    magnitudes = values[values >= 0].unique()
    generator = torch.Generator().manual_seed(1)
    chosen = magnitudes[torch.randint(1, len(magnitudes), (8,), generator=generator)].tolist()
    is_block = contender.format.block_rows == 128
    for top in [*chosen, float(magnitudes[1]), float(magnitudes[-1]), 1.0, 0.875, 127.0, 254.0]:
        below = values[values.abs() <= top]
        side = below if len(below) > 128 else below.repeat(2)
        if not is_block or len(below) == len(values):
            assert_same_bytes(contender, side.view(1, -1))
        if is_block:
            near = side[side.abs() >= top / 1024]
            assert_same_bytes(contender, near[: len(near) // 32 * 32].view(32, -1))


@pytest.mark.formats("nl4")
@pytest.mark.interpreted
def test_nl4_blocks_under_the_smallest_scales_are_within_their_reach(contender: Runner) -> None:
    """Levels under each small code, in units of code 1, beside a largest element of up to 139 times the code."""
    generator = torch.Generator().manual_seed(5)
    below = torch.tensor([level for level in LEVELS if abs(level) != max(map(abs, LEVELS))])
    blocks = []
    for code in range(1, 10):
        amax = torch.arange(87 * code, 140 * code, code)
        amax *= 2 * torch.randint(0, 2, amax.shape, generator=generator) - 1
        others = code * below[torch.randint(0, len(below), (len(amax), 31), generator=generator)]
        blocks.append(torch.cat((amax[:, None], others), 1))
    source = torch.cat(blocks) * 2.0 ** (LEAST_ROW_EXPONENT - 9)
    assert_same_bytes(contender, source)
    _, scale, scale_2 = contender.quantize(source)
    assert (source.abs() <= FURTHEST * scale.float().abs() * scale_2).all()


@pytest.mark.parametrize("exponent", [-40, -20, 0, 20, 100])
def test_float32_sources(contender: Runner, exponent: int) -> None:
    generator = torch.Generator().manual_seed(exponent)
    source = torch.randn(64, 512, generator=generator) * 2.0**exponent
    assert_same_bytes(contender, source)
    if (
        contender.format.name == "mxfp4"
    ):  # exactly on and next to a threshold, where rounding to BF16 first would be wrong
        ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 4.0]).repeat(4) * 2.0**exponent
        nudged = torch.nextafter(ties, torch.tensor(torch.inf))
        assert_same_bytes(contender, torch.stack((ties, nudged, torch.nextafter(ties, torch.tensor(0.0)))))


@pytest.mark.interpreted(formats=(*MX, *FP8_E4M3FN, INT8, "int4_group128_f16", "int4_group0_f32"))
def test_float32_bit_patterns(contender: Runner) -> None:
    generator = torch.Generator().manual_seed(3)
    bits = torch.randint(-(2**31), 2**31, (256, 384), generator=generator, dtype=torch.int64).to(torch.int32)
    source = bits.view(torch.float32)
    assert_same_bytes(contender, torch.where(torch.isfinite(source), source, 0.0))


@pytest.mark.parametrize("cols", [1, 2, 15, 31, 32, 33, 63, 100, 129, 257])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_odd_sizes(contender: Runner, cols: int, dtype: torch.dtype) -> None:
    source = torch.randn(3, cols, generator=torch.Generator().manual_seed(cols)).to(dtype)
    assert_same_bytes(contender, source)


def test_zero_rows_have_finite_scales(runner: Runner) -> None:
    source = torch.zeros(130, 160, dtype=torch.bfloat16)
    tensors = runner.quantize(source)
    assert all(torch.isfinite(scales.float()).all() for scales in tensors[1:])
    values = runner.dequantize(tensors, (130, 160))
    assert torch.equal(values, torch.zeros(130, 160))


@pytest.mark.interpreted(shape=(5, 33))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (130, 200), (128, 256)])
def test_dequantize(contender: Runner, shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    codes, scales, *outer = contender.empty(*shape)
    codes.view(torch.uint8).copy_(torch.randint(0, 256, codes.shape, generator=generator))
    raw = codes.view(torch.uint8)
    if contender.format.code_dtype == torch.float8_e4m3fn:
        raw[(raw & 127) == 127] = 3
    elif contender.format.code_dtype == torch.float8_e4m3fnuz:
        raw[raw == 128] = 3
    if contender.format.scale_dtype == torch.uint8:
        scales.copy_(torch.randint(0, 252, scales.shape, generator=generator))
    else:
        scales.copy_(torch.rand(scales.shape, generator=generator))
    tensors = codes, scales, *(each.fill_(0.37) for each in outer)
    want = torch.empty(shape, dtype=dtype)
    plain_set = kernel_set(contender.format.name, "cpu", {"dequantize": "torch"})
    plain_set.dequantize(tuple(each.cpu() for each in tensors), want)
    got = contender.dequantize(tensors, shape, dtype)
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.interpreted
def test_every_code_byte_dequantizes_to_its_meaning(runner: Runner) -> None:
    """All codes but NaN against tables built here from the definition of the format."""
    fmt = runner.format
    if fmt.name == "int8_channel":
        codes, values = torch.arange(-128, 128).to(torch.int8), [float(c) for c in range(-128, 128)]
    elif fmt.name in ("mxfp4", "mxfp4_rows", "nvfp4"):
        codes, values = torch.arange(256, dtype=torch.uint8), small_floats(2, 1, 1)
        values = [values[c] for byte in range(256) for c in (byte & 15, byte >> 4)]
    elif fmt.name == "nl4":
        codes = torch.arange(256, dtype=torch.uint8)
        values = [float(LEVELS[c]) for byte in range(256) for c in (byte & 15, byte >> 4)]
    elif fmt.scale_words == 2:  # the zero point is 2, as the scale is
        codes, bits = torch.arange(256, dtype=torch.uint8), fmt.code_bits
        values = [(byte >> at & (1 << bits) - 1) - 2.0 for byte in range(256) for at in range(0, 8, bits)]
    elif fmt.code_bits == 6:
        codes, values = six_bit_bytes(range(64)), small_floats(*((2, 3, 1) if fmt.name == "mxfp6_e2m3" else (3, 2, 3)))
    else:
        fnuz = fmt.code_dtype == torch.float8_e4m3fnuz
        values = small_floats(4, 3, 8 if fnuz else 7)
        for nan in [0x80] if fnuz else [0x7F, 0xFF]:
            values[nan] = values[0]
        byte = torch.arange(256, dtype=torch.uint8)
        codes = torch.where(byte == 0x80 if fnuz else byte & 0x7F == 0x7F, 0, byte).view(fmt.code_dtype)
    scales = torch.full(fmt.scale_shape(1, len(values)), 2.0)
    scales = (
        torch.full_like(scales, 128, dtype=torch.uint8)
        if fmt.scale_dtype == torch.uint8
        else scales.to(fmt.scale_dtype)
    )
    outer = [torch.ones(each.shape(1, len(values))) for each in fmt.scales[1:]]
    if fmt.name == "mxfp4_rows":
        scales[:, -4:] = torch.ones(1).view(torch.uint8)  # the multiplier of the row
    got = runner.dequantize((codes.view(1, -1), scales, *outer), (1, len(values)))
    want = 2 * torch.tensor([values])
    assert torch.equal(got.view(torch.int32), want.view(torch.int32))


def small_floats(exponent_bits: int, mantissa_bits: int, bias: int) -> list[float]:
    """What the codes of a small float mean, the negative ones last; special codes are not known here."""
    values = []
    for code in range(1 << exponent_bits + mantissa_bits):
        exponent, mantissa = divmod(code, 1 << mantissa_bits)
        fraction = mantissa / (1 << mantissa_bits) + (exponent > 0)
        values.append(fraction * 2.0 ** (max(exponent, 1) - bias))
    return values + [-v for v in values]


def six_bit_bytes(codes: Iterable[int]) -> torch.Tensor:
    """Six-bit codes as one little-endian number, in bytes."""
    number = sum(code << 6 * i for i, code in enumerate(codes))
    return torch.tensor(list(number.to_bytes(number.bit_length() + 7 >> 3, "little")), dtype=torch.uint8)
