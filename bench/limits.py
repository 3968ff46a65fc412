"""Loads under hard limits of memory, each in a process of its own, and a soak of loads that must not grow.

Every scheme of a dense and an MoE checkpoint, and quantized checkpoints as they are stored and quantized anew. Under a
limit of address space (RLIMIT_AS), of data (RLIMIT_DATA) and of a memory cgroup, where this process may make one, at
what the process had plus the predicted peak and 5 %, each must load; at the model less 5 %, each must end with
`MemoryBudgetError` before a weight is read. The soak loads and drops models in one process, and counts what it holds.

    python bench/limits.py
    python bench/limits.py --scale 0.02 --cycles 20    # a quick look
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints import WORK_FOLDER, make
from goals import Goal, print_goals
from limits_child import status_bytes
from machine import describe_machine, headline
from markdown import markdown
from quantload import convert_checkpoint, load_quantized, plan_quantized
from quantload.schemes.registry import ENTRIES
from result_files import RESULTS, write_result

MIB = 1 << 20
HERE = Path(__file__).resolve().parent
SCALE, CYCLES, WARM_UP_CYCLES = 0.1, 200, 20
MARGIN = 0.05
KINDS = {"as": "RLIMIT_AS", "data": "RLIMIT_DATA", "cgroup": "memory cgroup"}
"""In the order they are tried in one process: the first is met by one that has loaded nothing yet."""
STORED = (
    ("quark_mxfp4", "quark"),
    ("fp8_per_tensor", "quark"),
    ("fp8_per_channel", "compressed-tensors"),
    ("fp8_per_block", "compressed-tensors"),
    ("int8_per_channel", "compressed-tensors"),
    ("int4_per_group", "compressed-tensors"),
    ("nvfp4", "modelopt"),
)
SOAKED = ("quark_mxfp4", "fp8_per_tensor", "int4_per_group", "none")
GROWTH = {"anonymous": 8 * MIB, "descriptors": 0, "threads": 0, "mappings": 8}
"""How much more of each a soak may hold in the end than after its first cycles."""


@dataclass(frozen=True)
class Case:
    """One load: its checkpoint, by the name in the table too, and the scheme."""

    checkpoint: str
    path: Path
    scheme: str


def cases(scale: float, folder: Path) -> list[Case]:
    """All that can be loaded, the checkpoints made where they are not there yet."""
    found = [
        Case(name, make(name, scale, folder), entry.name)
        for name in ("dense", "moe")
        for entry in ENTRIES
        if entry.linear is not None or entry.experts is None or name == "moe"
    ]
    dense = make("dense", scale, folder)
    for scheme, form in STORED:
        path = folder / f"{dense.name}-{scheme}-{form}"
        if not path.exists():
            convert_checkpoint(dense, path, scheme, format=form)
        found += [Case(f"{scheme} of {form}", path, chosen) for chosen in ("auto", "int8_per_channel")]
    return found


@contextmanager
def memory_group() -> Iterator[Path | None]:
    """A memory cgroup below this process's own; None where it may not make one."""
    for base in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        group = base / f"quantload-limits-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        if any((group / name).exists() for name in ("memory.max", "memory.limit_in_bytes")):
            try:
                yield group
            finally:
                group.rmdir()
            return
        group.rmdir()
    yield None


def run(case: Case, kinds: list[str], steps: list[int], group: Path | None) -> tuple[list[dict[str, Any]], str]:
    """What a child says of its loads, and how it died if it did."""
    given = {"path": str(case.path), "scheme": case.scheme, "kinds": kinds, "steps": steps}
    argument = json.dumps(given | {"group": None if group is None else str(group)})
    command = [sys.executable, str(HERE / "limits_child.py"), argument]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    last = (done.stderr.strip().splitlines() or [""])[-1]
    died = f"died with {done.returncode}: {last[-300:]}" if done.returncode else ""
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")], died


def limited_loads(found: list[Case], kinds: list[str], group: Path | None) -> list[dict[str, Any]]:
    """Each case under each limit: without room for the model, then with room for the predicted peak."""
    runs = []
    for case in found:
        memory = plan_quantized(case.path, case.scheme, device="cpu").plan.memory
        allowed = {
            "MemoryBudgetError": int(memory.final_bytes * (1 - MARGIN)),
            "loaded": int(memory.peak_bytes * (1 + MARGIN)),
        }
        told, died = run(case, kinds, [*allowed.values()], group)
        asked = ((kind, wanted) for kind in kinds for wanted in allowed)
        for number, (kind, wanted) in enumerate(asked):
            one = told[number] if number < len(told) else {"limit": kind, "outcome": died or "no answer", "message": ""}
            # A refusal must come before a weight is read.
            right = one["outcome"] == wanted and (wanted == "loaded" or not one["bytes_read"])
            runs.append({"checkpoint": case.checkpoint, "scheme": case.scheme, "wanted": wanted, "right": right, **one})
            if not right:
                print(f"{case.checkpoint}, {case.scheme}, {kind}, {wanted}: {one}", file=sys.stderr, flush=True)
    return runs


