"""What the tests of every kernel do not ask of the Triton ones; run by `test_triton_quantize.py` in the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from quantload.kernels import statistics as st
from quantload.kernels.formats import FORMATS, INTEGERS, Tensors, WeightFormat
from quantload.kernels.gpu.quantize import triton_quantize
from quantload.kernels.reference.choose import reference
from quantload.kernels.reference.operations import tensor_rows
from quantload.kernels.registry import KernelSet, kernel_set
from tested_formats import TRITON, filled

ROWS, COLS = 130, 200
ONE_OF_EACH_GROUP = [fmt for i, fmt in enumerate(INTEGERS) if i % 3 == i // 3 % 3]
"""The integer formats with one dtype of scales for each number of bits and width of a group."""
QUICK = [fmt for fmt in ONE_OF_EACH_GROUP if fmt.block_cols in (16, 0)]


def plain(name: str) -> KernelSet:
    return kernel_set(name, "cpu", dict.fromkeys(("quantize", "observe", "finish_scales", "dequantize"), "torch"))


def weights(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(ROWS, COLS, generator=generator) * torch.exp(4 * torch.randn(ROWS, 1, generator=generator))
    source[3], source[4, ::2] = 0, -0.0
    return source.to(dtype)


def outputs(name: str) -> Tensors:
    return filled(FORMATS[name], ROWS, COLS)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


@pytest.mark.interpreted
@pytest.mark.parametrize("name", TRITON)
def test_two_passes(name: str, record_property: Callable[..., Any]) -> None:
    """Maxima in two parts, scales from them, codes under scales that are known: the bytes of one pass in torch."""
    record_property("kernel", f"finish_scales {name}")
    fmt, kernels, source = FORMATS[name], triton_quantize(name), weights()
    want = outputs(name)
    assert plain(name).quantize(source, want) == 0
    amax = torch.zeros(fmt.amax_shape(ROWS, COLS))
    cut = 128
    parts = ((0, cut), (cut, ROWS))
    for rows in parts:
        assert kernels.observe(source[slice(*rows)], amax[slice(*fmt.maxima.rows(*rows))]) == 0
    got = outputs(name)
    kernels.finish_scales(amax, got[1:])
    assert same(got[-1], want[-1])
    for rows in parts:
        assert kernels.quantize(source[slice(*rows)], tensor_rows(fmt, got, *rows), scales_known=True) == 0
    assert all(same(one, other) for one, other in zip(got, want, strict=True))
    if fmt.scale_dtype == torch.float32:
        kernels.finish_scales(amax, (amax,))
        assert same(amax, got[1])


@pytest.mark.interpreted
@pytest.mark.parametrize("name", TRITON)
def test_scales_of_every_exponent(name: str, record_property: Callable[..., Any]) -> None:
    record_property("kernel", f"finish_scales {name}")
    exponents = torch.arange(255, dtype=torch.int32)
    significands = torch.tensor([0, 1, 0x400000, 0x400001, 0x5FFFFF, 0x600000, 0x600001, 0x700000, 0x780000, 0x7FFFFF])
    amax = (exponents[:, None] << 23 | significands[None, :].int()).view(torch.float32)
    fmt = FORMATS[name]
    got, want = ([torch.zeros(amax.shape, dtype=each.dtype) for each in fmt.scales] for _ in range(2))
    triton_quantize(name).finish_scales(amax, tuple(got))
    plain(name).finish_scales(amax, tuple(want))
    assert all(same(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.interpreted
@pytest.mark.parametrize("name", [name for name in TRITON if FORMATS[name].code_bits == 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_byte_under_large_and_small_scales(
    name: str, dtype: torch.dtype, record_property: Callable[..., Any]
) -> None:
    """NaN codes, results that are subnormal, and results too large for the type."""
    record_property("kernel", f"dequantize {name}")
    fmt = FORMATS[name]
    codes = torch.arange(256, dtype=torch.uint8).view(fmt.code_dtype).view(1, 256)
    for exponent in (-126, -30, -8, 0, 9, 120):
        scales = torch.full(fmt.scale_shape(1, 256), 1.25 * 2.0**exponent)
        if fmt.scale_dtype == torch.uint8:
            scales = torch.full(scales.shape, 127 + exponent, dtype=torch.uint8)
        got, want = (torch.zeros(1, 256, dtype=dtype) for _ in range(2))
        triton_quantize(name).dequantize((codes, scales), got)
        plain(name).dequantize((codes, scales), want)
        finite = ~want.isnan()
        assert torch.equal(got.isnan(), want.isnan())
        assert same(got[finite], want[finite])


@pytest.mark.parametrize(
    "fmt",
    [pytest.param(fmt, id=fmt.name, marks=[pytest.mark.interpreted] * (fmt in QUICK)) for fmt in ONE_OF_EACH_GROUP],
)
def test_integers_of_every_group(fmt: WeightFormat, record_property: Callable[..., Any]) -> None:
    """Weights of one sign, zeros, ranges that no float16 scale spans, tiny ones; in one piece, and in two columns."""
    record_property("kernel", f"quantize {fmt.name}")
    record_property("kernel", f"dequantize {fmt.name}")
    source = torch.randn(7, 331, generator=torch.Generator().manual_seed(fmt.block_cols))
    source[0].abs_()
    source[1].abs_().neg_()
    source[2] = torch.tensor([0.0, -0.0, 0.0]).repeat(111)[:331]
    source[3] *= 1e30
    source[4] *= 1e-12
    source[5, ::2] = 0.5 * torch.arange(166).clamp(max=30)
    shapes = fmt.code_shape(*source.shape), fmt.scale_shape(*source.shape)
    want, got, parts = (
        (torch.full(shapes[0], 77, dtype=torch.uint8), torch.full(shapes[1], 7, dtype=fmt.scale_dtype))
        for _ in range(3)
    )
    assert plain(fmt.name).quantize(source, want) == 0
    kernels = triton_quantize(fmt.name)
    assert kernels.quantize(source, got) == 0
    assert same(got[0], want[0])
    assert same(got[1], want[1])
    for cols in (slice(0, 256), slice(256, 331)):
        words = (
            slice(2 * cols.start // fmt.block_cols, 2 * -(-cols.stop // fmt.block_cols)) if fmt.block_cols else slice(2)
        )
        codes = parts[0][:, fmt.tensors[0].columns(cols.start, cols.stop, source.shape[1])]
        assert kernels.quantize(source[:, cols], (codes, want[1][:, words]), scales_known=True) == 0
    assert same(parts[0], want[0])
    for dtype in (torch.float32, torch.bfloat16):
        values, expected = torch.zeros(source.shape, dtype=dtype), torch.zeros(source.shape, dtype=dtype)
        kernels.dequantize(got, values)
        plain(fmt.name).dequantize(want, expected)
        assert same(values, expected)


@pytest.mark.interpreted
@pytest.mark.parametrize("name", ["int4_group128_f16", "int4_group16_bf16"])
def test_integers_of_the_least_error(name: str, record_property: Callable[..., Any]) -> None:
    record_property("kernel", f"quantize {name} mse")
    source = torch.randn(5, 331, generator=torch.Generator().manual_seed(1))
    source[0].abs_()
    source[1] *= 1e30
    source[2] = torch.tensor([0.0, -0.0, 0.0]).repeat(111)[:331]
    source[3, ::2] = 0.5 * torch.arange(166).clamp(max=30)
    for dtype in (torch.float32, torch.bfloat16):
        got, want = (filled(FORMATS[name], *source.shape) for _ in range(2))
        measured, expected = st.new_statistics(), st.new_statistics()
        assert triton_quantize(name, "mse").quantize(source.to(dtype), got, measured) == 0
        assert reference(name, "mse").quantize(source.to(dtype), want, expected) == 0
        assert all(same(one, other) for one, other in zip(got, want, strict=True))
        torch.testing.assert_close(measured, expected, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="cannot be told from extremes alone"):
        triton_quantize(name, "mse").finish_scales(torch.ones(FORMATS[name].amax_shape(5, 331)), got[1:])
