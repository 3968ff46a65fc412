"""Small stored weights that are alike: their tensors taken from a buffer, checked and converted together.

A checkpoint with one tensor an expert has tens of thousands of weights of a few shapes. What follows from shapes and
conversions is worked out once for a family, and the tensors of experts that follow each other are one stack.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ..errors import CheckpointError, NonFiniteWeightError
from ..geometry.spans import Span
from ..schemes.stored.checks import check_finite
from ..schemes.stored.weights import StoredTensor, StoredWeight, scale_roles
from .stacks import Stack
from .stored_parts import TensorMatrix

MAX_HOLE = 256
"""Bytes between two tensors, such as a few numbers that nothing needs, that are read with them."""


class Family:
    """Stored weights of the same shapes, dtypes and conversions; `weight` is one of them."""

    def __init__(self, weight: StoredWeight) -> None:
        self.weight = weight
        self.matrices = [TensorMatrix(weight, part) for part in weight.parts]
        self.row_bytes = [matrix.row_bytes for matrix in self.matrices]
        scale = weight.input_scale
        self.input_scale = None if scale is None else TensorMatrix(weight, StoredTensor("input_scale", scale, 0))
        self.nbytes = weight.nbytes
        self.values_bytes = weight.rows * weight.columns * torch.float32.itemsize

    def whole_span(self, spans: Sequence[Span]) -> Span | None:
        """The span that takes a weight row by row, all of it, if that is all that takes anything."""
        if len(spans) != 1 or self.weight.experts is not None:
            return None
        (span,) = spans
        rows, columns = span.region.rows, span.region.columns
        shape = rows[1] - rows[0], columns[1] - columns[0]
        strides = span.row_stride if shape[0] > 1 else shape[1], span.column_stride if shape[1] > 1 else 1
        same = (shape, strides, span.offset) == ((self.weight.rows, self.weight.columns), (shape[1], 1), 0)
        return span if same else None


class Families:
    """The families of some weights, as they are met."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Family] = {}

    def of(self, weight: StoredWeight) -> Family:
        """The family of a weight."""
        parts = tuple([(p.role, p.entry.dtype, p.entry.shape, p.block, p.convert) for p in weight.parts])
        scale = weight.input_scale
        key = weight.format.name, weight[2:6], weight[7:11], parts, scale and scale[1:3]
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = Family(weight)
        return found


class StoredStack:
    """Weights of one family that land in the same rows and columns of experts, some of their tensors in step.

    `matrices` are those tensors, of any weight of the family; offsets and pitches of `stack` are in bytes.
    """

    __slots__ = ("matrices", "stack", "weights")

    def __init__(
        self, matrices: Sequence[TensorMatrix], weight: StoredWeight, span: Span, offsets: tuple[int, ...]
    ) -> None:
        self.matrices, self.weights = matrices, [weight]
        self.stack = Stack(span.parameter, span.region, offsets)

    def takes(self, weight: StoredWeight, span: Span, offsets: tuple[int, ...]) -> bool:
        """Put one more weight at the end, if all its tensors stand where the next ones would."""
        if not self.stack.takes(span.region.expert, offsets):
            return False
        self.weights.append(weight)
        return True

    def values(self, number: int, buffer: Tensor) -> Tensor:
        """The canonical form [weights, rows, columns] of one of the tensors as they stand in a buffer.

        Raises a `CheckpointError` that names the tensor for one that cannot be.
        """
        matrix, count = self.matrices[number], len(self.weights)
        nbytes, pitch = matrix.part.entry.nbytes, self.stack.pitches[number]
        first = buffer.storage_offset() + self.stack.offsets[number]
        stored = buffer.as_strided((count, nbytes), (pitch or nbytes, 1), first)
        aligned = stored.storage_offset() % matrix.part.entry.dtype.itemsize == 0
        stored = stored.contiguous() if aligned else stored.clone(memory_format=torch.contiguous_format)
        try:
            values = matrix.canonical(stored.view(-1), (0, count * matrix.rows))
        except CheckpointError:
            self._name(matrix, stored)
            raise
        if matrix.weight.along == "columns" and not matrix.part.only_checked:
            return values.reshape(len(values), count, -1).transpose(0, 1)
        return values.reshape(count, -1, values.shape[1])

    def finite(self, number: int, buffer: Tensor) -> Tensor:
        """What `values` returns; raises `NonFiniteWeightError` naming the tensor where it is scales that are not."""
        values, matrix = self.values(number, buffer), self.matrices[number]
        if matrix.part.role in ("scale", "zero_point", "scale_2"):
            largest = torch.inf if matrix.part.role == "zero_point" else matrix.weight.largest_scale
            fmt = matrix.weight.format
            beside = fmt.scales[scale_roles(fmt)[matrix.part.role][0]].beside
            try:
                check_finite(matrix.part.entry.name, values, largest, beside)
            except NonFiniteWeightError:
                for weight, own in zip(self.weights, values, strict=True):
                    check_finite(matrix.of(weight).part.entry.name, own, largest, beside)
                raise
        return values

    def _name(self, matrix: TensorMatrix, stored: Tensor) -> None:
        """Raise the error of the first weight that is to blame, with the names of its own tensors."""
        for weight, own in zip(self.weights, stored, strict=True):
            matrix.of(weight).canonical(own, (0, matrix.rows))
