"""Hand the parts of a piece to the closures of their parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..checkpoint.headers import TensorEntry
from ..checkpoint.workspace import Workspace
from ..errors import NonFiniteWeightError
from ..online.sink import InPlace, Sink
from .cuts import CutRegion


class Delivery:
    """Hands the parts of one piece to the closures of their parameters."""

    __slots__ = ("_calls", "_entry", "_observe")

    def __init__(
        self, entry: TensorEntry, parts: Sequence[CutRegion], sinks: Mapping[str, Sink], observe: bool
    ) -> None:
        self._entry = entry
        self._observe = observe
        self._calls = [(part, sinks[part.span.parameter]) for part in parts]

    def __call__(self, workspace: Workspace) -> None:
        elements = workspace.buffer.view(self._entry.dtype)
        for part, sink in self._calls:
            piece = matrix(elements, part, workspace)
            try:
                if self._observe:
                    sink.observe(piece, part.region)
                else:
                    sink.load_region(piece, part.region)
            except NonFiniteWeightError as error:
                raise located(error, self._entry, part) from None


class Arrival:
    """Ends a read of one part straight into its final storage."""

    __slots__ = ("_entry", "_part", "_place")

    def __init__(self, entry: TensorEntry, part: CutRegion, place: InPlace) -> None:
        self._entry, self._part, self._place = entry, part, place

    def __call__(self, _: Workspace) -> None:
        try:
            self._place.arrived()
        except NonFiniteWeightError as error:
            raise located(error, self._entry, self._part) from None


def matrix(elements: Tensor, part: CutRegion, workspace: Workspace) -> Tensor:
    """The part as [rows, columns] with contiguous rows, copied only if it stands otherwise in the buffer."""
    rows, columns = part.region.rows, part.region.columns
    shape = (rows[1] - rows[0], columns[1] - columns[0])
    strides, offset = (part.row_stride, part.column_stride), elements.storage_offset() + part.offset
    view = elements.as_strided(shape, strides, offset)
    if part.column_stride == 1 or shape[1] == 1:
        return view
    scratch = workspace.scratch(view.numel() * view.element_size()).view(view.dtype).view(shape)
    return scratch.copy_(view)


def located(error: NonFiniteWeightError, entry: TensorEntry, part: CutRegion) -> NonFiniteWeightError:
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
    parameter = part.span.parameter
    advice = error.advice or NonFiniteWeightError.leave_as_stored(parameter)
    return NonFiniteWeightError(
        f"checkpoint tensor {entry.name} is not finite at index {index} (goes to {parameter}); {advice}"
    )
