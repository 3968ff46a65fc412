"""What a quantized layer keeps for its next call: used while nothing has changed, else made anew."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from quantload import LoadOptions
from quantload.errors import QuantizedWeightError
from quantload.kernels.registry import kernel_set
from quantload.model.quantized import QuantizedLinear
from quantload.schemes.linear import PREPARED
from quantload.schemes.registry import SchemeFactory
from torch import Tensor, nn

ROWS, COLUMNS = 72, 128
SCHEMES = ("quark_mxfp4", "int4_per_group", "int8_per_channel", "nvfp4")


def linear(scheme: str = "quark_mxfp4", bias: bool = False, seed: int = 0, columns: int = COLUMNS) -> Any:
    made: Any = SchemeFactory(torch.device("cpu"), LoadOptions()).linear(scheme)
    own_bias = nn.Parameter(torch.arange(ROWS).bfloat16(), requires_grad=False) if bias else None
    module: Any = QuantizedLinear(made, columns, ROWS, own_bias, False)
    for name, tensor in zip(made.kernels.format.names("weight"), codes(made, seed, columns), strict=True):
        module._parameters[name] = module._parameters[name].around(tensor)
    return module


def codes(scheme: Any, seed: int, columns: int = COLUMNS) -> tuple[Tensor, ...]:
    tensors: tuple[Tensor, ...] = scheme.kernels.format.empty(ROWS, columns)
    weight = torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()
    assert scheme.kernels.quantize(weight, tensors) == 0
    return tensors


def x_of(tokens: int = 1, dtype: torch.dtype = torch.bfloat16, columns: int = COLUMNS) -> Tensor:
    return torch.randn(1, tokens, columns, generator=torch.Generator().manual_seed(7)).to(dtype)


def unprepared(layer: Any, x: Tensor) -> Tensor:
    """What the kernel gives that is handed everything anew."""
    tensors = tuple(layer._parameters[name].tensor for name in layer.scheme.kernels.format.names("weight"))
    kernels, columns = kernel_set(layer.scheme.kernels.format.name, "cpu"), x.shape[-1]
    out = kernels.linear(x.reshape(-1, columns), tensors, layer.bias, ROWS, columns)
    return out.view(*x.shape[:-1], ROWS)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_later_calls_give_the_bits_of_the_first(scheme: str, bias: bool) -> None:
    layer = linear(scheme, bias)
    for tokens, dtype in (1, torch.bfloat16), (3, torch.bfloat16), (2, torch.float32), (1, torch.float16):
        x = x_of(tokens, dtype)
        first = layer(x)
        kept = layer.__dict__[PREPARED]
        again = layer(x)
        assert layer.__dict__[PREPARED] is kept
        assert torch.equal(first, unprepared(layer, x))
        assert torch.equal(again, first)
        assert (again.shape, again.dtype, again.is_contiguous()) == (first.shape, dtype, True)
        assert torch.equal(layer(x[0, 0]), first[0, 0])
        assert torch.equal(layer(x.expand(2, -1, -1).transpose(0, 1)[:, 0]), first[0])


def test_sums_are_rounded_as_torch_rounds_them() -> None:
    layer, with_zeros, x = linear(), linear(bias=True), x_of(4)
    with_zeros.bias = nn.Parameter(torch.zeros(ROWS), requires_grad=False)  # is added in float32, before torch rounds
    assert torch.equal(layer(x), with_zeros(x))


def change_nothing(layer: Any) -> None:
    layer.to("cpu")


def exchange_the_bytes(layer: Any) -> None:
    for name, tensor in zip(layer.scheme.kernels.format.names("weight"), codes(layer.scheme, 1), strict=True):
        layer._parameters[name].tensor.copy_(tensor)


def exchange_the_tensors(layer: Any) -> None:
    for name, tensor in zip(layer.scheme.kernels.format.names("weight"), codes(layer.scheme, 1), strict=True):
        layer._parameters[name].data = tensor


def exchange_the_parameters(layer: Any) -> None:
    for name, tensor in zip(layer.scheme.kernels.format.names("weight"), codes(layer.scheme, 1), strict=True):
        layer._parameters[name] = layer._parameters[name].around(tensor)


def exchange_the_memory(layer: Any) -> None:
    for name, tensor in zip(layer.scheme.kernels.format.names("weight"), codes(layer.scheme, 1), strict=True):
        layer._parameters[name].tensor.set_(tensor)


def load_a_state_dict(layer: Any) -> None:
    layer.load_state_dict(linear(seed=1).state_dict())


CHANGES = (exchange_the_bytes, exchange_the_tensors, exchange_the_parameters, exchange_the_memory, load_a_state_dict)


@pytest.mark.parametrize("change", [change_nothing, *CHANGES])
def test_new_weights_are_used_at_once(change: Callable[[Any], None]) -> None:
    layer, x = linear(), x_of()
    before = layer(x)
    change(layer)
    assert torch.equal(layer(x), unprepared(layer, x))
    assert torch.equal(layer(x), before) is (change is change_nothing)


def test_numbers_in_the_place_of_codes_are_refused_as_before() -> None:
    layer, x = linear(), x_of()
    layer(x)
    layer._parameters["weight"] = nn.Parameter(torch.zeros(ROWS, COLUMNS // 2), requires_grad=False)
    with pytest.raises(QuantizedWeightError, match="other numbers were put there"):
        layer(x)
    other = linear()
    other(x)
    other._parameters["weight"].data = torch.zeros(ROWS - 1, COLUMNS // 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"a \\[{ROWS}, {COLUMNS}\\] weight has codes"):
        other(x)


def test_copies_have_their_own() -> None:
    layer, x = linear(), x_of()
    want = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in copy.deepcopy(layer), torch.load(buffer, weights_only=False):
        assert other.__dict__[PREPARED] is None
        exchange_the_bytes(layer)
        assert torch.equal(other(x), want)
        assert torch.equal(other(x), want)


def test_it_keeps_no_tensor_alive() -> None:
    layer, x = linear(), x_of()
    layer(x)
    kept, reference = layer.__dict__[PREPARED], weakref.ref(layer._parameters["weight"].tensor)
    del layer._parameters["weight"]
    gc.collect()
    assert kept is not None
    assert reference() is None


def test_what_torch_must_see_is_not_prepared() -> None:
    layer = linear()
    layer(x_of().requires_grad_()).sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x_of(dtype=torch.float32)).dtype == torch.bfloat16
    assert PREPARED not in layer.__dict__
    layer(x_of())
    x = x_of().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x_of(dtype=torch.float32)).dtype == torch.bfloat16


def test_many_tokens_and_columns_without_whole_blocks_go_the_usual_way() -> None:
    layer, odd = linear(), linear("int8_per_channel", columns=100)
    for module, x in (layer, x_of(40)), (odd, x_of(2, columns=100)):
        first = module(x)
        assert torch.equal(module(x), first)
        assert torch.equal(first, unprepared(module, x))


def test_threads_may_be_in_a_layer_at_once() -> None:
    layer = linear()
    given = [x_of(1) * (number + 1) for number in range(8)]
    want = [layer(x) for x in given]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(layer, given * 50))
    assert all(torch.equal(each, want[number % 8]) for number, each in enumerate(got))


def test_another_kernel_has_nothing_to_prepare() -> None:
    made: Any = SchemeFactory(torch.device("cpu"), LoadOptions(kernels={"linear": "torch"})).linear("quark_mxfp4")
    assert made.kernels.prepare is None
    assert kernel_set("mxfp4_rows", "cpu").prepare is None
