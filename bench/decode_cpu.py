"""How fast a CPU generates: quantload's schemes beside llama.cpp's types and transformers in BF16, in turns.

One process for each side; they hold models of one shape with random weights. The sides of a group, which are a scheme
and the type of llama.cpp that is nearest to it, or transformers, or for BF16 both, are there at the same time, and only
one of them computes at a time. A turn is a few tokens for one sequence, for eight and for 32, then a prompt of 512
tokens; its figures are tokens per processor second and per second, medians over the turns. The output head stays in
BF16 everywhere.

llama.cpp takes part where `--llama` names a Python that has llama-cpp-python and gguf. What a package index has for
that is compiled for any processor, not for this one: build it with CMAKE_ARGS=-DGGML_NATIVE=ON. It rounds activations
to eight bits where weights have fewer than 16; quantload does not.

    python bench/decode_cpu.py
    python bench/decode_cpu.py --shape moe --threads 1 --llama ENVIRONMENT/bin/python
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

TYPES = {"quark_mxfp4": "MXFP4", "int4_per_group": "Q4_0", "int8_per_channel": "Q8_0", "none": "BF16"}
"""Of llama.cpp, by the schemes that are measured beside them."""
TRANSFORMERS = "transformers BF16"
GOALS = {"decode 1": 0.8, "decode 8": 1.0, "prefill 512": 1.0}
"""Of what llama.cpp does in a processor second."""
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
        self.about: dict[str, str] = {}

    def wait(self) -> None:
        """Until it is ready; ends with an error where it has ended itself."""
        said = self._answer("ready").removeprefix("ready").strip()
        self.about = json.loads(said) if said else {}

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


def sides_of(scheme: str, arguments: argparse.Namespace, threads: int) -> dict[str, Side]:
    """The sides of a group, by name, ready."""
    folder = Path(__file__).parent
    child, of_llama = (str(folder / name) for name in ("decode_cpu_child.py", "decode_cpu_llama.py"))
    end = [arguments.shape, str(threads)]
    commands = {f"quantload {scheme}": [sys.executable, child, scheme, *end]}
    if arguments.llama:
        commands[f"llama.cpp {TYPES[scheme]}"] = [arguments.llama, of_llama, TYPES[scheme], *end]
    if scheme == "none" or not arguments.llama:
        commands[TRANSFORMERS] = [sys.executable, child, "transformers", *end]
    sides: dict[str, Side] = {}
    try:
        for name, command in commands.items():
            sides[name] = Side(command, threads)
            sides[name].wait()  # one after the other: all of them compile at first
    except BaseException:
        end_all(sides)
        raise
    return sides


def end_all(sides: dict[str, Side]) -> None:
    for side in sides.values():
        side.end()


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


def records_of(found: dict[str, dict[str, list[dict[str, float]]]], scheme: str, threads: int) -> list[dict[str, Any]]:
    """Tokens per processor second and per second of every work and side of a group."""
    return [
        {
            "group": scheme,
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
    """A row for each side of each group and number of threads, a column for each work."""
    speed = _speeds(records, kind)
    rows = []
    for threads, group, side in dict.fromkeys(key[:3] for key in speed):
        rows.append([side, str(threads), *(f"{speed[threads, group, side, work]:.1f}" for work in WORKS)])
    return markdown(rows, ["side", "threads", *WORKS])


def ratios(records: list[dict[str, Any]], kind: str = "processor") -> list[list[str]]:
    """For each scheme, what it does of what the other sides of its group do in a second."""
    speed = _speeds(records, kind)
    found = []
    for threads, group, side in dict.fromkeys(key[:3] for key in speed):
        own = f"quantload {group}"
        if side != own:
            of = (speed[threads, group, own, work] / speed[threads, group, side, work] for work in WORKS)
            found.append([f"{own} / {side}", str(threads), *(f"{each:.2f}" for each in of)])
    return found


def _speeds(records: list[dict[str, Any]], kind: str) -> dict[tuple[int, str, str, str], float]:
    return {(each["threads"], each["group"], each["side"], each["work"]): each[f"tokens/{kind}"] for each in records}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=list(TYPES), choices=list(TYPES))
    parser.add_argument("--shape", default="dense", choices=SHAPES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--tokens", type=int, default=12, help="that are generated for each sequence in a turn")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--llama", help="Python of an environment with llama-cpp-python and gguf")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    machine, about, records = describe_machine(), dict[str, dict[str, str]](), list[dict[str, Any]]()
    for threads in arguments.threads:
        for scheme in arguments.schemes:
            sides = sides_of(scheme, arguments, threads)
            try:
                about |= {name: side.about for name, side in sides.items() if side.about}
                records += records_of(take_turns(sides, arguments.turns, arguments.tokens), scheme, threads)
            finally:
                end_all(sides)
    for kind in KINDS:
        print(f"Tokens per second of {kind} time\n\n{table(records, kind)}\n")
        print(markdown(ratios(records, kind), ["ratio", "threads", *WORKS]), "\n")
    print(headline(machine))
    settings = {name: getattr(arguments, name) for name in ("schemes", "shape", "tokens", "turns")}
    result = {"machine": machine, "settings": settings, "others": about, "goals": GOALS, "records": records}
    print(write_result("decode_cpu", result, arguments.out))


if __name__ == "__main__":
    main()
