"""Single tensors, read whole before anything is planned: shapes and scalars that say what others mean."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CheckpointError
from .headers import TensorEntry
from .index import CheckpointIndex
from .resolve import Checkpoint
from .source import FileSource, read_bytes

MAX_BYTES = 1 << 20


class SmallTensors:
    """Reads tensors of at most a mebibyte; raises `CheckpointError` for a larger one."""

    def __init__(self, checkpoint: Checkpoint, index: CheckpointIndex) -> None:
        self._root, self._shards = checkpoint.root, index.shards

    def __call__(self, entry: TensorEntry) -> Tensor:
        if entry.nbytes > MAX_BYTES:
            raise CheckpointError(
                f"{entry.name} has {entry.nbytes:,} bytes; what it says takes a few numbers: copy the checkpoint again"
            )
        with FileSource(self._root, page_cache="keep") as files:
            data = read_bytes(files, self._shards[entry.shard].path, entry.offset, entry.nbytes)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(entry.dtype).view(entry.shape)
