"""Cut routes into pieces: contiguous reads of at most a chunk, each delivered to the parameters it holds parts of.

A piece is cut along the slower dimension of the checkpoint tensor, in whole scale blocks of whatever it lands in, so
that it can be quantized on its own. Where a scale needs more than one piece can hold (a row too long, a transposed
tensor, one scale a tensor) the pieces of that matrix go through twice: maxima first, then codes.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.headers import TensorEntry
from ..checkpoint.pieces import Barrier, Piece, Workspace
from ..errors import NonFiniteWeightError
from ..model.routes import Span
from .regions import Interval, Region
from .weight_loader import DirectWeightLoader

Matrix = tuple[str, int | None]


@dataclass(frozen=True, slots=True)
class Sink:
    """A parameter and the closure attached to it."""

    param: Tensor
    loader: Any

    @property
    def direct(self) -> bool:
        """Whether the parameter is kept as stored."""
        return isinstance(self.loader, DirectWeightLoader)

    @property
    def align(self) -> tuple[int, int]:
        """Rows and columns a piece must come in multiples of, to hold whole scale blocks."""
        if self.direct:
            return 1, 1
        fmt = self.loader.parameter.layout.format
        return fmt.block_rows or 1, fmt.block_cols or 1

    def whole(self, region: Region) -> bool:
        """Whether the scales of a region depend on nothing outside of it."""
        return self.direct or bool(self.loader.parameter.layout.whole(region))


@dataclass(frozen=True, slots=True)
class Part:
    """A region and where its elements stand in a piece's buffer, in elements."""

    span: Span
    region: Region
    offset: int
    row_stride: int
    column_stride: int


