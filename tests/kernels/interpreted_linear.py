"""Matmul kernels under Triton's interpreter, against the torch references; `test_triton_linear.py` runs this file.

The interpreter multiplies in float32, so only the order of additions and one rounding of the result are tolerated,
except where said. Codes and scales of activations are compared bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import interpreter_fixes
import pytest
import torch
import torch.nn.functional as F
from quantload.kernels.formats import FORMATS, MX, MXFP4, MXFP4_ROWS, Tensors
from quantload.kernels.gpu.activations import quantize_mx_activations, quantize_scaled_activations
from quantload.kernels.gpu.experts import TritonExperts
from quantload.kernels.gpu.linear import TritonLinear
from quantload.kernels.gpu.matmuls import gpu_matmuls
from quantload.kernels.gpu.scaled_mm import ScaledMmLinear
from quantload.kernels.gpu.target import GpuTarget
from quantload.kernels.reference import mx
from quantload.kernels.reference.choose import reference
from quantload.kernels.reference.row_multiplied import MultipliedExperts, MultipliedLinear
from quantload.kernels.scale_rules import FP8_BLOCK_MIN_AMAX, FP8_LARGEST
from triton.runtime import interpreter
from triton_ways import way_of

interpreter_fixes.apply()

ACTIVATIONS_TOO = [
    name
    for name, fmt in FORMATS.items()
    if len(fmt.scales) == 1 and any(kernel.rounds_activations for kernel in gpu_matmuls("linear", fmt))
]
"""But for those whose tensors have a scale of their own: `interpreted_nvfp4.py`."""
DECODED = ["mxfp6_e2m3", "mxfp6_e3m2", "mxfp8", "int4_group16_f16", "int4_group128_bf16", "int8_group0_f32"]
"""Formats that arithmetic decodes; groups narrower and wider than a tile, and of a whole row."""
GFX950 = GpuTarget("gfx950", 4)
SHAPES = [(3, 70, 1024), (40, 33, 100)]
"""Few tokens split along K and a ragged edge; more tokens than a tile holds, K that is no multiple of a block."""
TYPES = [(torch.bfloat16, "gfx950"), (torch.float16, "gfx950"), (torch.float16, "sm_80"), (torch.float32, "sm_80")]


def slow_if(condition: bool) -> list[pytest.MarkDecorator]:
    """The marks of a case that is left to the longer group where others are like it."""
    return [pytest.mark.slow] if condition else []


def quantized(name: str, n_rows: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return quantized_matrix(name, torch.randn(n_rows, k, generator=torch.Generator().manual_seed(seed)) * 0.05)


def quantized_matrix(name: str, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    fmt = FORMATS[name]
    codes = torch.zeros(fmt.code_shape(*matrix.shape), dtype=torch.uint8).view(fmt.code_dtype)
    scales = torch.zeros(fmt.scale_shape(*matrix.shape)).to(fmt.scale_dtype)
    assert reference(name).quantize(matrix, (codes, scales)) == 0
    return codes, scales


def dequantized(
    name: str, codes: torch.Tensor, scales: torch.Tensor, n_rows: int, k: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    out = torch.empty(n_rows, k, dtype=dtype)
    reference(name).dequantize((codes, scales), out)
    return out.double()


def multiplied(
    name: str, codes: torch.Tensor, scales: torch.Tensor, n_rows: int, k: int, x: torch.Tensor
) -> torch.Tensor:
    """The weight as it meets x: decoded to the type of x where scales go along K, which is exact for MX formats."""
    along_k = FORMATS[name].scale_dtype == torch.uint8 or FORMATS[name].scale_words == 2
    return dequantized(name, codes, scales, n_rows, k, x.dtype if along_k else torch.float32)


def rounded(name: str, x: torch.Tensor) -> torch.Tensor:
    """The values that activations have once they are codes of a format; scales per token, tensor or 1 x 128."""
    if name.startswith("fp8_block"):
        blocks = F.pad(x.float(), (0, -x.shape[1] % 128)).view(-1, 128)
        scale = blocks.abs().amax(1, keepdim=True).clamp(min=FP8_BLOCK_MIN_AMAX) / FP8_LARGEST
        codes = (blocks * scale.reciprocal()).to(torch.float8_e4m3fn)
        return (codes.float() * scale).view(x.shape[0], -1)[:, : x.shape[1]].double()
    return dequantized(name, *quantized_matrix(name, x), *x.shape)


def activations(tokens: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(tokens, k, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def skip_without_dot_scaled(name: str) -> None:
    if name in ("mxfp4", "mxfp8") and not hasattr(interpreter.InterpreterBuilder, "create_dot_scaled"):
        pytest.skip("this Triton's interpreter has no dot_scaled")


def assert_close(got: torch.Tensor, want: torch.Tensor, magnitude: torch.Tensor) -> None:
    """One rounding to the type of `got`, and a float32 sum: `magnitude` is the sum of |products|."""
    bound = want.abs() * torch.finfo(got.dtype).eps + magnitude * 64 * torch.finfo(torch.float32).eps + 1e-30
    worst = ((got.double() - want).abs() / bound).max()
    assert worst < 1, f"off by {float(worst)} of what rounding allows"


@pytest.mark.parametrize(
    ("tokens", "n_rows", "k", "dtype", "target", "bias_is_float32"),
    [
        pytest.param(
            *shape, *types, is_float32, marks=slow_if(shape == SHAPES[0] and (types != TYPES[0] or is_float32))
        )
        for shape, types, is_float32 in itertools.product(SHAPES, TYPES, (False, True))
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["mxfp4", *DECODED, "fp8_tensor", "fp8_block", "fp8_channel_fnuz", "int8_channel"])
def test_weight_only(
    record_property: Callable[..., Any],
    name: str,
    tokens: int,
    n_rows: int,
    k: int,
    dtype: torch.dtype,
    target: str,
    bias_is_float32: bool,
) -> None:
    record_property("kernel", f"{name} linear, weight-only")
    record_property("result", "close")
    of_every_type = ("mxfp4", "mxfp6_e2m3", "int4_group16_f16", "fp8_block")
    if (dtype != torch.bfloat16 or bias_is_float32) and name not in of_every_type:
        pytest.skip("the types of activations go the same way in every format of one byte")
    if target == "gfx950":
        skip_without_dot_scaled(name)
    codes, scales = quantized(name, n_rows, k)
    x, bias = activations(tokens, k, dtype), torch.randn(n_rows).to(torch.float32 if bias_is_float32 else dtype)
    weight = multiplied(name, codes, scales, n_rows, k, x)
    want = F.linear(x.double(), weight, bias.double())
    got = TritonLinear(FORMATS[name], way_of(name), GpuTarget(target, 4))(x, (codes, scales), bias, n_rows, k)
    assert got.dtype == dtype
    assert_close(got, want, F.linear(x.double().abs(), weight.abs()))


@pytest.mark.parametrize(
    ("name", "tokens", "n_rows", "k"),
    [
        pytest.param(name, *shape, marks=slow_if(shape == SHAPES[0] and name.endswith("_fnuz")))
        for name, shape in itertools.product(ACTIVATIONS_TOO, SHAPES)
    ],
)
def test_quantized_activations(
    record_property: Callable[..., Any], name: str, tokens: int, n_rows: int, k: int
) -> None:
    skip_without_dot_scaled(name)
    record_property("kernel", f"{name} linear, activations too")
    record_property("result", "close")
    codes, scales = quantized(name, n_rows, k)
    x = activations(tokens, k, torch.bfloat16)
    weight, seen = dequantized(name, codes, scales, n_rows, k), rounded(name, x)
    got = TritonLinear(FORMATS[name], way_of(name, True), GFX950)(x, (codes, scales), None, n_rows, k)
    assert_close(got, F.linear(seen, weight), F.linear(seen.abs(), weight.abs()))


@pytest.mark.parametrize("name", ACTIVATIONS_TOO)
def test_activations_are_quantized_as_weights_are(record_property: Callable[..., Any], name: str) -> None:
    record_property("kernel", f"{name} activations")
    if name.startswith("fp8_block"):
        pytest.skip("128 x 128 blocks for weights, 1 x 128 for activations: test_quantized_activations compares values")
    finite = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = finite[torch.isfinite(finite)]
    every = finite[torch.randperm(len(finite), generator=torch.Generator().manual_seed(0))]
    ties = torch.tensor(
        [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -5.0, 6.0, 0.0, -0.0, 448.0, 2.0**-9, 2.0**-10, 100]
    )
    for x in (every.view(8, -1), ties.repeat(3, 7)[:, :100].bfloat16(), torch.zeros(2, 64, dtype=torch.float16)):
        want_codes, want_scales = quantized_matrix(name, x)
        codes, scales = (
            quantize_mx_activations(x, FORMATS[name])
            if FORMATS[name].family is MX
            else quantize_scaled_activations(x, FORMATS[name])
        )
        assert torch.equal(codes.view(torch.uint8), want_codes.view(torch.uint8))
        assert torch.equal(scales, want_scales)


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "fp8_channel", "fp8_tensor", "int8_channel"])
def test_what_is_not_finite_stays_visible(name: str, bad: float) -> None:
    skip_without_dot_scaled(name)
    codes, scales = quantized(name, 16, 256)
    x = activations(40, 256, torch.bfloat16)
    x[3, 5] = bad
    out = TritonLinear(FORMATS[name], way_of(name, True), GFX950)(x, (codes, scales), None, 16, 256)
    assert not torch.isfinite(out[3]).any()
    assert torch.isfinite(out[:3]).all() or name.startswith("fp8_tensor")


@pytest.mark.parametrize(
    ("tokens", "n_rows", "dtype"), [(40, 48, torch.bfloat16), (40, 48, torch.float32), (3, 50, torch.bfloat16)]
)
@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["fp8_channel", "fp8_tensor"])
def test_through_torch_scaled_mm(
    name: str, tokens: int, n_rows: int, dtype: torch.dtype, bias_dtype: torch.dtype
) -> None:
    """torch's matmul of two FP8 operands, which it has for CPUs too, and Triton for what that does not take."""
    codes, scales = quantized(name, n_rows, 160)
    x, bias = activations(tokens, 160, dtype), torch.randn(n_rows).to(bias_dtype)
    linear = ScaledMmLinear(FORMATS[name], GFX950)
    assert linear.takes(x, codes, n_rows, 160) is (tokens == 40 and (dtype == torch.bfloat16 or name == "fp8_tensor"))
    weight, seen = dequantized(name, codes, scales, n_rows, 160), rounded(name, x)
    got = linear(x, (codes, scales), bias, n_rows, 160)
    assert got.dtype == dtype
    # the CPU's version scales the codes first, in float32: a rounding for every product
    magnitude = 4 * F.linear(seen.abs(), weight.abs()) + 4
    if bias_dtype != dtype:  # the product is rounded to the type of x before a bias of another type is added
        magnitude += F.linear(seen, weight).abs() * 1024
    assert_close(got, F.linear(seen, weight, bias.double()), magnitude)


