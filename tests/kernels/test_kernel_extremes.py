"""Weights at the ends of what their type can hold: values stay finite, and what is lost is measured and counted."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from quantload.kernels import formats
from quantload.kernels import statistics as st
from quantload.kernels.formats import SCALE_MODES, Tensors, WeightFormat
from quantload.kernels.registry import OPERATIONS, candidates, kernel_set
from runners import Runner
from tested_formats import MX, TESTED
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS, COLUMNS = 6, 290
RELATIVE = {"e2m1": 0.3, "e2m3": 0.08, "e3m2": 0.15, "e4m3": 0.08, "fnuz": 0.08, "int8": 0.005, "nl4": 0.2}
"""Largest error of a weight that is not saturated, in parts of the largest one that shares its scale."""
SMALLEST_STEP = {
    formats.MX: 2.0**-126,
    formats.MX_ROWS: 2.0**-125,
    formats.TENSOR_SCALED: 1e-35,
    formats.NON_LINEAR: 2.0**-118,
}
"""What a format cannot tell from zero; 1e-7 for those whose rules give scales a least size."""


def extremes(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Matrices of the largest and the smallest numbers of a dtype, alone, together, and among ordinary weights."""
    info, generator = torch.finfo(dtype), torch.Generator().manual_seed(0)
    usual = torch.randn(ROWS, COLUMNS, generator=generator) * 0.02
    signs = torch.randint(0, 2, (ROWS, COLUMNS), generator=generator) * 2.0 - 1
    for name, value in (("max", info.max), ("min", info.min), ("half of it", info.max / 2)):
        for base, around in (("weights", usual), ("zeros", torch.zeros_like(usual))):
            yield f"{name} among {base}", _with(around, 3, 5, value).to(dtype)
    yield "max beside min", _with(_with(usual, 3, 5, info.max), 3, 6, info.min).to(dtype)
    yield "all max", torch.full_like(usual, info.max).to(dtype)
    yield "all max or min", (signs * info.max).to(dtype)
    binade = 2.0 ** math.floor(math.log2(info.max))
    steps = 1 + torch.arange(ROWS * COLUMNS).view(COLUMNS, ROWS).T.contiguous() / (ROWS * COLUMNS)
    yield "the topmost binade", (steps * binade).clamp(max=info.max).to(dtype)
    yield "the topmost binade with both signs", (steps * binade * signs).clamp(info.min, info.max).to(dtype)
    yield "anything", ((torch.rand(ROWS, COLUMNS, generator=generator) * 2 - 1) * info.max).to(dtype)
    yield "smallest normal numbers", (signs * info.smallest_normal).to(dtype)
    yield "subnormal numbers", (usual * 10 * info.smallest_normal).to(dtype)
    yield "a subnormal number", _with(torch.zeros_like(usual), 3, 5, info.smallest_normal / 4).to(dtype)
    yield "max among the smallest", _with(signs * info.smallest_normal, 3, 5, info.max).to(dtype)
    yield "zeros of both signs", (signs * 0.0).to(dtype)


def _with(values: Tensor, row: int, column: int, value: float) -> Tensor:
    changed = values.clone()
    changed[row, column] = value
    return changed


def plain(runner: Runner, source: Tensor) -> Tensors:
    """Codes and scales by the torch reference."""
    kernels = runner.kernels
    reference = kernel_set(kernels.format.name, "cpu", {"quantize": "torch"}, scale_mode=kernels.scale_mode)
    tensors = tuple(tensor.cpu() for tensor in runner.empty(*source.shape))
    assert reference.quantize(source, tensors) == 0
    return tensors


def shared_maxima(fmt: WeightFormat, source: Tensor) -> Tensor:
    """The largest magnitude among those that share a scale with each element, float64."""
    blocks = fmt.read_as
    height, width = blocks.block_rows or ROWS, blocks.block_cols or COLUMNS
    padded = torch.nn.functional.pad(source.double().abs(), (0, -COLUMNS % width, 0, -ROWS % height))
    tall, wide = len(padded) // height, padded.shape[1] // width
    amax = padded.view(tall, height, wide, width).amax((1, 3))
    return amax.repeat_interleave(height, 0).repeat_interleave(width, 1)[:ROWS, :COLUMNS]


