"""How near a whole load onto a GPU comes to a plain pinned copy of the same bytes, and what device memory it takes."""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checkpoints import make, shards_of
from gpu_products import Attempt
from load_child import storage_bytes
from load_process import set_page_cache
from quantload.checkpoint.reader import PieceReader
from stopwatch import Stopwatch
from torch import Tensor

SCHEMES = ("quark_mxfp4", "fp8_per_channel", "int8_per_channel")
BUFFER_BYTES = 256 << 20


class PinnedCopy:
    """The bytes of some files in pinned memory, and a buffer on the device that they are copied to, part after part."""

    def __init__(self, files: list[Path], device: torch.device) -> None:
        self.size = sum(path.stat().st_size for path in files)
        pinned = device.type == "cuda"
        self._parts: list[Tensor] = []
        for path in files:
            with path.open("rb", buffering=0) as file:
                left = path.stat().st_size
                while left:
                    part = torch.empty(min(left, BUFFER_BYTES), dtype=torch.uint8, pin_memory=pinned)
                    _read(file, part.numpy().data)
                    self._parts.append(part)
                    left -= part.numel()
        largest = max(part.numel() for part in self._parts)
        self._target = torch.empty(largest, dtype=torch.uint8, device=device)

    def seconds(self) -> float:
        """Of copying everything, once."""
        synchronize(self._target.device)
        start = time.perf_counter()
        for part in self._parts:
            self._target[: part.numel()].copy_(part, non_blocking=True)
        synchronize(self._target.device)
        return time.perf_counter() - start


def _read(file: Any, view: memoryview) -> None:
    while view:
        count = file.readinto(view)
        if not count:
            raise EOFError(f"{file.name} became shorter while it was read")
        view = view[count:]


def synchronize(device: torch.device) -> None:
    """Wait for the device, where it works on its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def load_once(
    folder: Path, scheme: str, device: torch.device, look: Callable[[Any], object] | None = None
) -> dict[str, Any]:
    """Seconds of one load, of its stream of pieces alone, and the device's memory (bytes above the value before).

    `look(model)` is called with what was loaded.
    """
    from quantload import load_quantized

    gc.collect()
    synchronize(device)
    before = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with Stopwatch((PieceReader, "run")) as watch:
        start = time.perf_counter()
        model = load_quantized(str(folder), scheme, device=str(device))
        synchronize(device)
        seconds = time.perf_counter() - start
    if look is not None:
        look(model)
    report = model.load_report
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else report.peak_bytes
    final = storage_bytes(iter([*model.parameters(), *model.buffers()]))
    return {
        "seconds": seconds,
        "stream": watch.seconds["run"],
        "peak_bytes": peak,
        "final_bytes": final,
        "reported_peak_bytes": report.peak_bytes,
        "reported_final_bytes": report.final_bytes,
        "staging_bytes": model.load_plan.staging_bytes,
        "slack_bytes": model.load_plan.slack_bytes,
        "kernels": sorted({layer.kernel for layer in report.layers}),
    }


def measure_scheme(scheme: str, folder: Path, copy: PinnedCopy, device: torch.device, turns: int) -> dict[str, Any]:
    """One row: loads and copies taking turns, after a load that compiles; medians, and the worst of the memory."""
    first = load_once(folder, scheme, device)
    copies, loads = [], []
    for _ in range(turns):
        set_page_cache(shards_of(folder), cold=False)
        copies.append(copy.seconds())
        loads.append(load_once(folder, scheme, device))
    seconds = {key: statistics.median(load[key] for load in loads) for key in ("seconds", "stream")}
    worst = max(loads, key=lambda load: load["peak_bytes"] - load["final_bytes"])
    return {
        **worst,
        **seconds,
        "scheme": scheme,
        "bytes": copy.size,
        "copy_seconds": statistics.median(copies),
        "share_of_copy": statistics.median(copies) / seconds["seconds"],
        "stream_share_of_copy": statistics.median(copies) / seconds["stream"],
        "first_seconds": first["seconds"],
        "turns": {"copy": copies, "load": [load["seconds"] for load in loads]},
    }


def measure_loads(
    schemes: list[str], scale: float, work: Path, device: torch.device, turns: int, attempt: Attempt
) -> dict[str, Any]:
    """A row for every scheme, on the dense checkpoint."""
    folder = make("dense", scale, work)
    copy = PinnedCopy(shards_of(folder), device)
    rows = []
    for scheme in schemes:
        row = attempt(f"load {scheme}", partial(measure_scheme, scheme, folder, copy, device, turns))
        if row is not None:
            rows.append(row)
            rate, share = row["bytes"] / row["seconds"] / 1e9, row["share_of_copy"]
            print(f"load {scheme}: {rate:.1f} GB/s, {share:.2f} of the copy", file=sys.stderr, flush=True)
    return {"checkpoint": "dense", "scale": scale, "cores": len(os.sched_getaffinity(0)), "rows": rows}
