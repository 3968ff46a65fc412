"""Write finished parameters to the files of an entry while the rest of the model is still being read.

A thread of its own writes from the final tensors themselves, so nothing is held twice and the readers never wait for
it. What it has written is forced to disk and dropped from the page cache every few MiB: the checkpoint's pages stay.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from ..checkpoint.writer import ShardPlan, write_all
from ..kernels import system_calls
from ..shortage import start
from .checksums import SEGMENT_BYTES, Checksums

CHUNK_BYTES = 16 * SEGMENT_BYTES
"""Written at once, after it went through the processor's cache for its checksum."""
FLUSH_BYTES = 32 << 20
"""Dirty pages of a file before they are forced to disk."""


@dataclass
class _File:
    plan: ShardPlan
    fd: int
    checksums: Checksums
    dirty: int = 0


@dataclass(frozen=True)
class _Job:
    tensors: Mapping[str, Tensor]
    then: Callable[[], None]
    computed: Any

    def device(self) -> AbstractContextManager[Any]:
        """Meanwhile the thread works on the device of the tensors."""
        first = next(iter(self.tensors.values()))
        return torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext()


@dataclass
class _Faults:
    """What went wrong: in writing, which the load survives, and in what comes after it, which it does not."""

    writing: OSError | None = None
    after: list[BaseException] = field(default_factory=list)


class TensorWriter:
    """Writes tensors to the places that `plans` give them in files of `folder`.

    Use it as a context: the thread ends with it. An error of the disk ends the writing, not the load: `finish` raises
    it, and until then everything else goes on. With anything but a CPU, `CHUNK_BYTES` of host memory are needed.
    """

    def __init__(self, folder: Path, plans: Iterable[ShardPlan]) -> None:
        self._files: list[_File] = []
        self._file_of: dict[str, _File] = {}
        self._missing: set[str] = set()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._faults = _Faults()
        self._thread = threading.Thread(target=self._work, name="quantload-cache-writer")
        self._landing: Tensor | None = None
        self._given_up = False
        try:
            for plan in plans:
                self._open(folder, plan)
        except OSError:
            self._close()
            raise

    def __enter__(self) -> Self:
        try:
            start(self._thread, "the thread that writes the cache")
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._given_up = error is not None
        self._join()
        self._close()

    def take(self, tensors: Mapping[str, Tensor], then: Callable[[], None]) -> None:
        """Write tensors that are complete, by name, and call `then` when they may be changed; returns at once.

        `then` is called in the writer's thread, whether the disk took the tensors or not. What a `then` before this
        one raised is raised here.
        """
        self._raise_after()
        self._jobs.put(_Job(tensors, then, _computed(tensors.values())))

    def wait(self) -> None:
        """Wait until everything was handed to the system and every `then` was called; raises what one raised."""
        self._join()
        self._raise_after()

    def finish(self) -> dict[str, Checksums]:
        """Wait until everything is on disk; the checksums of each file.

        Raises what a `then` raised, and the `OSError` that ended the writing.
        """
        self.wait()
        if self._faults.writing is not None:
            raise self._faults.writing
        if self._missing:
            raise RuntimeError(f"parameters that were never handed to the cache: {sorted(self._missing)[:8]}")
        for file in self._files:
            self._flush(file)
        return {file.plan.path: file.checksums for file in self._files}

    def _open(self, folder: Path, plan: ShardPlan) -> None:
        fd = system_calls.open_plain(folder / plan.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        file = _File(plan, fd, _checksums(plan))
        self._files.append(file)
        self._file_of.update(dict.fromkeys(plan.offsets, file))
        self._missing.update(plan.offsets)
        os.truncate(fd, plan.size)
        write_all(fd, memoryview(plan.header), 0)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._given_up:  # the load has failed: nobody will see the entry or the model
                continue
            try:
                with job.device():
                    if job.computed is not None:
                        job.computed.synchronize()
                    self._try_to_write(job.tensors)
                    job.then()
            except BaseException as error:
                self._faults.after.append(error)

    def _try_to_write(self, tensors: Mapping[str, Tensor]) -> None:
        if self._faults.writing is not None:
            return
        try:
            for name, tensor in tensors.items():
                self._write(name, tensor)
        except OSError as error:
            self._faults.writing = error

    def _write(self, name: str, tensor: Tensor) -> None:
        file = self._file_of[name]
        self._missing.remove(name)
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        offset = file.plan.offsets[name]
        for begin in range(0, flat.numel(), CHUNK_BYTES):
            data = self._on_host(flat[begin : begin + CHUNK_BYTES]).numpy().data
            file.checksums.note(offset + begin, data)
            write_all(file.fd, data, offset + begin)
            file.dirty += len(data)
            if file.dirty >= FLUSH_BYTES:
                self._flush(file)

    def _on_host(self, part: Tensor) -> Tensor:
        if part.device.type == "cpu":
            return part
        if self._landing is None:
            self._landing = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
        return self._landing[: part.numel()].copy_(part)

    @staticmethod
    def _flush(file: _File) -> None:
        system_calls.sync_data(file.fd)
        system_calls.advise(file.fd, 0, 0, system_calls.DONTNEED)
        file.dirty = 0

    def _raise_after(self) -> None:
        if self._faults.after:
            raise self._faults.after[0]

    def _join(self) -> None:
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()

    def _close(self) -> None:
        for file in self._files:
            os.close(file.fd)
        self._files.clear()


def _computed(tensors: Iterable[Tensor]) -> Any:
    """A point in the queue of the device behind everything that writes to the tensors; None on a CPU."""
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def _checksums(plan: ShardPlan) -> Checksums:
    """Checksums of a file, that of its header known."""
    checksums = Checksums(sorted({0, *plan.offsets.values(), plan.size}))
    checksums.note(0, memoryview(plan.header))
    return checksums
