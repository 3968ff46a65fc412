"""Which modules are linear layers: those that compute what `F.linear` computes, whatever class they are of.

A subclass of `nn.Linear` may scale its outputs, clip its inputs, add a low-rank product, or write a plain product in
another way. Its forward is run on small numbers: one that gives what `F.linear` gives is replaced as any other layer
is, and all others are kept as they are, with the reason.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..shortage import is_shortage

PLAIN = (nn.Linear, Conv1D)
IN, OUT = 24, 40
"""The sizes of what is tried: neither divides the other, so that a layer that groups its inputs gives another shape."""
SHAPES = ((3, IN), (2, 3, IN), (1, 2, 5, IN))
SCALES = (1e-3, 1.0, 1e4)
"""Of the inputs: a layer that clips or normalizes gives away that it does for one of them."""
TOLERANCE = 1e-5
"""Relative to the largest output: sums of `IN` products in float32 in another order differ by less."""
SIZES = frozenset({"in_features", "out_features", "nx", "nf"})
# What a subclass may have of its own without anyone missing it in the layer that takes its place.
REPLACEABLE = frozenset({"__init__", "forward", "extra_repr", "reset_parameters", "__constants__"})
WRITTEN_BY_PYTHON = frozenset({"__module__", "__qualname__", "__doc__", "__annotations__", "__annotate_func__",
    "__static_attributes__", "__firstlineno__"})  # fmt: skip
INHERITED = frozenset(vars(nn.Module())) | {"_is_hf_initialized"}


class Products:
    """Says of linear layers whether they are nothing but a product; remembers what it has tried."""

    def __init__(self) -> None:
        self._tried: dict[tuple[Any, ...], bool] = {}

    def objection(self, module: nn.Module) -> str | None:
        """Why `module`, an `nn.Linear` or `Conv1D` by its class, is not replaced as a product is; `None` if it is."""
        cls = type(module)
        if has_hooks(module):
            return f"this {cls.__name__} has hooks or a forward of its own"
        if cls in PLAIN:
            return None
        more = {name.partition(".")[0] for name in module.state_dict()} - {"weight", "bias"} | module._modules.keys()
        if more:
            return f"{cls.__name__} is a linear layer with more than a weight and a bias: {', '.join(sorted(more)[:3])}"
        weight = module._parameters.get("weight")
        if weight is None or not weight.is_floating_point():
            return f"{cls.__name__} is a linear layer whose weight is no parameter of floating-point numbers"
        bases = [base for base in cls.__mro__ if base not in (*PLAIN, nn.Module, object)]
        others = sorted(key for base in bases for key in vars(base) if key not in REPLACEABLE | WRITTEN_BY_PYTHON)
        if others:
            return f"{cls.__name__} is a linear layer with more of its own than a forward: {', '.join(others[:3])}"
        return None if self._is_product(module) else f"{cls.__name__} is a linear layer with code of its own"

    def _is_product(self, module: nn.Module) -> bool:
        """Whether its forward computes what `F.linear` does; layers of one class with the same attributes are alike."""
        own = {key: value for key, value in vars(module).items() if key not in INHERITED and key not in SIZES}
        try:
            alike = (type(module), module._parameters.get("bias") is None, *sorted(own.items()))
            if alike not in self._tried:
                self._tried[alike] = _is_product(module, own)
            return self._tried[alike]
        except TypeError:  # an attribute without a hash: there is no telling whether another layer's is the same
            return _is_product(module, own)


def has_hooks(module: nn.Module) -> bool:
    """Whether something is attached to this one instance that another module in its place would not have."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in vars(module)


def _is_product(module: nn.Module, own: dict[str, Any]) -> bool:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        weight = torch.randn(OUT, IN, generator=generator)
        bias = None if module._parameters.get("bias") is None else torch.randn(OUT, generator=generator)
        try:
            stand_in = _stand_in(module, own, weight, bias)
            for shape in SHAPES:
                for scale in SCALES:
                    x = scale * torch.randn(shape, generator=generator)
                    if not _equal(stand_in(x), F.linear(x, weight, bias)):
                        return False
        except Exception as error:
            if is_shortage(error):
                raise
            return False  # it is code of somebody else, and whatever it raises says that it is not known for a product
    return True


def _stand_in(module: nn.Module, own: dict[str, Any], weight: Tensor, bias: Tensor | None) -> Any:
    """A small layer of the class of `module`, made without its `__init__`, with the same attributes but for sizes."""
    small: Any = object.__new__(type(module))
    nn.Module.__init__(small)
    vars(small).update(copy.deepcopy(own), training=False)
    transposed = isinstance(module, Conv1D)
    vars(small).update({"nf": OUT, "nx": IN} if transposed else {"in_features": IN, "out_features": OUT})
    small.weight = nn.Parameter(weight.T.contiguous() if transposed else weight, requires_grad=False)
    small.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    return small


def _equal(found: Any, expected: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.device != expected.device:
        return False
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return False
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())