@pytest.mark.parametrize("name", ["mxfp6_e2m3", "mxfp6_e3m2", "mxfp8"])
def test_every_code_under_scales_of_all_sizes(record_property: Callable[..., Any], name: str) -> None:
    """A product with the identity matrix is the weight itself, but for the sign of a zero; larger ones are infinite."""
    record_property("kernel", f"{name} weights decoded")
    fmt, scales = FORMATS[name], torch.arange(0, 240, 10, dtype=torch.uint8)[:, None].repeat(1, 8)
    every = torch.arange(256, dtype=torch.int32).repeat(24, 1)
    codes = mx.pack_fp6(every & 63) if fmt.code_bits == 6 else every.where(every & 127 != 127, 0).to(torch.uint8)
    weight = torch.empty(24, 256)
    reference(name).dequantize((codes.view(fmt.code_dtype), scales), weight)
    got = TritonLinear(fmt, way_of(name), GpuTarget("sm_90", 4))(
        torch.eye(256), (codes.view(fmt.code_dtype), scales), None, 24, 256
    )
    assert torch.equal(got.T, weight)


@pytest.mark.parametrize(
    "name",
    [
        "int4_group16_f16",
        pytest.param("int4_group64_bf16", marks=pytest.mark.slow),
        pytest.param("int4_group0_f32", marks=pytest.mark.slow),
        "int8_group256_f16",
    ],
)
def test_every_code_under_every_zero_point(record_property: Callable[..., Any], name: str) -> None:
    """A product with the identity matrix is the weight itself, of 300 columns: the last group is cut off."""
    record_property("kernel", f"{name} weights decoded")
    fmt = FORMATS[name]
    codes = torch.arange(fmt.code_shape(1, 300)[1], dtype=torch.int32).repeat(16, 1).mul(37).to(torch.uint8)
    scales = torch.randn(fmt.scale_shape(16, 300), generator=torch.Generator().manual_seed(0)).to(fmt.scale_dtype)
    scales[:, 1::2] = torch.arange(16)[:, None].to(fmt.scale_dtype)
    weight = torch.empty(16, 300)
    reference(name).dequantize((codes, scales), weight)
    got = TritonLinear(fmt, way_of(name), GpuTarget("sm_90", 4))(torch.eye(300), (codes, scales), None, 16, 300)
    assert torch.equal(got.T, weight)


