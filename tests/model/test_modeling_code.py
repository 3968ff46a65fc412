"""What is read out of modeling code is what stands there."""

from __future__ import annotations

import inspect

import pytest
from quantload.model import modeling_code
from torch import nn
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama
from transformers.models.t5 import modeling_t5


def _methods(module: object) -> list[object]:
    classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, nn.Module)]
    found = [inspect.unwrap(f) for c in classes for f in vars(c).values() if inspect.isfunction(f)]
    return [f for f in found if inspect.getsourcefile(f) == inspect.getsourcefile(module)]  # type: ignore[arg-type]


@pytest.mark.parametrize("module", [modeling_llama, modeling_t5, modeling_gpt2], ids=lambda m: m.__name__)
def test_lines_of_a_function_are_those_inspect_finds(module: object) -> None:
    methods = _methods(module)
    assert len(methods) > 10
    for method in methods:
        found = modeling_code._source(method)  # type: ignore[arg-type]
        assert found.rstrip() == inspect.getsource(method).rstrip()  # type: ignore[arg-type]


class Layer(nn.Module):
    def forward(self, x):  # type: ignore[no-untyped-def]
        def inner(y):  # type: ignore[no-untyped-def]
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
        self.other.weight.normal_()  # type: ignore[union-attr,operator]


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
