"""Weights that come as (name, tensor) pairs instead of files, cut into the same row pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError


@dataclass(frozen=True, slots=True)
class StreamEntry:
    """One tensor of a stream, with the fields of a `TensorEntry` that make sense without a file."""

    name: str
    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's dtype."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.tensor.numel() * self.tensor.element_size()

    def pieces(self, chunk_bytes: int, row_multiple: int = 1) -> Iterator[tuple[int, int, Tensor]]:
        """(first row, row after the last, view of these rows), each at most `chunk_bytes` or `row_multiple` rows.

        Every cut is at a multiple of `row_multiple`. A scalar comes whole, as rows 0 to 1 of a 1-D view.
        """
        rows = self.tensor if self.tensor.dim() else self.tensor.reshape(1)
        count = rows.shape[0]
        row_bytes = max(1, self.nbytes // max(1, count))
        step = max(1, chunk_bytes // row_bytes // row_multiple) * row_multiple
        for start in range(0, count, step):
            stop = min(start + step, count)
            yield start, stop, rows[start:stop]


def read_stream(weights: Iterable[tuple[str, Tensor]]) -> Iterator[StreamEntry]:
    """Entries of a (name, tensor) iterator, one at a time; none is kept, so a generator may reuse its tensors.

    Raises `CheckpointError` for a name that comes twice and for items that are no such pair.
    """
    seen: set[str] = set()
    for item in weights:
        name, tensor = item if isinstance(item, tuple) and len(item) == 2 else (None, None)
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"a weight stream yields (name, tensor) pairs, not {type(item).__name__}: {item!r:.200}"
            )
        if name in seen:
            raise CheckpointError(f"the weight stream yields {name!r} twice; each tensor may come once")
        seen.add(name)
        yield StreamEntry(name, tensor.detach())
