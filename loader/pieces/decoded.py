"""Pieces of stored weights that become something else, through float32, piece by piece.

The scales of a tensor come first and are held until its last codes have come. A slab of codes becomes a float32 matrix
in the worker's scratch buffer, which goes to the same closures as a piece of a high-precision tensor.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..checkpoint.pieces import Barrier, Piece
from ..checkpoint.workspace import Workspace
from ..errors import PolicyError
from ..geometry.regions import Interval
from ..geometry.spans import Span
from ..kernels.formats import Tensors
from ..online.sink import Sink
from ..schemes.stored.checks import check_finite
from ..schemes.stored.weights import StoredWeight, scale_roles
from .slabs import Slab, SlabRegion, lines_per_slab, slabs, slabs_across
from .stored_parts import TensorMatrix, all_but_codes, codes_of

Dequantize = Callable[[Tensors, Tensor], None]


class DecodedWeight:
    """A stored weight on its way through float32, and its scales from their arrival to the last slab of codes."""

    def __init__(self, weight: StoredWeight, dequantizer: Callable[[str], Dequantize]) -> None:
        self.weight, self._dequantize = weight, dequantizer(weight.format.name)
        self._codes = codes_of(weight)
        self._scales_there: Barrier | None = None
        self._scales: Tensors | None = None
        self._slabs_left, self._slabs_per_read = 0, 1
        self._along = weight.along
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """Bytes of the scales."""
        return sum(each.bytes(self.weight.all_rows, self.weight.columns) for each in self.weight.format.scales)

    @property
    def _line_bytes(self) -> int:
        """Bytes of the float32 values of one line."""
        weight = self.weight
        return (weight.columns if self._along == "rows" else weight.all_rows) * torch.float32.itemsize

    def scratch_bytes(self, slab: Slab) -> int:
        """Bytes of a slab's float32 values."""
        return slab.lines * self._line_bytes

    def cut(self, spans: Sequence[Span], sinks: Mapping[str, Sink], limit: int) -> list[Slab]:
        """Slabs whose float32 values take at most `limit` bytes, where the scale blocks allow it."""
        weight = self.weight
        axis = 0 if weight.along == "rows" else 1
        block = (weight.format.block_rows, weight.format.block_cols)[axis] or 1
        step = math.lcm(weight.step, block, *(sinks[span.parameter].align[axis] for span in spans))
        while axis == 0 and step % 2 == 0 and step * self._line_bytes > limit:
            step //= 2  # a part of a row of blocks: what it lands in may have to be observed first
        whole_rows = axis == 1 and any(sinks[span.parameter].whole_rows for span in spans)
        if whole_rows and weight.columns * self._line_bytes > limit:
            found = self._cut_across(spans, sinks, limit)
        else:
            lines = lines_per_slab(self._line_bytes, step, limit)
            found = list(
                slabs(weight, spans, lines if whole_rows else min(lines, self._codes.lines_within(limit, step)))
            )
        self._slabs_left = len(found)
        return found

    def _cut_across(self, spans: Sequence[Span], sinks: Mapping[str, Sink], limit: int) -> list[Slab]:
        """Slabs of whole rows of a weight that is stored column by column.

        Their codes are a part of every line of the tensor. As many slabs as fit `limit` bytes as codes are one read,
        for its lines to be long.
        """
        self._along = "rows"
        weight = self.weight
        step = math.lcm(self._codes.rows_across, *(sinks[span.parameter].align[0] for span in spans))
        least = step * self._line_bytes
        if least > limit:
            raise PolicyError(
                f"{weight.name} is stored column by column, and {step} whole rows of it take {least} bytes as float32, "
                f"more than a piece of {limit}; choose a scheme without a multiplier for each row, such as "
                f"quark_mxfp4, or pieces that large: --chunk {-(-least >> 10)}KiB, chunk_bytes={least}"
            )
        rows = lines_per_slab(self._line_bytes, step, limit)
        self._slabs_per_read = lines_per_slab(rows * self._codes.part.entry.nbytes // weight.rows, 1, limit)
        return list(slabs_across(weight, spans, rows))

    def scale_pieces(self, chunk_bytes: int) -> list[Piece]:
        """Pieces of the scales and zero points; pieces of codes wait for them."""
        pieces = [
            matrix.piece(rows, functools.partial(self._hold, matrix, rows))
            for matrix in all_but_codes(self.weight)
            for rows in matrix.ranges(chunk_bytes)
        ]
        self._scales_there = Barrier(len(pieces))
        for piece in pieces:
            piece.signal = self._scales_there
        return pieces

    def observing_piece(self, slab: Slab, parts: Sequence[SlabRegion], sinks: Mapping[str, Sink]) -> Piece:
        """The piece that shows some parts of a slab to closures that need to see all of a matrix first."""
        read = slab.low, slab.high

        def deliver(workspace: Workspace) -> None:
            values = self._values(workspace, read, slab)
            for part in parts:
                sinks[part.span.parameter].observe(values[part.rows, part.columns], part.region)

        return self._read(read, deliver, self._scales_there)

    def pieces(self, cuts: Sequence[Slab], sinks: Mapping[str, Sink], after: Barrier | None) -> Iterator[Piece]:
        """The pieces that hand over all slabs; `after` opens behind those that observed them, if any did."""
        for first in range(0, len(cuts), self._slabs_per_read):
            together = cuts[first : first + self._slabs_per_read]
            read = together[0].low, together[-1].high
            deliver = functools.partial(self._deliver, read, together, sinks)
            yield self._read(read, deliver, after or self._scales_there)

    def _deliver(
        self, read: Interval, together: Sequence[Slab], sinks: Mapping[str, Sink], workspace: Workspace
    ) -> None:
        """Hand over the slabs of one read."""
        for slab in together:
            values = self._values(workspace, read, slab)
            for part in slab.parts:
                sink = sinks[part.span.parameter]
                sink.load_region(values[part.rows, part.columns], part.region)
        self._done(len(together))

    def _read(self, lines: Interval, deliver: Callable[[Workspace], None], after: Barrier | None) -> Piece:
        """The piece that reads the codes of some lines."""
        if self._along == self.weight.along:
            return self._codes.piece(self._codes.rows_of(lines), deliver, after=after)
        return self._codes.piece_across(lines, deliver, after=after)

    def _hold(self, matrix: TensorMatrix, rows: Interval, workspace: Workspace) -> None:
        weight, fmt = self.weight, self.weight.format
        values = matrix.canonical(workspace.buffer, rows)
        if matrix.part.only_checked:
            return
        largest = torch.inf if matrix.part.role == "zero_point" else weight.largest_scale
        number, word = scale_roles(fmt)[matrix.part.role]
        check_finite(matrix.part.entry.name, values, largest, fmt.scales[number].beside)
        with self._lock:
            if self._scales is None:
                self._scales = fmt.empty(weight.all_rows, weight.columns, values.device)[1:]
                if fmt.scale_words > 1:
                    self._scales[0][:, 1 :: fmt.scale_words] = weight.zero_point
            held = self._scales[number][:, word :: fmt.scales[number].width]
        first, last = matrix.lines(rows)
        if weight.along == "columns":
            group = fmt.scales[number].block_cols or weight.columns
            held[:, first // group : -(-last // group)] = values
        else:
            held[slice(*fmt.scales[number].rows(first, last))] = values

    def _values(self, workspace: Workspace, read: Interval, slab: Slab) -> Tensor:
        """The float32 matrix of a slab, in the scratch buffer, of the codes of all lines that were read."""
        weight, fmt, scales, lines = self.weight, self.weight.format, self._scales, (slab.low, slab.high)
        assert scales is not None
        if self._along == weight.along:
            codes = self._codes.canonical(workspace.buffer, self._codes.rows_of(lines))
        else:
            codes = self._codes.canonical_across(workspace.buffer, read, lines)
        if self._along == "columns":
            shape = weight.all_rows, slab.lines
            index = [(slice(None), each.columns(*lines, weight.columns)) for each in fmt.scales]
        else:
            shape = slab.lines, weight.columns
            index = [(slice(*each.rows(*lines)), slice(None)) for each in fmt.scales]
        own = (each[where] for each, where in zip(scales, index, strict=True))
        values = workspace.scratch(self.scratch_bytes(slab)).view(torch.float32).view(shape)
        self._dequantize((codes, *own), values)
        return values

    def _done(self, slabs: int) -> None:
        with self._lock:
            self._slabs_left -= slabs
            if self._slabs_left == 0:
                self._scales = None
