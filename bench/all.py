"""Run the benchmarks and put their tables, and those of `quantload schemes`, into the documents that have them.

python bench/all.py --peers-python .peers/bin/python      # everything: hours, and 60 GiB of disk for the last one
python bench/all.py pipeline matmul_cpu                   # some of them
python bench/all.py --quick                               # all of them, reduced: minutes; the tables do not change
python bench/all.py --tables-only                         # run nothing
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import memory_drawing
from checkpoints import WORK_FOLDER
from result_files import RESULTS
from tables import write

BENCH = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Run:
    """A script, its arguments for the full size and for a quick look, and whether it takes certain options."""

    script: str
    full: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    work: str = ""
    peers: bool = False


OWN = ("--loaders", "read-*", "quark*", "fp8*", "int8*", "none", "--no-generate")
BOTH = ("--warm", "--checkpoints", "dense", "moe", "--no-generate")
RUNS = {
    "kernels_cpu": Run("kernels_cpu.py", quick=("--formats", "mxfp4", "--repeats", "5")),
    "matmul_cpu": Run(
        "matmul_cpu.py",
        quick=("--formats", "mxfp4", "--shapes", "4096x4096", "768x2048", "--tokens", "1", "512", "--turns", "3"),
    ),
    "kernels": Run("kernels.py", quick=("--quick",), work="--work"),  # says so and ends where there is no GPU
    "pipeline": Run("pipeline.py", quick=("--scale", "0.05", "--repeats", "2"), work="--work"),
    "load": Run(
        "load.py", OWN, (*OWN, "--warm", "--scale", "0.02", "--repeats", "1", "--checkpoints", "moe"), "--work"
    ),
    "peers": Run(
        "load.py",
        (*BOTH, "--repeats", "3", "--peer-repeats", "1"),
        (*BOTH, "--scale", "0.02", "--repeats", "1", "--peer-repeats", "1"),
        "--work",
        peers=True,
    ),
    "quality": Run("quality.py", quick=("--only", "sqnr")),
    "profile_load": Run("profile_load.py", quick=("--scale", "0.1", "--loads", "4"), work="--work"),
    "stored": Run("stored.py", quick=("--scale", "0.02", "--rounds", "1"), work="--dir"),
    "serve_load": Run("serve_load.py", quick=("--seconds", "5", "--clients", "16")),
    "cache": Run("cache.py", quick=("--scale", "0.02", "--rounds", "1"), work="--dir"),
    "remote": Run(
        "remote.py",
        quick=("--scale", "0.02", "--rates", "0", "--latencies", "0.001", "--rounds", "1", "--no-sweep"),
        work="--dir",
    ),
    "bigger_than_memory": Run("bigger_than_memory.py", quick=("--layers", "1"), work="--dir"),
}


def command(name: str, options: argparse.Namespace) -> list[str]:
    """The command line of one benchmark."""
    run = RUNS[name]
    line = [sys.executable, str(BENCH / run.script), *(run.quick if options.quick else run.full)]
    line += ["--results", str(options.results)]
    if run.work:
        line += [run.work, str(options.work)]
    if run.peers:
        line += ["--peers-python", options.peers_python]
    return line


def execute(line: list[str]) -> int:
    """Run a command to its end; when this is interrupted, so is the command, which then cleans up after itself."""
    process = subprocess.Popen(line)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise


def run_all(options: argparse.Namespace) -> list[str]:
    """Run what was asked for, the one that needs the whole disk last and alone; returns the names of what failed."""
    failed = []
    names = sorted(options.names or RUNS, key=list(RUNS).index)
    for name in names:
        if name == "bigger_than_memory" and not options.keep:
            remove_checkpoints(options.work)
        line = command(name, options)
        print(f"\n== {name}: {' '.join(line[1:])}", flush=True)
        start = time.perf_counter()
        if execute(line):
            failed.append(name)
        print(f"== {name}: {time.perf_counter() - start:.0f} s", flush=True)
    if not options.keep:
        remove_checkpoints(options.work)
    return failed


def remove_checkpoints(work: Path) -> None:
    """Remove the checkpoints that benchmarks leave for each other."""
    for stamp in work.glob("*/recipe.json"):
        shutil.rmtree(stamp.parent)


def main() -> int:
    """Run the benchmarks, render the tables; 1 when one of them failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)}; default all")
    parser.add_argument("--quick", action="store_true", help="reduced sizes, which the tables leave out")
    parser.add_argument("--tables-only", action="store_true", help="only render the tables from the results there are")
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter for the peers (default: this)")
    parser.add_argument("--work", type=Path, default=WORK_FOLDER, help="where the checkpoints are made")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints there")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the tables are made only from the default")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(RUNS))
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(RUNS)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed = [] if options.tables_only else run_all(options)
    for document in [*write(), *memory_drawing.write()]:
        print(f"written: {document}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
