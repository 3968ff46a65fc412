"""Tensors that lie in memory as in a safetensors file: nothing is copied."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..checkpoint.headers import read_header
from ..checkpoint.source import Source


class _Memory(Source):
    """One file, which is a buffer."""

    read_bytes = 1 << 30

    def __init__(self, buffer: memoryview) -> None:
        self._buffer = buffer

    def size(self, path: str) -> int:
        """Bytes of the buffer."""
        return self._buffer.nbytes

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        """Copy a part of the buffer."""
        buffer[:] = self._buffer[offset : offset + buffer.nbytes]
        return buffer.nbytes

    def prefetch(self, path: str, offset: int, length: int) -> None:
        """It is in memory."""

    def release(self, path: str, offset: int, length: int) -> None:
        """It stays in memory."""

    def close(self) -> None:
        """There is nothing to be closed."""


class PackedTensors:
    """Iterates over the tensors of a buffer that is laid out as a safetensors file; they share its memory.

    Raises a `CheckpointError` where it is none.
    """

    def __init__(self, buffer: memoryview, called: str) -> None:
        self._buffer = buffer
        self._entries = list(read_header(_Memory(buffer), called).tensors.values())

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        whole = torch.frombuffer(self._buffer, dtype=torch.uint8)
        for entry in self._entries:
            part = whole[entry.offset : entry.offset + entry.nbytes]
            aligned = part if part.data_ptr() % entry.dtype.itemsize == 0 else part.clone()
            yield entry.name, aligned.view(entry.dtype).view(entry.shape)
