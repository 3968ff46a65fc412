"""How much faster a load from the cache is: the checkpoint, the same while an entry is written, the entry; all cold.

Each load runs in a process of its own, warmed up on a tiny checkpoint, with nothing of the files in the page cache. The
three take turns, and between them the entry's files are read raw, which says what the disk can do.

    python bench/cache.py
    python bench/cache.py --scale 0.1 --rounds 1    # a quick look
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from checkpoints import WORK_FOLDER, make, shards_of
from goals import Goal, at_least, at_most, print_goals
from load_process import read_files, set_page_cache, touch_memory
from machine import describe_machine, headline
from markdown import markdown
from result_files import RESULTS, write_result

GIB, GB, MIB = 1 << 30, 1e9, 1 << 20
SCHEME = "quark_mxfp4"
NAMES = {"plain": "no cache", "written": "writing an entry", "hit": "from the entry"}
HIT_GOAL, WRITE_GOAL = 3.0, 1.25
WARM_UP_SCALE = 0.002


def load_once(checkpoint: str, warm_up: str, cache: str | None) -> None:
    """What a child process does: load twice, and say how the second load went as JSON on standard output."""
    from quantload import LoadOptions, load_quantized

    load_quantized(warm_up, SCHEME)
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    model = load_quantized(checkpoint, SCHEME, options=LoadOptions(cache=cache))
    seconds = time.perf_counter() - start
    report = model.load_report
    names = ("cache", "bytes_read", "final_bytes", "peak_bytes", "staging_peak_bytes", "predicted_peak_bytes")
    print(json.dumps({"seconds": seconds, **{name: getattr(report, name) for name in names}}), flush=True)


class Bench:
    """Loads one checkpoint in three ways."""

    def __init__(self, checkpoint: Path, warm_up: Path, cache: Path) -> None:
        self.checkpoint, self.warm_up, self.cache = checkpoint, warm_up, cache
        self.touched_bytes = sum(path.stat().st_size for path in shards_of(checkpoint))
        self.runs: list[dict[str, Any]] = []

    def round(self) -> None:
        """One load of each kind, the entry of an earlier round removed."""
        shutil.rmtree(self.cache, ignore_errors=True)
        self._run("plain", cached=False)
        self._run("written", cached=True)
        self._run("hit", cached=True)
        files = self._entry_files()
        set_page_cache(files, cold=True)
        start = time.perf_counter()
        read_files(files)
        self._note({"kind": "raw", "seconds": time.perf_counter() - start})

    def _entry_files(self) -> list[Path]:
        return sorted(self.cache.glob("*/*.safetensors"))

    def _run(self, kind: str, cached: bool) -> None:
        arguments = [self.checkpoint, self.warm_up, *([self.cache] if cached else [])]
        command = [sys.executable, __file__, "--load-once", *map(str, arguments)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            set_page_cache(shards_of(self.checkpoint) + self._entry_files(), cold=True)
            touch_memory(self.touched_bytes)
            output, _ = process.communicate("\n")
        if process.returncode:
            raise SystemExit(f"a load ({NAMES[kind]}) ended with {process.returncode}")
        facts = json.loads(output)
        if facts["cache"] != (kind if cached else None):
            raise SystemExit(f"a load ({NAMES[kind]}) says {facts['cache']!r} of the cache")
        self._note({"kind": kind, **facts})

    def _note(self, run: dict[str, Any]) -> None:
        print(f"{NAMES.get(run['kind'], 'reading the entry, doing nothing')}: {run['seconds']:.2f} s", file=sys.stderr)
        self.runs.append(run)


def seconds_of(result: dict[str, Any], kind: str) -> float:
    """Median seconds of one kind of run."""
    return statistics.median(float(run["seconds"]) for run in result["runs"] if run["kind"] == kind)


def goals_of(result: dict[str, Any]) -> list[Goal]:
    """The second load against the first, what writing costs, and the memory of both."""
    subject, plain = result["checkpoint"], seconds_of(result, "plain")
    first, hit = seconds_of(result, "written"), seconds_of(result, "hit")
    over = max(
        run["peak_bytes"] - run["final_bytes"] - run["staging_peak_bytes"] for run in result["runs"] if "cache" in run
    )
    return [
        at_least(f"cold: the second load >= {HIT_GOAL:g}x faster than the first", subject, first / hit, HIT_GOAL, "x"),
        at_least(f"cold: >= {HIT_GOAL:g}x faster than a load without a cache", subject, plain / hit, HIT_GOAL, "x"),
        at_most(
            f"cold: writing the entry <= {WRITE_GOAL:g}x of a load without", subject, first / plain, WRITE_GOAL, "x"
        ),
        at_most("peak <= final + staging + 64 MiB, all loads", subject, over / MIB, 64, " MiB beside them"),
    ]


def render(result: dict[str, Any]) -> str:
    """Medians of each kind."""
    plain, rows = seconds_of(result, "plain"), []
    for kind, name in NAMES.items():
        run = next(run for run in result["runs"] if run["kind"] == kind)
        seconds, peak = seconds_of(result, kind), (run["peak_bytes"] - run["final_bytes"]) / MIB
        read = run["bytes_read"]
        rows.append(
            [
                name,
                f"{read / GB:.2f}",
                f"{seconds:.2f}",
                f"{read / seconds / GB:.2f}",
                f"{plain / seconds:.2f}x",
                f"{peak:.0f}",
            ]
        )
    raw, size = seconds_of(result, "raw"), result["entry_bytes"]
    rows.append(["the entry's files read raw", f"{size / GB:.2f}", f"{raw:.2f}", f"{size / raw / GB:.2f}", "", ""])
    return markdown(rows, ("load", "GB read", "s", "GB/s", "faster by", "MiB over final"))


def main() -> None:
    """Make, load, print the table and goals, write the dated JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", default="moe", help="of bench/checkpoints.py (default moe)")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=WORK_FOLDER, help="where checkpoint and cache are made")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--load-once", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load_once:
        load_once(*options.load_once[:2], *(options.load_once[2:] or [None]))
        return
    machine = describe_machine()
    print(headline(machine))
    folder = make(options.checkpoint, options.scale, options.dir)
    bench = Bench(folder, make("dense", WARM_UP_SCALE, options.dir), options.dir / "cache")
    try:
        for _ in range(options.rounds):
            bench.round()
        entry_bytes = sum(path.stat().st_size for path in bench.cache.glob("*/*.safetensors"))
    finally:
        shutil.rmtree(bench.cache, ignore_errors=True)
    settings = {"scale": options.scale, "rounds": options.rounds, "scheme": SCHEME}
    result = {
        "machine": machine, "settings": settings, "checkpoint": options.checkpoint, "entry_bytes": entry_bytes,
        "runs": bench.runs,
    }  # fmt: skip
    print(f"\n{render(result)}")
    print_goals(goals_of(result))
    reduced = "" if options.scale == 1 else f"scale{options.scale:g}"
    print(f"\nwritten: {write_result('cache', result, options.results, reduced)}")


if __name__ == "__main__":
    main()
