"""Where the codes and scales of a quantized parameter lie."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..kernels.formats import FormatTensor, Tensors, WeightFormat
from .regions import Interval, Region

Index = tuple[slice, slice]


def extent_of(index: Index) -> tuple[int, int]:
    """Rows and columns of what an index chooses."""
    rows, columns = index
    return rows.stop - rows.start, columns.stop - columns.start


Shards = tuple[tuple[str, int], ...]
"""The (shard_id, rows) of a matrix, from top to bottom."""
ShardId = str | int | tuple[int, ...] | None
"""A part of a merged parameter: its name (`q`, `w1`), its number from the top, or several numbers; `None`: all."""


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a region inside one shard, with the slices that belong to it of each tensor, in the format's order.

    `shard` is its number from the top, `rows` are relative to the region, `maxima` is the slice of what `observe`
    raises. `fills` says of each scale tensor whether the block covers whole scales of it, `whole` of all, so that its
    scales depend on nothing else.
    """

    shard: int
    rows: Interval
    index: tuple[Index, ...]
    maxima: Index
    fills: tuple[bool, ...]
    whole: bool


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """One shard of a matrix: its rows in the weight, and where it lies in each tensor, in the format's order.

    `maxima` is the slice of what `observe` raises.
    """

    rows: slice
    index: tuple[Index, ...]
    maxima: Index


