"""Gradients flow through quantized matmuls as through the dequantized weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from quantload.kernels.arrangement import Arrangement
from quantload.kernels.formats import Tensors
from quantload.kernels.reference.differentiable import Linear
from quantload.kernels.reference.operations import tile_rows
from quantload.kernels.registry import KernelSet, kernel_set
from tested_formats import QUANTIZED, filled
from torch import Tensor

CPU_FORMATS = [name for name in QUANTIZED if not name.endswith("fnuz")]


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def quantized(name: str, rows: int, k: int, experts: int = 1) -> tuple[KernelSet, list[tuple[Tensors, Tensor]]]:
    kernels, generator = kernel_set(name, "cpu"), torch.Generator().manual_seed(0)
    fmt, made = kernels.format, []
    for _ in range(experts):
        tensors, weight = filled(fmt, rows, k, 0), torch.empty(rows, k)
        assert kernels.quantize(torch.randn(rows, k, generator=generator), tensors) == 0
        kernels.dequantize(tensors, weight)
        made.append((tensors, weight))
    return kernels, made


@pytest.mark.parametrize("name", CPU_FORMATS)
@pytest.mark.parametrize("tokens", [1, 8, 41, 70])
def test_linear(name: str, tokens: int) -> None:
    kernels, [(tensors, weight)] = quantized(name, 300, 96)
    x = torch.randn(tokens, 96, requires_grad=True)
    bias = torch.randn(300, requires_grad=True)
    twins = [t.detach().double().requires_grad_() for t in (x, bias)]
    out = kernels.linear(x, tensors, bias, 300, 96)
    want = F.linear(twins[0], weight.double(), twins[1])
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-4)
    direction = torch.randn(tokens, 300)
    out.backward(direction)
    want.backward(direction.double())
    for got, twin in zip((x, bias), twins, strict=True):
        torch.testing.assert_close(gradient(got).double(), twin.grad, rtol=1e-4, atol=1e-4)


def test_a_weight_of_more_than_one_tile() -> None:
    """The last one, of 8 rows, is smaller than the others."""
    kernels, [(tensors, weight)] = quantized("mxfp4", 40, 1 << 16)
    assert tile_rows(kernels.format, 40, 1 << 16) == 32
    x = torch.randn(2, 1 << 16, requires_grad=True)
    direction = torch.randn(2, 40)
    kernels.linear(x, tensors, None, 40, 1 << 16).backward(direction)
    torch.testing.assert_close(x.grad, direction @ weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [3, 301])
def test_the_gradient_of_a_float32_bias_beside_bfloat16(tokens: int) -> None:
    kernels, [(tensors, _)] = quantized("mxfp4", 64, 96)
    x, bias = torch.randn(tokens, 96).bfloat16(), torch.randn(64, requires_grad=True)
    kernels.linear(x, tensors, bias, 64, 96).sum().backward()
    assert gradient(bias).dtype == torch.float32
    assert torch.equal(gradient(bias), torch.full((64,), float(tokens)))  # 301 is no BF16


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "fp8_block", "int8_channel"])
def test_experts(name: str) -> None:
    kernels, made = quantized(name, 64, 96, experts=3)
    tensors = tuple(torch.stack(each) for each in zip(*(one for one, _ in made), strict=True))
    x, offsets = torch.randn(9, 96, requires_grad=True), torch.tensor([0, 4, 4, 9])
    kernels.experts(x, tensors, None, offsets, 64, 96).sum().backward()
    for rows, expert in ((slice(0, 4), 0), (slice(4, 9), 2)):
        want = made[expert][1].sum(0).expand(rows.stop - rows.start, -1)
        torch.testing.assert_close(gradient(x)[rows], want, rtol=1e-4, atol=1e-4)


def test_two_layers_that_share_scratch_memory() -> None:
    kernels, [(tensors, weight)] = quantized("mxfp4", 96, 96)
    x = torch.randn(50, 96, requires_grad=True)
    kernels.linear(kernels.linear(x, tensors, None, 96, 96), tensors, None, 96, 96).sum().backward()
    want = (weight @ weight).sum(0).expand(50, -1)
    torch.testing.assert_close(x.grad, want, rtol=1e-3, atol=1e-3)


def test_without_gradients_the_kernel_is_called_as_it_is() -> None:
    kernels, [(tensors, _)] = quantized("mxfp4", 96, 96)
    for x in (torch.randn(2, 96), torch.randn(2, 96, requires_grad=True)):
        with torch.no_grad():
            assert kernels.linear(x, tensors, None, 96, 96).grad_fn is None
    assert kernels.linear(torch.randn(2, 96), tensors, None, 96, 96).grad_fn is None


def test_an_arrangement_without_gradients_says_so() -> None:
    kernels, [(tensors, _)] = quantized("mxfp4", 96, 96)
    assert isinstance(kernels.linear, Linear)
    arrangement = Arrangement((1, 1), lambda tensors: None, lambda tensors: tensors)
    arranged = Linear(kernels.format, kernels.linear.forward, kernels.dequantize, arrangement)
    with pytest.raises(ValueError, match="arranged for a kernel without gradients"):
        arranged(torch.randn(2, 96, requires_grad=True), tensors, None, 96, 96)


@pytest.mark.parametrize("name", ["mxfp4", "fp8_channel", "int8_channel", "mxfp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [3, 60])
def test_the_default_dtype_of_torch_changes_nothing(name: str, dtype: torch.dtype, tokens: int) -> None:
    kernels, [(tensors, _)] = quantized(name, 300, 96)
    for x in (torch.randn(tokens, 96).bfloat16(), torch.randn(tokens, 96).half()):
        want = kernels.linear(x, tensors, None, 300, 96)
        torch.set_default_dtype(dtype)
        try:
            got = kernels.linear(x, tensors, None, 300, 96)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(got, want)
