"""Whose weight is read is found out of the source, through aliases, loops and arguments; the rest is only called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quantload.model import weight_reads
from quantload.model.weight_reads import weight_readers
from torch import Tensor, nn


class Parts(nn.Module):
    """Layers of every kind; what is read are the ones whose name says so."""

    inner: Any
    layers: Any

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(4, 4)
        self.called = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"read": nn.Linear(4, 4), "called": nn.Linear(4, 4)})
        self.layers = nn.ModuleList(Block() for _ in range(3))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)

    def forward(self, x: Tensor, bias: Any = None) -> Any:
        y: Tensor = self.fc(self.other(x))
        return y if bias is None else y + bias.weight[0]

    def scaled(self) -> Any:
        return torch.zeros(1)


def multiplied(x: Tensor, layer: nn.Linear) -> Any:
    return x @ layer.weight.t()


def of_module(module: Any, x: Tensor) -> Any:
    return F.linear(x, module.read.weight)


class Direct(Parts):
    def forward(self, x: Tensor) -> Any:
        return self.called(x) + F.linear(x, self.read.weight)


class Alias(Parts):
    def forward(self, x: Tensor) -> Any:
        layer, other = self.read, self.called
        return other(x) @ layer.weight


class WeightAlias(Parts):
    def forward(self, x: Tensor) -> Any:
        w = self.read.weight
        kept = self.called.weight
        return torch.einsum("bk,nk->bn", self.called(x.to(kept.dtype)), w)


class Transposed(Parts):
    def forward(self, x: Tensor) -> Any:
        return torch.matmul(self.called(x), self.read.weight.T)


class Data(Parts):
    def forward(self, x: Tensor) -> Any:
        return F.linear(self.called(x), self.read.weight.data)


class Norm(Parts):
    def forward(self, x: Tensor) -> Any:
        return self.called(x) / self.read.weight.norm()


class Shape(Parts):
    """Whose codes may have another shape than the weight."""

    def forward(self, x: Tensor) -> Any:
        return self.called(x) / self.read.weight.shape[1]


class Argument(Parts):
    def forward(self, x: Tensor) -> Any:
        return self._looked_up(x, self.read) + self._called(x, layer=self.called)

    def _looked_up(self, x: Tensor, bias: nn.Linear) -> Any:
        with torch.no_grad():
            return bias.weight[:, x.long()]

    def _called(self, x: Tensor, layer: nn.Linear) -> Any:
        return layer(x.to(layer.weight.device))


class FunctionArgument(Parts):
    def forward(self, x: Tensor) -> Any:
        return multiplied(self.called(x), self.read)


class WeightArgument(Parts):
    def forward(self, x: Tensor) -> Any:
        return self._times(self.called(x), self.read.weight)

    def _times(self, x: Tensor, w: Tensor) -> Any:
        return x * w


class SelfArgument(Parts):
    def forward(self, x: Tensor) -> Any:
        return of_module(self, self.called(x))


class ChildArgument(Parts):
    """Another module reads it."""

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x, bias=self.read)
        return self.called(x)


class Returned(Parts):
    def _table(self) -> Any:
        return self.read.weight

    def forward(self, x: Tensor) -> Any:
        return self.called(x) + self._table()


class Getattr(Parts):
    def forward(self, x: Tensor) -> Any:
        return self.called(x) * getattr(self.read, "weight")  # noqa: B009  # as some code does


class Conditional(Parts):
    def forward(self, x: Tensor) -> Any:
        layer = self.read if x.is_cuda else None
        if layer is not None and (w := layer.weight) is not None:
            x = x * w
        return self.called(x)


class Listed(Parts):
    def forward(self, x: Tensor) -> Any:
        w = torch.cat([layer.weight for layer in (self.read,)], dim=0)
        return self.called(x) @ w


class Inherited(Direct):
    pass


FLAT = [
    Direct, Alias, WeightAlias, Transposed, Data, Norm, Shape, Argument, FunctionArgument, WeightArgument, SelfArgument,
    ChildArgument, Returned, Getattr, Conditional, Listed, Inherited,
]  # fmt: skip


class Deep(Parts):
    def forward(self, x: Tensor) -> Any:
        return self.inner["called"](x) * self.inner["read"].weight + self.inner.read.weight


class OneOfLayers(Parts):
    def forward(self, x: Tensor) -> Any:
        return x.to(self.layers[0].other.weight.dtype) * self.layers[1].fc.weight


class Loop(Parts):
    def forward(self, x: Tensor) -> Any:
        for i, layer in enumerate(self.layers[:2]):
            x = layer(x) * layer.fc.weight * i
        return x


class Zipped(Parts):
    def forward(self, x: Tensor) -> Any:
        for (name, layer), y in zip(self.layers.named_children(), [x, x, x], strict=True):
            x = y * layer.fc.weight if name else x
        return x


def read_in(model: nn.Module) -> dict[str, str]:
    readers = weight_readers(model)
    return {name: readers[id(module)].__name__ for name, module in model.named_modules() if id(module) in readers}


@pytest.mark.parametrize("cls", FLAT)
def test_a_weight_that_is_read_is_found_and_its_neighbour_is_not(cls: type[Parts]) -> None:
    assert read_in(cls()) == {"read": cls.__name__}


def test_a_layer_further_down_is_found() -> None:
    assert read_in(Deep()) == {"inner.read": "Deep"}
    assert read_in(OneOfLayers()) == {"layers.1.fc": "OneOfLayers"}
    assert read_in(Loop()) == {f"layers.{i}.fc": "Loop" for i in range(3)}
    assert read_in(nn.Sequential(Loop(), Direct())) == {
        **{f"0.layers.{i}.fc": "Loop" for i in range(3)},
        "1.read": "Direct",
    }


class OnlyAsked(Parts):
    def forward(self, x: Tensor) -> Any:
        if isinstance(self.called.weight, Tensor) and self.called.weight is not None and self.called.weight.ndim == 2:
            x = x.to(self.called.weight.dtype).to(self.called.weight.device).type_as(self.called.weight)
        x = x.to(self.called.weight) + self.called.weight.new_zeros(1)
        return self.called(x)


class NotWhileRunning(Parts):
    def forward(self, x: Tensor) -> Any:
        return self.called(x)

    def _init_weights(self, module: nn.Linear) -> None:
        self.read.weight.data.normal_()
        module.weight.data.normal_()

    def tie_weights(self) -> None:
        self.called.weight = self.read.weight

    def resize_token_embeddings(self, size: int) -> Any:
        return self.read.weight[:size]


class Assigns(Parts):
    def forward(self, x: Tensor) -> Any:
        self.read.weight = self.called.weight
        return self.called(x)


@pytest.mark.parametrize("cls", [OnlyAsked, NotWhileRunning, Assigns])
def test_what_reads_no_number_is_no_read(cls: type[Parts]) -> None:
    assert read_in(cls()) == {}


def test_code_that_calls_itself_comes_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Recursive(Parts):
        def forward(self, x: Tensor, layer: Any = None, deeper: Any = None) -> Any:
            layer = layer or self.layers
            y: Tensor = self.forward(x, layer[0], self.forward(x, layer.fc)) * layer.weight
            return y

    assert "read" not in read_in(Recursive())
    monkeypatch.setattr(weight_reads, "MAX_CALLS", 1)
    assert read_in(Direct()) == {"read": "Direct"}


def test_functions_without_source_are_passed_over() -> None:
    space: dict[str, Any] = {}
    exec("def forward(self, x):\n    return self.read.weight * x\n", space)
    made: Any = type("Made", (Parts,), {"forward": space["forward"], "builtin": len})
    assert read_in(made()) == {}
