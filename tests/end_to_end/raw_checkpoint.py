"""Safetensors files written byte by byte: in any tensor order, in any split over shards, and wrong on purpose."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(shard))
    return tensors


def split_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """The parsed header of a shard and the bytes after it."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    return header, content[8 + length :]


def join_header(path: Path, header: bytes | Mapping[str, Any], data: bytes) -> None:
    """Write a shard from a header, parsed or as bytes, and the data after it."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` in the order given, which safetensors' own writer does not keep."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts: list[bytes] = []
    offset = 0
    for name, tensor in tensors.items():
        part = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(part)],
        }
        offset += len(part)
        parts.append(part)
    join_header(path, header, b"".join(parts))


def write(folder: Path, like: Path, shards: Sequence[Mapping[str, Tensor]]) -> Path:
    """Write `shards` and their index to `folder`, with the configuration files of the folder `like`."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in like.glob("*.json"):
        if file.name != INDEX and file.parent != folder:
            shutil.copy(file, folder)
    if len(shards) == 1:
        write_shard(folder / SINGLE, shards[0])
        return folder
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / name, shard)
        weight_map.update(dict.fromkeys(shard, name))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def shuffled(folder: Path, like: Path, seed: int, shard_count: int) -> Path:
    """The tensors of `like` in a random order over `shard_count` shards."""
    tensors = read(like)
    names = sorted(tensors)
    random.Random(seed).shuffle(names)
    shards = [{name: tensors[name] for name in names[start::shard_count]} for start in range(shard_count)]
    return write(folder, like, shards)
