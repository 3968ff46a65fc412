"""Memory that counts against a load: anonymous pages on the host, the allocator's bytes on a GPU."""

from __future__ import annotations

import io
import mmap
import os
import sys
import threading
import time
from types import TracebackType
from typing import Literal, Protocol, Self

import torch

from ..shortage import start

Kind = Literal["CPU", "GPU"]
SAMPLE_SECONDS = 0.004


class MemoryProbe(Protocol):
    """Reads the memory of one device, in bytes.

    `current` is the value now; `peak` the highest value since `reset_peak`. Between `start` and `stop` the peak is
    followed in the background where the device does not do so by itself; `sample` takes the value now into the peak
    and returns it, for the moments known to be high points.
    """

    @property
    def device(self) -> torch.device: ...
    @property
    def kind(self) -> Kind: ...
    def current(self) -> int: ...
    def sample(self) -> int: ...
    def reset_peak(self) -> None: ...
    def peak(self) -> int: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...


class AnonymousRssProbe:
    """Anonymous resident memory of this process, in bytes; page cache, file mappings and shared memory do not count.

    On Linux it is `resident - shared` of `/proc/self/statm`, which the kernel fills from the counters behind `RssAnon`
    in `/proc/self/status` (fs/proc/task_mmu.c) but formats in a third of the time; `smaps_rollup` would walk the page
    tables under the lock that page faults need. Elsewhere it is psutil's unique set size, which also counts
    pages of private file mappings and is slower to read. The peak is the highest of the values that were looked at:
    by a thread every `period` seconds between `start` and `stop`, by `sample` and by `current`.
    """

    kind: Kind = "CPU"

    def __init__(self, period: float = SAMPLE_SECONDS) -> None:
        self.device = torch.device("cpu")
        self.period = period
        self._counter = _StatmCounter() if sys.platform == "linux" else _UniqueSetCounter()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._peak = self._counter.read()

    def current(self) -> int:
        """Anonymous resident bytes now."""
        return self.sample()

    def sample(self) -> int:
        """Anonymous resident bytes now, taken into the peak."""
        value = self._counter.read()
        if value > self._peak:
            with self._lock:
                self._peak = max(self._peak, value)
        return value

    def reset_peak(self) -> None:
        """Let the peak start again from the value now."""
        with self._lock:
            self._peak = self._counter.read()

    def peak(self) -> int:
        """Highest value seen since `reset_peak` (bytes), the value now included."""
        self.sample()
        return self._peak

    def start(self) -> None:
        """Start the sampling thread; does nothing where it runs already."""
        if self._thread is None:
            thread = self._thread = threading.Thread(target=self._run, name="quantload-memory", daemon=True)
            try:
                start(thread, "the thread that watches memory")
            except BaseException:
                self._thread = None
                self._counter.close()
                raise

    def stop(self) -> None:
        """Stop the sampling thread and wait for its end, at most a period; does nothing where it does not run."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
            self.sample()
        self._counter.close()

    def _run(self) -> None:
        # A plain sleep costs two thirds of an Event with a timeout, and this runs beside the quantizing threads.
        me = threading.current_thread()
        while self._thread is me:
            time.sleep(self.period)
            self.sample()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class AllocatorProbe:
    """Bytes of PyTorch's caching allocator that live tensors hold on one CUDA or ROCm device.

    The allocator keeps the peak itself, so nothing runs in the background and no high point is missed. Memory other
    libraries take from the driver is not counted. Raises `ValueError` for a device that is not a GPU.
    """

    kind: Kind = "GPU"

    def __init__(self, device: torch.device | str | int = "cuda") -> None:
        given = torch.device(device)
        if given.type != "cuda":
            raise ValueError(f"device {given} has no CUDA or ROCm allocator; use AnonymousRssProbe for host memory")
        index = torch.cuda.current_device() if given.index is None else given.index
        self.device = torch.device("cuda", index)

    def current(self) -> int:
        """Allocated bytes now."""
        return torch.cuda.memory_allocated(self.device)

    def sample(self) -> int:
        """Allocated bytes now; the allocator follows the peak."""
        return self.current()

    def reset_peak(self) -> None:
        """Let the allocator's peak start again from the value now."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Highest allocated bytes since `reset_peak`."""
        return torch.cuda.max_memory_allocated(self.device)

    def start(self) -> None:
        """Nothing to start: the allocator follows its own peak."""

    def stop(self) -> None:
        """Nothing to stop."""


def probe_for(device: torch.device | str) -> MemoryProbe:
    """The probe for `device`: the allocator's for CUDA and ROCm, anonymous memory for the CPU; else `ValueError`."""
    device = torch.device(device)
    if device.type == "cuda":
        return AllocatorProbe(device)
    if device.type == "cpu":
        return AnonymousRssProbe()
    raise ValueError(f"no memory probe for device {device}; quantload loads onto cpu and cuda (CUDA or ROCm)")


class _StatmCounter:
    """Reads `/proc/self/statm` through a descriptor that stays open until `close`: one system call a reading."""

    def __init__(self) -> None:
        self._pid = -1
        self._file: io.FileIO | None = None

    def read(self) -> int:
        pid = os.getpid()
        file = self._file
        if file is None or self._pid != pid:  # after a fork the old descriptor still tells about the parent
            file = self._file = open("/proc/self/statm", "rb", buffering=0)  # noqa: SIM115  # closed by `close`
            self._pid = pid
        fields = os.pread(file.fileno(), 128, 0).split(maxsplit=3)
        return (int(fields[1]) - int(fields[2])) * mmap.PAGESIZE

    def close(self) -> None:
        """Give the descriptor back; a later reading opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


class _UniqueSetCounter:
    """Reads psutil's unique set size, on systems without `/proc/self/statm`."""

    def __init__(self) -> None:
        import psutil  # here, so that a load on Linux does not need it

        self._process = psutil.Process()

    def read(self) -> int:
        return int(self._process.memory_full_info().uss)

    def close(self) -> None:
        """There is nothing to close."""
