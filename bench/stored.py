"""How fast quantized checkpoints load: kept as stored, and quantized anew, beside the BF16 checkpoint they come from.

One process, page cache warm, the loads take turns; each quantized checkpoint is written by `quantload convert` first.

    python bench/stored.py
    python bench/stored.py --scale 0.1 --rounds 3    # a quick look
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from checkpoints import WORK_FOLDER, make
from goals import Goal, at_most, print_goals
from load_process import set_page_cache
from machine import describe_machine, headline
from markdown import markdown
from quantload import convert_checkpoint, load_quantized
from result_files import RESULTS, write_result

GB, MIB = 1e9, 1 << 20
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


def stored_checkpoints(original: Path, folder: Path) -> dict[str, Path]:
    """The BF16 checkpoint and its quantized forms, by name."""
    found = {"BF16": original}
    for name, (scheme, form) in STORED.items():
        found[name] = folder / f"{original.name}-{scheme}"
        if not found[name].exists():
            convert_checkpoint(original, found[name], scheme, format=form)
    return found


def measure(checkpoints: dict[str, Path], rounds: int) -> list[dict[str, Any]]:
    """Every load once a round, after one that is not counted: kernels are compiled and files read by then."""
    runs = []
    for number in range(rounds + 1):
        for name, scheme in LOADS:
            set_page_cache(sorted(checkpoints[name].glob("*.safetensors")), cold=False)
            report = load_quantized(checkpoints[name], scheme).load_report
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
    """The bound on memory holds for all."""
    over = max(run["peak_bytes"] - run["final_bytes"] - run["staging_peak_bytes"] for run in result["runs"])
    return [at_most("peak <= final + staging + 64 MiB, all loads", "dense", over / MIB, 64, " MiB beside them")]


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
    checkpoints = stored_checkpoints(make(options.checkpoint, options.scale, options.dir), options.dir)
    try:
        runs = measure(checkpoints, options.rounds)
    finally:
        for name in STORED:
            shutil.rmtree(checkpoints[name], ignore_errors=True)
    result = {"machine": machine, "settings": {"scale": options.scale, "rounds": options.rounds}, "runs": runs}
    print(f"\n{render(result)}")
    print_goals(goals_of(result))
    print(f"\nwritten: {write_result('stored', result, options.results, '' if options.scale == 1 else 'reduced')}")


if __name__ == "__main__":
    main()
