"""safetensors headers: parsed here, every rule of the format checked before any tensor is read."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import torch

from ..errors import CheckpointError, CorruptHeaderError, TruncatedShardError, UnsupportedCheckpointError
from .other_kinds import kind_of_head
from .source import Source, read_bytes
from .strict_json import SPACE, STRING, UINT, JsonScanner

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 1_000_000
MAX_METADATA_ENTRIES = 100_000
_INT64_MAX = 2**63 - 1

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
}
_DTYPES_WITHOUT_TORCH = ("F6_E2M3", "F6_E3M2")

_COMMA = SPACE + b"," + SPACE
_SHAPE = rb"\[" + SPACE + rb"((?:" + UINT + rb"(?:" + _COMMA + UINT + rb"){0,63}+)?)" + SPACE + rb"\]"
_OFFSETS = rb"\[" + SPACE + b"(" + UINT + b")" + _COMMA + b"(" + UINT + b")" + SPACE + rb"\]"
_COLON = SPACE + b":" + SPACE
# The three fields in any order; a field given twice leaves another one's group empty.
_FIELD = (
    rb'(?:"dtype"' + _COLON + rb'"([A-Za-z0-9_]{1,32}+)"'
    rb'|"shape"' + _COLON + _SHAPE + rb'|"data_offsets"' + _COLON + _OFFSETS + b")"
)
_ENTRY = re.compile(
    SPACE + STRING + _COLON + rb"\{" + SPACE + b"(?:" + _FIELD + SPACE + rb"(?:," + SPACE + rb'(?=")|(?=\}))){3}\}'
    + SPACE + b"([,}])"
)  # fmt: skip
_NULL = re.compile(rb"null")


class TensorEntry(NamedTuple):
    """Where one checkpoint tensor lies: `offset` in bytes from the start of shard number `shard`, `nbytes` long.

    `shape` is torch's: for F4 the last dimension counts bytes of two codes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: int
    offset: int
    nbytes: int


file_order = attrgetter("shard", "offset")
"""A key to sort tensors by that lie in shards, each with an `offset`."""


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """One safetensors header: `size` of the file and where its data starts, in bytes; tensors by name, file order."""

    path: str
    size: int
    data_start: int
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


def read_header(source: Source, path: str, shard: int = 0) -> ShardHeader:
    """Reads and checks the safetensors header of `path`; entries carry `shard` as their shard number.

    Raises `TruncatedShardError` when the file is shorter than its header says, `CorruptHeaderError` when a rule of
    the format is broken and `UnsupportedCheckpointError` for dtypes torch lacks. Memory is bounded by the 100 MB a
    header may have plus 1,000,000 entries. Format: https://github.com/huggingface/safetensors#format.
    """
    size = source.size(path)
    if size < 8:
        raise TruncatedShardError(f"{path}: {size} bytes, a safetensors file has at least 8; copy or download it again")
    head = read_bytes(source, path, 0, 8)
    length = int.from_bytes(head, "little")
    if length > MAX_HEADER_BYTES:
        other = kind_of_head(bytes(head))
        if other is not None:
            raise CorruptHeaderError(f"{path}: is {other}")
        raise CorruptHeaderError(
            f"{path}: its header claims {length:,} bytes, the format allows {MAX_HEADER_BYTES:,}; "
            "this is no safetensors file, or a damaged one"
        )
    data_start = 8 + length
    if data_start > size:
        raise TruncatedShardError(
            f"{path}: {size:,} bytes, but its header alone ends at byte {data_start:,}; copy or download it again"
        )
    scanner = JsonScanner(read_bytes(source, path, 8, length), f"{path}: header", CorruptHeaderError)
    tensors, metadata = _parse(scanner, shard, data_start)
    end = _check_contiguous(path, tensors, data_start)
    if end > size:
        raise TruncatedShardError(
            f"{path}: {size:,} bytes, but its tensors end at byte {end:,}: {end - size:,} bytes are missing; "
            "copy or download it again"
        )
    if end < size:
        raise CorruptHeaderError(
            f"{path}: {size:,} bytes, but its tensors end at byte {end:,}; {size - end:,} bytes belong to none"
        )
    return ShardHeader(path, size, data_start, tensors, metadata)


