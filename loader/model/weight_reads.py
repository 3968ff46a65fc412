"""Which layers of a model have their weights read by its modeling code, instead of being called.

A layer whose weight is codes can be called, and asked for dtype, device and bias. Modeling code that multiplies with
`layer.weight` would get codes: the code of every class is followed, as far as a layer can be followed without running
it, through aliases, loops over layers, and arguments of methods and functions. What is not found here is refused while
the model runs (`OpaqueParameter`).
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType

from torch import nn

from .code_values import NOTHING, Path, Scope, Values, is_weight
from .modeling_code import NOT_RUNNING, own_methods, source

RISKY = re.compile(r"(?<!\bself)\.weight\b(?!\.(?:dtype|device|ndim|is_meta)\b)(?!\s*=[^=])|[\"']weight[\"']")
"""What the source of a function has to have in it for a weight to be read there, other than a module's own."""
TYPE_CHECK = re.compile(r"isinstance\([^()]*\)")
NOT_WHILE_RUNNING = re.compile(r"resize|prune|extra_repr|convert|load_|save_")
MAX_CALLS, MAX_DEPTH = 4000, 16
"""Calls followed for one class, and inside of each other: modeling code has hundreds, and few levels."""


def weight_readers(model: nn.Module) -> dict[int, type[nn.Module]]:
    """Of modules whose weight is read as a tensor, by `id`: the class whose code does it."""
    modules = list(model.modules())
    classes: set[type] = {type(module) for module in modules}
    if not any(map(_is_risky, classes)):
        return {}
    readers: dict[int, type[nn.Module]] = {}
    found: dict[object, frozenset[Path]] = {}
    for module in modules:
        if not module._modules:
            continue
        children = tuple((name, type(child)) for name, child in module._modules.items())
        kind = type(module), children
        if kind not in found:
            found[kind] = _Followed(module).reads()
        for path in found[kind]:
            readers.update((id(read), type(module)) for read in resolve(module, path))  # the innermost comes last
    return readers


def resolve(module: object, path: Path) -> Iterator[nn.Module]:
    """The modules that a path leads to from `module`; `*` is every element."""
    if not path:
        if isinstance(module, nn.Module):
            yield module
        return
    part, rest = path[0], path[1:]
    if part == "*":
        for each in _elements(module):
            yield from resolve(each, rest)
    elif (found := _member(module, part)) is not None:
        yield from resolve(found, rest)


def _elements(held: object) -> list[object]:
    if isinstance(held, nn.Module):
        return list(held._modules.values())
    if isinstance(held, Mapping):
        return list(held.values())
    return list(held) if isinstance(held, (list, tuple)) else []


def _member(held: object, name: str) -> object:
    if isinstance(held, nn.Module):
        return held._modules.get(name, held.__dict__.get(name))
    if isinstance(held, (list, tuple)) and name.isdigit() and int(name) < len(held):
        return held[int(name)]
    return None


@functools.cache
def _methods(cls: type) -> tuple[FunctionType, ...]:
    return tuple(
        method for name, method in own_methods(cls) if name not in NOT_RUNNING and not NOT_WHILE_RUNNING.search(name)
    )


@functools.cache
def _is_risky(cls: type) -> bool:
    """Whether a weight may be read in the methods of a class, or in functions that stand beside them."""
    beside = {
        function
        for method in _methods(cls)
        for function in method.__globals__.values()
        if isinstance(function, FunctionType) and function.__module__ == method.__module__
    }
    return any(_may_read(function) for function in (*_methods(cls), *beside))


@functools.cache
def _may_read(function: FunctionType) -> bool:
    return _speaks_of_weight(function.__code__) and RISKY.search(TYPE_CHECK.sub("", source(function))) is not None


def _speaks_of_weight(code: CodeType) -> bool:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return "weight" in code.co_names or "weight" in code.co_consts or any(map(_speaks_of_weight, inner))


class _Followed:
    """The code of one module's class, with paths from that module for values."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._reads: set[Path] = set()
        self._returned: dict[object, Values] = {}
        self._depth = 0

    def reads(self) -> frozenset[Path]:
        """Paths of the modules whose weight is read."""
        cls: type = type(self._root)
        for method in _methods(cls):
            names = method.__code__.co_varnames[: method.__code__.co_argcount]
            self.run(method, {names[0]: frozenset({()})} if names else {})
        return frozenset(self._reads)

    def read(self, values: Values) -> None:
        """Some code takes these for numbers, as far as they are weights."""
        self._reads.update(path[:-1] for path in values if is_weight(path) and len(path) > 1)

    def run(self, function: FunctionType, bound: Mapping[str, Values]) -> Values:
        """Follow a function whose arguments are `bound`; what it returns."""
        key = function, frozenset(bound.items())
        if key not in self._returned and len(self._returned) < MAX_CALLS and self._depth < MAX_DEPTH:
            self._returned[key] = NOTHING  # for calls of itself
            self._depth += 1
            self._returned[key] = Scope(self, function, bound).follow()
            self._depth -= 1
        return self._returned.get(key, NOTHING)

    def method(self, path: Path, name: str) -> FunctionType | None:
        """The method `name` of what is at `path`, where that is a module."""
        module = next(resolve(self._root, path), None)
        found = None if module is None else inspect.getattr_static(type(module), name, None)
        function = inspect.unwrap(found) if inspect.isfunction(found) else None
        return function if isinstance(function, FunctionType) else None

    def is_module(self, path: Path) -> bool:
        """Whether a path leads to a module."""
        return next(resolve(self._root, path), None) is not None
