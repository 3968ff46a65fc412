"""What is read out of modeling code is what stands there."""

from __future__ import annotations

import inspect
from types import FunctionType, ModuleType

import pytest
from quantload.model import modeling_code
from torch import nn
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
        found = modeling_code.source(method)
        assert found.rstrip() == inspect.getsource(method).rstrip()
