"""Run tensor operations on coordinates instead of data.

A `Coordinates` tensor has a shape and no storage. It knows, for every part of itself, which element of which source
tensor would stand there: a list of strided boxes. Handed to transformers' own conversion operations it comes out as
the map from source elements to parameter elements, and no weight has to exist for it. Only operations that move
elements can be followed; anything else raises `NotExpressible`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, Self

import torch

from .boxes import Box, contiguous_strides, matching_groups, regroup

MAX_BOXES = 1 << 20


class NotExpressible(Exception):
    """An operation does something that moving strided boxes around cannot describe."""


@lru_cache(256)
def _on_meta(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor without elements, of which maps of one shape are made: they have their own sizes, and share nothing."""
    return torch.empty(shape, dtype=dtype, device="meta")


class Coordinates(torch.Tensor):
    """A meta tensor that remembers where each of its elements comes from."""

    boxes: list[Box]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Coordinates({list(self.shape)}, {self.dtype}, {len(self.boxes)} boxes)"

    @classmethod
    def of(cls, source: int, shape: Sequence[int], dtype: torch.dtype, strides: tuple[int, ...] | None = None) -> Self:
        """The identity map of source tensor number `source`, whose elements lie row by row, or `strides` apart."""
        shape = tuple(shape)
        box = Box(source, (0,) * len(shape), shape, 0, contiguous_strides(shape) if strides is None else strides)
        return cls.build(shape, dtype, [box] if math.prod(shape) else [])

    @classmethod
    def build(cls, shape: Sequence[int], dtype: torch.dtype, boxes: list[Box]) -> Self:
        """A map of these boxes; raises `NotExpressible` for too many."""
        if len(boxes) > MAX_BOXES:
            raise NotExpressible(f"the map falls into more than {MAX_BOXES} boxes")
        with torch._C.DisableTorchFunctionSubclass():
            tensor: Self = torch.Tensor._make_subclass(cls, _on_meta(tuple(shape), dtype))
        tensor.boxes = boxes
        return tensor

    def moved(self, shape: Sequence[int], boxes: list[Box]) -> Self:
        """What a movement of this map's elements gives; a subclass hands on what it knows besides."""
        return type(self).build(shape, self.dtype, boxes)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", repr(func))
        if name == "__get__":
            name = func.__self__.__name__  # type: ignore[attr-defined]  # the property's own name
        handler = MOVEMENTS.get(name)
        if handler is not None:
            return handler(*args, **(kwargs or {}))
        if name in QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise NotExpressible(f"{name} is not a movement of elements")


QUESTIONS = frozenset(
    {"shape", "dtype", "device", "ndim", "layout", "is_meta", "requires_grad", "itemsize", "nbytes", "names"}
    | {"size", "dim", "ndimension", "numel", "nelement", "stride", "is_floating_point", "is_complex"}
    | {"is_contiguous", "__len__", "__hash__", "element_size", "storage_offset", "get_device"}
)
"""What only asks about shape, type or place; the meta tensor below answers."""


def _shape(x: Coordinates) -> tuple[int, ...]:
    return tuple(x.shape)


def _dim(x: Coordinates, dim: int, extra: int = 0) -> int:
    count = x.ndim + extra
    if not -count <= dim < count:
        raise IndexError(f"dimension {dim} is out of range for a tensor of {count} dimensions")
    return dim % count


def _index(x: Coordinates, dim: int, index: int) -> int:
    size = x.shape[dim]
    if not -size <= index < size:
        raise IndexError(f"index {index} is out of range for dimension {dim} of size {size}")
    return index % size


def _same(x: Coordinates, *_: Any, **__: Any) -> Coordinates:
    return x


def _to(x: Coordinates, *args: Any, **kwargs: Any) -> Coordinates:
    dtypes = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
    if any(dtype != x.dtype for dtype in dtypes):
        raise NotExpressible("a conversion to another dtype is not a movement of elements")
    return x


def _cat(tensors: Sequence[Coordinates], dim: int = 0, *, axis: int | None = None) -> Coordinates:
    dim = _dim(tensors[0], dim if axis is None else axis)
    shape, boxes, at = list(_shape(tensors[0])), [], 0
    for x in tensors:
        other = list(_shape(x))
        if other[:dim] + other[dim + 1 :] != shape[:dim] + shape[dim + 1 :]:
            raise ValueError(f"cannot concatenate {tuple(shape)} and {tuple(other)} along dimension {dim}")
        for b in x.boxes:
            start = (*b.start[:dim], b.start[dim] + at, *b.start[dim + 1 :])
            boxes.append(Box(b.source, start, b.shape, b.offset, b.strides))
        at += other[dim]
    shape[dim] = at
    return tensors[0].moved(shape, boxes)


