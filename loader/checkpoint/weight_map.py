"""Which shards a checkpoint consists of: the names transformers looks for, and its index file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError, UnsupportedCheckpointError
from .paths import check_name
from .strict_json import JsonScanner

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 1 << 27
MAX_INDEX_ENTRIES = 1_000_000


def explicit_name(config: Mapping[str, Any]) -> str | None:
    """The weights or index file `transformers_weights` in `config.json` asks for, if any; a safe relative path."""
    name = config.get("transformers_weights")
    if name is None:
        return None
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(
            f"config.json: transformers_weights is {name!r}; it must name a .safetensors file or its index"
        )
    check_name(name, "config.json")
    return name


def parse_weight_map(data: bytes | bytearray, what: str) -> dict[str, str]:
    """Tensor name -> shard of an index file's content; `what` names it in messages.

    Raises `CheckpointError` when it is no JSON object with a `weight_map` of strings, or has a name twice,
    `UnsafePathError` and `UnsupportedCheckpointError` for shards that may not or cannot be read.
    """
    scanner = JsonScanner(data, what)
    weight_map: dict[str, str] | None = None
    position, ended = scanner.open_object(0)
    while not ended:
        key, position = scanner.key(position)
        if key == "weight_map" and weight_map is None:
            weight_map, position = scanner.strings(position, MAX_INDEX_ENTRIES)
        else:
            position = scanner.skip(position)
        position, ended = scanner.after_value(position)
    scanner.end(position)
    if not weight_map:
        raise CheckpointError(f"{what}: has no weight_map from tensor names to shards; save the checkpoint again")
    for name in set(weight_map.values()):
        check_name(name, what)
        if not name.endswith(".safetensors"):
            raise UnsupportedCheckpointError(f"{what} names the shard {name[:200]!r}; only .safetensors is read")
    return weight_map
