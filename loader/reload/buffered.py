"""What is asked of a tensor that is handed over, and where its parts are gathered that cannot be handed on alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checkpoint.headers import TensorEntry
from ..errors import RepeatedRegionError, ShapeMismatchError, UnsupportedCheckpointError
from ..online.sink import Sink
from ..plan import QUANTIZABLE

_Box = tuple[tuple[int, int], ...]


class Buffered:
    """A tensor that is gathered from parts, in memory of its own."""

    def __init__(self, entry: TensorEntry, first: Tensor) -> None:
        self.name = entry.name
        self.tensor = torch.empty(entry.shape, dtype=first.dtype)
        self._boxes: list[_Box] = []
        self._left = self.tensor.numel()

    @property
    def is_complete(self) -> bool:
        """Whether all of it came."""
        return self._left == 0

    def put(self, part: Tensor, start: Sequence[int] | None) -> None:
        """Take a part; raises `RepeatedRegionError` where it overlaps with another."""
        begin = start or (0,) * part.dim()
        box = tuple((at, at + extent) for at, extent in zip(begin, part.shape, strict=True))
        if any(_meet(box, other) for other in self._boxes):
            raise RepeatedRegionError(f"{self.name}: a part of shape {tuple(part.shape)} at {start} came twice")
        self._boxes.append(box)
        self.tensor[tuple(slice(*interval) for interval in box)].copy_(part)
        self._left -= part.numel()


def _meet(one: _Box, two: _Box) -> bool:
    return all(a[0] < b[1] and b[0] < a[1] for a, b in zip(one, two, strict=True))


def check_part(entry: TensorEntry, tensor: Tensor, start: Sequence[int] | None) -> None:
    """Raise `ShapeMismatchError` for what is no tensor of that shape, nor a part of one that begins at `start`."""
    if start is None:
        if tuple(tensor.shape) != entry.shape:
            raise ShapeMismatchError(
                f"{entry.name}: got a tensor of shape {tuple(tensor.shape)}, {entry.shape} is expected; a part of one "
                f"is given with the index of its first element"
            )
        return
    fits = len(start) == tensor.dim() == len(entry.shape) and all(
        at >= 0 and at + extent <= whole for at, extent, whole in zip(start, tensor.shape, entry.shape, strict=True)
    )
    if not fits:
        raise ShapeMismatchError(
            f"{entry.name}: a part of shape {tuple(tensor.shape)} at {tuple(start)} lies outside of {entry.shape}"
        )


def check_dtype(name: str, dtype: torch.dtype, sink: Sink) -> None:
    """Raise `UnsupportedCheckpointError` for a dtype whose values a parameter cannot be made of."""
    kept_as = sink.values_dtype
    if dtype in QUANTIZABLE and (kept_as is None or kept_as.is_floating_point):
        return
    if kept_as is None or dtype != kept_as:
        raise UnsupportedCheckpointError(
            f"{name} is {dtype}; {sink.name} is made of "
            f"{kept_as if kept_as is not None and not kept_as.is_floating_point else 'bfloat16, float16 or float32'}"
        )
