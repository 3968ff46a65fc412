"""The command of `bench/kernels.py`: what is measured, in what order, and what becomes of the result."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoints import WORK_FOLDER
from goals import print_goals
from gpu_clock import CudaQueue, Queue
from gpu_facts import describe_gpu, driver_facts, gpu_headline, missing_gpu, rotated_bytes
from gpu_load import SCHEMES, measure_loads
from gpu_pieces import measure_pieces
from gpu_products import How, measure_experts, measure_linear
from gpu_tables import PARTS, goals_of, render
from machine import describe_machine, headline
from measured_formats import MEASURED
from quantload.kernels.formats import FORMATS
from quantload.kernels.gpu.quantizers import gpu_quantizers, stored_format
from result_files import RESULTS, write_result

FORMATS_MEASURED = tuple(
    name for name in MEASURED if FORMATS[name].ocp is None and gpu_quantizers("quantize", FORMATS[name])
)
PIECES = (8 << 20, 256 << 20)
SHAPES = ("4096x4096", "14336x4096", "4096x14336")
EXPERTS = ("128x1536x2048", "128x2048x768")
"""Gate and up, and down, of Qwen3-30B-A3B's experts."""
TOKENS = (1, 2, 4, 8, 16, 32, 64, 512)
EXPERTS_TOKENS = (1, 8, 64, 512)
QUICK: dict[str, Any] = {
    "formats": ["mxfp4"],
    "shapes": ["4096x4096"],
    "experts": ["128x1536x2048"],
    "tokens": [1, 64],
    "experts_tokens": [1, 64],
    "schemes": ["quark_mxfp4"],
    "scale": 0.2,
    "turns": 3,
}


def parser() -> argparse.ArgumentParser:
    """The options; `--quick` gives those that are not given other defaults."""
    made = argparse.ArgumentParser(description="How fast the kernels for GPUs are, on the CUDA or ROCm GPU at hand.")
    made.add_argument("--quick", action="store_true", help="one format, few sizes: a minute; the tables leave it out")
    made.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    made.add_argument("--formats", nargs="+", choices=FORMATS_MEASURED, default=list(FORMATS_MEASURED))
    made.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="ROWSxCOLS", type=_shape(2))
    made.add_argument("--experts", nargs="+", default=list(EXPERTS), metavar="NxROWSxCOLS", type=_shape(3))
    made.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    made.add_argument("--experts-tokens", nargs="+", type=int, default=list(EXPERTS_TOKENS))
    made.add_argument("--schemes", nargs="+", default=list(SCHEMES), help="of the loads")
    made.add_argument("--scale", type=float, default=1.0, help="of the checkpoint, relative to its full size")
    made.add_argument("--turns", type=int, default=7, help="that a figure is the median of")
    made.add_argument("--turn-seconds", type=float, default=0.01)
    made.add_argument("--work", type=Path, default=WORK_FOLDER, help="where the checkpoint is made")
    made.add_argument("--results", type=Path, default=RESULTS)
    return made


def _shape(sizes: int) -> Callable[[str], str]:
    def check(text: str) -> str:
        if len(sizes_of(text)) != sizes:
            raise ValueError(text)
        return text

    check.__name__ = "x".join(["SIZE"] * sizes)  # argparse names it in its error
    return check


def sizes_of(text: str) -> tuple[int, ...]:
    """`14336x4096` as numbers."""
    return tuple(int(size) for size in text.split("x"))


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of a command line, `--quick` applied to those that were not given."""
    made = parser()
    if made.parse_args(arguments).quick:
        made.set_defaults(**QUICK)
    return made.parse_args(arguments)


def reduced(options: argparse.Namespace) -> str:
    """How the parts that are run are smaller than in full; empty when they are not."""
    if options.quick:
        return "quick"
    full = {"formats": FORMATS_MEASURED, "shapes": SHAPES, "experts": EXPERTS, "tokens": TOKENS,
            "experts_tokens": EXPERTS_TOKENS, "schemes": SCHEMES}  # fmt: skip
    whole = all(set(wanted) <= set(getattr(options, name)) for name, wanted in full.items())
    return "" if whole and options.scale == 1 else "part"


class Failures:
    """Keeps what fails from ending the rest, and remembers it."""

    def __init__(self) -> None:
        self.found: list[dict[str, str]] = []

    def attempt(self, what: str, function: Callable[[], Any]) -> Any:
        """What the function returns, or None when it raised."""
        try:
            return function()
        except Exception as error:
            first = (str(error).strip() or "no message").splitlines()[0]
            self.found.append({"what": what, "why": f"{type(error).__name__}: {first}"})
            print(f"FAILED {what}: {self.found[-1]['why']}", file=sys.stderr, flush=True)
            return None


def measure(options: argparse.Namespace, device: torch.device, queue: Queue, failures: Failures) -> dict[str, Any]:
    """The parts that the options ask for."""
    formats = [stored_format(name, device) for name in options.formats]
    rotated = rotated_bytes(device)
    shared = {"device": device, "queue": queue, "rotated_bytes": rotated, "turns": options.turns}
    how = How(**shared, turn_seconds=options.turn_seconds, attempt=failures.attempt)
    shapes = [(rows, cols) for rows, cols in map(sizes_of, options.shapes)]
    experts = [(number, rows, cols) for number, rows, cols in map(sizes_of, options.experts)]
    parts: dict[str, Callable[[], Any]] = {
        "quantize": lambda: measure_pieces(
            formats, PIECES, failures.attempt, **shared, turn_seconds=options.turn_seconds
        ),
        "linear": lambda: measure_linear(formats, shapes, options.tokens, how),
        "experts": lambda: measure_experts(formats, experts, options.experts_tokens, how),
        "load": lambda: measure_loads(
            options.schemes, options.scale, options.work, device, options.turns, failures.attempt
        ),
    }
    found: dict[str, Any] = {"rotated_bytes": rotated, "driver_after": {}}
    for part in PARTS:
        if part in options.parts:
            found[part] = parts[part]()
            if device.type == "cuda":
                found["driver_after"][part] = driver_facts(device)
                torch.cuda.empty_cache()
    return found


def run(arguments: list[str] | None = None) -> int:
    """Measure, print the tables and goals, write the dated JSON; 1 when something failed or was wrong."""
    options = options_of(arguments)
    missing = missing_gpu()
    if missing is not None:
        print(missing)
        return 0
    device = torch.device("cuda", torch.cuda.current_device())
    machine = describe_machine()
    print(headline(machine))
    if os.getloadavg()[0] > 1:
        print(f"the load average is {os.getloadavg()[0]:.1f}: loads will not be the machine's best", file=sys.stderr)
    queue, failures = CudaQueue(device), Failures()
    gpu = describe_gpu(device)
    print(gpu_headline(gpu))
    found = measure(options, device, queue, failures)
    settings = {name: getattr(options, name) for name in ("parts", "formats", "turns", "turn_seconds", "scale")}
    result = {"machine": machine, "gpu": gpu, "settings": settings, **found, "failures": failures.found}
    print(f"\n{render(result)}")
    print_goals(goals_of(result))
    print(f"\nwritten: {write_result('kernels', result, options.results, reduced(options))}")
    return 1 if failures.found else 0
