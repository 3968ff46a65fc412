"""Stage "speed": the figures of `bench/kernels.py`, what matters most first, written down one after the other.

`speed.json` has rows as a result of that script has them; those of `loads` say what reading alone does, too.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from checkpoints import make, shards_of
from gpu_clock import CudaQueue, Queue
from gpu_command import FORMATS_MEASURED, PIECES
from gpu_day_loads import scale_of
from gpu_day_record import Record, Steps
from gpu_facts import rotated_bytes
from gpu_load import PinnedCopy, measure_scheme
from gpu_pieces import measure_pieces
from gpu_products import Attempt, How, measure_experts, measure_linear
from load_process import set_page_cache
from pipeline_parts import read_alone
from quantload.kernels.gpu.quantizers import stored_format

FIRST = "mxfp4"
OTHERS = ("fp8_channel", "int8_channel", "nvfp4", "fp8_block", "int4_group128_f16", "mxfp8")
TOKENS = (1, 8, 64, 2048)
SHAPES, EXPERTS = ((4096, 4096), (14336, 4096)), ((128, 1536, 2048),)
SCHEMES = ("quark_mxfp4", "fp8_per_channel", "int8_per_channel")
DRY_SHAPE, DRY_EXPERTS, DRY_TOKENS, DRY_PIECE = (64, 128), (4, 64, 128), (1, 8), 1 << 15
Part = tuple[str, str, Callable[[], Any]]
"""Part of the result, what is measured, and the measuring, which returns rows."""


class HostQueue:
    """A CPU as a queue: each call is over before the next begins."""

    def mark(self) -> float:
        return time.perf_counter()

    def hold(self, seconds: float) -> None:
        """Nothing waits here."""

    def passed(self, mark: float) -> bool:
        return False

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def synchronize(self) -> None:
        """Nothing is behind."""


def run(record: Record, device: torch.device, options: argparse.Namespace) -> None:
    """All parts in their order, until the time is up."""
    steps = Steps(record, device, options.until, "quantize", "linear", "experts", "loads")
    queue: Queue = HostQueue() if options.dry else CudaQueue(device)
    for part, what, measure in parts(device, queue, steps.attempt, options):
        steps.step(part, what, measure)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def parts(device: torch.device, queue: Queue, attempt: Attempt, options: argparse.Namespace) -> list[Part]:
    """What is measured, in order of worth."""
    dry, turns = options.dry, 1 if options.dry else 5
    rotated = 60_000 if dry else rotated_bytes(device)
    shared: dict[str, Any] = {
        "device": device,
        "queue": queue,
        "rotated_bytes": rotated,
        "turns": turns,
        "turn_seconds": 0.0 if dry else 0.01,
    }
    how = How(**shared, attempt=attempt, without=("torch",))
    tokens, shapes, experts = (DRY_TOKENS, (DRY_SHAPE,), (DRY_EXPERTS,)) if dry else (TOKENS, SHAPES, EXPERTS)
    pieces = (DRY_PIECE,) if dry else PIECES

    def quantize(name: str) -> Part:
        measure = partial(measure_pieces, [stored_format(name, device)], pieces, attempt, **shared)
        return "quantize", f"quantize {name}", measure

    def linear(name: str, some: Sequence[tuple[int, int]]) -> Part:
        return "linear", f"linear {name}", partial(measure_linear, [stored_format(name, device)], some, tokens, how)

    def grouped(name: str) -> Part:
        measure = partial(measure_experts, [stored_format(name, device)], experts, tokens[:3], how)
        return "experts", f"experts {name}", measure

    def load(scheme: str) -> Part:
        return "loads", f"load {scheme}", partial(measure_load, scheme, device, options, 1 if dry else 3)

    others = ("fp8_tensor", "nvfp4") if dry else tuple(name for name in OTHERS if name in FORMATS_MEASURED)
    found = [quantize(FIRST), linear(FIRST, shapes), load(SCHEMES[0]), grouped(FIRST)]
    found += [quantize(name) for name in others] + [linear(name, shapes[:1]) for name in others]
    found += [grouped(name) for name in others]
    return found + [load(scheme) for scheme in SCHEMES[1 : 1 if dry else None]]


def measure_load(scheme: str, device: torch.device, options: argparse.Namespace, turns: int) -> dict[str, Any]:
    """Whole loads and pinned copies of the same bytes taking turns, and the project's reader alone."""
    folder = make("dense", scale_of(options.dry), options.work)
    copy = PinnedCopy(shards_of(folder), device)
    row = measure_scheme(scheme, folder, copy, device, turns)
    set_page_cache(shards_of(folder), cold=False)
    row["read_bytes_per_second"] = read_alone(folder)
    row["share_of_read"] = row["bytes"] / row["seconds"] / row["read_bytes_per_second"]
    return row
