"""Under autocast a quantized layer does what the layer it stands for does: the same dtypes, the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import BY_NAME, logits
from quantload import LoadOptions, load_quantized
from quantload.model.quantized import QuantizedLinear
from quantload.schemes.registry import ENTRIES, SchemeFactory
from torch import Tensor, nn

Checkpoint = Callable[[str], Path]
ROWS, COLUMNS = 48, 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HALVES = (torch.bfloat16, torch.float16)
LINEAR = [entry.name for entry in ENTRIES if entry.linear is not None]


def linear(scheme: str, dtype: torch.dtype, options: LoadOptions | None = None) -> Any:
    """A quantized linear layer with a bias of a dtype."""
    made: Any = SchemeFactory(torch.device("cpu"), options or LoadOptions()).linear(scheme)
    generator = torch.Generator().manual_seed(0)
    bias = nn.Parameter(torch.randn(ROWS, generator=generator).to(dtype))
    module = QuantizedLinear(made, COLUMNS, ROWS, bias, False)
    weight = torch.randn(ROWS, COLUMNS, generator=generator).to(dtype)
    tensors = made.kernels.format.empty(ROWS, COLUMNS)
    assert made.kernels.quantize(weight, tensors) == 0
    for name, tensor in zip(made.kernels.format.names("weight"), tensors, strict=True):
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    return module


def inputs(dtype: torch.dtype) -> Tensor:
    return torch.randn(3, 5, COLUMNS, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def run(
    function: Callable[[Tensor], Tensor], x: Tensor, to: torch.dtype, backward_inside: bool
) -> tuple[Tensor, Tensor]:
    """Result and gradient of the input, with autocast to a dtype around the forward, and perhaps the backward."""
    x = x.detach().requires_grad_()
    seed = torch.Generator().manual_seed(2)
    with torch.autocast("cpu", dtype=to):
        out = function(x)
        loss = (out.float() * torch.randn(out.shape, generator=seed)).sum()
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    assert x.grad is not None
    return out.detach(), x.grad


@pytest.mark.parametrize("scheme", LINEAR)
@pytest.mark.parametrize("to", HALVES, ids=str)
def test_a_linear_layer_computes_in_the_dtype_of_autocast(scheme: str, to: torch.dtype) -> None:
    for dtype in DTYPES:
        module, x = linear(scheme, dtype), inputs(dtype)
        weight, bias = module.dequantize(), module.bias.detach()
        for inside in (False, True):
            got, grad = run(module, x, to, inside)
            want, grad_wanted = run(lambda x, w=weight, b=bias: F.linear(x, w.to(x.dtype), b), x, to, inside)  # type: ignore[misc]
            assert (got.dtype, grad.dtype) == (want.dtype, grad_wanted.dtype) == (to, dtype)
            torch.testing.assert_close(got, want, rtol=2e-2, atol=0.1)
            torch.testing.assert_close(grad, grad_wanted, rtol=2e-2, atol=0.3)
        with torch.no_grad(), torch.autocast("cpu", dtype=to):
            assert torch.equal(module(x), module(x.to(to)))
        assert module(x).dtype == dtype


@pytest.mark.parametrize("kernel", ["numba", "torch"])
def test_every_kernel_takes_it(kernel: str) -> None:
    module = linear("quark_mxfp4", torch.float16, LoadOptions(kernels={"linear": kernel}))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(inputs(torch.float16)).dtype == torch.bfloat16


def test_float64_is_left_alone_and_meta_is_no_place_for_it() -> None:
    module = linear("int8_per_channel", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ValueError, match=r"expected x of shape .* in float32, .* got torch\.float64"):
            module(inputs(torch.float64))
        with pytest.raises(RuntimeError, match="same dtype"):
            F.linear(inputs(torch.float64), torch.zeros(ROWS, COLUMNS))


def test_what_inputs_are_rounded_to_is_made_of_what_autocast_gives() -> None:
    module, x = linear("mxfp8", torch.float32, LoadOptions(activations="emulate")), inputs(torch.float32)
    with torch.no_grad():
        want = module(x.bfloat16())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(module(x), want)


MODELS = {
    "llama_float16": torch.bfloat16,
    **dict.fromkeys(("llama", "llama_float32", "qwen3_moe", "gpt_oss", "t5", "llama4"), torch.float16),
}


@pytest.mark.parametrize(("name", "to"), MODELS.items())
def test_a_model_runs_under_autocast_to_another_dtype(name: str, to: torch.dtype, checkpoint: Checkpoint) -> None:
    model = load_quantized(checkpoint(name), "fp8_per_channel")
    given = BY_NAME[name].inputs()
    with torch.no_grad():
        usual = logits(model, given).float()
        with torch.autocast("cpu", dtype=to):
            got = logits(model, given)
    assert got.isfinite().all()
    assert float((got.float() - usual).norm() / usual.norm()) < 0.1
