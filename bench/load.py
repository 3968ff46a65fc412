"""Compare quantload with transformers' on-the-fly quantizers on synthetic checkpoints: time, memory, coverage.

Each load runs in a process of its own, the loaders take turns, and the table shows medians of the time and the largest
memory seen. A first load of a small checkpoint of the same architecture warms every process up (lazy imports, compiled
kernels); the table shows what that took as "start-up s".

    python bench/load.py --peers-python PATH/TO/python     # an interpreter with torchao, optimum-quanto, bitsandbytes
    python bench/load.py --scale 0.05 --repeats 1          # a quick look
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from checkpoints import WORK_FOLDER, make, shards_of
from goals import print_goals
from load_process import Limits, Run, run_loader, set_page_cache, touch_memory
from load_results import Goals, Row, print_rows, summarize
from loaders import LOADERS, Loader
from machine import describe_machine, headline
from recipes import RECIPES
from result_files import RESULTS, write_result

CHECKPOINTS = ("dense", "moe", "huge", "tiny")
WARM_UP_SCALE = 0.002
COLD_LOADERS = ("read-only", "read-drop", "quark_mxfp4", "fp8_per_channel", "int8_per_channel")
COLD_REPEATS = 3
MEMORY_SHARE = 0.8
TOUCH_FACTOR = {"floor": 0.1, "quantload": 1.0, "peer": 2.5}  # of the checkpoint: what each may need at its peak


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter for the peers (default: this)")
    parser.add_argument("--checkpoints", nargs="+", choices=sorted(RECIPES), default=list(CHECKPOINTS))
    parser.add_argument("--loaders", nargs="+", default=["*"], metavar="GLOB", help="rows to run (default all)")
    parser.add_argument("--scale", type=float, default=1.0, help="size relative to the full checkpoints (default 1)")
    parser.add_argument("--work", type=Path, default=WORK_FOLDER, help="where the checkpoints are made")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--repeats", type=int, default=5, help="warm runs of each of quantload's rows (default 5)")
    parser.add_argument("--peer-repeats", type=int, default=2, help="warm runs of each peer (default 2)")
    parser.add_argument("--slow", type=float, default=60, help="a loader slower than this is not repeated (seconds)")
    parser.add_argument("--timeout", type=float, default=900, help="limit for imports and load of one run (seconds)")
    parser.add_argument("--generate-timeout", type=float, default=180, help="limit for the eight tokens (seconds)")
    parser.add_argument("--no-touch", action="store_true", help="do not touch free memory before each load")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--cold", action="store_true", help="only the cold runs")
    only.add_argument("--warm", action="store_true", help="only the warm runs")
    parser.add_argument("--no-generate", action="store_true", help="skip the eight tokens")
    parser.add_argument("--no-warm-up", action="store_true", help="time the first load of each process")
    options = parser.parse_args()
    if not any(fnmatch.fnmatch(name, pattern) for name in LOADERS for pattern in options.loaders):
        parser.error(f"no loader matches {' '.join(options.loaders)}; there are {', '.join(LOADERS)}")
    return options


def _memory_limit() -> int:
    """Anonymous bytes at which a load is stopped, so that the machine does not start to swap or kill at random."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(int(line.split()[1]) * 1024 * MEMORY_SHARE)
    raise RuntimeError("/proc/meminfo has no MemAvailable line; this benchmark needs Linux")


