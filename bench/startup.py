"""How long whole processes of the command line take: from `--help` to a load, beside the import of transformers alone.

Everything takes turns, each in a process of its own: wall time and processor time from its start to its end. With
`--before FOLDER` (on whose path an earlier `quantload` is) that one takes its turns too.

    python bench/startup.py                                # the dense checkpoint of bench/checkpoints.py
    python bench/startup.py --before OLD --rounds 9        # beside an earlier version
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints import WORK_FOLDER, drop_files, make, shards_of
from load_process import read_files
from machine import describe_machine, headline
from markdown import markdown
from result_files import RESULTS, write_result

IMPORT = "import transformers"
COMMAND = (sys.executable, "-m", "quantload")
READ = "import sys\nb = bytearray(8 << 20)\nfor p in sys.argv[1:]:\n f = open(p, 'rb', 0)\n while f.readinto(b): pass"
NOW = "now"
SLACK = {"load, warm": 0.3, "load, cold": 0.5}
"""Seconds that a load may take above the import, or above the reading where that takes longer."""
PLAN_SECONDS = 1.5


@dataclass(frozen=True)
class Row:
    """One kind of process: how it is started, and whether the weights are in the page cache then."""

    name: str
    command: tuple[str, ...]
    cold: bool = False
    code: int = 0


def rows_for(model: Path) -> list[Row]:
    """What is measured."""
    load = (*COMMAND, "load", str(model), "-q", "quark_mxfp4", "--device", "cpu", "--json")
    shards = tuple(str(path) for path in shards_of(model))
    return [
        Row(IMPORT, (sys.executable, "-c", "from transformers import PreTrainedModel")),
        Row("read the files, cold", (sys.executable, "-c", READ, *shards), cold=True),
        Row("--version", (*COMMAND, "--version")),
        Row("load --help", (*COMMAND, "load", "--help")),
        Row("load of a folder that is not there", (*COMMAND, "load", str(model / "missing")), code=3),
        Row("schemes", (*COMMAND, "schemes")),
        Row("plan", (*COMMAND, "plan", str(model), "--device", "cpu")),
        Row("load, warm", load),
        Row("load, cold", load, cold=True),
    ]


def run(row: Row, tree: Path | None, folder: Path) -> dict[str, float]:
    """Wall and processor seconds of one process, started in a folder."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if tree is not None:
        environment["PYTHONPATH"] = str(tree)
    start = time.perf_counter()
    process = subprocess.Popen(
        row.command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != row.code:
        raise SystemExit(f"{row.name} ended with {process.returncode}: {' '.join(row.command)}")
    return {"wall": wall, "processor": usage.ru_utime + usage.ru_stime}


def take_turns(
    rows: list[Row], trees: dict[str, Path | None], model: Path, rounds: int
) -> dict[tuple[str, str], list[dict[str, float]]]:
    """The turns of each row in each tree. One round more comes first, which counts for nothing."""
    shards = shards_of(model)
    turns: dict[tuple[str, str], list[dict[str, float]]] = {}
    for number in range(rounds + 1):
        for row in rows:
            for name, tree in trees.items():
                if name != NOW and row.command[: len(COMMAND)] != COMMAND:
                    continue  # it has nothing of quantload
                (drop_files if row.cold else read_files)(shards)
                took = run(row, tree, model)
                if number:
                    turns.setdefault((row.name, name), []).append(took)
    return turns


def goals(medians: dict[str, float]) -> list[dict[str, Any]]:
    """The goals in seconds, and what was reached, by the medians of wall times."""
    imported, read = medians[IMPORT], medians["read the files, cold"]
    limits = {
        "load, warm": imported + SLACK["load, warm"],
        "load, cold": max(imported, read) + SLACK["load, cold"],
        "plan": PLAN_SECONDS,
    }
    return [{"row": name, "goal": limit, "wall": medians[name]} for name, limit in limits.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="size of the checkpoint (default 1: 3 GB)")
    parser.add_argument("--work", type=Path, default=WORK_FOLDER, help="where the checkpoint is made")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--before", type=Path, help="a folder for PYTHONPATH that has an earlier quantload")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    model = make("dense", arguments.scale, arguments.work)
    shards = shards_of(model)
    trees: dict[str, Path | None] = {NOW: None, **({"before": arguments.before} if arguments.before else {})}
    machine = describe_machine()
    turns = take_turns(rows_for(model), trees, model, arguments.rounds)
    machine["load_average_after"] = [round(value, 2) for value in os.getloadavg()]
    table: list[dict[str, Any]] = [
        {
            "row": row,
            "tree": tree,
            **{kind: statistics.median(turn[kind] for turn in own) for kind in own[0]},
            "turns": own,
        }
        for (row, tree), own in turns.items()
    ]
    reached = goals({each["row"]: each["wall"] for each in table if each["tree"] == NOW})
    print(headline(machine))
    print(markdown([[each["row"], each["tree"], f"{each['wall']:.2f}", f"{each['processor']:.2f}"] for each in table],
                   ["process", "quantload", "seconds", "of a processor"]))  # fmt: skip
    print(markdown([[each["row"], f"{each['wall']:.2f}", f"{each['goal']:.2f}"] for each in reached],
                   ["process", "seconds", "goal"]))  # fmt: skip
    settings = {
        "scale": arguments.scale,
        "rounds": arguments.rounds,
        "nice": os.nice(0),
        "bytes": sum(path.stat().st_size for path in shards),
    }
    result = {"machine": machine, "settings": settings, "rows": table, "goals": reached}
    print(
        write_result("startup", result, arguments.results, "" if arguments.scale == 1 else f"scale{arguments.scale:g}")
    )


if __name__ == "__main__":
    main()
