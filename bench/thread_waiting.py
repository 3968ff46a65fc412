"""What waiting threads cost: decode in processes whose OpenMP threads spin, or sleep, between two products.

One process for each policy, all started at once, that take turns at generating; a turn is wall time and processor time.
With `--beside N` so many other processes compute meanwhile, as on a machine that is not quantload's alone.

    python bench/thread_waiting.py                  # on a quiet machine: what sleeping costs
    python bench/thread_waiting.py --beside 2       # on a busy one: what spinning costs
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import describe_machine, headline
from markdown import markdown
from result_files import RESULTS, write_result

POLICIES: dict[str, dict[str, str]] = {
    "libgomp's own (spins for milliseconds)": {},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}
DEMO = "demo"


def generate(model: str, scheme: str, tokens: int, threads: int) -> None:
    """What a child does: load, then generate whenever a line comes, and say what it took as JSON."""
    import torch
    from quantload import load_quantized

    torch.set_num_threads(threads)
    if model == DEMO:
        from quantload.cli import DEMO_MODEL

        model = str(DEMO_MODEL)
    loaded: Any = load_quantized(model, scheme, device="cpu", progress=False)
    ids = torch.arange(1, 17)[None]

    def turn() -> dict[str, float]:
        wall, own = time.perf_counter(), time.process_time()
        loaded.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return {"wall": time.perf_counter() - wall, "processor": time.process_time() - own}

    turn()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(turn()), flush=True)


def start(policy: dict[str, str], arguments: argparse.Namespace) -> subprocess.Popen[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_WAIT", "GOMP_SPIN", "KMP_"))}
    chosen = [arguments.model, arguments.scheme, str(arguments.tokens), str(arguments.threads)]
    return subprocess.Popen(
        [sys.executable, __file__, "--child", *chosen],
        env={**own, **policy}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def take_turns(children: dict[str, subprocess.Popen[str]], rounds: int) -> dict[str, list[dict[str, float]]]:
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in children}
    for child in children.values():
        assert child.stdout is not None
        assert child.stdout.readline().strip() == "ready"
    for _ in range(rounds):
        for name, child in children.items():
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write("\n")
            child.stdin.flush()
            turns[name].append(json.loads(child.stdout.readline()))
    return turns


def rows(turns: dict[str, list[dict[str, float]]], tokens: int) -> list[dict[str, Any]]:
    first = next(iter(turns))
    found = []
    for name, own in turns.items():
        wall, processor = (statistics.median(turn[kind] for turn in own) for kind in ("wall", "processor"))
        pairs = zip(own, turns[first], strict=True)
        ratio = statistics.median(turn["wall"] / other["wall"] for turn, other in pairs)
        found.append({
            "policy": name, "tokens/s": tokens / wall, "processor ms/token": 1e3 * processor / tokens,
            "wall, against the first": ratio,
        })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--scheme", default="quark_mxfp4")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--beside", type=int, default=0, help="processes that compute meanwhile")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.child:
        model, scheme, tokens, threads = arguments.child
        generate(model, scheme, int(tokens), int(threads))
        return
    others: list[subprocess.Popen[Any]] = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(arguments.beside)
    ]
    children = {name: start(policy, arguments) for name, policy in POLICIES.items()}
    try:
        table = rows(take_turns(children, arguments.rounds), arguments.tokens)
    finally:
        for process in [*others, *children.values()]:
            process.kill()
            process.wait()
    machine = describe_machine()
    print(headline(machine))
    print(markdown([[_text(value) for value in row.values()] for row in table], list(table[0])))
    settings = {name: getattr(arguments, name) for name in ("model", "scheme", "tokens", "threads", "rounds", "beside")}
    print(write_result("thread-waiting", {"machine": machine, "settings": settings, "rows": table}, arguments.out))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.2f}"


if __name__ == "__main__":
    main()
