"""How fast the CPU kernels quantize: GB/s of source per core on a hot 8 MiB piece, against memcpy of the same piece.

Everything runs on one thread, interleaved in one process, so that whatever else the machine does hits all alike; the
figure is the best of the repeats. "quantize" is without statistics, "+ stats" with them, also as a share of memcpy,
which says what the machine at hand could do at best; "amax" is the first pass of a two-pass weight. Also: seconds and
anonymous memory that compiling costs, and microseconds of a call on a tiny matrix.

    python bench/kernels_cpu.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from goals import Goal, at_least, columns, print_goals
from machine import describe_machine, headline
from markdown import markdown
from measured_formats import MEASURED
from quantload.kernels import statistics as stats
from quantload.kernels.registry import kernel_set, needed_to_load, prepare
from result_files import RESULTS, write_result

PIECE_BYTES = 8 << 20
COLUMNS = 4096
SOURCES = (torch.bfloat16, torch.float16, torch.float32)
GOALS = {"mxfp4": 12.0, "int8_channel": 15.0, "fp8_channel": 8.0, "fp8_tensor": 8.0, "fp8_block": 8.0}
"""GB/s of BF16 per core with statistics, on an idle AVX-512 machine that copies 54 GB/s a core."""
COLUMNS_TIMED = ("memcpy", "quantize", "+ stats", "amax", "dequantize")
COMPILE = """
import json, sys, time, torch
import quantload.kernels.registry as registry
def anonymous():
    with open("/proc/self/smaps_rollup") as lines:
        return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) << 10
before, start = anonymous(), time.perf_counter()
registry.prepare(registry.needed_to_load(sys.argv[1], "cpu", torch.bfloat16))
print(json.dumps({"seconds": time.perf_counter() - start, "anonymous_bytes": anonymous() - before}))
"""


def cpu_formats() -> list[str]:
    """The formats that have a kernel for CPUs; the others are quantized by the plain torch kernel here."""
    return [name for name in MEASURED if kernel_set(name, "cpu").names["quantize"] == "numba"]


def piece(dtype: torch.dtype) -> torch.Tensor:
    rows = PIECE_BYTES // (COLUMNS * dtype.itemsize)
    return (torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def subjects(name: str, source: torch.Tensor) -> dict[str, Callable[[], object]]:
    """What is timed for one format and source type, by column."""
    kernels, (rows, cols) = kernel_set(name, "cpu"), source.shape
    tensors, amax = kernels.format.empty(rows, cols), torch.zeros(kernels.format.amax_shape(rows, cols))
    vector, copy = stats.new_statistics(), torch.empty_like(source)
    return {
        "memcpy": lambda: copy.copy_(source),
        "quantize": lambda: kernels.quantize(source, tensors),
        "+ stats": lambda: kernels.quantize(source, tensors, vector),
        "amax": lambda: kernels.observe(source, amax),
        "dequantize": lambda: kernels.dequantize(tensors, copy),
    }


def rates(name: str, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """GB/s of source bytes by column; best of `repeats` interleaved rounds."""
    source = piece(dtype)
    timed = subjects(name, source)
    best = dict.fromkeys(timed, float("inf"))
    for _ in range(repeats):
        for column, run in timed.items():
            start = time.perf_counter()
            run()
            best[column] = min(best[column], time.perf_counter() - start)
    return {column: source.nbytes / seconds / 1e9 for column, seconds in best.items()}


def call_microseconds(name: str) -> float:
    """Best mean time of a call on a 2 x 128 matrix."""
    kernels = kernel_set(name, "cpu")
    source = torch.randn(2, 128).bfloat16()
    tensors = kernels.format.empty(2, 128)
    vector, best = stats.new_statistics(), float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(500):
            kernels.quantize(source, tensors, vector)
        best = min(best, (time.perf_counter() - start) / 500)
    return best * 1e6


def compile_cost(name: str, cache_folder: str) -> dict[str, Any]:
    """What warming a format up costs a fresh process: first with an empty disk cache, then with a filled one."""
    found = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", COMPILE, name],
            env={**os.environ, "NUMBA_CACHE_DIR": cache_folder},
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(json.loads(done.stdout))
    return {"compiled": found[0], "cached": found[1]}


def measure_rates(formats: list[str], repeats: int) -> list[dict[str, Any]]:
    """GB/s of every format and source type."""
    found = []
    for name in formats:
        for dtype in SOURCES:
            prepare(needed_to_load(name, "cpu", dtype))
            goal = GOALS.get(name) if dtype == torch.bfloat16 else None
            row = {"format": name, "source": str(dtype), "gb_per_second": rates(name, dtype, repeats), "goal": goal}
            found.append(row)
    return found


def render(result: dict[str, Any], source: str | None = None) -> str:
    """The rates as a table; `source` keeps only one source type."""
    lines = []
    for row in result["rates"]:
        if source in (None, row["source"]):
            found = row["gb_per_second"]
            share = f"{found['+ stats'] / found['memcpy']:.0%}"
            cells = [*(f"{value:.1f}" for value in found.values()), share]
            lines.append([f"{row['format']} {row['source'].removeprefix('torch.')}", *cells])
    return markdown(lines, ("GB/s of source a core", *COLUMNS_TIMED, "+ stats / memcpy"))


def goals_of(result: dict[str, Any]) -> list[Goal]:
    """The goals of the formats that have one."""
    return [
        at_least(
            f"with statistics: >= {row['goal']:g} GB/s a core",
            row["format"],
            row["gb_per_second"]["+ stats"],
            row["goal"],
            " GB/s",
        )
        for row in result["rates"]
        if row["goal"] is not None
    ]


def main() -> None:
    """Measure, print the tables and goals, write the dated JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--formats", nargs="+", default=cpu_formats(), choices=cpu_formats())
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe_machine()
    print(headline(machine))
    if machine["load_average"][0] > 1:
        print("warning: the machine is not idle; compare the rates with the memcpy column only")
    result: dict[str, Any] = {"machine": machine, "piece_bytes": PIECE_BYTES}
    result["rates"] = measure_rates(options.formats, options.repeats)
    print(f"\nhot 8 MiB piece\n{render(result)}")
    print_goals(goals_of(result))
    result["calls"] = measure_calls(options.formats)
    reduced = "" if set(options.formats) == set(cpu_formats()) else "part"
    print(f"\nwritten: {write_result('kernels_cpu', result, options.results, reduced)}")


def measure_calls(formats: list[str]) -> list[dict[str, Any]]:
    """Compile cost and call overhead of every format, printed as a table."""
    rows, lines = [], []
    for name in formats:
        with tempfile.TemporaryDirectory() as folder:
            row = {"format": name, "microseconds": call_microseconds(name), **compile_cost(name, folder)}
        rows.append(row)
        cells = [f"{row['microseconds']:.1f}"]
        for state in ("compiled", "cached"):
            cells += [f"{row[state]['seconds']:.2f}", f"{row[state]['anonymous_bytes'] / 2**20:.0f}"]
        lines.append([name, *cells])
    print("\na call on 2 x 128, and warming up a fresh process (numba's own import included)")
    print(columns(lines, ["kernel", "us", "compile s", "MiB", "cached s", "MiB"]))
    return rows


if __name__ == "__main__":
    main()
