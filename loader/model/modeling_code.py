"""The source of transformers' modeling code, and what it says in a single line about layers whose weight is codes."""

from __future__ import annotations

import functools
import inspect
import linecache
import re
from collections.abc import Iterator
from types import CodeType, FunctionType

import torch
from torch import nn
from transformers import PreTrainedModel

# A method that only initializes or ties does not read a weight while the model runs.
NOT_RUNNING = frozenset({"__init__", "_init_weights", "tie_weights", "_tie_weights", "reset_parameters"})
OF_EVERY_MODEL = re.compile(r"transformers\.(?!models\.)")
"""The modules of transformers that are about no model: generation, attention kernels, outputs."""
WRITES_WEIGHT = re.compile(r"\.(\w+)\.weight\.(?:data\.)?\w+_\(")
READS_DTYPE = re.compile(r"\bself\.([\w.]+)\.weight\.dtype\b")
ASKS_CONFIG = re.compile(r"hasattr\(self\.config, \"(_is_quantized)\"\)")


def asks_if_quantized(parent: nn.Module) -> bool:
    """Whether code of `parent` asks its config if weights are quantized, and then calls its layers."""
    return _found(ASKS_CONFIG, parent, "_is_quantized")


def writes_weight(root: PreTrainedModel, child: str) -> bool:
    """Whether code of `root`, or of its base model, changes in place the weight of some layer called `child`."""
    return any(_found(WRITES_WEIGHT, model, child) for model in (root, root.base_model))


def layers_cast_to(model: nn.Module, codes: torch.dtype) -> list[str]:
    """Names of the layers whose dtype of weights some code casts their input to, where that may be one of `codes`.

    In `load_quantized`'s models it is the dtype they compute in. Other tools have codes there, and modeling code knows
    INT8 as such in some places (`self.wo` of T5).
    """
    found = set()
    for name, module in model.named_modules():
        cls: type = type(module)
        for child in _dtypes_read(cls, codes == torch.int8):
            full = f"{name}.{child}".lstrip(".")
            try:
                model.get_submodule(full)
            except AttributeError:  # a parameter, or what only some models of the class have
                continue
            found.add(full)
    return sorted(found)


@functools.cache
def _dtypes_read(cls: type, is_int8: bool) -> frozenset[str]:
    running = (source(function) for name, function in own_methods(cls) if name not in NOT_RUNNING)
    return frozenset().union(*(READS_DTYPE.findall(text) for text in running if not (is_int8 and "torch.int8" in text)))


def _found(pattern: re.Pattern[str], module: nn.Module, name: str) -> bool:
    cls: type = type(module)
    return name in _names_of(pattern, cls)


@functools.cache
def _names_of(pattern: re.Pattern[str], cls: type) -> frozenset[str]:
    running = (function for name, function in own_methods(cls) if name not in NOT_RUNNING)
    return frozenset().union(*(pattern.findall(source(function)) for function in running))


def own_methods(cls: type) -> Iterator[tuple[str, FunctionType]]:
    """The methods of a model's class and its bases, by name, without those that every module or model has."""
    for base in cls.__mro__:
        if base.__module__ != nn.Module.__module__ and not OF_EVERY_MODEL.match(base.__module__):
            for name, method in vars(base).items():
                function = inspect.unwrap(method) if inspect.isfunction(method) else None
                if isinstance(function, FunctionType):
                    yield name, function


@functools.cache
def source(function: FunctionType) -> str:
    """The lines a function was compiled from; empty where there are none to look into.

    `inspect.getsource` finds the last line by running Python's tokenizer in Python, which took longer than all else
    before the first byte of a load; the line numbers in the byte code say the same.
    """
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)
    return "".join(lines[code.co_firstlineno - 1 : _last_line(code)])


def _last_line(code: CodeType) -> int:
    own = (end or line or 0 for line, end, _, _ in code.co_positions())
    inner = (_last_line(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return max((code.co_firstlineno, *own, *inner))
