"""Kept linear layers: a kernel of quantload's for a few tokens, and torch for all that only torch can do."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quantload import LoadOptions, load_quantized
from quantload.kernels import registry
from quantload.kernels.cpu import plain
from quantload.model import kept_linears
from quantload.model.kept_linears import use_kernel_for_kept
from quantload.schemes import ahead, kept
from quantload.schemes.kept import KeptLinear
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

ROWS, COLUMNS = 48, 64


class Counting:
    """The kernel, which says how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def linear(self, *given: Any) -> Tensor:
        self.calls += 1
        kernel = registry.plain_linear(torch.device("cpu"))
        assert kernel is not None
        return kernel.linear(*given)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Counting:
    counting, real = Counting(), registry.plain_linear(torch.device("cpu"))
    assert real is not None
    made = registry.PlainLinear(real.name, counting.linear, real.serves, real.needed, real.most_tokens)
    for module in kept, kept_linears:
        monkeypatch.setattr(module, "plain_kernel", lambda: made)
    monkeypatch.setattr(kept_linears, "LEAST_ELEMENTS", ROWS * COLUMNS)
    return counting


def head(dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> nn.Linear:
    made = nn.Linear(COLUMNS, ROWS, bias=bias, dtype=dtype)
    holder = nn.Sequential(made)
    use_kernel_for_kept(holder, {})
    assert type(holder[0]) is KeptLinear
    return made


def inputs(tokens: int = 2, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(1, tokens, COLUMNS, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_few_tokens_are_multiplied_by_the_kernel(kernel: Counting, dtype: torch.dtype, bias: bool) -> None:
    layer, x = head(dtype, bias), inputs(3, dtype)
    with torch.no_grad():
        got = layer(x)
        exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert kernel.calls == 1
    assert (got.shape, got.dtype) == ((1, 3, ROWS), dtype)
    torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)
    with torch.inference_mode():
        assert torch.equal(layer(x[0, 0]), got[0, 0])
    assert kernel.calls == 2


def other_inputs(layer: Any) -> dict[str, Callable[[], Tensor]]:
    """What is torch's to compute."""
    x = inputs()

    def cast() -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            return layer.float()(x.float())

    def counted() -> Any:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            out = layer(x)
        assert counter.get_total_flops() == 2 * 2 * ROWS * COLUMNS
        return out

    def tangents() -> Any:
        wide = copy.deepcopy(layer).float().requires_grad_(False)
        return torch.func.jvp(wide, (x.float(),), (torch.ones_like(x.float()),))[1]

    def traced() -> Any:
        frozen = copy.deepcopy(layer).requires_grad_(False)
        return torch.jit.trace(frozen, x, check_trace=False)(x + 1)

    without = torch.no_grad()
    return {
        "gradients of the weight": lambda: layer(x),
        "gradients of the input": lambda: copy.deepcopy(layer).requires_grad_(False)(inputs().requires_grad_()),
        "many tokens": lambda: without(layer)(inputs(9)),
        "no tokens": lambda: without(layer)(inputs(0)),
        "autocast": cast,
        "a mode that counts": counted,
        "a vmap": lambda: without(torch.vmap(layer))(x),
        "forward-mode gradients": tangents,
        "a traced graph": traced,
        "the meta device": lambda: without(copy.deepcopy(layer).to("meta"))(x.to("meta")),
        "columns with gaps": lambda: without(_with_gaps(layer))(x),
    }


def _with_gaps(layer: Any) -> Any:
    other = copy.deepcopy(layer)
    other.weight = nn.Parameter(layer.weight.detach().repeat(1, 2)[:, :COLUMNS], requires_grad=False)
    return other


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("what", list(other_inputs(nn.Linear(COLUMNS, ROWS, dtype=torch.bfloat16))))
def test_torch_does_what_only_torch_can(kernel: Counting, what: str) -> None:
    torch.manual_seed(0)
    layer = head()
    plain = nn.Linear(COLUMNS, ROWS, dtype=torch.bfloat16)
    plain.load_state_dict(layer.state_dict())
    got, expected = (other_inputs(each)[what]() for each in (layer, plain))
    assert kernel.calls == 0
    assert got.requires_grad is expected.requires_grad
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_what_changes_a_weight_on_its_way_is_seen(kernel: Counting) -> None:
    x = inputs(1)
    pruned, doubled = head(), head()
    prune.l1_unstructured(pruned, "weight", amount=0.5)
    parametrize.register_parametrization(doubled, "weight", _Doubled())
    with torch.no_grad():
        for layer in pruned, doubled:
            expected = F.linear(x.double(), layer.weight.double(), layer.bias.double())
            torch.testing.assert_close(layer(x).double(), expected, rtol=2.0**-7, atol=1e-5)


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def test_a_layer_is_what_it_was_to_everybody_else(kernel: Counting) -> None:
    layer = head()
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == ["weight", "bias"]
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in copy.deepcopy(layer), torch.load(buffer, weights_only=False):
        assert type(other) is KeptLinear
        with torch.no_grad():
            assert torch.equal(other(inputs()), layer(inputs()))


class _Own(nn.Linear):
    pass


def test_layers_that_are_more_than_a_product_or_small_stay_as_they_are(kernel: Counting) -> None:
    hooked, given = (nn.Linear(COLUMNS, ROWS, dtype=torch.bfloat16) for _ in range(2))
    hooked.register_forward_hook(lambda *_: None)
    given.forward = lambda input: input  # type: ignore[method-assign]
    narrow, odd = nn.Linear(COLUMNS, ROWS - 1), nn.Linear(40, 100)
    others = [hooked, given, narrow, odd, _Own(COLUMNS, ROWS), nn.Linear(COLUMNS, ROWS, dtype=torch.float64)]
    classes = [type(each) for each in others]
    model = nn.Sequential(*others)
    use_kernel_for_kept(model, {})
    assert [type(each) for each in model] == classes


def test_another_kernel_for_linear_layers_leaves_them_to_torch(kernel: Counting) -> None:
    for kernels, cls in (({"linear": "torch"}, nn.Linear), ({"linear": "numba"}, KeptLinear), ({}, KeptLinear)):
        model = nn.Sequential(nn.Linear(COLUMNS, ROWS))
        use_kernel_for_kept(model, LoadOptions(kernels=kernels).kernels)
        assert type(model[0]) is cls


def test_what_a_server_will_call_is_compiled_before(kernel: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(registry, "prepare", asked.extend)
    ahead.prepare_products(nn.Sequential(head(), nn.Linear(8, 8)), torch.device("cpu"), torch.bfloat16)
    few = [("plain_bf16", 1), ("plain_bf16", 2), ("plain_bf16", 4)]
    eight = [("plain_bf16_bf16", 8)] if plain.most_tokens(torch.bfloat16) == 8 else []
    assert [needed.key for needed in asked] == [*few, *eight]


def test_the_head_of_a_loaded_model_is_multiplied_by_the_kernel(
    kernel: Counting, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_linears, "LEAST_ELEMENTS", 1)
    logits = []
    for kernels in {}, {"linear": "torch"}:
        model: Any = load_quantized(
            checkpoint("llama"), "none", device="cpu", options=LoadOptions(kernels=kernels), progress=False
        )
        changed = [type(each) is KeptLinear for each in model.modules() if isinstance(each, nn.Linear)]
        assert changed == [not kernels] * len(changed)
        calls = kernel.calls
        with torch.no_grad():
            logits.append(model(torch.tensor([[1, 2, 3]])).logits)
        assert kernel.calls - calls == sum(changed)
    torch.testing.assert_close(*logits)
