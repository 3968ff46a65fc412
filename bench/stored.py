"""How fast quantized checkpoints are written, and load: kept as stored, and quantized anew, beside the BF16 one.

One process. Each quantized checkpoint is converted from cold files first, next to reading the same bytes, and writing
as many with an fsync, and doing nothing else. Then the loads take turns, page cache warm, memory touched before.

    python bench/stored.py
    python bench/stored.py --scale 0.1 --rounds 3    # a quick look
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from checkpoints import WORK_FOLDER, make, shards_of
from goals import Goal, at_most, print_goals
from load_process import read_files, set_page_cache, touch_memory
from machine import describe_machine, headline
from markdown import markdown
from quantload import LoadOptions, convert_checkpoint, load_quantized
from result_files import RESULTS, write_result

GB, MIB = 1e9, 1 << 20
WRITE_BYTES = 8 << 20
WARM = LoadOptions(page_cache="keep")
STORED = {
    "MXFP4 (quark)": ("quark_mxfp4", "quark"),
    "FP8 blocks (compressed-tensors)": ("fp8_per_block", "compressed-tensors"),
    "INT4 groups (compressed-tensors)": ("int4_per_group", "compressed-tensors"),
}
LOADS = (
    ("BF16", "quark_mxfp4"),
    ("MXFP4 (quark)", "auto"),
    ("FP8 blocks (compressed-tensors)", "auto"),
    ("FP8 blocks (compressed-tensors)", "quark_mxfp4"),
    ("INT4 groups (compressed-tensors)", "auto"),
    ("INT4 groups (compressed-tensors)", "quark_mxfp4"),
)


def convert_all(original: Path, checkpoints: dict[str, Path]) -> list[dict[str, Any]]:
    """Write every quantized form; seconds of each, and of the disk alone."""
    runs = []
    for name, (scheme, form) in STORED.items():
        shutil.rmtree(checkpoints[name], ignore_errors=True)
        files = shards_of(original)
        set_page_cache(files, cold=True)
        start = time.perf_counter()
        read_files(files)
        reading = time.perf_counter() - start
        set_page_cache(files, cold=True)
        report = convert_checkpoint(original, checkpoints[name], scheme, format=form)
        writing = write_raw(checkpoints[name].with_suffix(".raw"), report.final_bytes)
        facts = {"seconds": report.seconds, "bytes_read": report.bytes_read, "bytes_written": report.final_bytes}
        over = report.peak_bytes - report.staging_peak_bytes
        runs.append({"checkpoint": name, **facts, "reading": reading, "writing": writing, "over_staging": over})
        print(f"convert to {name}: {report.seconds:.2f} s", file=sys.stderr)
    return runs


def write_raw(path: Path, nbytes: int) -> float:
    """Seconds to write so many bytes and have them on the disk."""
    block = os.urandom(WRITE_BYTES)
    start = time.perf_counter()
    try:
        with path.open("wb") as file:
            for low in range(0, nbytes, WRITE_BYTES):
                file.write(block[: nbytes - low])
            file.flush()
            os.fsync(file.fileno())
        return time.perf_counter() - start
    finally:
        path.unlink()


def measure(checkpoints: dict[str, Path], rounds: int) -> list[dict[str, Any]]:
    """Every load once a round, after one that is not counted: kernels are compiled and files read by then."""
    runs = []
    touched = sum(path.stat().st_size for path in shards_of(checkpoints["BF16"]))  # more than any model has
    for number in range(rounds + 1):
        for name, scheme in LOADS:
            touch_memory(touched)
            report = load_quantized(checkpoints[name], scheme, options=WARM).load_report
            names = ("seconds", "bytes_read", "final_bytes", "peak_bytes", "staging_peak_bytes")
            if number:
                facts = {field: getattr(report, field) for field in names}
                runs.append({"checkpoint": name, "scheme": scheme, **facts})
                print(f"{name}, {scheme}: {report.seconds:.2f} s", file=sys.stderr)
    return runs


def of(result: dict[str, Any], name: str, scheme: str) -> list[dict[str, Any]]:
    """The runs of one load."""
    return [run for run in result["runs"] if (run["checkpoint"], run["scheme"]) == (name, scheme)]


def goals_of(result: dict[str, Any]) -> list[Goal]:
    """The bounds on memory, and conversions against the slower side of the disk."""
    over = max(run["peak_bytes"] - run["final_bytes"] - run["staging_peak_bytes"] for run in result["runs"])
    beside, conversions = " MiB beside them", result["conversions"]
    slower = max(run["seconds"] / max(run["reading"], run["writing"]) for run in conversions)
    converting = max(run["over_staging"] for run in conversions)
    return [
        at_most("peak <= final + staging + 64 MiB, all loads", "dense", over / MIB, 64, beside),
        at_most("peak <= staging + 64 MiB, all conversions", "dense", converting / MIB, 64, beside),
        at_most("convert <= 1.25x of the slower side of the disk", "dense", slower, 1.25, "x"),
    ]


def render_conversions(result: dict[str, Any]) -> str:
    """Each conversion beside the disk."""
    rows = [
        [
            run["checkpoint"],
            f"{run['bytes_read'] / GB:.2f}",
            f"{run['bytes_written'] / GB:.2f}",
            *(f"{run[key]:.2f}" for key in ("seconds", "reading", "writing")),
            f"{run['seconds'] / max(run['reading'], run['writing']):.2f}x",
        ]
        for run in result["conversions"]
    ]
    head = ("convert to", "GB read", "GB written", "s", "reading alone, s", "writing alone, s", "against the slower")
    return markdown(rows, head)


def render(result: dict[str, Any]) -> str:
    """Medians of each load."""
    rows = []
    original = statistics.median(run["seconds"] for run in of(result, *LOADS[0]))
    for name, scheme in LOADS:
        runs = of(result, name, scheme)
        seconds, read = statistics.median(run["seconds"] for run in runs), runs[0]["bytes_read"]
        becomes = "as stored" if scheme == "auto" else scheme
        peak = max(run["peak_bytes"] - run["final_bytes"] for run in runs) / MIB
        figures = [f"{read / GB:.2f}", f"{seconds:.2f}", f"{read / seconds / GB:.2f}", f"{original / seconds:.2f}x"]
        rows.append([name, becomes, *figures, f"{runs[0]['final_bytes'] / GB:.2f}", f"{peak:.0f}"])
    head = ("checkpoint", "becomes", "GB read", "s", "GB/s", "against BF16", "GB final", "MiB over final")
    return markdown(rows, head)


def render_all(result: dict[str, Any]) -> str:
    """Both tables."""
    return f"{render_conversions(result)}\n\n{render(result)}"


def main() -> None:
    """Make, load, print the table and goals, write the dated JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", default="dense", help="of bench/checkpoints.py (default dense)")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=WORK_FOLDER, help="where the checkpoints are made")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    machine = describe_machine()
    print(headline(machine))
    original = make(options.checkpoint, options.scale, options.dir)
    names = {name: options.dir / f"{original.name}-{scheme}" for name, (scheme, _) in STORED.items()}
    checkpoints = {"BF16": original, **names}
    try:
        conversions = convert_all(original, checkpoints)
        runs = measure(checkpoints, options.rounds)
    finally:
        for name in STORED:
            shutil.rmtree(checkpoints[name], ignore_errors=True)
    settings = {"scale": options.scale, "rounds": options.rounds}
    result = {"machine": machine, "settings": settings, "conversions": conversions, "runs": runs}
    print(f"\n{render_all(result)}")
    print_goals(goals_of(result))
    print(f"\nwritten: {write_result('stored', result, options.results, '' if options.scale == 1 else 'reduced')}")


if __name__ == "__main__":
    main()
