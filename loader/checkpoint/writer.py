"""Write safetensors shards whose sizes are known beforehand: header first, then tensors in any order, in any parts."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import OutputError
from ..kernels import system_calls
from .headers import DTYPES
from .weight_map import SINGLE_NAME

UNFINISHED_SUFFIX = ".part"
FLUSH_BYTES = 256 << 20
"""Bytes of a shard after which whoever writes next waits for the disk, so that the end has little left to wait for."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_ALIGNMENT = 8


class TensorSpec(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One file to be written: `header` with its length prefix, then tensors at `offsets` (bytes from the start)."""

    path: str
    header: bytes
    offsets: dict[str, int]
    size: int


def plan_shards(groups: Iterable[Sequence[TensorSpec]], max_shard_bytes: int) -> list[ShardPlan]:
    """Files of at most `max_shard_bytes` bytes of tensors, in the order of `groups`; no group is torn apart.

    A group that is larger has a file of its own. The names are those transformers gives. Within a file wider dtypes
    come first, so that every tensor is aligned although the format knows no gaps.
    """
    files: list[list[TensorSpec]] = [[]]
    size = 0
    for group in groups:
        nbytes = sum(spec.nbytes for spec in group)
        if files[-1] and size + nbytes > max_shard_bytes:
            files.append([])
            size = 0
        files[-1].extend(group)
        size += nbytes
    if len(files) == 1:
        return [_plan_shard(SINGLE_NAME, files[0])]
    count = len(files)
    return [_plan_shard(f"model-{i:05}-of-{count:05}.safetensors", specs) for i, specs in enumerate(files, 1)]


def _plan_shard(path: str, specs: Sequence[TensorSpec]) -> ShardPlan:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    at = 0
    for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize):
        starts[spec.name] = at
        offsets = [at, at + spec.nbytes]
        entries[spec.name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        at += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return ShardPlan(path, header, {name: len(header) + start for name, start in starts.items()}, len(header) + at)


def weight_index(plans: Iterable[ShardPlan]) -> dict[str, Any]:
    """What the index file says: the shard of each tensor, by name, and the bytes of all tensors."""
    plans = list(plans)
    weight_map = {name: plan.path for plan in plans for name in plan.offsets}
    total = sum(plan.size - len(plan.header) for plan in plans)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


class Extent(NamedTuple):
    """`rows` stretches of `width` bytes, `pitch` apart, from byte `offset` of a file on; CRC-32 of them, end to end."""

    offset: int
    rows: int
    width: int
    pitch: int
    crc: int


class ShardWriter:
    """One shard on its way: room is taken and the header written with the first part, which may be any.

    `parts` are to be marked `done`; with the last one the file is flushed to the disk, gets its name, and
    `on_finished` runs with what was written, in the thread that brought it. Safe to use from several threads. Raises
    `OutputError` when the disk is full or fails.
    """

    def __init__(
        self, folder: Path, plan: ShardPlan, parts: int, on_finished: Callable[[ShardPlan, list[Extent]], None]
    ) -> None:
        self.plan = plan
        self._path = folder / plan.path
        self._unfinished = folder / f"{plan.path}{UNFINISHED_SUFFIX}"
        self._parts = parts
        self._on_finished = on_finished
        self._extents: list[Extent] = []
        self._lock = threading.Lock()
        self._fd = -1
        self._unflushed = 0

    def write(self, offset: int, data: Tensor, pitch: int) -> None:
        """Write the rows of `data`, uint8 [rows, width] and contiguous, to `offset` and every `pitch` bytes after."""
        self.write_each((offset,), data.unsqueeze(0), pitch)

    def write_each(self, offsets: Sequence[int], data: Tensor, pitch: int) -> None:
        """Write each matrix of `data`, uint8 [matrices, rows, width] and contiguous, as `write` does to its offset."""
        _, rows, width = data.shape
        if rows * width == 0:
            return
        fd, written = self._open(), []
        with data.numpy().data as view:
            buffer = view.cast("B")
            for number, offset in enumerate(offsets):
                matrix = buffer[number * rows * width : (number + 1) * rows * width]
                self._write_rows(fd, matrix, len(matrix) if width == pitch else width, offset, pitch)
                written.append(Extent(offset, rows, width, pitch, zlib.crc32(matrix)))
        with self._lock:
            self._extents += written
            self._unflushed += data.numel()
            flush = self._unflushed >= FLUSH_BYTES
            if flush:
                self._unflushed = 0
        if flush:
            self._flush(fd)

    def done(self, parts: int = 1) -> None:
        """So many more parts are complete."""
        with self._lock:
            self._parts -= parts
            last = self._parts == 0
        if last:
            self._finish()

    def close(self) -> None:
        """Close the file, finished or not."""
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _open(self) -> int:
        with self._lock:
            if self._fd < 0:
                try:
                    self._fd = create_file(self._unfinished)
                    system_calls.reserve(self._fd, self.plan.size)
                    write_all(self._fd, memoryview(self.plan.header), 0)
                except OSError as error:
                    raise self._failed(error) from error
            return self._fd

    def _write_rows(self, fd: int, matrix: memoryview, step: int, offset: int, pitch: int) -> None:
        """Write `step` bytes after the other, `pitch` apart."""
        try:
            for number in range(len(matrix) // step):
                write_all(fd, matrix[number * step : (number + 1) * step], offset + number * pitch)
        except OSError as error:
            raise self._failed(error) from error

    def _finish(self) -> None:
        self._flush(self._open())
        try:
            self.close()
            os.replace(self._unfinished, self._path)
        except OSError as error:
            raise self._failed(error) from error
        extents, self._extents = self._extents, []
        self._on_finished(self.plan, extents)

    def _flush(self, fd: int) -> None:
        try:
            system_calls.sync_data(fd)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self._path.name}: {self.plan.size:,} bytes cannot be written to {self._path.parent}: {error.strerror}; "
            "make room or choose another folder, and run it again"
        )


def verified(path: Path, plan: ShardPlan, extents: Iterable[Extent]) -> bool:
    """Whether the file is there, as long as planned, with the planned header and the bytes the extents say: all."""
    extents = list(extents)
    if len(plan.header) + sum(extent.rows * extent.width for extent in extents) != plan.size:
        return False
    try:
        with open(system_calls.open_plain(path, os.O_RDONLY, follow=False), "rb") as file:
            if os.fstat(file.fileno()).st_size != plan.size or file.read(len(plan.header)) != plan.header:
                return False
            return all(_crc_of(file.fileno(), extent) == extent.crc for extent in extents)
    except OSError:
        return False


def _crc_of(fd: int, extent: Extent) -> int:
    rows, width = (1, extent.rows * extent.width) if extent.width == extent.pitch else (extent.rows, extent.width)
    crc = 0
    for row in range(rows):
        crc = zlib.crc32(system_calls.pread(fd, width, extent.offset + row * extent.pitch), crc)
    return crc


def create_file(path: Path) -> int:
    """A descriptor to write to a new file with, in place of whatever an earlier run left there; no link is followed."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    return system_calls.open_plain(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` to a file from byte `offset` on."""
    while data:
        count = system_calls.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count
