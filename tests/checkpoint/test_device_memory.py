"""Uploads to a device overlap with the work there, and neither reads what the other has overwritten.

There is no device here: the queues are played by a thread of their own that is late at random, as a GPU would be.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quantload.checkpoint import FileSource, Piece, PieceReader, read_index
from quantload.checkpoint import device as device_module
from quantload.checkpoint.device import DeviceMemory, DeviceWorkspace
from quantload.checkpoint.index import CheckpointIndex
from quantload.checkpoint.reader import ReadTotals
from quantload.checkpoint.resolve import resolve
from quantload.checkpoint.workspace import Workspace
from quantload.errors import MemoryBudgetError, PolicyError
from safetensors.torch import save_file
from torch import Tensor

DEVICE = torch.device("cpu:0")


Saved = tuple[CheckpointIndex, Path, dict[str, Tensor]]
Task = Callable[[], object]


class Point:
    def __init__(self) -> None:
        self.passed = threading.Event()

    def synchronize(self) -> None:
        assert self.passed.wait(20)


class LateStreams:
    """Two queues, each carried out in order by a thread that dawdles."""

    def __init__(self, seed: int) -> None:
        self._queues: dict[str, deque[Task]] = {"copies": deque(), "kernels": deque()}
        self._open = True
        self.uploads = 0
        self._threads = [
            threading.Thread(target=self._run, args=(queue, random.Random(seed + n)), daemon=True)
            for n, queue in enumerate(self._queues.values())
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, queue: deque[Task], chance: random.Random) -> None:
        while self._open or queue:
            if not queue:
                time.sleep(0.0005)
                continue
            if chance.random() < 0.3:
                time.sleep(chance.random() * 0.01)
            queue.popleft()()

    def launch(self, kernel: Task, queue: str = "kernels") -> None:
        self._queues[queue].append(kernel)

    def _mark(self, queue: str) -> Point:
        point = Point()
        self.launch(point.passed.set, queue)
        return point

    def upload(self, target: torch.Tensor, source: torch.Tensor, after: Point | None) -> Point:
        self.uploads += 1
        if after is not None:
            self.launch(after.synchronize, "copies")
        self.launch(lambda: target.copy_(source), "copies")
        return self._mark("copies")

    def compute_after(self, event: Point) -> None:
        self.launch(event.synchronize)

    def computed(self) -> Point:
        return self._mark("kernels")

    def computing(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        for queue in self._queues:
            self._mark(queue).synchronize()

    def stop(self) -> None:
        self._open = False
        for thread in self._threads:
            thread.join(20)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Saved:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t{i}": torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
        for i, size in enumerate([40_000, 100, 4096, 70_001, 333, 5, 300_000, 64, 8192, 31])
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return read_index(resolve(tmp_path)), tmp_path, tensors


def read_all(
    checkpoint: Saved,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    seed: int,
    chunk: int,
) -> tuple[dict[str, Tensor], ReadTotals, list[DeviceMemory], LateStreams]:
    index, folder, tensors = checkpoint
    streams = LateStreams(seed)
    memories: list[DeviceMemory] = []

    def memory(device: torch.device, workers: int, slot_bytes: int) -> DeviceMemory:
        memories.append(DeviceMemory(workers, slot_bytes, DEVICE, streams))
        return memories[-1]

    def aligned(workspace: DeviceWorkspace, part: Tensor) -> Tensor:  # a kernel where there is a device
        target: Tensor = workspace._slot.device[chunk // 2 :][: len(part)]
        streams.launch(lambda: target.copy_(part))
        return target

    monkeypatch.setattr(device_module.DeviceWorkspace, "aligned", aligned)
    monkeypatch.setattr("quantload.checkpoint.reader.working_memory", memory)
    monkeypatch.setattr("quantload.checkpoint.reader.slots_per_worker", lambda device: DeviceMemory.slots_per_worker)
    found = {name: torch.zeros(len(tensor), dtype=torch.uint8) for name, tensor in tensors.items()}
    pieces = []
    for entry in sorted(index.tensors.values(), key=lambda entry: entry.offset):
        for start in range(0, entry.nbytes, chunk):
            part = found[entry.name][start : start + chunk]

            def deliver(workspace: Workspace, part: Tensor = part) -> None:
                buffer, scratch = workspace.buffer, workspace.scratch(len(part))
                streams.launch(lambda: part.copy_(scratch.copy_(buffer)))

            pieces.append(Piece(0, ((entry.offset + start, len(part)),), deliver))
    try:
        reader = PieceReader(FileSource(folder), index.shards, workers=workers, chunk_bytes=chunk)
        totals = reader.run(pieces)
    finally:
        streams.stop()
    return found, totals, memories, streams


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_every_byte_arrives_whoever_is_late(
    checkpoint: Saved,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    seed: int,
) -> None:
    found, totals, _, streams = read_all(checkpoint, monkeypatch, workers, seed, 8192)
    for name, tensor in checkpoint[2].items():
        assert torch.equal(found[name], tensor), name
    assert totals.bytes_read == sum(len(tensor) for tensor in checkpoint[2].values())
    assert totals.staging_peak_bytes == workers * DeviceMemory.slots_per_worker * 8192
    assert streams.uploads > 40


def test_a_test_without_events_would_fail(checkpoint: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queues here are late enough to show a buffer that is overwritten too early."""
    monkeypatch.setattr(Point, "synchronize", lambda self: None)
    monkeypatch.setattr(LateStreams, "synchronize", lambda self: time.sleep(0.3))
    wrong = 0
    for seed in range(5):
        found, *_ = read_all(checkpoint, monkeypatch, 1, seed, 8192)
        wrong += any(not torch.equal(found[name], tensor) for name, tensor in checkpoint[2].items())
    assert wrong


