"""Where an engine's own loader puts a tensor: learned on a shadow of the parameter, once for all of the same shape.

An engine narrows a tensor to its part of a tensor-parallel group, finds its place in a merged weight or among experts,
and copies it. Its loader is run on *coordinates* and a shadow, which is the parameter as it would be without
quantization, on meta; the copies it makes there are the answer. No rule of an engine is repeated here.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import RouteError
from ..geometry.regions import Region
from ..geometry.spans import Span
from ..model.boxes import Box
from .lazy import Copy, EngineSink, LazyTensor, Origin, capturing, shape_of

NOBODY = -1
"""What engines call the local number of an expert that another rank has."""

Base = Callable[..., Any]


class Place(NamedTuple):
    """A rectangle of a tensor: the region it fills, and its elements in the source they come from.

    Element (row, column) of the region is element `offset + row * row_stride + column * column_stride` of the flattened
    source number `source`.
    """

    source: int
    region: Region
    offset: int
    row_stride: int
    column_stride: int


class Placed(NamedTuple):
    """What a call of a loader came to: what it returned, where sources of origins go, and how many elements of them."""

    result: Any
    places: Sequence[tuple[Origin, Sequence[Place]]]
    numel: int


@dataclass(frozen=True)
class Shadow:
    """A parameter as it would be without quantization: [N, K], or [experts, N, K].

    `attributes` are what the engine's loader asks of a parameter, such as `output_dim`. Places do not reach over
    `borders`, the rows at which the shards of a weight begin and end.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    borders: Sequence[int]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def parameter(self) -> nn.Parameter:
        """A new one, without storage."""
        meta = nn.Parameter(torch.empty(self.shape, dtype=self.dtype, device="meta"), requires_grad=False)
        for name, value in self.attributes.items():
            setattr(meta, name, value)
        return meta