def routed(experts: int, counts: list[int], nobody: int) -> tuple[torch.Tensor, int]:
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    assert len(offsets) == experts + 1
    return offsets, int(offsets[-1]) + nobody


@pytest.mark.parametrize("counts", [[0, 5, 0, 33, 1], [0, 0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("is_quantized", [False, True], ids=["weight-only", "activations too"])
@pytest.mark.parametrize("name", ["mxfp4", *DECODED[1:], "fp8_channel", "fp8_tensor", "fp8_block_fnuz", "int8_channel"])
def test_experts(record_property: Callable[..., Any], name: str, is_quantized: bool, counts: list[int]) -> None:
    """Each expert's tokens as `linear` computes them; rows of nobody are 0; an idle expert is not read."""
    if is_quantized and name not in ACTIVATIONS_TOO:
        pytest.skip("activations stay as they are")
    record_property("kernel", f"{name} experts, {'activations too' if is_quantized else 'weight-only'}")
    record_property("result", "close")
    skip_without_dot_scaled(name)
    fmt, n_rows, k = FORMATS[name], 70, 160
    pairs = [quantized(name, n_rows, k, seed) for seed in range(5)]
    codes, scales = (torch.stack(t) for t in zip(*pairs, strict=True))
    offsets, tokens = routed(5, counts, nobody=3)
    idle = [e for e, count in enumerate(counts) if not count]
    scales[idle] = 255 if scales.dtype == torch.uint8 else float("nan")
    x, bias = activations(tokens, k, torch.bfloat16), torch.randn(5, n_rows)
    out = TritonExperts(fmt, way_of(name, is_quantized), GFX950)(x, (codes, scales), bias, offsets, n_rows, k)
    seen = rounded(name, x) if is_quantized else x.double()
    for expert, (start, stop) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False)):
        if start < stop:
            weight = multiplied(name, codes[expert], scales[expert], n_rows, k, x)
            rows = seen[start:stop]
            want = F.linear(rows, weight, bias[expert].double())
            assert_close(out[start:stop], want, F.linear(rows.abs(), weight.abs()) + 4)
    assert not out[offsets[-1] :].any()


@pytest.mark.parametrize("is_quantized", [False, True], ids=["weight-only", "activations too"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_with_multipliers(record_property: Callable[..., Any], is_quantized: bool, dtype: torch.dtype) -> None:
    """The kernels of MXFP4 on scales with a gap behind each row; the product is rounded to the type of x twice."""
    record_property("kernel", f"mxfp4 with multipliers of rows, {'activations too' if is_quantized else 'weight-only'}")
    record_property("result", "close")
    skip_without_dot_scaled("mxfp4")
    n_rows, k = 70, 160
    pairs = [quantized("mxfp4_rows", n_rows, k, seed) for seed in range(3)]
    codes, scales = (torch.stack(t) for t in zip(*pairs, strict=True))
    offsets, tokens = routed(3, [0, 5, 2], nobody=3)
    x, bias = activations(tokens, k, dtype), torch.randn(3, n_rows)
    linear = MultipliedLinear(MXFP4_ROWS, TritonLinear(MXFP4, way_of("mxfp4", is_quantized), GFX950))
    experts = MultipliedExperts(MXFP4_ROWS, TritonExperts(MXFP4, way_of("mxfp4", is_quantized), GFX950))
    out = experts(x, (codes, scales), bias, offsets, n_rows, k)
    seen = rounded("mxfp4", x) if is_quantized else x.double()
    for expert, (start, stop) in enumerate([(0, 5), (5, 7)], start=1):
        weight = dequantized("mxfp4_rows", codes[expert], scales[expert], n_rows, k)
        rows, want = x[start:stop], F.linear(seen[start:stop], weight, bias[expert].double())
        magnitude = F.linear(seen[start:stop].abs(), weight.abs()) + 4
        magnitude *= 1 + torch.finfo(dtype).eps / torch.finfo(torch.float32).eps / 64  # of the product before the bias
        assert_close(out[start:stop], want, magnitude)
        assert_close(linear(rows, (codes[expert], scales[expert]), bias[expert], n_rows, k), want, magnitude)
    assert not out[offsets[-1] :].any()


def nl4(n_rows: int, k: int, seed: int, dtype: torch.dtype) -> tuple[Tensors, torch.Tensor]:
    """A weight in NL4, of which each row has another size, and what it is in the type of activations."""
    tensors, values = FORMATS["nl4"].empty(n_rows, k), torch.empty(n_rows, k, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n_rows, 1, generator=generator).exp() * 0.05
    assert reference("nl4").quantize(torch.randn(n_rows, k, generator=generator) * rows, tensors) == 0
    reference("nl4").dequantize(tensors, values)
    return tensors, values.double()


@pytest.mark.parametrize(
    ("tokens", "n_rows", "k", "dtype"),
    [
        pytest.param(*shape, dtype, marks=slow_if(shape == SHAPES[0] and dtype != torch.bfloat16))
        for shape, dtype in itertools.product(SHAPES, (torch.bfloat16, torch.float16, torch.float32))
    ],
    ids=str,
)
def test_weight_only_with_scales_of_rows(
    record_property: Callable[..., Any], tokens: int, n_rows: int, k: int, dtype: torch.dtype
) -> None:
    record_property("kernel", "nl4 linear, weight-only")
    record_property("result", "close")
    (tensors, values), x = nl4(n_rows, k, 0, dtype), activations(tokens, k, dtype)
    bias = torch.randn(n_rows)
    got = TritonLinear(FORMATS["nl4"], way_of("nl4"), GFX950)(x, tensors, bias, n_rows, k)
    assert_close(got, F.linear(x.double(), values, bias.double()), F.linear(x.double().abs(), values.abs()) + 4)


def test_weight_only_experts_with_scales_of_rows(record_property: Callable[..., Any]) -> None:
    record_property("kernel", "nl4 experts, weight-only")
    record_property("result", "close")
    n_rows, k = 70, 160
    made = [nl4(n_rows, k, seed, torch.bfloat16) for seed in range(3)]
    tensors = tuple(torch.stack(each) for each in zip(*(one for one, _ in made), strict=True))
    offsets = torch.tensor([0, 5, 5, 38], dtype=torch.int32)
    x = activations(41, k, torch.bfloat16)
    out = TritonExperts(FORMATS["nl4"], way_of("nl4"), GFX950)(x, tensors, None, offsets, n_rows, k)
    for expert, (start, stop) in enumerate(((0, 5), (5, 5), (5, 38))):
        values, rows = made[expert][1], x[start:stop].double()
        if start < stop:
            assert_close(out[start:stop], F.linear(rows, values), F.linear(rows.abs(), values.abs()))
    assert not out[38:].any()
