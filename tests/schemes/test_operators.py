"""The operators that stand for kernels in graphs: they do what the kernels do, and say what will come out."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from quantload.kernels.formats import FORMATS
from quantload.kernels.registry import kernel_set
from quantload.schemes import activations as act
from quantload.schemes import operators
from quantload.schemes.activations import Activation
from torch import Tensor

CPU = torch.device("cpu")
T, N, K, E = 5, 48, 64, 3


def weights(name: str, experts: int | None = None) -> tuple[Tensor, Tensor]:
    """The codes and scales of random matrices [N, K]."""
    fmt, kernels = FORMATS[name], kernel_set(name, CPU)
    count = experts or 1
    codes = torch.empty(count, *fmt.code_shape(N, K), dtype=fmt.code_dtype)
    scales = torch.empty(count, *fmt.scale_shape(N, K), dtype=fmt.scale_dtype)
    for each in range(count):
        kernels.quantize(torch.randn(N, K, generator=torch.Generator().manual_seed(each)), (codes[each], scales[each]))
    return (codes[0], scales[0]) if experts is None else (codes, scales)


def arguments(operator: str, name: str) -> tuple[Any, tuple[Any, ...], str]:
    """The function behind an operator, its arguments, and what describes its kernels."""
    kernels = kernel_set(name, CPU)
    x = torch.randn(T, K, generator=torch.Generator().manual_seed(9))
    if operator == "linear":
        rest: tuple[Any, ...] = (x, weights(name), torch.ones(N), N, K)
    else:
        rest = (x, weights(name, E), None, torch.tensor([0, 2, 2, 5], dtype=torch.int32), N, K)
    return getattr(kernels, operator), rest, operators.describe_kernels(kernels, CPU)


@pytest.mark.parametrize("operator", ["linear", "experts"])
@pytest.mark.parametrize("name", ["mxfp4", "fp8_block", "int4_group32_f16"])
def test_a_matmul(operator: str, name: str) -> None:
    function, rest, chosen = arguments(operator, name)
    want = function(*rest)
    assert torch.equal(operators.call(operator, function, chosen, *rest), want)
    registered = getattr(torch.ops.quantload, operator).default
    assert torch.equal(registered(*rest, chosen), want)
    torch.library.opcheck(registered, (*rest, chosen), test_utils="test_faketensor")


@pytest.mark.parametrize("activations", [act.MXFP4, act.FP8_STATIC, act.FP8_GROUP], ids=str)
@pytest.mark.parametrize("tokens", [0, T])
def test_rounding(activations: act.ActivationFormat, tokens: int) -> None:
    rounding, x = Activation(activations, CPU), torch.randn(tokens, K)
    scale = torch.tensor([0.1]) if activations.static else None
    chosen = operators.describe_activation(rounding)
    want = rounding(x, scale)
    assert torch.equal(operators.call("rounded", rounding, chosen, x, scale), want)
    assert torch.equal(torch.ops.quantload.rounded(x, scale, chosen), want)
    torch.library.opcheck(
        torch.ops.quantload.rounded.default, (x, scale, chosen), test_utils=("test_schema", "test_faketensor")
    )


def test_what_kernels_are_chosen_by_chooses_them_again() -> None:
    for overrides in ({}, {"linear": "torch"}):
        kernels = kernel_set("mxfp4", CPU, overrides)
        assert operators._kernels(operators.describe_kernels(kernels, CPU)).names == kernels.names
    for activations in (act.MXFP4, act.INT8_STATIC, act.FP8_GROUP):
        rounding = Activation(activations, CPU)
        assert operators._activation(operators.describe_activation(rounding)) == rounding


def test_schemes_do_not_import_the_tracer() -> None:
    """It takes seconds, which what builds no model need not spend."""
    code = "import sys, quantload.schemes.registry; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