class Placements:
    """The places of tensors that are given to one loader, each worked out once for a shape and a shard.

    `base` is the engine's loader; it is held weakly where it is a method, so that its layer can go. `local_expert` says
    which expert of this rank the expert of a call is, `NOBODY` for none; with it, all experts share what was worked out
    for one.
    """

    def __init__(self, base: Base, shadow: Shadow, local_expert: Callable[[int], int] | None = None) -> None:
        self.shadow = shadow
        self._local_expert = local_expert
        self._known: dict[Any, _Known | None] = {}
        self.use(base)

    def use(self, base: Base) -> None:
        """Another loader of the engine has the word from now on."""
        self._base = weakref.WeakMethod(base) if isinstance(base, MethodType) else lambda: base
        self._known.clear()

    def of(self, tensor: LazyTensor, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Placed:
        """Where a tensor goes that a loader was called with; `arguments` and `named` are those behind the tensor."""
        shape = shape_of(tensor)
        box = tensor.boxes[0] if len(tensor.boxes) == 1 and not tensor.is_real else None
        known = None
        if box is not None and box.shape == shape:
            known = self._known_of(shape, tensor.dtype, box, arguments, named)
        if known is None or box is None:
            return self._run_on(tensor, arguments, named)
        learned, local = known
        return Placed(learned.result, ((tensor.origin, _moved(learned.places, box, local)),), learned.numel)

    def _known_of(
        self, shape: tuple[int, ...], dtype: torch.dtype, box: Box, arguments: tuple[Any, ...], named: Mapping[str, Any]
    ) -> tuple[_Known, int | None] | None:
        """What is known of tensors of a shape, and the expert to say it of; `None` where it must be asked of each."""
        expert, rest = self._expert(arguments, named) if len(shape) == 2 else (None, None)
        local = None if expert is None or self._local_expert is None else self._local_expert(expert)
        said = (arguments, *named.items()) if local is None else (rest, local == NOBODY)
        key = shape, box.strides, dtype, said
        if key not in self._known:
            self._known[key] = self._learned(shape, dtype, box, arguments, named, local)
        known = self._known[key]
        return None if known is None else (known, local)

    def _expert(self, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[int | None, Any]:
        """The expert of a call, and all that is said besides (`engine_calls` has how engines call)."""
        if self._local_expert is None:
            return None, None
        if "expert_id" in named:
            return named["expert_id"], (arguments, *(item for item in named.items() if item[0] != "expert_id"))
        if len(arguments) > 2:
            return arguments[2], (arguments[:2], arguments[3:], *named.items())
        return None, None

    def _learned(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        box: Box,
        arguments: tuple[Any, ...],
        named: Mapping[str, Any],
        local: int | None,
    ) -> _Known | None:
        """What holds for all such tensors; `None` where the loader computes with numbers, or one of them is special."""
        nothing = LazyTensor.of_source(_NOWHERE, 0, shape, dtype, _NOWHERE.wrap, box.strides)
        try:
            result, copies = self._run(nothing, arguments, named)
        except _NumbersWantedError:
            return None
        places = [place for copy in copies for place in _places(copy, self.shadow)]
        if local is not None and any(place.region.expert != local for place in places):
            return None
        return _Known(result, places, sum(place.region.numel for place in places))

    def _run_on(self, tensor: LazyTensor, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Placed:
        """Where the loader puts this very tensor."""
        result, copies = self._run(tensor, arguments, named)
        places = [(copy.source.origin, [*_places(copy, self.shadow)]) for copy in copies]
        return Placed(result, places, sum(place.region.numel for _, own in places for place in own))

    def _run(self, tensor: LazyTensor, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, list[Copy]]:
        base = self._base()
        if base is None:
            raise ReferenceError("the layer was deleted while it was being loaded")
        with _disable_current_modes(), capturing() as copies:
            result = base(self.shadow.parameter(), tensor, *arguments, **named)
        return result, copies


class _Known(NamedTuple):
    """What is known of tensors of one shape: places in elements of the tensor."""

    result: Any
    places: Sequence[Place]
    numel: int


class _NumbersWantedError(Exception):
    """A loader does more than moving elements."""


class _Nowhere:
    """The origin of a tensor that stands for all of its shape, and has no elements."""

    def write(self, target: Tensor, source: LazyTensor) -> None:
        raise _NumbersWantedError

    def read(self, source: LazyTensor, why: str) -> Tensor:
        raise _NumbersWantedError

    def deliver(self, source: int, span: Span, sink: EngineSink) -> None:
        raise _NumbersWantedError

    def wrap(self, tensor: Tensor) -> LazyTensor:
        raise _NumbersWantedError


_NOWHERE = _Nowhere()


def _moved(places: Sequence[Place], box: Box, expert: int | None) -> list[Place]:
    """Places of one tensor said of another one, of the same shape and strides: `box` is all of it."""
    source, offset = box.source, box.offset
    if expert is None:
        return [Place(source, at.region, at.offset + offset, at.row_stride, at.column_stride) for at in places]
    return [
        Place(source, Region(expert, *at.region[1:]), at.offset + offset, at.row_stride, at.column_stride)
        for at in places
    ]


def _places(copy: Copy, shadow: Shadow) -> Iterator[Place]:
    """The places of one copy that a loader made into a shadow."""
    target, source = copy
    strides = target.stride()
    for box in source.boxes:
        at = int(target.storage_offset()) + sum(
            start * stride for start, stride in zip(box.start, strides, strict=True)
        )
        extents = [each for each in zip(box.shape, strides, box.strides, strict=True) if each[0] > 1]
        yield from _rectangles(box.source, sorted(extents, key=lambda each: -each[1]), at, box.offset, shadow)


def _rectangles(
    source: int, extents: Sequence[tuple[int, int, int]], at: int, offset: int, shadow: Shadow
) -> Iterator[Place]:
    """Of a grid of elements those in each matrix and shard of a shadow.

    `extents` are (count, stride in the shadow, stride in the source), slowest first; the grid begins at element `at` of
    the shadow and `offset` of the source.
    """
    rows, columns = shadow.shape[-2:]
    outer, own_columns = _split(extents, columns)
    while outer and (outer[0][1] >= rows * columns or len(outer) > 1):
        count, stride, step = outer[0]
        for number in range(count):
            inside = [*outer[1:], *own_columns]
            yield from _rectangles(source, inside, at + number * stride, offset + number * step, shadow)
        return
    matrix, place = divmod(at, rows * columns)
    row, column = divmod(place, columns)
    count, stride, row_step = outer[0] if outer else (1, columns, 0)
    width, column_stride, column_step = own_columns[0] if own_columns else (1, 1, 0)
    expert = matrix if len(shadow.shape) == 3 else None
    if len(own_columns) > 1 or column_stride != 1 or column + width > columns or stride % columns:
        raise RouteError(
            f"the engine's loader copies to elements of {shadow.shape} that are {stride} and {column_stride} apart, "
            f"which is no rectangle of rows and columns: such a layer cannot be quantized while it is loaded; ignore it"
        )
    if stride != columns:
        for number in range(count):
            low = row + number * (stride // columns)
            region = Region(expert, (low, low + 1), (column, column + width))
            yield Place(source, region, offset + number * row_step, row_step, column_step)
        return
    edges = [row, *(border for border in shadow.borders if row < border < row + count), row + count]
    for low, high in itertools.pairwise(edges):
        region = Region(expert, (low, high), (column, column + width))
        yield Place(source, region, offset + (low - row) * row_step, row_step, column_step)


def _split(
    extents: Sequence[tuple[int, int, int]], columns: int
) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """Those that go from row to row, and those that stay in one."""
    return [each for each in extents if each[1] >= columns], [each for each in extents if each[1] < columns]
