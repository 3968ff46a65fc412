"""Builds safetensors files by hand, right ones and wrong ones."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from quantload.checkpoint import Source
from quantload.errors import MissingShardError, TruncatedShardError

Entry = dict[str, Any]


def entry(dtype: str, shape: list[int], begin: int, end: int) -> Entry:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def raw_shard(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def shard_bytes(tensors: dict[str, bytes], metadata: dict[str, str] | None = None) -> bytes:
    """A shard of U8 vectors with the given contents, in this order."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, content in tensors.items():
        header[name] = entry("U8", [len(content)], len(data), len(data) + len(content))
        data += content
    return raw_shard(json.dumps(header).encode(), data)


def write_sharded(folder: Path, shards: dict[str, dict[str, bytes]], weight_map: dict[str, str] | None = None) -> None:
    for name, tensors in shards.items():
        (folder / name).write_bytes(shard_bytes(tensors))
    if weight_map is None:
        weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class MemorySource(Source):
    """A `Source` over bytes, which records what it was asked."""

    read_bytes = 1 << 20

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.reads: list[tuple[str, int, int]] = []
        self.prefetched: list[tuple[str, int, int]] = []
        self.released: list[tuple[str, int, int]] = []
        self.closed = 0

    def size(self, path: str) -> int:
        if path not in self.files:
            raise MissingShardError(f"{path}: no such file")
        return len(self.files[path])

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        self.reads.append((path, offset, len(buffer)))
        data = self.files[path][offset : offset + len(buffer)]
        if len(data) < len(buffer):
            raise TruncatedShardError(f"{path}: ended")
        buffer[:] = data
        return len(data)

    def prefetch(self, path: str, offset: int, length: int) -> None:
        self.prefetched.append((path, offset, length))

    def release(self, path: str, offset: int, length: int) -> None:
        self.released.append((path, offset, length))

    def close(self) -> None:
        self.closed += 1
