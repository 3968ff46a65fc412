"""What the source of transformers' modeling code does with a linear layer besides calling it.

A layer whose weight is codes can be called. Modeling code that multiplies with `layer.weight` itself, divides it in
place, or casts to its dtype would get codes instead of numbers, silently; so the source is asked first.
"""

from __future__ import annotations

import functools
import inspect
import linecache
import re
from types import CodeType, FunctionType

from torch import nn
from transformers import PreTrainedModel

# A method that only initializes or ties does not read a weight while the model runs.
NOT_RUNNING = frozenset({"__init__", "_init_weights", "tie_weights", "_tie_weights", "reset_parameters"})
READS_WEIGHT = re.compile(
    r"(?<!isinstance\()\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|ndim|is_meta)\b)(?!\s*=[^=])"
)
READS_DTYPE = re.compile(r"\bself\.(\w+)\.weight\.dtype\b")
WRITES_WEIGHT = re.compile(r"\.(\w+)\.weight\.(?:data\.)?\w+_\(")
ASKS_CONFIG = re.compile(r"hasattr\(self\.config, \"(_is_quantized)\"\)")


def reads_weight(parent: nn.Module, child: str) -> bool:
    """Whether code of `parent` uses the weight of its layer `child` as a tensor."""
    return _found(READS_WEIGHT, parent, child)


def reads_dtype(parent: nn.Module, child: str) -> bool:
    """Whether code of `parent` asks for the dtype of the weight of `child`, to cast activations to it."""
    return _found(READS_DTYPE, parent, child)


def asks_if_quantized(parent: nn.Module) -> bool:
    """Whether code of `parent` asks its config if weights are quantized, and then calls its layers."""
    return _found(ASKS_CONFIG, parent, "_is_quantized")


def writes_weight(root: PreTrainedModel, child: str) -> bool:
    """Whether code of `root`, or of its base model, changes in place the weight of some layer called `child`."""
    return any(_found(WRITES_WEIGHT, model, child) for model in (root, root.base_model))


def _found(pattern: re.Pattern[str], module: nn.Module, name: str) -> bool:
    cls: type = type(module)
    return name in _names_of(pattern, cls)


@functools.cache
def _names_of(pattern: re.Pattern[str], cls: type) -> frozenset[str]:
    own = (base for base in cls.__mro__ if base.__module__ not in (nn.Module.__module__, "transformers.modeling_utils"))
    return frozenset().union(*(_names(pattern, base) for base in own))


def _names(pattern: re.Pattern[str], cls: type) -> frozenset[str]:
    names: set[str] = set()
    for name, method in vars(cls).items():
        function = inspect.unwrap(method) if inspect.isfunction(method) else None
        if inspect.isfunction(function) and name not in NOT_RUNNING:
            names.update(pattern.findall(_source(function)))
    return frozenset(names)


@functools.cache
def _source(function: FunctionType) -> str:
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
