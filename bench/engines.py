"""Loading in vLLM: its own online quantization against quantload's through the same engine, and quantload alone.

    python bench/engines.py --vllm-python .vllm/bin/python             # a dense and a MoE checkpoint of 3 GB each
    python bench/engines.py --vllm-python .vllm/bin/python --scale 0.05 --repeats 1

Each load is a process of its own; loads take turns, and a row is the median of its repeats. Peak memory is that above
what the process held when the load of the weights began: anonymous memory, and pages of files beside it.
"Packed" are the copies that vLLM itself makes of kept weights, in oneDNN's layout, beside the parameters. Tokens are
generated in the first round only, and only where they are compared.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpoints import make
from goals import Goal, at_most, columns, print_goals
from machine import describe_machine, headline
from result_files import RESULTS, write_result

BENCH = Path(__file__).resolve().parent
MIB = 1 << 20
CHECKPOINTS = ("huge", "moe")
REPEATS = 3
TOKENS = 16
LOAD_SECONDS = 1800
STAGING_AND_SLACK = 32 * MIB + 64 * MIB
"""What a load may take above its parameters: the staging arena of two cores, and the allowance of a load."""


@dataclass(frozen=True)
class Way:
    """One way to load, to codes of so many bits: `like` is the way of quantload alone whose tokens it must give."""

    name: str
    kind: str
    settings: dict[str, str]
    bits: int = 8
    like: str = ""
    bounded: bool = False


WAYS = (
    Way("vLLM, BF16", "vllm", {}),
    Way("vLLM, its own fp8_per_channel", "vllm", {"quantization": "fp8_per_channel"}),
    Way("vLLM with quantload, FP8 per channel", "vllm",
        {"quantization": "quantload_fp8_per_channel", "load_format": "quantload"}, 8,
        "quantload, fp8_per_channel", True),
    Way("vLLM with quantload, MXFP4", "vllm",
        {"quantization": "quark_mxfp4", "load_format": "quantload"}, 4, "quantload, quark_mxfp4", True),
    Way("vLLM with quantload, MXFP4, vLLM's own reader", "vllm",
        {"quantization": "quark_mxfp4"}, 4, "quantload, quark_mxfp4"),
    Way("quantload, fp8_per_channel", "quantload", {"quantization": "fp8_per_channel"}),
    Way("quantload, quark_mxfp4", "quantload", {"quantization": "quark_mxfp4"}, 4),
)  # fmt: skip

HEADER = ("way", "peak MiB", "parameters MiB", "packed MiB", "file pages MiB", "s", "CPU s", "quantized", "tokens")
SAYS_WHY = re.compile(r"\b\w*(?:Error|Exception): .+")


def run(way: Way, folder: Path, python: str, tokens: int = TOKENS) -> dict[str, Any]:
    """One load in a process of its own, and so many tokens; `error` says why there is nothing else."""
    settings = [json.dumps(way.settings), str(way.bits), str(tokens)]
    command = [python, str(BENCH / "engines_child.py"), way.kind, str(folder), *settings]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LOAD_SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"no end after {LOAD_SECONDS} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = SAYS_WHY.findall(done.stderr)
        return {"error": said[-1] if said else f"ended with {done.returncode}"}
    facts: dict[str, Any] = json.loads(lines[-1])
    return facts


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of the runs of one way; an error where one failed."""
    failed = [each for each in runs if "error" in each]
    if failed:
        return {"error": failed[0]["error"], "runs": runs}
    numbers = [name for name, value in runs[0].items() if isinstance(value, (int, float))]
    medians = {name: statistics.median(each[name] for each in runs) for name in numbers}
    return {**medians, "engine": runs[0]["engine"], "tokens": runs[0]["tokens"], "runs": runs}


def same_tokens(way: Way, rows: dict[str, dict[str, Any]]) -> str:
    """How many tokens of how many are those of quantload alone, up to the first that differs."""
    ours, wanted = rows[way.name].get("tokens"), rows.get(way.like, {}).get("tokens")
    if ours is None or wanted is None:
        return "-"
    equal = 0
    for got, want in zip(ours, wanted, strict=True):
        equal += next((at for at, (a, b) in enumerate(zip(got, want, strict=True)) if a != b), len(want))
    return f"{equal} of {sum(map(len, wanted))}"


def table(rows: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The rows of one checkpoint, as text."""
    lines = []
    for way in WAYS:
        row = rows.get(way.name)
        if row is None:
            continue
        if "error" in row:
            lines.append([way.name, "failed", *[""] * (len(HEADER) - 2)])
            continue
        sizes = [
            f"{row[name] / MIB:.0f}" for name in ("peak_anon_bytes", "final_bytes", "packed_bytes", "peak_file_bytes")
        ]
        times = [f"{row[name]:.1f}" for name in ("seconds", "cpu_seconds")]
        lines.append([way.name, *sizes, *times, f"{row['quantized_share']:.1%}", same_tokens(way, rows)])
    return lines


def goals_of(results: dict[str, dict[str, dict[str, Any]]]) -> list[Goal]:
    """The bound of a load, through the engine."""
    found = []
    for checkpoint, rows in results.items():
        for way in WAYS:
            row = rows.get(way.name)
            if way.bounded and row is not None:
                held = "final_bytes", "packed_bytes"
                over = None if "error" in row else (row["peak_anon_bytes"] - sum(row[name] for name in held)) / MIB
                found.append(at_most(f"{way.name}: peak above what is held", checkpoint, over,
                                     STAGING_AND_SLACK / MIB, " MiB"))  # fmt: skip
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", required=True, help="interpreter with vLLM and quantload")
    parser.add_argument("--checkpoints", nargs="+", choices=("huge", "moe", "dense"), default=CHECKPOINTS)
    parser.add_argument("--scale", type=float, default=1.0, help="size of the checkpoints")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON")
    arguments = parser.parse_args()
    machine = describe_machine()
    print(headline(machine))
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for checkpoint in arguments.checkpoints:
        folder = make(checkpoint, arguments.scale)
        runs: dict[str, list[dict[str, Any]]] = {way.name: [] for way in WAYS}
        compared = {name for way in WAYS if way.like for name in (way.name, way.like)}
        for round_ in range(arguments.repeats):
            for way in WAYS:
                python = arguments.vllm_python if way.kind == "vllm" else sys.executable
                tokens = TOKENS if round_ == 0 and way.name in compared else 0
                runs[way.name].append(run(way, folder, python, tokens))
                print(f"{checkpoint}, round {round_ + 1}: {way.name}", file=sys.stderr, flush=True)
        results[checkpoint] = {name: summary(each) for name, each in runs.items()}
        print(f"\n{checkpoint}\n{columns(table(results[checkpoint]), HEADER)}")
        for name, row in results[checkpoint].items():
            if "error" in row:
                print(f"{name}: {row['error']}")
    goals = goals_of(results)
    print_goals(goals)
    settings = {"scale": arguments.scale, "repeats": arguments.repeats, "ways": [asdict(way) for way in WAYS]}
    reduced = "" if arguments.scale == 1 and arguments.repeats >= REPEATS else "reduced"
    result = {"machine": machine, "settings": settings, "results": results, "goals": [asdict(goal) for goal in goals]}
    print(write_result("engines", result, arguments.results, reduced))


if __name__ == "__main__":
    main()
