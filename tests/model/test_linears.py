"""What computes a plain product is a linear layer whatever its class; what cannot be told is kept with the reason."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
from typing import Any

import pytest
import torch
import transformers
from quantload.model.linears import Products
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.esm.modeling_esmfold import EsmFoldLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledLinear
from transformers.pytorch_utils import Conv1D


class Written(nn.Linear):
    """A product in other words, with an attribute that makes no difference."""

    def __init__(self, rows: int, columns: int, bias: bool = True) -> None:
        super().__init__(rows, columns, bias=bias)
        self.note = "tensor parallel"

    def forward(self, x: Tensor) -> Tensor:
        out = torch.einsum("...k,nk->...n", x, self.weight)
        return out if self.bias is None else out + self.bias


class Scaled(nn.Linear):
    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor

    def __init__(self, factor: float = 0.5) -> None:
        super().__init__(32, 64)
        self.factor = factor


class Slightly(nn.Linear):
    """Off by a thousandth, on large inputs only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-3e4, 3e4))


class Rounded(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(
            x.bfloat16(), self.weight.bfloat16(), None if self.bias is None else self.bias.bfloat16()
        ).float()


class Normalizing(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class WithoutBias(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Pair(nn.Linear):
    """As parallel layers of engines do, which return the bias apart."""

    def forward(self, x: Tensor) -> Any:
        return F.linear(x, self.weight), self.bias


class LowRank(nn.Linear):
    def __init__(self) -> None:
        super().__init__(32, 64)
        self.lora_A, self.lora_B = nn.Linear(32, 4, bias=False), nn.Linear(4, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x) + self.lora_B(self.lora_A(x))
        return out


class Codes(nn.Linear):
    """As quantized layers of other libraries are."""

    def __init__(self) -> None:
        super().__init__(32, 64)
        self.weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), requires_grad=False)


class Dropping(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5))


class Asks(nn.Linear):
    """Has what its parent may call."""

    def with_scale(self, x: Tensor) -> Tensor:
        product: Tensor = 2 * self(x)
        return product


class Calls(nn.Linear):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return 3 * super().__call__(*args, **kwargs)


class Turned(Conv1D):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = x @ self.weight + self.bias
        return product


class TurnedTwice(Conv1D):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = x @ self.weight + 2 * self.bias
        return product


def hooked() -> nn.Module:
    layer = nn.Linear(32, 64)
    layer.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    return layer


def patched() -> nn.Module:
    layer = nn.Linear(32, 64)
    layer.forward = lambda input: 2 * input  # type: ignore[method-assign]
    return layer


def normed() -> nn.Module:
    layer: nn.Module = nn.utils.parametrizations.weight_norm(nn.Linear(32, 64))
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cls", [nn.Linear, FalconLinear, EsmFoldLinear, Written, NonDynamicallyQuantizableLinear])
def test_products(cls: type[nn.Linear], bias: bool) -> None:
    state = torch.get_rng_state()
    with torch.device("meta"):
        assert Products().objection(cls(4096, 1024, bias=bias)) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_a_product_with_a_transposed_weight() -> None:
    with torch.device("meta"):
        assert Products().objection(Conv1D(64, 32)) is None
        assert Products().objection(Turned(64, 32)) is None
        assert Products().objection(TurnedTwice(64, 32)) == "TurnedTwice is a linear layer with code of its own"


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Scaled, "Scaled is a linear layer with more of its own than a forward: scale"),
        (lambda: Slightly(32, 64), "Slightly is a linear layer with code of its own"),
        (lambda: Rounded(32, 64), "Rounded is a linear layer with code of its own"),
        (lambda: Normalizing(32, 64), "Normalizing is a linear layer with code of its own"),
        (lambda: WithoutBias(32, 64), "WithoutBias is a linear layer with code of its own"),
        (lambda: Pair(32, 64), "Pair is a linear layer with code of its own"),
        (lambda: Dropping(32, 64).eval(), "Dropping is a linear layer with code of its own"),
        (lambda: DeepseekV4GroupedLinear(32, 64, 2), "DeepseekV4GroupedLinear is a linear layer with code of its own"),
        (LowRank, "LowRank is a linear layer with more than a weight and a bias: lora_A, lora_B"),
        (
            lambda: IdeficsDecoupledLinear(32, 64, 8),
            "IdeficsDecoupledLinear is a linear layer with more than a weight and a bias: additional_fc",
        ),
        (Codes, "Codes is a linear layer whose weight is no parameter of floating-point numbers"),
        (lambda: Asks(32, 64), "Asks is a linear layer with more of its own than a forward: with_scale"),
        (lambda: Calls(32, 64), "Calls is a linear layer with more of its own than a forward: __call__"),
        (hooked, "this Linear has hooks or a forward of its own"),
        (patched, "this Linear has hooks or a forward of its own"),
        (normed, "ParametrizedLinear is a linear layer with more than a weight and a bias: parametrizations"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_more_than_a_product_or_cannot_be_told(layer: Any, reason: str) -> None:
    assert Products().objection(layer()) == reason


def test_without_its_bias_it_is_a_product() -> None:
    assert Products().objection(WithoutBias(32, 64, bias=False)) is None


class Told(nn.Linear):
    def __init__(self, factor: Any) -> None:
        super().__init__(32, 64)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = super().forward(x) * (self.factor[0] if isinstance(self.factor, list) else self.factor)
        return product


def test_layers_with_other_attributes_are_tried_for_themselves() -> None:
    products = Products()
    for factor, is_product in ((1, True), (2, False), (1, True), ([1], True), ([2], False)):
        assert (products.objection(Told(factor)) is None) == is_product, factor


def test_what_is_tried_is_no_part_of_the_model() -> None:
    layer = Written(32, 64)
    before = copy.deepcopy(layer.state_dict())
    assert Products().objection(layer) is None
    assert layer.training
    assert (layer.in_features, layer.out_features) == (32, 64)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


# Every subclass in transformers: a product, or what it is instead.
PRODUCTS = {"FalconLinear", "EsmFoldLinear"}
MORE = {
    "Llama4Router": "returns scores and logits",
    "PhimoeTopKRouter": "returns weights and experts",
    "DeepseekV4GroupedLinear": "a product for each group of its inputs",
    "IdeficsDecoupledLinear": "a second product beside it, where it has additional features",
    "DoryLMHead": "scales its logits",
    "AutoBitLinear": "ternary weights",
    "CompressedTensorsFP8Linear": "codes",
    "FP8Linear": "codes",
    "FbgemmFp8Linear": "codes",
    "FP8GroupedLinear": "codes",
    "MetalLinear": "codes",
    "QuantizedLinear": "codes",
}


@pytest.mark.slow
def test_every_subclass_in_transformers_is_known() -> None:
    """A class that is new has to be looked at: its forward is tried in a load, and this table says what to expect."""
    found: set[str] = set()
    for module in pkgutil.walk_packages(transformers.__path__, "transformers."):
        if ".modeling_" in module.name or ".integrations." in module.name:
            try:
                classes = vars(importlib.import_module(module.name)).values()
            except Exception:  # needs a package that is not installed
                continue
            found |= {
                cls.__name__
                for cls in classes
                if inspect.isclass(cls) and issubclass(cls, nn.Linear) and cls.__module__ == module.name
            }
    assert found <= PRODUCTS | MORE.keys()
    assert {"FalconLinear", "EsmFoldLinear", "Llama4Router"} <= found
