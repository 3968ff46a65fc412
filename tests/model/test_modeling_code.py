"""What is read out of modeling code is what stands there."""

from __future__ import annotations

import inspect
from types import FunctionType, ModuleType

import pytest
from quantload.model import modeling_code
from torch import Tensor, nn
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama
from transformers.models.t5 import modeling_t5


def _methods(module: ModuleType) -> list[FunctionType]:
    classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, nn.Module)]
    unwrapped = [inspect.unwrap(f) for c in classes for f in vars(c).values() if inspect.isfunction(f)]
    found = [f for f in unwrapped if isinstance(f, FunctionType)]
    return [f for f in found if inspect.getsourcefile(f) == inspect.getsourcefile(module)]


@pytest.mark.parametrize("module", [modeling_llama, modeling_t5, modeling_gpt2], ids=lambda m: m.__name__)
def test_lines_of_a_function_are_those_inspect_finds(module: ModuleType) -> None:
    methods = _methods(module)
    assert len(methods) > 10
    for method in methods:
        found = modeling_code._source(method)
        assert found.rstrip() == inspect.getsource(method).rstrip()


class Layer(nn.Module):
    first: nn.Linear
    last: nn.Linear
    other: nn.Linear

    def forward(self, x: Tensor) -> list[Tensor]:
        def inner(y: Tensor) -> list[Tensor]:
            return [
                y,
                self.last.weight,
            ]

        return inner(
            x.to(
                self.first.weight.dtype,
            )
        )

    def reset_parameters(self) -> None:
        self.other.weight.normal_()


def test_reads_in_nested_functions_and_on_later_lines_are_seen() -> None:
    layer = Layer()
    assert modeling_code.reads_weight(layer, "last")
    assert modeling_code.reads_dtype(layer, "first")
    assert not modeling_code.reads_weight(layer, "first")
    assert not modeling_code.reads_weight(layer, "other")


def test_functions_without_source_are_passed_over() -> None:
    space: dict[str, object] = {}
    exec("def forward(self, x):\n    return self.made.weight * x\n", space)
    made = type("Made", (nn.Module,), {"forward": space["forward"], "builtin": len})
    assert not modeling_code.reads_weight(made(), "made")
