"""The tensors of a checkpoint folder, in parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..checkpoint.folder import Checkpoint
from ..checkpoint.headers import TensorEntry
from ..checkpoint.index import read_index
from ..errors import PolicyError
from ..options import LoadOptions


class TensorsOf:
    """Iterates over the tensors of a folder, each in parts of at most a chunk of `options`, as far as rows allow it.

    Reads are tried again as the options say. A part is overwritten when the next is asked for. `ChangedFileError` where
    a file is written to meanwhile.
    """

    def __init__(self, checkpoint: Checkpoint, options: LoadOptions) -> None:
        if checkpoint.is_quantized:
            raise PolicyError(
                f"{checkpoint.model_id} is quantized; a part of a model is updated from values alone: give all of it"
            )
        self._checkpoint, self._options = checkpoint, options
        self._index = read_index(checkpoint)
        self.wants: Callable[[str], bool] = lambda _: True
        """Whether a tensor of a name is read."""

    def __iter__(self) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
        files = self._checkpoint.files.source(self._options)
        buffer = torch.empty(0, dtype=torch.uint8)
        try:
            for entry in (entry for entry in self._index.tensors.values() if self.wants(entry.name)):
                for first, count in self._parts(entry):
                    row = entry.nbytes // entry.shape[0] if entry.shape else entry.nbytes
                    nbytes = count * row
                    if buffer.numel() < nbytes:
                        buffer = torch.empty(nbytes, dtype=torch.uint8)
                    offset = entry.offset + first * row
                    files.read_into(self._index.shards[entry.shard].path, offset, buffer[:nbytes].numpy().data)
                    shape = (count, *entry.shape[1:]) if entry.shape else ()
                    start = (first, *[0] * (len(entry.shape) - 1)) if entry.shape else ()
                    yield entry.name, buffer[:nbytes].view(entry.dtype).view(shape), start
            self._checkpoint.files.check_unchanged()
        finally:
            files.close()

    def _parts(self, entry: TensorEntry) -> Iterator[tuple[int, int]]:
        """First and count of the rows, or what else the first dimension counts, that are read at once."""
        rows = entry.shape[0] if entry.shape else 1
        if not math.prod(entry.shape):
            return
        step = max(self._options.chunk_bytes // (entry.nbytes // rows), 1)
        if len(entry.shape) == 2 and step > _ALIGN:
            step = step // _ALIGN * _ALIGN
        for first in range(0, rows, step):
            yield first, min(step, rows - first)


_ALIGN = 128
"""Rows of the largest blocks of scales."""
