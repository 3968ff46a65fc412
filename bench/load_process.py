"""Start one load in its own process, watch its memory from outside, and collect what it says about itself."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import drop_files

BENCH = Path(__file__).resolve().parent
PAGE = mmap.PAGESIZE
Prepare = Callable[[], dict[str, Any]]
SAMPLE_SECONDS = 0.003
READ_BYTES = 8 << 20
PAGE_CACHE_TRIES = 5
WARM_SHARE, COLD_SHARE = 0.999, 0.01
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}


@dataclass(frozen=True)
class Limits:
    """When a run is stopped: seconds for imports and load, for the generation, and anonymous bytes over the start."""

    load_seconds: float
    generate_seconds: float
    memory_bytes: int


@dataclass
class Run:
    """What one process did. `status`: ok, missing, failed, timeout, killed; `facts` are its events, put together."""

    status: str = "failed"
    detail: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """This run, ready for JSON."""
        return {"status": self.status, "detail": self.detail, **self.facts}


def read_files(files: list[Path]) -> None:
    """Read every byte, which puts the files into the page cache as far as memory allows."""
    buffer = bytearray(READ_BYTES)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def cached_share(files: list[Path]) -> float:
    """Share of the files' pages in the page cache, as mincore(2) tells."""
    libc = ctypes.CDLL(None, use_errno=True)
    cached = pages = 0
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE) as view:
            anchor = ctypes.c_char.from_buffer(view)
            count = -(-size // PAGE)
            states = (ctypes.c_ubyte * count)()
            address = ctypes.c_void_p(ctypes.addressof(anchor))
            if libc.mincore(address, ctypes.c_size_t(size), states) != 0:
                raise OSError(ctypes.get_errno(), f"mincore of {path}")
            del anchor
            cached += int(np.count_nonzero(np.frombuffer(bytes(states), dtype=np.uint8) & 1))
            pages += count
    return cached / pages


def set_page_cache(files: list[Path], cold: bool) -> float:
    """Warm or empty the page cache for these files and return the share that is cached now.

    Raises `RuntimeError` when the kernel does not follow: the run would not measure what it says.
    """
    for _ in range(PAGE_CACHE_TRIES):  # the kernel may be reclaiming pages that nobody used for a while
        if cold:
            drop_files(files)
        else:
            read_files(files)
        share = cached_share(files)
        if share <= COLD_SHARE if cold else share >= WARM_SHARE:
            return share
    state = "cold" if cold else "warm"
    raise RuntimeError(f"{share:.1%} of {files[0].parent.name} is in the page cache: no {state} run")


def touch_memory(size: int) -> float:
    """Allocate, touch and free `size` bytes; returns the bytes a second of that first touch.

    A virtual machine may have given its free pages back to the host, which then takes milliseconds to find each of
    them again: without this the loads would be timed by what ran before them.
    """
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as view:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            view.madvise(mmap.MADV_HUGEPAGE)
        pages = np.frombuffer(view, dtype=np.uint8)[::PAGE]
        try:
            start = time.perf_counter()
            pages[:] = 1
            seconds = time.perf_counter() - start
        finally:
            del pages  # it holds the mapping, also when this is interrupted
    return size / seconds


def _anonymous(pid: int) -> int:
    """Anonymous resident bytes of a process: resident minus file and shared pages."""
    _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(resident) - int(shared)) * PAGE


class _Watcher:
    """Reads a child's events and samples its memory until it ends or breaks a limit."""

    def __init__(self, process: subprocess.Popen[bytes], limits: Limits, before_load: Prepare) -> None:
        self.process = process
        self.before_load = before_load
        self.limits = limits
        self.run = Run()
        self.sampling = False
        self.loaded = False
        self.peak_anon = 0
        self.deadline = time.monotonic() + limits.load_seconds

    def watch(self) -> Run:
        """Follow the child to its end; kills it when a limit is broken."""
        assert self.process.stdout is not None
        stream = self.process.stdout.fileno()
        pending = b""
        while True:
            # The samples lie between two select calls, so an event is never older than one sample.
            readable, _, _ = select.select([stream], [], [], SAMPLE_SECONDS)
            if self.sampling:
                self._sample()
            if readable:
                block = os.read(stream, 1 << 16)
                if not block:
                    break
                *lines, pending = (pending + block).split(b"\n")
                for line in lines:
                    self._handle(json.loads(line))
            if self._over_limit():
                self.process.kill()
                break
        self.process.wait()
        return self.run

    def _sample(self) -> None:
        try:
            self.peak_anon = max(self.peak_anon, _anonymous(self.process.pid))
        except (FileNotFoundError, ProcessLookupError, ValueError):
            self.sampling = False  # it has just ended

    def _handle(self, event: dict[str, Any]) -> None:
        kind = event.pop("event")
        facts = self.run.facts
        if kind == "ready":
            facts |= event
            left = self.deadline - time.monotonic()
            facts |= self.before_load()
            self.deadline = time.monotonic() + left
            self.sampling = True
            assert self.process.stdin is not None
            self.process.stdin.write(b"go\n")
            self.process.stdin.flush()
        elif kind == "loaded":
            self.sampling = False
            self.loaded = True
            self.run.status = "ok"
            facts |= event
            facts["peak_anon"] = self.peak_anon - facts["baseline"]["anon"]
            self.deadline = time.monotonic() + self.limits.generate_seconds
        elif kind == "measured":
            facts |= event
        elif kind == "generated":
            facts["generate"] = event
        elif kind == "missing":
            self.run.status, self.run.detail = "missing", "not installed: " + ", ".join(event["modules"])
        elif kind == "failed":
            self.run.detail = f"{event['phase']}: {event['error']}"
            self.run.status = "failed"

    def _over_limit(self) -> bool:
        grown = self.peak_anon - self.run.facts.get("baseline", {}).get("anon", 0)
        if not self.loaded and grown > self.limits.memory_bytes:
            self.run.status = "killed"
            self.run.detail = f"needs more than {self.limits.memory_bytes / 1e9:.1f} GB of anonymous memory"
            return True
        if time.monotonic() <= self.deadline:
            return False
        if self.loaded:
            self.run.facts["generate"] = {"ok": False, "problems": [f"over {self.limits.generate_seconds:.0f} s"]}
        else:
            self.run.status, self.run.detail = "timeout", f"over {self.limits.load_seconds:.0f} s"
        return True


def run_loader(
    python: str,
    loader: str,
    folder: Path,
    *,
    warm_up: Path | None = None,
    limits: Limits,
    generate: bool = False,
    before_load: Prepare = dict,
) -> Run:
    """Load `folder` with `loader` under the interpreter `python`, in a process of its own.

    `before_load` runs here when that process has imported everything and is about to load; what it returns joins the
    facts of the run.
    """
    command = [python, str(BENCH / "load_child.py"), loader, str(folder)]
    if warm_up is not None:
        command += ["--warm-up", str(warm_up)]
    if not generate:
        command.append("--no-generate")
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=scratch,
            env={**os.environ, **QUIET},
        )
        with process:
            try:
                run = _Watcher(process, limits, before_load).watch()
            finally:
                process.kill()  # it has ended, unless the watching was interrupted
        if run.status == "failed" and not run.detail:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            run.detail = f"exit code {process.returncode}: {lines[-1][:300] if lines else 'no output'}"
    return run
