"""The Triton kernels of NVFP4 in Triton's interpreter, against the torch reference; run by `test_triton_nvfp4.py`."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import interpreter_fixes
import pytest
import torch
import torch.nn.functional as F
from quantload.kernels import statistics as st
from quantload.kernels.formats import NVFP4, Tensors
from quantload.kernels.gpu.activations import quantize_nvfp4_activations
from quantload.kernels.gpu.experts import TritonExperts
from quantload.kernels.gpu.linear import TritonLinear
from quantload.kernels.gpu.quantize import triton_quantize
from quantload.kernels.gpu.target import GpuTarget
from quantload.kernels.reference.choose import reference
from tested_formats import filled
from triton.runtime import interpreter
from triton_ways import way_of

interpreter_fixes.apply()

Record = Callable[[str, object], None]
MODES = ("default", "mse")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SM_100 = GpuTarget("sm_100", 4)
REFERENCE = reference("nvfp4")
has_dot_scaled = pytest.mark.skipif(
    not hasattr(interpreter, "_dot_scaled_scale_to_f32"), reason="this Triton's interpreter has no dot_scaled"
)


def slow_if(condition: bool) -> list[pytest.MarkDecorator]:
    """The marks of a case that is left to the longer group where others are like it."""
    return [pytest.mark.slow] if condition else []


def same(left: Tensors, right: Tensors) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(left, right, strict=True))


def weights(rows: int, cols: int, dtype: torch.dtype, exponent: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    blocks = torch.exp(2 * torch.randn(rows, -(-cols // 16), generator=generator)).repeat_interleave(16, 1)
    source = torch.randn(rows, cols, generator=generator) * blocks[:, :cols] * 0.02 * 2.0**exponent
    source[0, ::3], source[-1, ::2] = -0.0, 0.0
    return source.to(dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param(shape, dtype, marks=slow_if(shape == (64, 512) and dtype != torch.bfloat16))
        for shape, dtype in itertools.product([(1, 1), (3, 37), (33, 48), (64, 512)], DTYPES)
    ],
    ids=str,
)
def test_bytes_and_statistics(record_property: Record, mode: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    record_property("kernel", f"quantize nvfp4 {mode}")
    for exponent in (0, -90, 90) if dtype != torch.float16 else (0, -10):
        source = weights(*shape, dtype, exponent)
        got, want = filled(NVFP4, *shape), filled(NVFP4, *shape)
        measured, expected = st.new_statistics(), st.new_statistics()
        assert triton_quantize("nvfp4", mode).quantize(source, got, measured) == 0
        assert reference("nvfp4", mode).quantize(source, want, expected) == 0
        assert same(got, want)
        torch.testing.assert_close(measured, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_nonfinite_weights_are_counted_once(record_property: Record, mode: str) -> None:
    record_property("kernel", f"quantize nvfp4 {mode}")
    source = weights(8, 64, torch.bfloat16)
    source[3, 5], source[4, 60:] = torch.nan, torch.inf
    assert triton_quantize("nvfp4", mode).quantize(source, filled(NVFP4, 8, 64)) == 5


def quantized(n_rows: int, k: int, seed: int = 0) -> tuple[Tensors, torch.Tensor]:
    """A weight, and the values it stands for."""
    tensors, values = filled(NVFP4, n_rows, k), torch.empty(n_rows, k)
    matrix = torch.randn(n_rows, k, generator=torch.Generator().manual_seed(seed)) * 0.05 * (seed + 1)
    assert REFERENCE.quantize(matrix, tensors) == 0
    REFERENCE.dequantize(tensors, values)
    return tensors, values.double()


def activations(tokens: int, k: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(tokens, k, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """What activations are as codes: each token as a tensor of its own."""
    values = torch.empty(x.shape)
    for token, out in zip(x.split(1), values.split(1), strict=True):
        tensors = filled(NVFP4, *token.shape)
        assert REFERENCE.quantize(token, tensors) == 0
        REFERENCE.dequantize(tensors, out)
    return values.double()


def assert_close(got: torch.Tensor, want: torch.Tensor, magnitude: torch.Tensor) -> None:
    """One rounding to the type of `got`, and a float32 sum: `magnitude` is the sum of |products|."""
    bound = want.abs() * torch.finfo(got.dtype).eps + magnitude * 64 * torch.finfo(torch.float32).eps + 1e-30
    worst = ((got.double() - want).abs() / bound).max()
    assert worst < 1, f"off by {float(worst)} of what rounding allows"


@pytest.mark.parametrize(
    ("tokens", "n_rows", "k", "dtype"),
    [
        pytest.param(*shape, dtype, marks=slow_if(shape == (3, 70, 1024) and dtype != torch.bfloat16))
        for shape, dtype in itertools.product([(3, 70, 1024), (40, 33, 100)], DTYPES)
    ],
    ids=str,
)
def test_weight_only(record_property: Record, tokens: int, n_rows: int, k: int, dtype: torch.dtype) -> None:
    record_property("kernel", "nvfp4 linear, weight-only")
    record_property("result", "close")
    (tensors, values), x = quantized(n_rows, k), activations(tokens, k, dtype)
    bias = torch.randn(n_rows)
    got = TritonLinear(NVFP4, way_of("nvfp4"), SM_100)(x, tensors, bias, n_rows, k)
    assert_close(got, F.linear(x.double(), values, bias.double()), F.linear(x.double().abs(), values.abs()) + 4)


@has_dot_scaled
@pytest.mark.parametrize(("tokens", "n_rows", "k"), [(3, 70, 1024), (40, 33, 100), (70, 130, 160)])
def test_activations_too(record_property: Record, tokens: int, n_rows: int, k: int) -> None:
    record_property("kernel", "nvfp4 linear, activations too")
    record_property("result", "close")
    (tensors, values), x = quantized(n_rows, k), activations(tokens, k)
    got = TritonLinear(NVFP4, way_of("nvfp4", True), SM_100)(x, tensors, None, n_rows, k)
    seen = rounded(x)
    assert_close(got, F.linear(seen, values), F.linear(seen.abs(), values.abs()))


@pytest.mark.parametrize("k", [16, 100, 512])
def test_activations_are_quantized_as_weights_are(record_property: Record, k: int) -> None:
    record_property("kernel", "nvfp4 activations")
    x = activations(21, k) * torch.exp(3 * torch.randn(21, 1, generator=torch.Generator().manual_seed(0)))
    x[3], x[4, 1] = 0, torch.inf
    codes, scales, scale_2 = quantize_nvfp4_activations(x, NVFP4)
    assert torch.isnan(scale_2[4])
    for token in set(range(21)) - {4}:
        want = filled(NVFP4, 1, k)
        assert REFERENCE.quantize(x[token : token + 1], want) == 0
        got = codes[token : token + 1], scales[token : token + 1].view(torch.float8_e4m3fn), scale_2[token].view(1, 1)
        assert same(got, want)


@has_dot_scaled
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_what_is_not_finite_stays_visible(bad: float) -> None:
    tensors, _ = quantized(16, 256)
    x = activations(40, 256)
    x[3, 5] = bad
    out = TritonLinear(NVFP4, way_of("nvfp4", True), SM_100)(x, tensors, None, 16, 256)
    assert torch.isnan(out[3]).all()
    assert torch.isfinite(out[:3]).all()
    assert torch.isfinite(out[4:]).all()


@pytest.mark.parametrize("counts", [[0, 5, 0, 33, 1], [0, 0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("is_quantized", [False, pytest.param(True, marks=has_dot_scaled)])
def test_experts(record_property: Record, is_quantized: bool, counts: list[int]) -> None:
    """Each expert has a tensor scale of its own; rows of nobody are 0; an idle expert is not read."""
    record_property("kernel", f"nvfp4 experts, {'activations too' if is_quantized else 'weight-only'}")
    record_property("result", "close")
    n_rows, k = 70, 160
    made = [quantized(n_rows, k, seed) for seed in range(5)]
    tensors = tuple(torch.stack(each) for each in zip(*(one for one, _ in made), strict=True))
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    tensors[2][[expert for expert, count in enumerate(counts) if not count]] = torch.nan
    x, bias = activations(int(offsets[-1]) + 3, k), torch.randn(5, n_rows)
    out = TritonExperts(NVFP4, way_of("nvfp4", is_quantized), SM_100)(x, tensors, bias, offsets, n_rows, k)
    seen = rounded(x) if is_quantized else x.double()
    for expert, (start, stop) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False)):
        if start < stop:
            values, rows = made[expert][1], seen[start:stop]
            want = F.linear(rows, values, bias[expert].double())
            assert_close(out[start:stop], want, F.linear(rows.abs(), values.abs()) + 4)
    assert not out[offsets[-1] :].any()
