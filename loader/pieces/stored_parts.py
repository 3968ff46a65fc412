"""The tensors of a stored weight seen as matrices: which rows to read, what they stand for, what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ..checkpoint.pieces import Barrier, Lines, Piece
from ..checkpoint.workspace import Workspace
from ..errors import CheckpointError
from ..geometry.regions import Interval
from ..schemes.activations import check_input_scales
from ..schemes.stored.checks import check_codes, check_order, check_shape, check_zero
from ..schemes.stored.weights import StoredTensor, StoredWeight
from .slabs import lines_per_slab

CONVERTED_BYTES = 1 << 19
"""Bytes of a tensor that are converted or checked at once: what that takes beside them, several times as much, is not
in the arena, and each worker takes it."""


@dataclass(frozen=True)
class TensorMatrix:
    """One tensor of a stored weight; a row of it stands for `part.block` lines of the weight."""

    weight: StoredWeight
    part: StoredTensor

    @cached_property
    def rows(self) -> int:
        """Rows of the tensor."""
        return -(-self.weight.lines // self.part.block) if self.part.block else 1

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of a row; raises `CheckpointError` for a tensor that does not fall into so many rows."""
        entry, weight = self.part.entry, self.weight
        if entry.nbytes % max(self.rows, 1):
            raise CheckpointError(
                f"{entry.name} has shape {entry.shape}, which is not {self.rows} rows as {weight.name} of "
                f"{weight.all_rows} x {weight.columns} needs; copy the checkpoint again, or correct its config.json"
            )
        return entry.nbytes // max(self.rows, 1)

    @cached_property
    def rows_across(self) -> int:
        """How many rows an element stands for, where the weight is cut along columns."""
        return self.weight.rows * self.part.entry.dtype.itemsize // self.row_bytes

    def of(self, weight: StoredWeight) -> TensorMatrix:
        """The same tensor of another weight of the family."""
        if self.part.role != "input_scale":
            return TensorMatrix(weight, weight.parts[self.weight.parts.index(self.part)])
        assert weight.input_scale is not None
        return TensorMatrix(weight, self.part._replace(entry=weight.input_scale))

    def lines_within(self, limit: int, step: int) -> int:
        """How many lines fit `limit` bytes, in steps of so many, which are whole rows; at least one step."""
        return lines_per_slab(self.row_bytes, step // self.part.block, self._at_once(limit)) * self.part.block

    def _at_once(self, limit: int) -> int:
        return limit if self.part.role == "codes" and self.part.convert is None else min(limit, CONVERTED_BYTES)

    def rows_of(self, lines: Interval) -> Interval:
        """The rows that stand for some lines, from one step to another."""
        return lines[0] // self.part.block, -(-lines[1] // self.part.block)

    def ranges(self, chunk_bytes: int) -> Iterator[Interval]:
        """The rows, as many at once as fit a piece."""
        step = lines_per_slab(self.row_bytes, 1, self._at_once(chunk_bytes))
        return ((low, min(low + step, self.rows)) for low in range(0, self.rows, step))

    def lines(self, rows: Interval) -> Interval:
        """The lines of the weight, rows or columns, that some rows stand for."""
        block, lines = self.part.block, self.weight.lines
        return (rows[0] * block, min(rows[1] * block, lines)) if block else (0, lines)

    def piece(
        self,
        rows: Interval,
        deliver: Callable[[Workspace], None],
        target: Callable[[], Tensor] | None = None,
        after: Barrier | None = None,
    ) -> Piece:
        """The piece that reads some rows."""
        start = self.part.entry.offset + rows[0] * self.row_bytes
        extents = ((start, (rows[1] - rows[0]) * self.row_bytes),)
        return Piece(self.part.entry.shard, extents, deliver, target, after)

    def piece_across(
        self, lines: Interval, deliver: Callable[[Workspace], None], after: Barrier | None = None
    ) -> Piece:
        """The piece that reads some rows of a weight that is cut along columns: a part of every row of the tensor."""
        entry = self.part.entry
        first, last = (line // self.rows_across * entry.dtype.itemsize for line in lines)
        if last - first == self.row_bytes:
            return self.piece((0, self.rows), deliver, after=after)
        lines_of_bytes = Lines(entry.offset + first, self.row_bytes, last - first, self.rows)
        return Piece(entry.shard, lines_of_bytes, deliver, after=after)

    def canonical(self, buffer: Tensor, rows: Interval) -> Tensor:
        """What some rows, as they lie in a piece's buffer, are in the canonical layout.

        Raises a `CheckpointError` for what cannot be, or does not fit the weight.
        """
        return self._canonical(buffer.view(self.part.entry.dtype).view(rows[1] - rows[0], -1))

    def canonical_across(self, buffer: Tensor, read: Interval, lines: Interval) -> Tensor:
        """What some rows of the weight, of those that `piece_across` has read, are in the canonical layout."""
        stored = buffer.view(self.part.entry.dtype).view(self.rows, -1)
        first, last = ((line - read[0]) // self.rows_across for line in lines)
        return self._canonical(stored[:, first:last])

    def _canonical(self, stored: Tensor) -> Tensor:
        role, name = self.part.role, self.part.entry.name
        if role == "must_be_zero":
            check_zero(name, stored)
        if role == "order":
            check_order(name, stored, self.weight.format.block_cols or self.weight.columns)
        if role == "shape":
            check_shape(name, stored, self.weight)
        if role == "input_scale":
            check_input_scales(name, stored)
        if role != "codes":
            return stored if self.part.convert is None else self.part.convert(stored)
        check_codes(name, stored)
        return (stored if self.part.convert is None else self.part.convert(stored)).view(self.weight.format.code_dtype)


def codes_of(weight: StoredWeight) -> TensorMatrix:
    """The codes of a weight, of which a step of lines is whole rows."""
    part = weight.codes
    if not part.block or weight.step % part.block:
        raise CheckpointError(f"{part.entry.name}: the codes of {weight.name} cannot be cut every {weight.step} lines")
    return TensorMatrix(weight, part)


def all_but_codes(weight: StoredWeight) -> Iterator[TensorMatrix]:
    """Scales, zero points, and what is only checked."""
    return (TensorMatrix(weight, part) for part in weight.parts if part.role != "codes")
