"""What a quantized layer computes, as operators of torch: torch.compile calls them and does not look inside.

Kernels are no torch code: they hand addresses to compiled functions, which they choose by the number of tokens. A graph
names them by what they are chosen by, so that one that torch keeps on disk means the same in another process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..kernels.formats import Tensors
from ..kernels.registry import KernelSet, kernel_set
from .activations import Activation, ActivationFormat
from .rows import decode_rows

Chosen = str
"""What kernels, or the rounding of activations, are chosen by."""


def describe_kernels(kernels: KernelSet, device: torch.device) -> Chosen:
    """The kernels of a format on a device."""
    return json.dumps([kernels.format.name, str(device), dict(kernels.names)])


def describe_activation(activation: Activation) -> Chosen:
    """The rounding of activations on a device."""
    return json.dumps([asdict(activation.format), str(activation.device)])


def call(name: str, function: Callable[..., Tensor], chosen: Chosen, x: Tensor, *rest: Any) -> Tensor:
    """`function(x, *rest)`, and where torch.compile traces that, the operator of that name.

    `name` is `linear` or `experts`, with the function of that name in a kernel set (`quantload.kernels.registry` has
    their arguments), or `rounded` with an `Activation`; `chosen` describes the one or the other. Where a gradient is
    wanted, the graph breaks, and the function is called between its parts.

    Where autocast is on, `x` becomes the dtype that autocast wants, and so does the result, as with `F.linear`; inside,
    kernels compute in the dtypes they choose themselves.
    """
    if not _is_in_autocast(x):
        return _call(name, function, chosen, x, *rest)
    x = as_autocast_wants(x)
    with torch.autocast(x.device.type, enabled=False):
        return _call(name, function, chosen, x, *rest)


def look_up(
    kernels: KernelSet, chosen: Chosen, ids: Tensor, tensors: Tensors, columns: int, dtype: torch.dtype
) -> Tensor:
    """`decode_rows` with these kernels, and where torch.compile traces it, the operator that does it."""
    if not torch.compiler.is_compiling():
        return decode_rows(kernels, ids, tensors, columns, dtype)
    traced: Tensor = _OPERATORS["rows"](ids, tensors, columns, dtype, chosen)
    return traced


def as_autocast_wants(x: Tensor) -> Tensor:
    """`x` in the dtype that autocast gives to operands of a matmul, where it is on; it leaves float64 alone."""
    if not _is_in_autocast(x) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _is_in_autocast(x: Tensor) -> bool:
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _call(name: str, function: Callable[..., Tensor], chosen: Chosen, x: Tensor, *rest: Any) -> Tensor:
    if not torch.compiler.is_compiling():
        return function(x, *rest)
    if torch.is_grad_enabled() and any(each.requires_grad for each in (x, *rest) if isinstance(each, Tensor)):
        from .between_graphs import call_between_graphs

        return call_between_graphs(function, x, *rest)
    traced: Tensor = _OPERATORS[name](x, *rest, chosen)
    return traced


@cache
def _kernels(chosen: Chosen) -> KernelSet:
    format_name, device, names = json.loads(chosen)
    return kernel_set(format_name, device, names)


@cache
def _activation(chosen: Chosen) -> Activation:
    fields, device = json.loads(chosen)
    return Activation(ActivationFormat(**fields), torch.device(device))


def _linear(x: Tensor, tensors: Sequence[Tensor], *rest: Any) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # a graph may be run where it is on
        return _kernels(rest[-1]).linear(x, tuple(tensors), *rest[:-1]).contiguous()


def _experts(x: Tensor, tensors: Sequence[Tensor], *rest: Any) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return _kernels(rest[-1]).experts(x, tuple(tensors), *rest[:-1]).contiguous()


def _rounded(x: Tensor, scale: Tensor | None, chosen: Chosen) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return _activation(chosen)(x, scale).contiguous() if x.numel() else torch.empty_like(x)


def _rows(ids: Tensor, tensors: Sequence[Tensor], columns: int, dtype: torch.dtype, chosen: Chosen) -> Tensor:
    return decode_rows(_kernels(chosen), ids, tuple(tensors), columns, dtype)


def _product(x: Tensor, *rest: Any) -> Tensor:
    """[T, n]: before the last two arguments, k and the kernels, is n."""
    return x.new_empty(x.shape[0], rest[-3])


def _operator(name: str, function: Callable[..., Tensor], schema: str, like: Callable[..., Tensor]) -> Any:
    """`like` makes what a graph knows of the result: its shape, contiguous, and its dtype."""
    operator = torch.library.custom_op(f"quantload::{name}", function, mutates_args=(), schema=f"({schema}) -> Tensor")
    operator.register_fake(like)
    return operator


_WEIGHT = "Tensor x, Tensor[] tensors, Tensor? bias"
_OPERATORS = {
    "linear": _operator("linear", _linear, f"{_WEIGHT}, int n, int k, str chosen", _product),
    "experts": _operator("experts", _experts, f"{_WEIGHT}, Tensor offsets, int n, int k, str chosen", _product),
    "rounded": _operator(
        "rounded", _rounded, "Tensor x, Tensor? scale, str chosen", lambda x, *_: x.new_empty(x.shape)
    ),
    "rows": _operator(
        *("rows", _rows, "Tensor ids, Tensor[] tensors, int k, ScalarType dtype, str chosen"),
        lambda ids, _, k, dtype, *__: ids.new_empty(ids.shape[0], k, dtype=dtype),
    ),
}