def held() -> dict[str, int]:
    """What this process holds: anonymous bytes, descriptors, threads, mappings."""
    gc.collect()
    return {
        "anonymous": status_bytes("RssAnon"),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
    }


def soak(paths: list[Path], cycles: int, warm_up: int = WARM_UP_CYCLES) -> dict[str, Any]:
    """Load and drop models in turns; what was held after the first cycles and at the end, and the most between."""
    samples = []
    for number in range(warm_up + cycles):
        path, scheme = paths[number % len(paths)], SOAKED[number // len(paths) % len(SOAKED)]
        model = load_quantized(path, scheme, device="cpu")
        del model
        if number >= warm_up - 1:
            samples.append(held())
    first, last = samples[0], samples[-1]
    most = {name: max(sample[name] for sample in samples) for name in first}
    grown = {name: last[name] - first[name] for name in first if last[name] - first[name] > GROWTH[name]}
    return {"cycles": cycles, "first": first, "last": last, "most": most, "grown": grown}


def render_limits(result: Mapping[str, Any]) -> str:
    """How many loads of each kind of checkpoint did what they must, by limit."""
    runs = result["loads"]
    kinds = [kind for kind in KINDS if any(run["limit"] == kind for run in runs)]
    rows = []
    for name, group in _groups(runs).items():
        row = [name, str(len({(run["checkpoint"], run["scheme"]) for run in group}))]
        for kind in kinds:
            for wanted in ("loaded", "MemoryBudgetError"):
                of_kind = [run["right"] for run in group if (run["limit"], run["wanted"]) == (kind, wanted)]
                row.append(f"{sum(of_kind)} of {len(of_kind)}")
        rows.append(row)
    head = ["checkpoint", "loads"]
    for kind in kinds:
        head += [f"{KINDS[kind]}: peak + 5 % loads", "model - 5 % is refused"]
    return markdown(rows, head)


def _groups(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in runs:
        name = one["checkpoint"]
        if name not in ("dense", "moe"):
            name = "quantized, as stored" if one["scheme"] == "auto" else "quantized, to INT8"
        groups.setdefault(name, []).append(one)
    return groups


def render_soak(result: Mapping[str, Any]) -> str:
    """What the soak held."""
    found = result["soak"]
    rows = []
    for name in found["first"]:
        shown = [found[when][name] for when in ("first", "last", "most")]
        rows.append([name, *(f"{value / MIB:.1f} MiB" if name == "anonymous" else str(value) for value in shown)])
    return markdown(rows, ("held", "before", f"after {found['cycles']} cycles", "most between"))


def goals_of(result: Mapping[str, Any]) -> list[Goal]:
    """All loads did what they must, and the soak did not grow."""
    wrong = Counter(run["limit"] for run in result["loads"] if not run["right"])
    total = len(result["loads"])
    grown = result["soak"]["grown"]
    return [
        Goal("loads within hard limits, or is refused", "all", not wrong, f"{total - wrong.total()} of {total}"),
        Goal("a soak does not grow", "small", not grown, f"{grown or 'nothing grew'}"),
    ]


def main() -> None:
    """Make the checkpoints, run, print the tables and goals, write the dated JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", type=float, default=SCALE, help=f"size of the checkpoints (default {SCALE})")
    parser.add_argument("--cycles", type=int, default=CYCLES, help=f"of the soak (default {CYCLES})")
    parser.add_argument("--dir", type=Path, default=WORK_FOLDER, help="where the checkpoints are made")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    machine = describe_machine()
    print(headline(machine))
    small = [make(name, 0.002, options.dir) for name in ("dense", "moe")]
    soaked = soak(small, options.cycles)
    found = cases(options.scale, options.dir)
    with memory_group() as group:
        kinds = [kind for kind in KINDS if kind != "cgroup" or group is not None]
        loads = limited_loads(found, kinds, group)
    for path in {case.path for case in found if case.checkpoint not in ("dense", "moe")}:
        shutil.rmtree(path)
    result = {"machine": machine, "settings": {"checkpoint_scale": options.scale}, "loads": loads, "soak": soaked}
    print(f"\n{render_limits(result)}\n\n{render_soak(result)}")
    print_goals(goals_of(result))
    full = (options.scale, options.cycles) == (SCALE, CYCLES)
    print(f"\nwritten: {write_result('limits', result, options.results, '' if full else 'reduced')}")


if __name__ == "__main__":
    main()
