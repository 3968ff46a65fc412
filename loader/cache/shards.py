"""Where the tensors of an entry lie: safetensors files whose every byte is known before the first tensor is written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..checkpoint.headers import DTYPES
from ..checkpoint.weight_map import INDEX_NAME, SINGLE_NAME
from .checksums import Checksums

MAX_SHARD_BYTES = 4 << 30
"""Of tensors; one that is larger has a file of its own."""
ALIGNMENT = 64
"""Bytes at a multiple of which the first tensor of a file begins."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class ShardPlan:
    """One safetensors file: its `head` (length and header), and the offset of each tensor from the file's start."""

    name: str
    head: bytes
    offsets: Mapping[str, int]
    size: int

    def checksums(self) -> Checksums:
        """Checksums of the file, that of its head known."""
        checksums = Checksums(sorted({0, *self.offsets.values(), self.size}))
        checksums.note(0, memoryview(self.head))
        return checksums


def plan_shards(tensors: Mapping[str, Tensor]) -> list[ShardPlan]:
    """Put tensors, of which dtypes and shapes matter, one after the other into as few files as their size allows."""
    groups = list(_groups(tensors))
    if len(groups) == 1:
        return [_plan(SINGLE_NAME, groups[0], tensors)]
    count = len(groups)
    return [
        _plan(f"model-{number:05}-of-{count:05}.safetensors", names, tensors)
        for number, names in enumerate(groups, start=1)
    ]


def index_file(shards: Iterable[ShardPlan]) -> dict[str, bytes]:
    """Name and content of the index; nothing for a single file."""
    shards = list(shards)
    if len(shards) == 1:
        return {}
    weight_map = {name: shard.name for shard in shards for name in shard.offsets}
    total = sum(shard.size - len(shard.head) for shard in shards)
    return {INDEX_NAME: json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}).encode()}


def _groups(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > MAX_SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def _plan(name: str, names: list[str], tensors: Mapping[str, Tensor]) -> ShardPlan:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    at = 0
    for each in names:
        tensor = tensors[each]
        begins[each], at = at, at + tensor.nbytes
        fields = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[each] = {**fields, "data_offsets": [begins[each], at]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    return ShardPlan(name, head, {each: len(head) + begin for each, begin in begins.items()}, len(head) + at)