@dataclass(frozen=True, slots=True)
class Cut:
    """One read of a checkpoint tensor: extents in elements of the tensor, and the parts it holds."""

    extents: tuple[tuple[int, int], ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class _Line:
    """A span seen from the checkpoint tensor: outer lines, each of inner elements."""

    span: Span
    along_rows: bool
    outer: int
    outer_stride: int
    inner: int
    inner_stride: int
    outer_align: int
    inner_align: int

    @property
    def width(self) -> int:
        return (self.inner - 1) * self.inner_stride + 1

    @property
    def end(self) -> int:
        return self.span.offset + (self.outer - 1) * self.outer_stride + self.width

    def part(self, outer: Interval, inner: Interval, offset: int, outer_stride: int) -> Part:
        """The part of this span between the given outer and inner indices."""
        region = self.span.region
        rows, columns = (outer, inner) if self.along_rows else (inner, outer)
        strides = (outer_stride, self.inner_stride)
        row_stride, column_stride = strides if self.along_rows else strides[::-1]
        cut = Region(
            region.expert,
            (region.rows[0] + rows[0], region.rows[0] + rows[1]),
            (region.columns[0] + columns[0], region.columns[0] + columns[1]),
        )
        return Part(self.span, cut, offset, row_stride, column_stride)


def _line(span: Span, align: tuple[int, int]) -> _Line:
    rows, columns = span.region.rows[1] - span.region.rows[0], span.region.columns[1] - span.region.columns[0]
    along_rows = columns == 1 or (span.row_stride >= span.column_stride and rows > 0) or rows == 1
    line = (rows, span.row_stride, columns, span.column_stride)
    outer, outer_stride, inner, inner_stride = line if along_rows else (*line[2:], *line[:2])
    # A dimension of one may come with any stride, 0 where a conversion added it; what is read depends on them.
    inner_stride = 1 if inner == 1 else inner_stride
    if outer == 1:
        outer_stride = max(outer_stride, (inner - 1) * inner_stride + 1)
    return _Line(span, along_rows, outer, outer_stride, inner, inner_stride, *(align if along_rows else align[::-1]))


def cut_tensor(entry: TensorEntry, spans: Sequence[Span], sinks: Mapping[str, Sink], chunk_bytes: int) -> Iterator[Cut]:
    """Cuts of one checkpoint tensor, each at most `chunk_bytes` where the scale blocks allow it."""
    limit = max(chunk_bytes // entry.dtype.itemsize, 1)
    lines = sorted((_line(span, sinks[span.parameter].align) for span in spans), key=lambda line: line.span.offset)
    for group in _groups(lines):
        step = max(line.outer_align for line in group)
        if step * group[0].outer_stride <= limit or group[0].outer * group[0].outer_stride <= limit:
            yield from _bands(group, step, limit)
        else:
            for line in group:
                yield from _tiles(line, limit)


def _groups(lines: list[_Line]) -> Iterator[list[_Line]]:
    """Spans whose lines run side by side through the same bytes, such as two halves that are interleaved."""
    group: list[_Line] = []
    for line in lines:
        if group and _side_by_side(group, line):
            group.append(line)
        else:
            if group:
                yield group
            group = [line]
    if group:
        yield group


def _side_by_side(group: list[_Line], line: _Line) -> bool:
    first = group[0]
    same = (line.along_rows, line.outer, line.outer_stride) == (first.along_rows, first.outer, first.outer_stride)
    return same and line.span.offset + line.width - first.span.offset <= first.outer_stride


def _bands(group: list[_Line], step: int, limit: int) -> Iterator[Cut]:
    first = group[0]
    start, stride = first.span.offset, first.outer_stride
    width = max(line.span.offset + line.width for line in group) - start
    lines_per_cut = max(limit // max(stride, 1) // step, 1) * step
    for low in range(0, first.outer, lines_per_cut):
        high = min(low + lines_per_cut, first.outer)
        length = (high - low - 1) * stride + width
        parts = tuple(
            line.part((low, high), (0, line.inner), line.span.offset - start, line.outer_stride) for line in group
        )
        yield Cut(((start + low * stride, length),), parts)


def _tiles(line: _Line, limit: int) -> Iterator[Cut]:
    """Cut the inner dimension as well: one extent a line, packed one after the other in the buffer."""
    per_line = max(limit // line.outer_align // line.inner_stride // line.inner_align, 1) * line.inner_align
    for low in range(0, line.outer, line.outer_align):
        high = min(low + line.outer_align, line.outer)
        for left in range(0, line.inner, per_line):
            right = min(left + per_line, line.inner)
            length = (right - left - 1) * line.inner_stride + 1
            begin = line.span.offset + left * line.inner_stride
            extents = tuple((begin + i * line.outer_stride, length) for i in range(low, high))
            yield Cut(extents, (line.part((low, high), (left, right), 0, length),))


class Delivery:
    """Hands the parts of one piece to the closures of their parameters."""

    __slots__ = ("_calls", "_entry", "_observe")

    def __init__(self, entry: TensorEntry, parts: Sequence[Part], sinks: Mapping[str, Sink], observe: bool) -> None:
        self._entry = entry
        self._observe = observe
        self._calls = [(part, sinks[part.span.parameter]) for part in parts]

    def __call__(self, workspace: Workspace) -> None:
        elements = workspace.buffer.view(self._entry.dtype)
        for part, sink in self._calls:
            piece = _piece(elements, part, workspace)
            try:
                if self._observe:
                    sink.loader.observe(piece, part.region)
                else:
                    sink.loader(sink.param, piece, region=part.region)
            except NonFiniteWeightError as error:
                raise _located(error, self._entry, part) from None


def _piece(elements: Tensor, part: Part, workspace: Workspace) -> Tensor:
    """The part as [rows, columns] with contiguous rows, copied only if it stands otherwise in the buffer."""
    rows, columns = part.region.rows, part.region.columns
    shape = (rows[1] - rows[0], columns[1] - columns[0])
    strides, offset = (part.row_stride, part.column_stride), elements.storage_offset() + part.offset
    view = elements.as_strided(shape, strides, offset)
    if part.column_stride == 1 or shape[1] == 1:
        return view
    scratch = workspace.scratch(view.numel() * view.element_size()).view(view.dtype).view(shape)
    return scratch.copy_(view)


def _located(error: NonFiniteWeightError, entry: TensorEntry, part: Part) -> NonFiniteWeightError:
    """The same error in the checkpoint's own coordinates."""
    if error.position is None:
        return error
    row, column = error.position
    low_row, low_column = (
        part.region.rows[0] - part.span.region.rows[0],
        part.region.columns[0] - part.span.region.columns[0],
    )
    flat = part.span.offset + (low_row + row) * part.span.row_stride + (low_column + column) * part.span.column_stride
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat), entry.shape)]
    return NonFiniteWeightError(
        f"checkpoint tensor {entry.name} is not finite at index {index} (goes to {part.span.parameter}); weights to be "
        f"quantized must be finite: repair the checkpoint, or leave this layer as stored with an ignore pattern"
    )


def plan_pieces(
    entries: Sequence[TensorEntry],
    spans: Mapping[str, Sequence[Span]],
    sinks: Mapping[str, Sink],
    chunk_bytes: int,
) -> list[Piece]:
    """Pieces of all tensors, by shard and offset; tensors that need two passes come first pass, second pass."""
    cuts = {entry.name: list(cut_tensor(entry, spans[entry.name], sinks, chunk_bytes)) for entry in entries}
    twice = {
        (part.span.parameter, part.region.expert)
        for tensor_cuts in cuts.values()
        for cut in tensor_cuts
        for part in cut.parts
        if not sinks[part.span.parameter].whole(part.region)
    }
    pieces: list[Piece] = []
    for group in _together(entries, cuts, twice):
        barrier = _first_pass(group, cuts, twice, sinks, pieces)
        for entry in group:
            pieces.extend(_second_pass(entry, cuts[entry.name], sinks, barrier))
    return pieces


def _first_pass(
    group: Sequence[TensorEntry],
    cuts: Mapping[str, list[Cut]],
    twice: set[Matrix],
    sinks: Mapping[str, Sink],
    pieces: list[Piece],
) -> Barrier | None:
    first = []
    for entry in group:
        for cut in cuts[entry.name]:
            parts = [part for part in cut.parts if (part.span.parameter, part.region.expert) in twice]
            if parts:
                first.append(Piece(entry.shard, _bytes(entry, cut), Delivery(entry, parts, sinks, observe=True)))
    if not first:
        return None
    barrier = Barrier(len(first))
    for piece in first:
        piece.signal = barrier
    pieces.extend(first)
    return barrier


def _second_pass(
    entry: TensorEntry, cuts: list[Cut], sinks: Mapping[str, Sink], after: Barrier | None
) -> Iterator[Piece]:
    for cut in cuts:
        target = _direct(entry, cut, sinks)
        if target is not None:
            yield Piece(entry.shard, _bytes(entry, cut), *target)
        else:
            yield Piece(entry.shard, _bytes(entry, cut), Delivery(entry, cut.parts, sinks, observe=False), after=after)


def _direct(
    entry: TensorEntry, cut: Cut, sinks: Mapping[str, Sink]
) -> tuple[Callable[[Workspace], None], Callable[[], Tensor]] | None:
    """`deliver` and `target` of a piece that can be read straight into its final storage."""
    if len(cut.parts) != 1 or len(cut.extents) != 1:
        return None
    (part,) = cut.parts
    loader = sinks[part.span.parameter].loader
    if not isinstance(loader, DirectWeightLoader) or cut.extents[0][1] != part.region.numel:
        return None
    if part.column_stride != 1 or not loader.accepts_bytes(entry.dtype, part.region):
        return None
    return lambda _: loader.direct_done(part.region), functools.partial(loader.direct_target, part.region)


def _bytes(entry: TensorEntry, cut: Cut) -> tuple[tuple[int, int], ...]:
    size = entry.dtype.itemsize
    return tuple((entry.offset + start * size, length * size) for start, length in cut.extents)


def _together(
    entries: Sequence[TensorEntry], cuts: Mapping[str, list[Cut]], twice: set[Matrix]
) -> Iterator[list[TensorEntry]]:
    """Tensors in order, those that share a two-pass matrix in one list."""
    members: dict[Matrix, list[str]] = defaultdict(list)
    matrices: dict[str, set[Matrix]] = {}
    for entry in entries:
        of_entry = {(part.span.parameter, part.region.expert) for cut in cuts[entry.name] for part in cut.parts}
        matrices[entry.name] = of_entry & twice
        for matrix in matrices[entry.name]:
            members[matrix].append(entry.name)
    by_name = {entry.name: entry for entry in entries}
    done: set[str] = set()
    for entry in entries:
        if entry.name in done:
            continue
        group, waiting = [], [entry.name]
        done.add(entry.name)
        while waiting:
            name = waiting.pop()
            group.append(by_name[name])
            fresh = {other for matrix in matrices[name] for other in members[matrix]} - done
            done |= fresh
            waiting.extend(fresh)
        yield sorted(group, key=lambda entry: (entry.shard, entry.offset))