class Bench:
    """Runs the loaders on one checkpoint after another and keeps every run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rows: list[Row] = []
        self.runs: list[dict[str, Any]] = []
        self.limits = Limits(options.timeout, options.generate_timeout, _memory_limit())

    def loaders_for(self, checkpoint: str, cold: bool) -> list[Loader]:
        """The rows asked for that make sense for this checkpoint."""
        return [
            loader
            for loader in LOADERS.values()
            if (not loader.only or checkpoint in loader.only)
            and (loader.name in COLD_LOADERS if cold else loader.name != "read-drop")
            and any(fnmatch.fnmatch(loader.name, pattern) for pattern in self.options.loaders)
        ]

    def run_checkpoint(self, checkpoint: str, cold: bool) -> None:
        """All repetitions of all loaders on one checkpoint, taking turns."""
        folder = make(checkpoint, self.options.scale, self.options.work)
        warm_up = None if self.options.no_warm_up else make(checkpoint, WARM_UP_SCALE, self.options.work)
        files = shards_of(folder)
        loaders = self.loaders_for(checkpoint, cold)
        done: dict[str, list[Run]] = {loader.name: [] for loader in loaders}
        size = sum(path.stat().st_size for path in files)

        for loader in self._turns(loaders, cold, done):
            python = self.options.peers_python if loader.family == "peer" else sys.executable
            generate = not (done[loader.name] or cold or self.options.no_generate)
            run = run_loader(
                python,
                loader.name,
                folder,
                warm_up=warm_up,
                limits=self.limits,
                generate=generate,
                before_load=partial(self._set_scene, files, cold, TOUCH_FACTOR[loader.family]),
            )
            done[loader.name].append(run)
            self._note(checkpoint, loader, cold, run)
        self.rows += [summarize(checkpoint, name, cold, size, runs) for name, runs in done.items()]

    def _set_scene(self, files: list[Path], cold: bool, touch_factor: float) -> dict[str, Any]:
        cached = set_page_cache(files, cold)
        rate = None
        if not self.options.no_touch:
            size = int(touch_factor * sum(path.stat().st_size for path in files))
            rate = touch_memory(min(size, self.limits.memory_bytes // 2))
        return {"cached_before": cached, "first_touch_bytes_per_second": rate}

    def _turns(self, loaders: Sequence[Loader], cold: bool, done: dict[str, list[Run]]) -> Iterator[Loader]:
        repeats = {
            loader.name: COLD_REPEATS
            if cold
            else (self.options.peer_repeats if loader.family == "peer" else self.options.repeats)
            for loader in loaders
        }
        for turn in range(max(repeats.values(), default=0)):
            for loader in loaders:
                runs = done[loader.name]
                settled = any(run.status != "ok" or run.facts["seconds"] > self.options.slow for run in runs)
                if turn < repeats[loader.name] and not settled:
                    yield loader

    def _note(self, checkpoint: str, loader: Loader, cold: bool, run: Run) -> None:
        record = {"checkpoint": checkpoint, "loader": loader.name, "cold": cold}
        self.runs.append({**record, **run.to_dict()})
        seconds = run.facts.get("seconds")
        outcome = run.detail if seconds is None else f"{seconds:.3f} s"
        state = "cold" if cold else "warm"
        print(f"{checkpoint} {state} {loader.name}: {outcome or run.status}", file=sys.stderr, flush=True)

    def peer_libraries(self) -> dict[str, str]:
        """Library versions of the interpreter that ran the peers, as its processes told."""
        for run in self.runs:
            if LOADERS[run["loader"]].family == "peer" and "versions" in run:
                versions: dict[str, str] = run["versions"]
                return versions
        return {}


def save(bench: Bench, machine: dict[str, Any], goals: list[Any], options: argparse.Namespace) -> Path:
    """Write the dated JSON and return its path; a reduced size is part of the name."""
    settings = {"scale": options.scale, "warm_up": not options.no_warm_up, "touch": not options.no_touch}
    for run in bench.runs:
        run.pop("versions", None)
    result = {
        "machine": machine,
        "settings": {
            **settings,
            "repeats": options.repeats,
            "peer_repeats": options.peer_repeats,
            "cold_repeats": COLD_REPEATS,
        },
        "rows": [row.to_dict() for row in bench.rows],
        "goals": [vars(goal) for goal in goals],
        "runs": bench.runs,
    }
    return write_result("load", result, options.results, "" if options.scale == 1 else f"scale{options.scale:g}")


def main() -> None:
    """Run what the command line asks for, print the tables and goals, write the JSON."""
    options = _arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    machine = describe_machine()
    if os.getloadavg()[0] > 1:
        print(f"the load average is {os.getloadavg()[0]:.1f}: times will not be the machine's best", file=sys.stderr)
    bench = Bench(options)
    states = [cold for cold in (False, True) if not (options.warm and cold) and not (options.cold and not cold)]
    try:
        for checkpoint in options.checkpoints:
            for cold in states:
                bench.run_checkpoint(checkpoint, cold)
    except KeyboardInterrupt:
        print("stopped; what was measured until now follows", file=sys.stderr)
    machine["peer_libraries"] = bench.peer_libraries()
    print(headline(machine))
    print_rows(bench.rows)
    goals = Goals(bench.rows).all()
    print_goals(goals)
    if options.scale != 1:
        print(f"(the goals are for the full size; this was --scale {options.scale:g})")
    print(f"\nwritten: {save(bench, machine, goals, options)}")


if __name__ == "__main__":
    main()