def test_after_an_error_nothing_reads_the_arena_any_more(checkpoint: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    index, folder, _ = checkpoint
    streams = LateStreams(0)
    done: list[int] = []

    def late() -> None:
        time.sleep(0.05)
        done.append(1)

    def deliver(workspace: Workspace) -> None:
        streams.launch(late)
        raise ValueError("no")

    monkeypatch.setattr(
        "quantload.checkpoint.reader.working_memory",
        lambda device, workers, slot_bytes: DeviceMemory(workers, slot_bytes, DEVICE, streams),
    )
    entry = index.tensors["t2"]
    with pytest.raises(ValueError, match="no"):
        PieceReader(FileSource(folder), index.shards, chunk_bytes=8192).run(
            [Piece(0, ((entry.offset, entry.nbytes),), deliver)]
        )
    assert done
    streams.stop()


def test_staging_is_counted_for_the_device(checkpoint: Saved) -> None:
    index, folder, _ = checkpoint
    source, gpu = FileSource(folder), torch.device("cuda")
    with pytest.raises(PolicyError, match="staging_bytes is 12287; pieces of 4096 bytes need at least 12288"):
        PieceReader(source, index.shards, chunk_bytes=4096, staging_bytes=12287, device=gpu)
    assert (
        PieceReader(source, index.shards, workers=4, chunk_bytes=4096, staging_bytes=5 * 8192, device=gpu).workers == 3
    )


def test_the_arena_is_pinned_once_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(device_module, "pin", lambda memory: calls.append(("pin", memory.numel())))
    monkeypatch.setattr(device_module, "unpin", lambda memory: calls.append(("unpin", memory.numel())))

    real_empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, device=None, **k: real_empty(*a, **k))
    streams = LateStreams(0)
    with DeviceMemory(2, 4096, torch.device("cuda"), streams) as memory, memory.workspace() as workspace:
        assert calls == [("pin", 4 * 4096)]
        assert workspace.next_slot() is not workspace.next_slot()
    assert calls == [("pin", 4 * 4096), ("unpin", 4 * 4096)]
    streams.stop()


def test_memory_that_cannot_be_pinned_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class Runtime:
        @staticmethod
        def cudaHostRegister(address: int, size: int, flags: int) -> int:
            return 2

    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime)
    with pytest.raises(MemoryBudgetError, match="4096 bytes of staging could not be pinned"):
        device_module.pin(torch.zeros(4096, dtype=torch.uint8))


def test_the_arena_is_let_go_where_the_device_has_no_memory_left(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(device_module, "pin", lambda memory: calls.append("pin"))
    monkeypatch.setattr(device_module, "unpin", lambda memory: calls.append("unpin"))

    class Full:
        def __init__(self, device: torch.device) -> None:
            raise torch.OutOfMemoryError("no streams today")

    monkeypatch.setattr(device_module, "CudaStreams", Full)
    with pytest.raises(torch.OutOfMemoryError):
        DeviceMemory(1, 4096, torch.device("cuda"))
    assert calls == ["pin", "unpin"]