def _unsqueeze(x: Coordinates, dim: int) -> Coordinates:
    dim = _dim(x, dim, extra=1)

    def put(values: tuple[int, ...], value: int) -> tuple[int, ...]:
        return (*values[:dim], value, *values[dim:])

    boxes = [Box(b.source, put(b.start, 0), put(b.shape, 1), b.offset, put(b.strides, 0)) for b in x.boxes]
    return x.moved(put(_shape(x), 1), boxes)


def _stack(tensors: Sequence[Coordinates], dim: int = 0) -> Coordinates:
    shapes = {_shape(x) for x in tensors}
    if len(shapes) != 1:
        raise ValueError(f"cannot stack tensors of different shapes: {sorted(shapes)}")
    return _cat([_unsqueeze(x, dim) for x in tensors], _dim(tensors[0], dim, extra=1))


def _drop(x: Coordinates, dims: Iterable[int]) -> Coordinates:
    gone = set(dims)

    def keep(values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(value for dim, value in enumerate(values) if dim not in gone)

    boxes = [Box(b.source, keep(b.start), keep(b.shape), b.offset, keep(b.strides)) for b in x.boxes]
    return x.moved(keep(_shape(x)), boxes)


def _squeeze(x: Coordinates, dim: int | Sequence[int] | None = None) -> Coordinates:
    dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    return _drop(x, [_dim(x, d) for d in dims if x.shape[_dim(x, d)] == 1])


def _permute(x: Coordinates, *dims: Any) -> Coordinates:
    order = [_dim(x, d) for d in (dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims)]

    def move(values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(values[d] for d in order)

    boxes = [Box(b.source, move(b.start), move(b.shape), b.offset, move(b.strides)) for b in x.boxes]
    return x.moved(move(_shape(x)), boxes)


def _transpose(x: Coordinates, dim0: int, dim1: int) -> Coordinates:
    order = list(range(x.ndim))
    a, b = _dim(x, dim0), _dim(x, dim1)
    order[a], order[b] = order[b], order[a]
    return _permute(x, order)


def _swap_first(x: Coordinates) -> Coordinates:
    return _transpose(x, 0, 1) if x.ndim > 1 else x


def _swap_last(x: Coordinates) -> Coordinates:
    return _transpose(x, -2, -1)


def _reversed(x: Coordinates) -> Coordinates:
    return _permute(x, list(reversed(range(x.ndim))))


def _narrow(x: Coordinates, dim: int, start: int, length: int) -> Coordinates:
    dim = _dim(x, dim)
    if start < 0:
        start += x.shape[dim]
    if start < 0 or length < 0 or start + length > x.shape[dim]:
        raise IndexError(f"{length} elements from {start} on are out of range for dimension {dim} of {x.shape[dim]}")
    boxes = []
    for b in x.boxes:
        low, high = max(start, b.start[dim]), min(start + length, b.start[dim] + b.shape[dim])
        if low < high:
            moved = (*b.start[:dim], low - start, *b.start[dim + 1 :])
            cut = (*b.shape[:dim], high - low, *b.shape[dim + 1 :])
            boxes.append(Box(b.source, moved, cut, b.offset + (low - b.start[dim]) * b.strides[dim], b.strides))
    return x.moved((*x.shape[:dim], length, *x.shape[dim + 1 :]), boxes)


def _split(x: Coordinates, sizes: int | Sequence[int], dim: int = 0) -> tuple[Coordinates, ...]:
    total = x.shape[_dim(x, dim)]
    if isinstance(sizes, int):
        sizes = [min(sizes, total - at) for at in range(0, total, sizes)]
    if sum(sizes) != total:
        raise ValueError(f"cannot split {total} elements into {list(sizes)}")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(_narrow(x, dim, start, size) for start, size in zip(starts, sizes, strict=True))


def _chunk(x: Coordinates, chunks: int, dim: int = 0) -> tuple[Coordinates, ...]:
    return _split(x, -(-x.shape[_dim(x, dim)] // chunks), dim)


def _unbind(x: Coordinates, dim: int = 0) -> tuple[Coordinates, ...]:
    dim = _dim(x, dim)
    if x.shape[dim] == 1:
        return (_drop(x, [dim]),)
    return tuple(_drop(_narrow(x, dim, i, 1), [dim]) for i in range(x.shape[dim]))


def _getitem(x: Coordinates, index: Any) -> Coordinates:
    items = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in items:
        at = items.index(Ellipsis)
        named = sum(item is not None for item in items) - 1
        items[at : at + 1] = [slice(None)] * (x.ndim - named)
    gone = []
    for dim, item in enumerate(items):
        if item is None:
            x = _unsqueeze(x, dim)
        elif isinstance(item, int):
            x = _narrow(x, dim, _index(x, dim, item), 1)
            gone.append(dim)
        elif isinstance(item, slice) and item.step in (None, 1):
            start, stop, _ = item.indices(x.shape[dim])
            x = _narrow(x, dim, start, max(stop - start, 0))
        elif isinstance(item, slice):
            x = _step(x, dim, item)
        else:
            raise NotExpressible(f"indexing with {type(item).__name__} is not a movement of boxes")
    return _drop(x, gone) if gone else x


def _step(x: Coordinates, dim: int, item: slice) -> Coordinates:
    start, stop, step = item.indices(x.shape[dim])
    if step < 1 or any(b.start[dim] or b.shape[dim] != x.shape[dim] for b in x.boxes):
        raise NotExpressible("a step over a dimension made of several boxes")
    length = max(-(-(stop - start) // step), 0)

    def put(values: tuple[int, ...], value: int) -> tuple[int, ...]:
        return (*values[:dim], value, *values[dim + 1 :])

    boxes = [
        Box(b.source, b.start, put(b.shape, length), b.offset + start * b.strides[dim],
            put(b.strides, b.strides[dim] * step))
        for b in x.boxes
    ]  # fmt: skip
    return x.moved(put(_shape(x), length), boxes)


def _reshape(x: Coordinates, *shape: Any) -> Coordinates:
    wanted = list(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
    if -1 in wanted:
        wanted[wanted.index(-1)] = x.numel() // max(-math.prod(wanted), 1)
    if math.prod(wanted) != x.numel():
        raise ValueError(f"cannot reshape {_shape(x)} into {tuple(wanted)}")
    boxes = x.boxes
    groups = list(matching_groups(_shape(x), tuple(wanted)))
    for old, new in reversed(groups):  # from the right, so that positions to the left stay valid
        old_sizes, new_sizes = [x.shape[d] for d in old], [wanted[d] for d in new]
        if old_sizes != new_sizes:
            boxes = [c for b in boxes for c in regroup(b, old.start, old_sizes, new_sizes)]
    return x.moved(wanted, boxes)


def _as(x: Coordinates, other: torch.Tensor) -> Coordinates:
    return _reshape(x, tuple(other.shape))


def _select(x: Coordinates, dim: int, index: int) -> Coordinates:
    dim = _dim(x, dim)
    return _drop(_narrow(x, dim, _index(x, dim, index), 1), [dim])


def _move(x: Coordinates, source: int | Sequence[int], destination: int | Sequence[int]) -> Coordinates:
    sources, destinations = ([each] if isinstance(each, int) else each for each in (source, destination))
    to = {_dim(x, new): _dim(x, old) for old, new in zip(sources, destinations, strict=True)}
    others = iter([dim for dim in range(x.ndim) if dim not in to.values()])
    return _permute(x, [to[dim] if dim in to else next(others) for dim in range(x.ndim)])


def _flatten(x: Coordinates, start_dim: int = 0, end_dim: int = -1) -> Coordinates:
    first, last = _dim(x, start_dim), _dim(x, end_dim)
    shape = _shape(x)
    return _reshape(x, (*shape[:first], math.prod(shape[first : last + 1]), *shape[last + 1 :]))


def _unflatten(x: Coordinates, dim: int, sizes: Sequence[int]) -> Coordinates:
    dim = _dim(x, dim)
    return _reshape(x, (*x.shape[:dim], *sizes, *x.shape[dim + 1 :]))


MOVEMENTS: dict[str, Callable[..., Any]] = {
    "cat": _cat, "concat": _cat, "concatenate": _cat, "stack": _stack,
    "unsqueeze": _unsqueeze, "squeeze": _squeeze,
    "permute": _permute, "transpose": _transpose, "swapaxes": _transpose, "t": _swap_first,
    "T": _reversed, "mT": _swap_last,
    "narrow": _narrow, "split": _split, "split_with_sizes": _split, "chunk": _chunk, "unbind": _unbind,
    "__getitem__": _getitem, "reshape": _reshape, "view": _reshape, "flatten": _flatten, "unflatten": _unflatten,
    "view_as": _as, "reshape_as": _as, "select": _select, "movedim": _move, "moveaxis": _move,
    "contiguous": _same, "clone": _same, "detach": _same, "to": _to,
}  # fmt: skip
"""The operations that can be followed, by name."""
