"""Strided boxes: which elements of which source stand in a block of a tensor, and how blocks change with its shape."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ..geometry.regions import Region


class Box(NamedTuple):
    """A block of a tensor whose elements lie on a strided grid of one source tensor.

    `start` and `shape` place the block in the tensor; element `i` of the block is element
    `offset + sum(i * strides)` of the flattened source number `source`. All in elements.
    """

    source: int
    start: tuple[int, ...]
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]


def region_of(box: Box, expert: int | None = None) -> Region:
    """The region that a box of a matrix fills."""
    rows, columns = ((start, start + length) for start, length in zip(box.start, box.shape, strict=True))
    return Region(expert, rows, columns)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides of `shape`, in elements."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return tuple(strides)


def matching_groups(old: tuple[int, ...], new: tuple[int, ...]) -> Iterator[tuple[range, range]]:
    """Split two shapes of equal size into the shortest runs of dimensions with equal products."""
    i = j = 0
    while i < len(old) or j < len(new):
        first_old, first_new = i, j
        left = right = 1
        while left != right or (i == first_old and j == first_new):
            if (left <= right and i < len(old)) or j == len(new):
                left *= old[i]
                i += 1
            else:
                right *= new[j]
                j += 1
        yield range(first_old, i), range(first_new, j)


def regroup(box: Box, first: int, old: list[int], new: list[int]) -> Iterator[Box]:
    """Boxes of `box` after its dimensions `first..first+len(old)` of sizes `old` became `new`."""
    for merged in merge_boxes(box, first, old):
        yield from _unmerge(merged, first, new)


def as_matrix(box: Box, shape: Sequence[int]) -> Iterator[Box]:
    """Boxes of a box of a tensor of `shape` after it was flattened to [product of the others, last]."""
    if len(shape) == 0:
        yield Box(box.source, (0, 0), (1, 1), box.offset, (1, 1))
    elif len(shape) == 1:
        yield Box(box.source, (0, *box.start), (1, *box.shape), box.offset, (shape[0], *box.strides))
    else:
        yield from merge_boxes(box, 0, list(shape[:-1]))


def merge_boxes(box: Box, first: int, sizes: list[int]) -> Iterator[Box]:
    """Boxes of `box` after its dimensions `first...` of sizes `sizes` were flattened into one."""
    if not sizes:
        yield Box(box.source, _put(box.start, first, 0, (0,)), _put(box.shape, first, 0, (1,)), box.offset,
                  _put(box.strides, first, 0, (0,)))  # fmt: skip
        return
    if len(sizes) == 1:
        yield box
        return
    inner, last = sizes[-1], first + len(sizes) - 1
    outer = last - 1
    start = box.start[outer] * inner + box.start[last]
    whole = box.shape[last] == inner and box.strides[outer] == inner * box.strides[last]
    if whole or box.shape[outer] == 1:
        shape = box.shape[outer] * box.shape[last]
        yield from merge_boxes(_fuse(box, outer, start, shape, box.offset), first, [*sizes[:-2], sizes[-2] * inner])
        return
    for i in range(box.shape[outer]):
        piece = _fuse(box, outer, start + i * inner, box.shape[last], box.offset + i * box.strides[outer])
        yield from merge_boxes(piece, first, [*sizes[:-2], sizes[-2] * inner])


def _fuse(box: Box, outer: int, start: int, length: int, offset: int) -> Box:
    stride = box.strides[outer + 1]
    return Box(box.source, _put(box.start, outer, 2, (start,)), _put(box.shape, outer, 2, (length,)), offset,
               _put(box.strides, outer, 2, (stride,)))  # fmt: skip


def _unmerge(box: Box, dim: int, sizes: list[int]) -> Iterator[Box]:
    if len(sizes) <= 1:
        yield box if sizes else _without(box, dim)
        return
    inner = math.prod(sizes[1:])
    start, stop, stride = box.start[dim], box.start[dim] + box.shape[dim], box.strides[dim]
    at = start
    while at < stop:
        row, column = divmod(at, inner)
        if column == 0 and stop - at >= inner:
            rows, columns = (stop - at) // inner, inner
        else:
            rows, columns = 1, min(inner - column, stop - at)
        cut = Box(box.source, _put(box.start, dim, 1, (row, column)), _put(box.shape, dim, 1, (rows, columns)),
                  box.offset + (at - start) * stride, _put(box.strides, dim, 1, (stride * inner, stride)))  # fmt: skip
        yield from _unmerge(cut, dim + 1, sizes[1:])
        at += rows * columns


def _without(box: Box, dim: int) -> Box:
    return Box(box.source, _put(box.start, dim, 1, ()), _put(box.shape, dim, 1, ()), box.offset,
               _put(box.strides, dim, 1, ()))  # fmt: skip


def _put(values: tuple[int, ...], at: int, count: int, new: Iterable[int]) -> tuple[int, ...]:
    return (*values[:at], *new, *values[at + count :])