def assert_finite_and_measured(runner: Runner, dtype: torch.dtype, name: str, source: Tensor) -> None:
    fmt, got = runner.format, st.new_statistics(runner.device)
    tensors = runner.quantize(source, got)
    got = got.cpu()
    for one, other in zip(tensors, plain(runner, source), strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), name
    for wide in {torch.float32, torch.bfloat16, dtype}:
        assert runner.dequantize(tensors, (ROWS, COLUMNS), wide).isfinite().all(), f"{name} as {wide}"
    x, values = source.double(), runner.dequantize(tensors, (ROWS, COLUMNS)).double()
    error = (x - values).abs()
    signal, amax = x.square().sum(), x.abs().max()
    assert got[st.COUNT] == x.numel(), name
    assert got[st.AMAX] == amax, name
    assert got[st.ZERO] == (values == 0).sum(), name
    assert got.isfinite().all(), name
    # A sum of float32 squares keeps nothing of what is 2^-23 of the largest.
    torch.testing.assert_close(got[st.NOISE], error.square().sum(), rtol=2e-3, atol=1e-13 * float(signal) + 1e-70)
    torch.testing.assert_close(got[st.SIGNAL], signal, rtol=1e-4, atol=1e-70)
    torch.testing.assert_close(got[st.MAX_ERROR], error.max(), rtol=1e-3, atol=1e-6 * float(amax))
    assert math.isnan(st.sqnr_db(got)) == (not source.any()), name

    relative = 0.005 if fmt.element == "uint8" else RELATIVE.get(fmt.element, 0.15)
    least = SMALLEST_STEP.get(fmt.family, 1e-7) if fmt.family is not None else 0.0
    # Blocks far below the maximum of the tensor or row have `EMPTY_SCALE`: half a step of it.
    tensor_wide = (2.1e-5 if fmt.family is formats.TENSOR_SCALED else 0.0) * float(amax)
    tensor_wide += (6e-7 if fmt.family is formats.NON_LINEAR else 0.0) * float(amax)
    far = error > relative * shared_maxima(fmt, source) + least + tensor_wide
    assert far.sum() <= got[st.SATURATED], f"{name}: {far.sum()} far off, {got[st.SATURATED]} said to be saturated"


@pytest.mark.interpreted
def test_the_largest_weights_stay_finite_and_are_measured(runner: Runner) -> None:
    found = dict(extremes(torch.float32))
    for name in ("max beside min", "the topmost binade with both signs"):
        assert_finite_and_measured(runner, torch.float32, name, found[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_weights_stay_finite_and_are_measured(runner: Runner, dtype: torch.dtype) -> None:
    for name, source in extremes(dtype):
        assert_finite_and_measured(runner, dtype, name, source)


LEAST_ERROR = [
    (name, kernel.name)
    for name in TESTED
    if name in SCALE_MODES["mse"]
    for kernel, reason in candidates("quantize", name, "cpu", "mse")
    if reason is None
]


@pytest.mark.parametrize(("name", "kernel"), LEAST_ERROR)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_weights_under_scales_of_the_least_error(name: str, kernel: str, dtype: torch.dtype) -> None:
    runner = Runner(kernel_set(name, "cpu", dict.fromkeys(OPERATIONS[:4], kernel), scale_mode="mse"), "cpu")
    for said, source in extremes(dtype):
        assert_finite_and_measured(runner, dtype, said, source)


@pytest.mark.formats(*MX)
@pytest.mark.interpreted
def test_a_largest_weight_becomes_the_largest_code(runner: Runner) -> None:
    """OCP MX: the element saturates; its scale is the last under which no code is infinite."""
    element = runner.format.mx_element
    for dtype, top in ((torch.bfloat16, 127), (torch.float32, 127), (torch.float16, 15)):
        source = torch.zeros(1, 32, dtype=dtype)
        source[0, :2] = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min])
        got = st.new_statistics(runner.device)
        tensors = runner.quantize(source, got)
        assert tensors[1].tolist() == [[127 + top - element.emax]]
        largest = element.largest * 2.0 ** (top - element.emax)
        assert runner.dequantize(tensors, (1, 32))[0, :2].tolist() == [largest, -largest]
        assert got[st.SATURATED] == 2


@pytest.mark.parametrize("kernel", ["torch", "numba"])
def test_two_passes_make_the_scales_of_one(kernel: str) -> None:
    """What is observed piece by piece is not followed further than what is quantized at once."""
    rules = (formats.FP8_CHANNEL, formats.FP8_TENSOR, formats.FP8_BLOCK, formats.INT8_CHANNEL)
    for fmt in (*rules, formats.NVFP4, formats.NL4):
        kernels = kernel_set(fmt.name, "cpu", dict.fromkeys(OPERATIONS[:4], kernel))
        for name, source in extremes(torch.float32):
            once = fmt.empty(ROWS, COLUMNS)
            assert kernels.quantize(source, once) == 0
            amax = torch.zeros(fmt.amax_shape(ROWS, COLUMNS))
            for rows in ((0, 4), (4, ROWS)):
                of_rows = slice(*rows) if len(amax) == ROWS else slice(None)
                assert kernels.observe(source[slice(*rows)], amax[of_rows]) == 0
            twice = fmt.empty(ROWS, COLUMNS)
            kernels.finish_scales(amax, twice[1:])
            assert kernels.quantize(source, twice, scales_known=True) == 0
            for one, other in zip(once, twice, strict=True):
                assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), (fmt.name, name)


def test_noise_that_is_infinite_is_said_to_be() -> None:
    vector = st.new_statistics()
    vector[[st.COUNT, st.SIGNAL, st.NOISE]] = torch.tensor([1.0, 1.0, math.inf], dtype=torch.float64)
    assert st.sqnr_db(vector) == -math.inf
