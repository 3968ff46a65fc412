"""What expressions of modeling code stand for: the modules, and weights of modules, that they may be.

A value is a set of paths from the module whose code is followed: `()` is that module, `("layers", "*", "fc")` a linear
layer of each of its layers, `("fc", "weight")` the weight of one. Branches are all taken, assignments add up, and
everything else has no value.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, Protocol

from .modeling_code import source

Path = tuple[str, ...]
Values = frozenset[Path]
NOTHING: Values = frozenset()
EVERY = "*"
LONGEST = 8
"""Parts of a path: longer ones come from loops that walk along attributes."""

# Of a weight these are right whatever it holds.
HARMLESS = frozenset(
    {"dtype", "device", "is_meta", "ndim", "requires_grad", "is_cuda", "grad", "dim", "is_floating_point"}
)
ASKS = frozenset({"isinstance", "hasattr", "id", "len", "type", "print", "repr", "str", "callable", "is_tensor"})
CASTS_LIKE = frozenset({"to", "type_as"})
SAME_ELEMENTS = frozenset({"list", "tuple", "reversed", "iter", "sorted", "set"})


class Follower(Protocol):
    """What a scope asks of whoever follows calls."""

    def read(self, values: Values) -> None: ...
    def run(self, function: FunctionType, bound: Mapping[str, Values]) -> Values: ...
    def method(self, path: Path, name: str) -> FunctionType | None: ...
    def is_module(self, path: Path) -> bool: ...


def is_weight(path: Path) -> bool:
    """Whether a path is that of a weight."""
    return path[-1:] == ("weight",)


def part_of(values: Values, name: str) -> Values:
    """The attribute or element `name` of values."""
    return frozenset((*path, name) for path in values if len(path) < LONGEST and not is_weight(path))


@functools.cache
def _body(function: FunctionType) -> Sequence[ast.stmt]:
    """The statements of a function; none where it has no source."""
    for text in (source, inspect.getsource):
        try:
            (tree,) = ast.parse(textwrap.dedent(text(function))).body
        except (SyntaxError, ValueError, OSError, TypeError):  # a lambda inside of a line, the end of a line missing
            continue
        if isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return tree.body
    return ()


class Scope:
    """One call of one function: its names, and what it returns."""

    def __init__(self, follower: Follower, function: FunctionType, bound: Mapping[str, Values]) -> None:
        self._follower, self._function = follower, function
        self._names: dict[str, Values] = dict(bound)
        self._results: Values = NOTHING

    def follow(self) -> Values:
        """Take every statement, in order."""
        self._statements(_body(self._function))
        return self._results

    # Statements

    def _statements(self, statements: Sequence[ast.AST]) -> None:
        for statement in statements:
            self._statement(statement)

    def _statement(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._assign(target, node.value)
        elif isinstance(node, ast.AnnAssign):
            if node.value is not None:
                self._assign(node.target, node.value)
        elif isinstance(node, ast.AugAssign):
            self._use(node.target)
            self._use(node.value)
        elif isinstance(node, (ast.For, ast.AsyncFor)):
            self._bind_elements(node.target, node.iter)
            self._statements([*node.body, *node.orelse])
        elif isinstance(node, ast.Return):
            self._results |= NOTHING if node.value is None else self._value(node.value)
        elif isinstance(node, ast.Expr):
            self._value(node.value)
        else:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    self._value(child)
                elif not isinstance(child, ast.arguments):
                    self._statement(child)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        pairs = isinstance(target, (ast.Tuple, ast.List)) and isinstance(value, (ast.Tuple, ast.List))
        if pairs and len(target.elts) == len(value.elts):  # type: ignore[attr-defined]
            for each, one in zip(target.elts, value.elts, strict=True):  # type: ignore[attr-defined]
                self._assign(each, one)
            return
        self._bind(target, self._value(value))

    def _bind(self, target: ast.expr, values: Values) -> None:
        if isinstance(target, ast.Name):
            self._names[target.id] = self._names.get(target.id, NOTHING) | values
        elif isinstance(target, ast.Starred):
            self._bind(target.value, values)
        elif isinstance(target, (ast.Tuple, ast.List)):
            for each in target.elts:
                self._bind(each, values | part_of(values, EVERY))

    def _bind_elements(self, target: ast.expr, iterated: ast.expr) -> None:
        """`for target in iterated`."""
        call = iterated if isinstance(iterated, ast.Call) else None
        name = call.func.id if call is not None and isinstance(call.func, ast.Name) else ""
        method = call.func.attr if call is not None and isinstance(call.func, ast.Attribute) else ""
        targets = target.elts if isinstance(target, (ast.Tuple, ast.List)) else []
        if call is not None and name == "enumerate" and len(targets) == 2 and call.args:
            self._bind_elements(targets[1], call.args[0])
        elif call is not None and name == "zip" and len(targets) == len(call.args):
            for each, one in zip(targets, call.args, strict=True):
                self._bind_elements(each, one)
        elif call is not None and method in ("items", "named_children") and len(targets) == 2:
            self._bind(targets[1], part_of(self._value(call.func.value), EVERY))  # type: ignore[attr-defined]
        else:
            self._bind(target, self._elements(iterated))

    def _elements(self, iterated: ast.expr) -> Values:
        if isinstance(iterated, (ast.Tuple, ast.List)):
            return self._union(iterated.elts)
        values = self._value(iterated)
        self._follower.read(values)  # to go over the rows of a weight
        return values | part_of(values, EVERY)

    # Expressions

    def _use(self, node: ast.AST) -> None:
        """An expression whose value, if it is a weight, is taken for numbers."""
        if isinstance(node, ast.expr):
            self._follower.read(self._value(node))

    def _union(self, nodes: Sequence[ast.expr]) -> Values:
        return NOTHING.union(*(self._value(node) for node in nodes))

    def _value(self, node: ast.expr) -> Values:
        handler = _EXPRESSIONS.get(type(node))
        if handler is not None:
            return handler(self, node)
        for child in ast.iter_child_nodes(node):
            self._use(child)
        return NOTHING

    def _name(self, node: ast.Name) -> Values:
        return self._names.get(node.id, NOTHING)

    def _attribute(self, node: ast.Attribute) -> Values:
        return self._member(self._value(node.value), node.attr)

    def _member(self, values: Values, name: str) -> Values:
        if name == "data":
            return values
        if name not in HARMLESS and not name.startswith("new_"):
            self._follower.read(values)
        return part_of(values, name)

    def _subscript(self, node: ast.Subscript) -> Values:
        values, index = self._value(node.value), node.slice
        self._use(index)
        self._follower.read(values)
        if isinstance(index, ast.Slice):
            return values
        known = isinstance(index, ast.Constant) and isinstance(index.value, (int, str))
        return part_of(values, str(index.value) if known else EVERY)  # type: ignore[attr-defined]

    def _either(self, node: ast.IfExp) -> Values:
        self._value(node.test)
        return self._value(node.body) | self._value(node.orelse)

    def _any_of(self, node: ast.BoolOp) -> Values:
        return self._union(node.values)

    def _compare(self, node: ast.Compare) -> Values:
        identity = all(isinstance(each, (ast.Is, ast.IsNot)) for each in node.ops)
        for each in (node.left, *node.comparators):
            (self._value if identity else self._use)(each)
        return NOTHING

    def _sequence(self, node: ast.Tuple | ast.List | ast.Set) -> Values:
        return self._union(node.elts)

    def _starred(self, node: ast.Starred) -> Values:
        return self._value(node.value)

    def _named(self, node: ast.NamedExpr) -> Values:
        values = self._value(node.value)
        self._bind(node.target, values)
        return values

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> Values:
        for generator in node.generators:
            self._bind_elements(generator.target, generator.iter)
            for condition in generator.ifs:
                self._value(condition)
        return self._value(node.elt)

    # Calls

    def _call(self, node: ast.Call) -> Values:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        if name in ASKS or method in ASKS:
            self._union(arguments)
            return NOTHING
        if name == "getattr" and len(node.args) >= 2:
            return self._getattr(node.args)
        if name == "super":
            return frozenset({()})
        if name in SAME_ELEMENTS:
            return self._union(arguments)
        if isinstance(node.func, ast.Attribute):
            return self._call_method(node, node.func)
        values = self._value(node.func)
        return self._hand_over(node, None if values else self._global(name), values)

    def _getattr(self, arguments: Sequence[ast.expr]) -> Values:
        values, name = self._value(arguments[0]), arguments[1]
        self._union(arguments[2:])
        known = isinstance(name, ast.Constant) and isinstance(name.value, str)
        return self._member(values, name.value) if known else part_of(values, EVERY)  # type: ignore[attr-defined]

    def _call_method(self, node: ast.Call, func: ast.Attribute) -> Values:
        base = self._value(func.value)
        if func.attr in ("values", "children", "modules", "items", "named_children"):
            return base
        weights = frozenset(path for path in base if is_weight(path))
        if func.attr in CASTS_LIKE and not weights:
            self._union([*node.args, *(keyword.value for keyword in node.keywords)])  # x.to(weight), for its dtype
            return NOTHING
        if weights:
            self._member(weights, func.attr)
        results = NOTHING
        for path in base - weights:
            called = self._follower.method(path, func.attr)
            if called is not None:
                results |= self._hand_over(node, called, frozenset({path}))
            elif self._follower.is_module((*path, func.attr)):
                results |= self._hand_over(node, None, frozenset({(*path, func.attr)}))
        if not results:
            module = self._function.__globals__.get(func.value.id) if isinstance(func.value, ast.Name) else None
            called = getattr(module, func.attr, None) if inspect.ismodule(module) else None
            if not base:
                results = self._hand_over(node, called if isinstance(called, FunctionType) else None, NOTHING)
        return results

    def _global(self, name: str) -> FunctionType | None:
        found = self._function.__globals__.get(name)
        return found if isinstance(found, FunctionType) else None

    def _hand_over(self, node: ast.Call, called: FunctionType | None, on: Values) -> Values:
        """Follow a call of the function `called` of the modules `on`; where it is None, of the modules themselves."""
        positional = [self._value(each) for each in node.args]
        named = {keyword.arg: self._value(keyword.value) for keyword in node.keywords}
        given = [*positional, *named.values()]
        if called is None:
            return self._call_modules(on, positional, named, given)
        if not _is_modeling(called):
            self._follower.read(NOTHING.union(*given))
            return NOTHING
        if not any(given) and on != frozenset({()}):
            return NOTHING  # nothing of this module goes there: it is followed where it belongs
        parameters = called.__code__.co_varnames[: called.__code__.co_argcount + called.__code__.co_kwonlyargcount]
        values = [on, *positional] if on else positional
        bound = dict(zip(parameters, values, strict=False))
        bound.update({key: value for key, value in named.items() if key in parameters})
        self._follower.read(NOTHING.union(*values[len(parameters) :]))
        return self._follower.run(called, {key: value for key, value in bound.items() if value})

    def _call_modules(
        self, on: Values, positional: Sequence[Values], named: Mapping[str | None, Values], given: Sequence[Values]
    ) -> Values:
        results = NOTHING
        for path in on:
            forward = self._follower.method(path, "forward")
            if forward is None or not _is_modeling(forward):
                continue
            if any(given):
                parameters = forward.__code__.co_varnames[: forward.__code__.co_argcount]
                bound = dict(zip(parameters, [frozenset({path}), *positional], strict=False))
                bound.update({key: value for key, value in named.items() if key in parameters})
                results |= self._follower.run(forward, {key: value for key, value in bound.items() if value})
                return results
        self._follower.read(NOTHING.union(*given))
        return results


def _is_modeling(function: FunctionType) -> bool:
    """Whether a function is one of a model, not of torch or of another library that computes with what it is given."""
    return function.__module__.partition(".")[0] not in ("torch", "numpy", "einops", "builtins")


_EXPRESSIONS: dict[type[ast.expr], Callable[[Scope, Any], Values]] = {
    ast.Name: Scope._name,
    ast.Attribute: Scope._attribute,
    ast.Subscript: Scope._subscript,
    ast.IfExp: Scope._either,
    ast.BoolOp: Scope._any_of,
    ast.Compare: Scope._compare,
    ast.Tuple: Scope._sequence,
    ast.List: Scope._sequence,
    ast.Set: Scope._sequence,
    ast.Starred: Scope._starred,
    ast.NamedExpr: Scope._named,
    ast.ListComp: Scope._comprehension,
    ast.SetComp: Scope._comprehension,
    ast.GeneratorExp: Scope._comprehension,
    ast.Call: Scope._call,
}
