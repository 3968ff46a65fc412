"""Requests at once, one after the other against a continuous batch: two servers over one model, taking turns.

Each turn is a number of greedy requests sent at the same moment; told are tokens a second of wall time and of processor
time, and the median time to the first token.

    python bench/serve_batching.py                   # the demo model
    python bench/serve_batching.py --model FOLDER
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from pathlib import Path
from typing import Any

from machine import describe_machine, headline
from markdown import markdown
from result_files import RESULTS, write_result

AT_ONCE = (1, 8, 32)
NAMES = {False: "one after the other", True: "in a batch"}


def server(model: Any, processor: Any, batched: bool) -> Any:
    from quantload.server import ServerState
    from quantload.server.warm_up import warm_up

    state = ServerState("bench", continuous_batching=None if batched else False)
    state.finish(model, processor, warm_up)
    if state.served().batches is not batched:
        raise SystemExit("this model is not batched: see the log")
    return state.served()


async def together(served: Any, count: int, tokens: int) -> dict[str, float]:
    """Ask for `count` answers at once."""
    from quantload.server.generation_request import parse_completion

    bodies = [
        {"prompt": f"def f{number}(x):\n    ", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        for number in range(count)
    ]
    requests = [parse_completion(body, served.name) for body in bodies]
    wall, processor = time.perf_counter(), time.process_time()
    began = time.monotonic()
    await asyncio.gather(*(served.complete(each, f"{time.monotonic_ns()}-{i}") for i, each in enumerate(requests)))
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    first = statistics.median((each.usage.first_token_at or began) - began for each in requests)
    made = sum(each.usage.completion_tokens for each in requests)
    return {"tokens/s": made / wall, "tokens/processor s": made / processor, "first token s": first}


def main() -> None:
    """Take turns, print the table and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a checkpoint; the demo model by default")
    parser.add_argument("--scheme", default="quark_mxfp4")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    from quantload.threads import settle_threads

    settle_threads()
    from quantload import LoadOptions, load_quantized
    from quantload.checkpoint.resolve import resolve
    from quantload.cli import DEMO_MODEL
    from quantload.tokenizer import load_processor

    path = Path(options.model or DEMO_MODEL)
    model = load_quantized(path, options.scheme, device="cpu", options=LoadOptions(stats=False), progress=False)
    processor = load_processor(resolve(path), False)
    servers = {batched: server(model, processor, batched) for batched in NAMES}
    turns: dict[tuple[bool, int], list[dict[str, float]]] = {}
    for _ in range(options.rounds):
        for count in AT_ONCE:
            for batched, served in servers.items():
                turn = asyncio.run(together(served, count, options.tokens))
                turns.setdefault((batched, count), []).append(turn)
    rows: list[dict[str, Any]] = [
        {"requests": count, "how": NAMES[batched], **{name: statistics.median(t[name] for t in own) for name in own[0]}}
        for (batched, count), own in turns.items()
    ]
    for served in servers.values():
        served.stop()
    machine = describe_machine()
    print(headline(machine))
    cells = [[each if isinstance(each, str) else f"{each:.4g}" for each in row.values()] for row in rows]
    print(markdown(cells, list(rows[0])))
    settings = {name: getattr(options, name) for name in ("model", "scheme", "tokens", "rounds")}
    print(write_result("serve-batching", {"machine": machine, "settings": settings, "rows": rows}, options.results))


if __name__ == "__main__":
    main()
