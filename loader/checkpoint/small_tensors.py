"""Single tensors, read whole before anything is planned: shapes and scalars that say what others mean."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..options import LoadOptions
from .folder import Checkpoint
from .headers import TensorEntry
from .index import CheckpointIndex
from .source import read_bytes

MAX_BYTES = 1 << 20


class SmallTensors:
    """Reads tensors of at most a mebibyte; raises `CheckpointError` for a larger one. Use it as a context manager."""

    def __init__(self, checkpoint: Checkpoint, index: CheckpointIndex) -> None:
        self._files = checkpoint.files.source(LoadOptions(page_cache="keep"))
        self._shards = index.shards

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._files.close()

    def __call__(self, entry: TensorEntry) -> Tensor:
        if entry.nbytes > MAX_BYTES:
            raise CheckpointError(
                f"{entry.name} has {entry.nbytes:,} bytes; what it says takes a few numbers: copy the checkpoint again"
            )
        data = read_bytes(self._files, self._shards[entry.shard].path, entry.offset, entry.nbytes)
        return torch.frombuffer(data, dtype=torch.uint8).view(entry.dtype).view(entry.shape)