def _parse(scanner: JsonScanner, shard: int, data_start: int) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    tensors: dict[str, TensorEntry] = {}
    metadata: dict[str, str] | None = None
    layouts: dict[tuple[bytes, bytes], tuple[torch.dtype, tuple[int, ...], int]] = {}
    data, match_entry = scanner.data, _ENTRY.match
    if not data.startswith(b"{"):
        raise scanner.fail(0, "'{'")
    position, ended = scanner.open_object(0)
    while not ended:
        match = match_entry(data, position)
        if match is None:
            name, value = scanner.key(position)
            if name != "__metadata__" or metadata is not None:
                raise _bad_entry(scanner, name, value)
            metadata, position = _parse_metadata(scanner, value)
            position, ended = scanner.after_value(position)
            continue
        raw_name, dtype, shape, begin, stop, closing = match.groups()
        name = scanner.name(raw_name, position)
        if dtype is None or shape is None or begin is None or name == "__metadata__":
            raise _bad_entry(scanner, name, position)
        if name in tensors:
            raise CorruptHeaderError(f"{scanner.what}: tensor {name[:200]!r} appears twice; write the file again")
        layout = layouts.get((dtype, shape))
        if layout is None:
            layout = layouts[dtype, shape] = _layout(scanner.what, name, dtype.decode(), shape)
        offset, nbytes = int(begin), layout[2]
        if int(stop) - offset != nbytes:
            raise CorruptHeaderError(
                f"{scanner.what}: tensor {name[:200]!r} has offsets [{offset}, {int(stop)}], but {dtype.decode()} of "
                f"shape {list(layout[1])} takes {nbytes} bytes"
            )
        if len(tensors) == MAX_TENSORS:
            raise CorruptHeaderError(f"{scanner.what}: more than {MAX_TENSORS:,} tensors; split it into shards")
        tensors[name] = TensorEntry(name, layout[0], layout[1], shard, data_start + offset, nbytes)
        position, ended = match.end(), closing == b"}"
    scanner.end(position)
    return tensors, metadata or {}


def _parse_metadata(scanner: JsonScanner, position: int) -> tuple[dict[str, str], int]:
    null = _NULL.match(scanner.data, position)
    if null is not None:
        return {}, null.end()
    return scanner.strings(position, MAX_METADATA_ENTRIES)


def _bad_entry(scanner: JsonScanner, name: str, position: int) -> CheckpointError:
    fields = '{"dtype": "...", "shape": [non-negative integers], "data_offsets": [begin, end]}'
    return scanner.fail(position, f"for {name[:200]!r} exactly {fields}")


def _layout(what: str, name: str, dtype_name: str, raw_shape: bytes) -> tuple[torch.dtype, tuple[int, ...], int]:
    dtype = DTYPES.get(dtype_name)
    if dtype is None:
        message = f"{what}: tensor {name[:200]!r} has dtype {dtype_name!r}"
        if dtype_name in _DTYPES_WITHOUT_TORCH:
            raise UnsupportedCheckpointError(f"{message}, which torch cannot hold; store its codes as U8")
        raise CorruptHeaderError(f"{message}; the format has {', '.join(DTYPES)}")
    shape = tuple(map(int, raw_shape.split(b","))) if raw_shape else ()
    if dtype is torch.float4_e2m1fn_x2:
        if not shape or shape[-1] % 2:
            raise CorruptHeaderError(
                f"{what}: tensor {name[:200]!r} is F4 of shape {list(shape)}; two codes share a byte, so its last "
                "dimension must be even"
            )
        shape = (*shape[:-1], shape[-1] // 2)
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes > _INT64_MAX or any(size > _INT64_MAX for size in shape):
        raise CorruptHeaderError(f"{what}: tensor {name[:200]!r} of shape {list(shape)} is larger than 2^63 bytes")
    return dtype, shape, nbytes


def _check_contiguous(path: str, tensors: dict[str, TensorEntry], data_start: int) -> int:
    """The end of the last tensor in the file, in bytes; tensors must follow each other without hole or overlap."""
    end = data_start
    previous: TensorEntry | None = None
    for entry in sorted(tensors.values(), key=attrgetter("offset", "nbytes")):
        if entry.offset != end:
            before = f"tensor {previous.name[:200]!r}" if previous else "the header"
            how = "overlaps" if entry.offset < end else f"leaves a hole of {entry.offset - end:,} bytes after"
            raise CorruptHeaderError(
                f"{path}: header: tensor {entry.name[:200]!r} starts at byte {entry.offset:,} and {how} {before}, "
                f"which ends at byte {end:,}"
            )
        end += entry.nbytes
        previous = entry
    return end