@dataclass(frozen=True)
class WeightLayout:
    """Codes and scales of one parameter: `experts` matrices (None: one), each a stack of `shards` of `columns`.

    `shards` are (shard_id, rows) from top to bottom, such as `(("w1", I), ("w3", I))`; every shard is quantized on
    its own, so no scale block reaches over its border. Orientation is canonical, [N, K], whatever the module has.
    The tensors have room for the rows of each shard, and for the columns, rounded up to `multiples` of both, as a
    kernel may want it; `clear_padding` writes the zeros.
    """

    format: WeightFormat
    experts: int | None
    shards: Shards
    columns: int
    multiples: tuple[int, int] = (1, 1)

    @property
    def rows(self) -> int:
        """Output features of one matrix."""
        return sum(rows for _, rows in self.shards)

    @property
    def numel(self) -> int:
        """Weights, all experts together."""
        return (self.experts or 1) * self.rows * self.columns

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each tensor, experts first."""
        return _shapes(self)

    @property
    def maxima_shape(self) -> tuple[int, int]:
        """Shape of the maxima of one matrix, which `observe` raises."""
        return self._extent(self.format.maxima)

    @property
    def tensors(self) -> tuple[tuple[torch.dtype, tuple[int, ...]], ...]:
        """Dtype and shape of the codes, then of the scales."""
        return tuple(zip((tensor.dtype for tensor in self.format.tensors), self.shapes, strict=True))

    @property
    def maxima_bytes(self) -> int:
        """Bytes of the maxima of one matrix."""
        return math.prod(self.maxima_shape) * self.format.maxima.dtype.itemsize

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each tensor, padding included."""
        return _sizes(self)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, padding included."""
        return sum(_sizes(self))

    @property
    def align(self) -> tuple[int, int]:
        """Rows and columns that a piece must come in multiples of, to hold whole scale blocks, or bytes, of codes."""
        columns = self.columns if self.format.whole_rows else self.format.block_cols or self.format.packed
        return self.format.block_rows or 1, max(columns, 1)

    @property
    def is_padded(self) -> bool:
        """Whether the tensors are larger than the weight needs."""
        return self._padded_columns != self.columns or any(self._padded_rows(rows) != rows for _, rows in self.shards)

    @property
    def scales_follow_rows(self) -> bool:
        """Whether a row of every tensor belongs to a fixed number of rows all through, across shard borders too."""
        heights = [scale.block_rows for scale in self.format.scales]
        return len(self.shards) == 1 or all(block and rows % block == 0 for block in heights for _, rows in self.shards)

    def shard_rows(self, shard_id: ShardId) -> Interval:
        """Rows of a shard; `None`, or `w13` for gate and up together, means all of them.

        Raises `KeyError` for a shard that is not there, and for several that do not lie one below the other.
        """
        names = [name for name, _ in self.shards]
        if shard_id is None or (shard_id == "w13" and names[0] == "w1"):
            return 0, self.rows
        numbers = shard_id if isinstance(shard_id, tuple) else (shard_id,)
        wanted = [names.index(each) if each in names else each for each in numbers]
        first = wanted[0] if wanted else None
        if not isinstance(first, int) or first < 0 or wanted != list(range(first, first + len(wanted))):
            raise KeyError(f"no shard {shard_id!r}; there are {', '.join(map(repr, names))}")
        borders = self.shard_borders()
        if first + len(wanted) >= len(borders):
            raise KeyError(f"no shard {shard_id!r}; there are {', '.join(map(repr, names))}")
        return borders[first], borders[first + len(wanted)]

    def shard_borders(self) -> list[int]:
        """Rows at which a shard begins, the end included."""
        borders = [0]
        for _, rows in self.shards:
            borders.append(borders[-1] + rows)
        return borders

    def shard_indices(self) -> Iterator[ShardIndex]:
        """The shards, without their padding."""
        tensors = *self.format.tensors, self.format.maxima
        starts, first = [self._starts_in(tensor) for tensor in tensors], 0
        for number, (_, rows) in enumerate(self.shards):
            whole = (0, rows), (0, self.columns)
            *index, maxima = (
                _index(tensor, own[number], *whole, self.columns) for tensor, own in zip(tensors, starts, strict=True)
            )
            yield ShardIndex(slice(first, first + rows), tuple(index), maxima)
            first += rows

    def calls(self, *, padding: bool) -> tuple[ShardIndex, ...]:
        """The parts of a matrix that one call of a kernel can take, with or without what they are padded with.

        All of it at once where there is one shard, or scales follow rows across the borders; else each shard.
        """
        kept = padding or not self.is_padded
        if (len(self.shards) == 1 and kept) or (self.scales_follow_rows and not self.is_padded):
            everything = slice(None), slice(None)
            return (ShardIndex(slice(0, self.rows), (everything,) * len(self.format.tensors), everything),)
        parts = tuple(self.shard_indices())
        if not padding:
            return parts
        starts = [*self._starts, self._starts_in(self.format.maxima)]
        padded = ([(slice(*own[n : n + 2]), slice(None)) for own in starts] for n in range(len(parts)))
        return tuple(ShardIndex(part.rows, tuple(own[:-1]), own[-1]) for part, own in zip(parts, padded, strict=True))

    def without_padding(self, tensors: Tensors) -> Tensors:
        """What `tensors`, of the shapes here, hold of the weight; copies where it lies in several parts of them."""
        if not self.is_padded:
            return tensors
        parts = list(self.shard_indices())
        cut = ([tensor[(..., *part.index[number])] for part in parts] for number, tensor in enumerate(tensors))
        return tuple(each[0] if len(each) == 1 else torch.cat(each, dim=-2) for each in cut)

    def clear_padding(self, tensors: Tensors) -> None:
        """Write zeros to what `tensors`, of the shapes here, hold beside the weight."""
        parts = list(self.shard_indices()) if self.is_padded else []
        for number, tensor in enumerate(tensors):
            kept = [part.index[number] for part in parts]
            ends = [rows.start for rows, _ in kept[1:]] + [tensor.shape[-2]]
            for (rows, columns), end in zip(kept, ends, strict=bool(parts)):
                tensor[..., rows.start : end, columns.stop :] = 0
                tensor[..., rows.stop : end, :] = 0

    def blocks(self, region: Region) -> tuple[Block, ...]:
        """Cut a region at the shard borders."""
        return _blocks(self, region.rows, region.columns)

    def whole(self, region: Region) -> bool:
        """Whether the region covers whole scale blocks only."""
        return all(block.whole for block in self.blocks(region))

    def code_aligned(self, region: Region) -> bool:
        """Whether the region begins and ends at a byte of codes, and at a scale where scales cannot be revised."""
        step = self.align[1] if self.format.packed > 1 else 1
        low, high = region.columns
        return low % step == 0 and (high % step == 0 or high == self.columns)

    @property
    def _starts(self) -> tuple[tuple[int, ...], ...]:
        """Of each tensor the rows at which the shards begin."""
        return tuple(self._starts_in(tensor) for tensor in self.format.tensors)

    def _starts_in(self, tensor: FormatTensor) -> tuple[int, ...]:
        heights = [tensor.shape(self._padded_rows(rows), self.columns)[0] for _, rows in self.shards]
        return (0, *itertools.accumulate(heights))

    def _extent(self, tensor: FormatTensor) -> tuple[int, int]:
        return self._starts_in(tensor)[-1], tensor.shape(1, self._padded_columns)[1]

    @property
    def _leading(self) -> tuple[int, ...]:
        return () if self.experts is None else (self.experts,)

    @property
    def _padded_columns(self) -> int:
        return -(-self.columns // self.multiples[1]) * self.multiples[1]

    def _padded_rows(self, rows: int) -> int:
        return -(-rows // self.multiples[0]) * self.multiples[0]


# Thousands of layers have the same layout, and their pieces the same regions: each is worked out once.


@lru_cache(maxsize=1024)
def _shapes(layout: WeightLayout) -> tuple[tuple[int, ...], ...]:
    return tuple((*layout._leading, *layout._extent(tensor)) for tensor in layout.format.tensors)


@lru_cache(maxsize=1024)
def _sizes(layout: WeightLayout) -> tuple[int, ...]:
    pairs = zip(layout.shapes, layout.format.tensors, strict=True)
    return tuple(math.prod(shape) * tensor.dtype.itemsize for shape, tensor in pairs)


@lru_cache(maxsize=4096)
def _blocks(layout: WeightLayout, rows: Interval, columns: Interval) -> tuple[Block, ...]:
    begin, found = 0, []
    for number, (_, height) in enumerate(layout.shards):
        low, high = max(rows[0], begin), min(rows[1], begin + height)
        if low < high:
            inside, within = (low - begin, high - begin), (low - rows[0], high - rows[0])
            found.append(_block(layout, number, inside, columns, within))
        begin += height
    return tuple(found)


def _block(layout: WeightLayout, number: int, rows: Interval, columns: Interval, within: Interval) -> Block:
    """The block of some rows of a shard and some columns; `within` are those rows in the region it is part of."""
    fmt, (low, high), (first, last), cols = layout.format, rows, columns, layout.columns
    index = [
        _index(tensor, starts[number], rows, columns, cols)
        for tensor, starts in zip(fmt.tensors, layout._starts, strict=True)
    ]
    maxima = _index(fmt.maxima, layout._starts_in(fmt.maxima)[number], rows, columns, cols)
    fills = tuple(
        _fills(low, high, layout.shards[number][1], scale.block_rows)
        and _fills(first, last, cols, 0 if scale.beside else scale.block_cols)
        for scale in fmt.scales
    )
    return Block(number, within, tuple(index), maxima, fills, all(fills))


def _index(tensor: FormatTensor, start: int, rows: Interval, columns: Interval, cols: int) -> Index:
    """Where rows and columns of a shard that begins at row `start` of a tensor lie in it."""
    first, last = tensor.rows(*rows)
    return slice(start + first, start + last), tensor.columns(*columns, cols)


def _fills(first: int, last: int, extent: int, block: int) -> bool:
    """Whether elements `first:last` of `extent` are whole blocks; 0: there is one."""
    size = block or max(extent, 1)
    return first % size == 0 and (last % size == 0 or last == extent)
