"""How fast a CPU generates: quantload's schemes beside transformers in BF16, in turns.

One process for each side, all started before the first turn; they hold models of one shape with random weights, and
only one of them computes at a time. A turn is a few tokens for one sequence, then for eight, then a prompt of 512
tokens; its figures are tokens per processor second and per second, medians over the turns. The output head stays in
BF16 everywhere.

    python bench/decode_cpu.py
    python bench/decode_cpu.py --shape moe --threads 1
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from decode_cpu_child import BATCHES, PROMPT, SHAPES
from machine import describe_machine, headline
from markdown import markdown
from result_files import RESULTS, write_result

SCHEMES = ("quark_mxfp4", "int4_per_group", "int8_per_channel", "none")
TRANSFORMERS = "transformers BF16"
WORKS = [*(f"decode {batch}" for batch in BATCHES), f"prefill {PROMPT}"]


class Side:
    """One process that waits for lines, each of which says what it is to do, and answers with what that took."""

    def __init__(self, command: list[str], threads: int) -> None:
        counts = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        own = {**os.environ, **counts, "OMP_WAIT_POLICY": "PASSIVE"}
        self._process = subprocess.Popen(
            command, env=own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._questions, self._answers = self._process.stdin, self._process.stdout

    def wait(self) -> None:
        """Until it is ready; ends with an error where it has ended itself."""
        self._answer("ready")

    def turn(self, work: str, tokens: int) -> dict[str, float]:
        """What so many tokens took."""
        self._questions.write(json.dumps([work, tokens]) + "\n")
        self._questions.flush()
        took: dict[str, float] = json.loads(self._answer("{"))
        return took

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self, begins: str) -> str:
        for line in self._answers:
            if line.startswith(begins):
                return line
        raise SystemExit(f"{' '.join(self._process.args)} ended with code {self._process.wait()}")  # type: ignore[arg-type]


def sides_of(arguments: argparse.Namespace, threads: int) -> dict[str, Side]:
    """All sides, by name, ready."""
    child = str(Path(__file__).with_name("decode_cpu_child.py"))
    given = {f"quantload {scheme}": scheme for scheme in arguments.schemes} | {TRANSFORMERS: "transformers"}
    sides = {}
    for name, scheme in given.items():
        sides[name] = Side([sys.executable, child, scheme, arguments.shape, str(threads)], threads)
        sides[name].wait()  # one after the other: all of them compile at first
    return sides


def take_turns(sides: dict[str, Side], turns: int, tokens: int) -> dict[str, dict[str, list[dict[str, float]]]]:
    """What every turn of every side took, by work and side."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {work: {name: [] for name in sides} for work in WORKS}
    for turn in range(turns + 1):
        for work in WORKS:
            for name, side in sides.items():
                took = side.turn(work, tokens)
                if turn:  # the first one compiles and touches memory
                    found[work][name].append(took)
    return found


def records_of(found: dict[str, dict[str, list[dict[str, float]]]], threads: int) -> list[dict[str, Any]]:
    """Tokens per processor second and per second of every work and side."""
    return [
        {
            "threads": threads,
            "side": name,
            "work": work,
            **{f"tokens/{kind}": statistics.median(each["tokens"] / each[kind] for each in took) for kind in KINDS},
        }
        for work, sides in found.items()
        for name, took in sides.items()
    ]


KINDS = ("processor", "wall")
"""Seconds."""


def table(records: list[dict[str, Any]], kind: str) -> str:
    """A row for each side and number of threads, a column for each work."""
    speed = {(each["threads"], each["side"], each["work"]): each[f"tokens/{kind}"] for each in records}
    rows = []
    for threads, side in dict.fromkeys((each["threads"], each["side"]) for each in records):
        rows.append([side, str(threads), *(f"{speed[threads, side, work]:.1f}" for work in WORKS)])
    return markdown(rows, ["side", "threads", *WORKS])


def ratios(records: list[dict[str, Any]]) -> list[list[str]]:
    """For each side, what it does of what transformers does in BF16 in a processor second."""
    speed = {(each["threads"], each["side"], each["work"]): each["tokens/processor"] for each in records}
    found = []
    for threads, side in dict.fromkeys((each["threads"], each["side"]) for each in records):
        of = (speed[threads, side, work] / speed[threads, TRANSFORMERS, work] for work in WORKS)
        found.append([side, str(threads), *(f"{each:.2f}" for each in of)])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--shape", default="dense", choices=SHAPES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--tokens", type=int, default=12, help="that are generated for each sequence in a turn")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    machine, records = describe_machine(), []
    for threads in arguments.threads:
        sides: dict[str, Side] = {}
        try:
            sides = sides_of(arguments, threads)
            records += records_of(take_turns(sides, arguments.turns, arguments.tokens), threads)
        finally:
            for side in sides.values():
                side.end()
    for kind in KINDS:
        print(f"Tokens per second of {kind} time\n\n{table(records, kind)}\n")
    print("Of transformers in BF16, in a processor second\n")
    print(markdown(ratios(records), ["side", "threads", *WORKS]), "\n")
    print(headline(machine))
    settings = {name: getattr(arguments, name) for name in ("schemes", "shape", "tokens", "turns")}
    print(write_result("decode_cpu", {"machine": machine, "settings": settings, "records": records}, arguments.out))


if __name__ == "__main__":
    main()
