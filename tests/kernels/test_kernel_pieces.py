"""The same bytes come out however a weight is cut, and a kernel touches nothing outside its views."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantload.kernels import statistics as stats
from quantload.kernels.formats import FORMATS, Tensors, WeightFormat
from quantload.kernels.registry import kernel_set
from runners import Runner
from tested_formats import QUANTIZED, filled

INTERPRETED = ("mxfp4", "mxfp6_e2m3", "nvfp4", "nl4", "fp8_block", "fp8_channel", "int8_channel", "int4_group0_f32")
"""Formats whose Triton kernels are run in the interpreter in every run; the longer group takes all of them."""


def weights(rows: int, cols: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(3 * torch.randn(rows, 1, generator=generator))
    return (torch.randn(rows, cols, generator=generator) * spread * 0.02).to(dtype)


def cuts(extent: int, align: int | None, fractions: list[float]) -> list[int]:
    """Sorted cut positions in 0 .. extent at multiples of `align`; only the ends where pieces must be whole."""
    if align is None:
        return [0, extent]
    inner = {int(f * extent) // align * align for f in fractions}
    return sorted({0, extent, *inner})


def part_of(fmt: WeightFormat, tensors: Tensors, r0: int, r1: int, c0: int, c1: int, cols: int) -> Tensors:
    """What belongs to rows [r0, r1) and columns [c0, c1) of a weight."""
    kinds = zip(fmt.tensors, tensors, strict=True)
    return tuple(tensor[slice(*kind.rows(r0, r1)), kind.columns(c0, c1, cols)] for kind, tensor in kinds)


def in_one_pass(name: str) -> bool:
    """Whether a part that is not the whole matrix can be quantized without having seen the rest."""
    return FORMATS[name].maxima.block_cols != 0 or FORMATS[name].block_cols == 0


FRACTIONS = st.lists(st.floats(0, 1), max_size=4)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from([name for name in QUANTIZED if in_one_pass(name)]),
    rows=st.integers(1, 300),
    cols=st.integers(1, 300),
    row_cuts=FRACTIONS,
    col_cuts=FRACTIONS,
    order=st.randoms(use_true_random=False),
)
def test_one_pass_pieces_give_the_bytes_of_the_whole(
    name: str, rows: int, cols: int, row_cuts: list[float], col_cuts: list[float], order: random.Random
) -> None:
    kernels, fmt = kernel_set(name, "cpu"), FORMATS[name]
    source = weights(rows, cols)
    whole, pieces = filled(fmt, rows, cols), filled(fmt, rows, cols)
    total, parts = stats.new_statistics(), stats.new_statistics()
    assert kernels.quantize(source, whole, total) == 0
    down, across = cuts(rows, fmt.block_rows or None, row_cuts), cuts(cols, fmt.block_cols or None, col_cuts)
    work = [(r, c) for r in pairwise(down) for c in pairwise(across)]
    order.shuffle(work)
    for (r0, r1), (c0, c1) in work:
        assert kernels.quantize(source[r0:r1, c0:c1], part_of(fmt, pieces, r0, r1, c0, c1, cols), parts) == 0
    assert_equal_outputs(whole, pieces)
    assert_same_statistics(parts, total)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from([name for name in QUANTIZED if not FORMATS[name].whole_rows]),
    rows=st.integers(1, 300),
    cols=st.integers(1, 300),
    row_cuts=FRACTIONS,
    col_cuts=FRACTIONS,
    order=st.randoms(use_true_random=False),
)
def test_two_passes_give_the_bytes_of_one(
    name: str, rows: int, cols: int, row_cuts: list[float], col_cuts: list[float], order: random.Random
) -> None:
    """Pieces of the two passes start at a block where blocks repeat, anywhere where one scale spans the extent."""
    kernels, fmt = kernel_set(name, "cpu"), FORMATS[name]
    source = weights(rows, cols, seed=1)
    whole, pieces = filled(fmt, rows, cols), filled(fmt, rows, cols)
    total, parts = stats.new_statistics(), stats.new_statistics()
    assert kernels.quantize(source, whole, total) == 0
    down, across = cuts(rows, fmt.block_rows or 1, row_cuts), cuts(cols, fmt.block_cols or fmt.packed, col_cuts)
    work = [(r, c) for r in pairwise(down) for c in pairwise(across)]
    amax = torch.zeros(fmt.amax_shape(rows, cols))
    for step in ("observe", "quantize"):
        order.shuffle(work)
        for (r0, r1), (c0, c1) in work:
            piece = source[r0:r1, c0:c1]
            if step == "observe":
                seen = amax[slice(*fmt.maxima.rows(r0, r1)), fmt.maxima.columns(c0, c1, cols)]
                assert kernels.observe(piece, seen) == 0
            else:
                part = part_of(fmt, pieces, r0, r1, c0, c1, cols)
                assert kernels.quantize(piece, part, parts, scales_known=True) == 0
        if step == "observe":
            kernels.finish_scales(amax, pieces[1:])
    assert_equal_outputs(whole, pieces)
    assert_same_statistics(parts, total)


def assert_same_statistics(got: torch.Tensor, want: torch.Tensor) -> None:
    """Noise may be a difference of float32 sums that are up to a thousand times as large: 0.001 dB."""
    close = torch.full_like(want, 1e-5)
    close[stats.NOISE] = 10.0**0.0001 - 1
    assert ((got - want).abs() <= close * want.abs()).all(), (got, want)


def guarded(tensor: torch.Tensor, margin: int, device: str) -> torch.Tensor:
    """Bytes of 77, a row and `margin` columns more on each side."""
    shape = tensor.shape[0] + 2, (tensor.shape[1] + 2 * margin) * tensor.itemsize
    return torch.full(shape, 77, dtype=torch.uint8, device=device).view(tensor.dtype)


@pytest.mark.interpreted(formats=INTERPRETED, dtype=torch.bfloat16, cols=200)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("cols", [96, 200])
def test_strided_views_and_guard_bytes(runner: Runner, dtype: torch.dtype, cols: int) -> None:
    rows, margin = 140, 16
    source = weights(rows, cols, seed=2, dtype=dtype).to(runner.device)
    want = runner.quantize(source)
    wide_source = torch.full((rows, cols + 8), torch.nan, dtype=dtype, device=runner.device)
    wide_source[:, 3 : 3 + cols] = source
    wide = [guarded(tensor, margin, runner.device) for tensor in want]
    views = tuple(each[1:-1, margin:-margin] for each in wide)
    assert runner.kernels.quantize(wide_source[:, 3 : 3 + cols], views) == 0
    assert_equal_outputs(tuple(view.cpu() for view in views), want)
    out = torch.full((rows, cols + 2), 77.0, device=runner.device)
    runner.kernels.dequantize(views, out[:, 1:-1])
    assert torch.equal(out[:, 1:-1].cpu(), runner.dequantize(want, (rows, cols)))
    for tensor, untouched in zip(wide, (guarded(each, margin, runner.device) for each in want), strict=True):
        tensor[1:-1, margin:-margin] = untouched[1:-1, margin:-margin]
        assert torch.equal(tensor.view(torch.uint8), untouched.view(torch.uint8))
    assert (out[:, 0] == 77).all()
    assert (out[:, -1] == 77).all()


@pytest.mark.interpreted(formats=INTERPRETED, dtype=torch.bfloat16, where=(0, 0))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("where", "value"), [((0, 0), torch.nan), ((139, 199), torch.inf), ((77, 33), -torch.inf)])
def test_nonfinite_elements_are_counted(
    runner: Runner, dtype: torch.dtype, where: tuple[int, int], value: float
) -> None:
    source = weights(140, 200, seed=3, dtype=dtype)
    source[where] = value
    tensors = runner.empty(140, 200)
    amax = torch.zeros(runner.format.amax_shape(140, 200), device=runner.device)
    assert runner.kernels.quantize(source.to(runner.device), tensors) == 1
    assert runner.kernels.quantize(source.to(runner.device), tensors, None, True) == 1
    assert runner.kernels.observe(source.to(runner.device), amax) == 1
    source[5, :10] = value
    count = 10 + (where[0] != 5)
    assert runner.kernels.quantize(source.to(runner.device), tensors) == count
    assert runner.kernels.observe(source.to(runner.device), amax) == count


def test_largest_finite_values_are_not_taken_for_infinite(runner: Runner) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        source = torch.full((2, 64), torch.finfo(dtype).max, dtype=dtype)
        tensors = runner.quantize(source)
        for scales, kind in zip(tensors[1:], runner.format.scales, strict=True):
            assert kind.dtype != torch.float32 or torch.isfinite(scales).all()
        assert runner.dequantize(tensors, (2, 64)).min() > 0


@pytest.mark.interpreted
def test_empty_matrices(runner: Runner) -> None:
    for shape in ((0, 64), (4, 0)):
        tensors = runner.empty(*shape)
        assert runner.kernels.quantize(torch.zeros(shape, dtype=torch.bfloat16, device=runner.device), tensors) == 0


@pytest.mark.interpreted
def test_arguments_that_do_not_fit_are_named(runner: Runner) -> None:
    source = weights(4, 64)
    codes, scales, *outer = runner.empty(4, 64)
    with pytest.raises(ValueError, match="codes of a"):
        runner.kernels.quantize(source, (codes[:3], scales, *outer))
    with pytest.raises(ValueError, match="scales of a"):
        runner.kernels.quantize(source, (codes, scales.double(), *outer))
    with pytest.raises(ValueError, match="bfloat16, float16 or float32"):
        runner.kernels.quantize(source.double(), (codes, scales, *outer))
    with pytest.raises(ValueError, match="contiguous"):
        runner.kernels.quantize(weights(64, 4).t(), (codes, scales, *outer))
    with pytest.raises(ValueError, match=r"scales of a|scale_2 of a"):
        runner.kernels.observe(source, torch.zeros(9, 9))


def assert_equal_outputs(left: Tensors, right: Tensors) -> None:
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
