"""The same bytes come out however a weight is cut, and a kernel touches nothing outside its views."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantload.kernels import statistics as stats
from quantload.kernels.formats import FORMATS
from quantload.kernels.registry import kernel_set
from tested_formats import QUANTIZED


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


def block_range(start: int, stop: int, block: int) -> slice:
    return slice(start // block, -(-stop // block)) if block else slice(0, 1)


FRACTIONS = st.lists(st.floats(0, 1), max_size=4)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(QUANTIZED),
    rows=st.integers(1, 300),
    cols=st.integers(1, 300),
    row_cuts=FRACTIONS,
    col_cuts=FRACTIONS,
    order=st.randoms(use_true_random=False),
)
def test_one_pass_pieces_give_the_bytes_of_the_whole(name, rows, cols, row_cuts, col_cuts, order):
    kernels, fmt = kernel_set(name, "cpu"), FORMATS[name]
    source = weights(rows, cols)
    whole, pieces = new_outputs(fmt, rows, cols), new_outputs(fmt, rows, cols)
    total, parts = stats.new_statistics(), stats.new_statistics()
    assert kernels.quantize(source, whole, total) == 0
    down, across = cuts(rows, fmt.block_rows or None, row_cuts), cuts(cols, fmt.block_cols or None, col_cuts)
    work = [(r, c) for r in pairwise(down) for c in pairwise(across)]
    order.shuffle(work)
    for (r0, r1), (c0, c1) in work:
        codes = pieces[0][r0:r1, fmt.tensors[0].columns(c0, c1, cols)]
        scales = pieces[1][block_range(r0, r1, fmt.block_rows), fmt.scales[0].columns(c0, c1, cols)]
        assert kernels.quantize(source[r0:r1, c0:c1], (codes, scales), parts) == 0
    assert_equal_outputs(whole, pieces)
    torch.testing.assert_close(parts, total, rtol=1e-5, atol=0)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from([name for name in QUANTIZED if not FORMATS[name].whole_rows]),
    rows=st.integers(1, 300),
    cols=st.integers(1, 300),
    row_cuts=FRACTIONS,
    col_cuts=FRACTIONS,
    order=st.randoms(use_true_random=False),
)
def test_two_passes_give_the_bytes_of_one(name, rows, cols, row_cuts, col_cuts, order):
    """Pieces of the two passes start at a block where blocks repeat, anywhere where one scale spans the extent."""
    kernels, fmt = kernel_set(name, "cpu"), FORMATS[name]
    source = weights(rows, cols, seed=1)
    whole, pieces = new_outputs(fmt, rows, cols), new_outputs(fmt, rows, cols)
    total, parts = stats.new_statistics(), stats.new_statistics()
    assert kernels.quantize(source, whole, total) == 0
    down, across = cuts(rows, fmt.block_rows or 1, row_cuts), cuts(cols, fmt.block_cols or fmt.packed, col_cuts)
    work = [(r, c) for r in pairwise(down) for c in pairwise(across)]
    amax = torch.zeros(fmt.amax_shape(rows, cols))
    for step in ("observe", "quantize"):
        order.shuffle(work)
        for (r0, r1), (c0, c1) in work:
            piece = source[r0:r1, c0:c1]
            blocks = (block_range(r0, r1, fmt.block_rows), fmt.scales[0].columns(c0, c1, cols))
            if step == "observe":
                assert kernels.observe(piece, amax[blocks]) == 0
            else:
                codes = pieces[0][r0:r1, fmt.tensors[0].columns(c0, c1, cols)]
                assert kernels.quantize(piece, (codes, pieces[1][blocks]), parts, scales_known=True) == 0
        if step == "observe":
            kernels.finish_scales(amax, (pieces[1],))
    assert_equal_outputs(whole, pieces)
    torch.testing.assert_close(parts, total, rtol=1e-5, atol=0)


@pytest.mark.interpreted(dtype=torch.bfloat16, cols=200)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("cols", [96, 200])
def test_strided_views_and_guard_bytes(runner, dtype, cols):
    rows, margin = 140, 16
    source = weights(rows, cols, seed=2, dtype=dtype).to(runner.device)
    want_codes, want_scales = runner.quantize(source)
    wide_source = torch.full((rows, cols + 8), torch.nan, dtype=dtype, device=runner.device)
    wide_source[:, 3 : 3 + cols] = source
    codes, scales = runner.empty(rows + 2, cols + 64)
    code_shape, scale_shape = runner.format.code_shape(rows, cols), runner.format.scale_shape(rows, cols)
    raw_codes = torch.full((rows + 2, code_shape[1] + 2 * margin), 77, dtype=torch.uint8, device=runner.device)
    raw_scales = torch.full((scale_shape[0] + 2, scale_shape[1] + 2), 77, device=runner.device).to(scales.dtype)
    codes = raw_codes.view(codes.dtype)[1:-1, margin:-margin]
    scales = raw_scales[1:-1, 1:-1]
    assert runner.kernels.quantize(wide_source[:, 3 : 3 + cols], (codes, scales)) == 0
    assert torch.equal(codes.cpu().view(torch.uint8), want_codes.view(torch.uint8))
    assert torch.equal(scales.cpu(), want_scales)
    out = torch.full((rows, cols + 2), 77.0, device=runner.device)
    runner.kernels.dequantize((codes, scales), out[:, 1:-1])
    assert torch.equal(out[:, 1:-1].cpu(), runner.dequantize(want_codes, want_scales, (rows, cols)))
    raw_codes[1:-1, margin:-margin] = 77
    raw_scales[1:-1, 1:-1] = 77
    assert (raw_codes == 77).all()
    assert (raw_scales == 77).all()
    assert (out[:, 0] == 77).all()
    assert (out[:, -1] == 77).all()


@pytest.mark.interpreted(dtype=torch.bfloat16, where=(0, 0))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("where", "value"), [((0, 0), torch.nan), ((139, 199), torch.inf), ((77, 33), -torch.inf)])
def test_nonfinite_elements_are_counted(runner, dtype, where, value):
    source = weights(140, 200, seed=3, dtype=dtype)
    source[where] = value
    codes, scales = runner.empty(140, 200)
    amax = torch.zeros(runner.format.scale_shape(140, 200), device=runner.device)
    assert runner.kernels.quantize(source.to(runner.device), (codes, scales)) == 1
    assert runner.kernels.quantize(source.to(runner.device), (codes, scales), None, True) == 1
    assert runner.kernels.observe(source.to(runner.device), amax) == 1
    source[5, :10] = value
    count = 10 + (where[0] != 5)
    assert runner.kernels.quantize(source.to(runner.device), (codes, scales)) == count
    assert runner.kernels.observe(source.to(runner.device), amax) == count


def test_largest_finite_values_are_not_taken_for_infinite(runner):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        source = torch.full((2, 64), torch.finfo(dtype).max, dtype=dtype)
        codes, scales = runner.quantize(source)
        if runner.format.scale_dtype == torch.float32:
            assert torch.isfinite(scales).all()
        assert runner.dequantize(codes, scales, (2, 64)).min() > 0


@pytest.mark.interpreted
def test_empty_matrices(runner):
    for shape in ((0, 64), (4, 0)):
        codes, scales = runner.empty(*shape)
        assert (
            runner.kernels.quantize(torch.zeros(shape, dtype=torch.bfloat16, device=runner.device), (codes, scales))
            == 0
        )


@pytest.mark.interpreted
def test_arguments_that_do_not_fit_are_named(runner):
    source = weights(4, 64)
    codes, scales = runner.empty(4, 64)
    with pytest.raises(ValueError, match="codes of a"):
        runner.kernels.quantize(source, (codes[:3], scales))
    with pytest.raises(ValueError, match="scales of a"):
        runner.kernels.quantize(source, (codes, scales.double()))
    with pytest.raises(ValueError, match="bfloat16, float16 or float32"):
        runner.kernels.quantize(source.double(), (codes, scales))
    with pytest.raises(ValueError, match="contiguous"):
        runner.kernels.quantize(weights(64, 4).t(), (codes, scales))
    with pytest.raises(ValueError, match="scales of a"):
        runner.kernels.observe(source, torch.zeros(9, 9))


def new_outputs(fmt, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.full(fmt.code_shape(rows, cols), 77, dtype=torch.uint8).view(fmt.code_dtype)
    return codes, torch.full(fmt.scale_shape(rows, cols), 77, dtype=fmt.scale_dtype)


def assert_equal_outputs(left: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
