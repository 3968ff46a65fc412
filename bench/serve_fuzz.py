"""Ask a server very many things that nobody should ask: no answer is a 5xx, each refusal has OpenAI's shape.

Requests are made by a grammar over all routes and fields, then changed at the level of JSON values and of bytes, as a
function of the seed. They go straight to the ASGI application, some at the same time, with the demo model quantized to
MXFP4, once one request after the other and once with continuous batching. Faults are: a status of 5xx, an error inside
of a stream, a refusal that is no error object of OpenAI's, an exception that leaves the application, and no answer
within 60 s.

    python bench/serve_fuzz.py                  # 20,000 requests
    python bench/serve_fuzz.py --requests 500   # a quick look
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import describe_machine, headline
from markdown import markdown
from result_files import RESULTS, write_result
from serve_grammar import Grammar, Request

AT_ONCE = 4
SECONDS = 60.0
DEMO = Path(__file__).resolve().parents[1] / "loader" / "demo_model"


@dataclass
class Answer:
    """What came back: status 0 if nothing did, and what was raised."""

    status: int = 0
    body: bytes = b""
    raised: str = ""
    seconds: float = 0.0
    headers: dict[bytes, bytes] = field(default_factory=dict)


async def ask(app: Any, request: Request, seconds: float = SECONDS) -> Answer:
    """Send a request to an ASGI application."""
    answer, sent, begin = Answer(), False, time.perf_counter()
    forever = asyncio.Event()

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if sent:
            await forever.wait()
        sent = True
        return {"type": "http.request", "body": request.body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            answer.status, answer.headers = message["status"], dict(message["headers"])
        else:
            answer.body += message.get("body", b"")

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
        "method": request.method, "scheme": "http", "path": request.path, "raw_path": request.path.encode(),
        "query_string": b"", "root_path": "", "headers": [(b"host", b"127.0.0.1"), *request.headers],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000), "state": {},
    }  # fmt: skip
    try:
        await asyncio.wait_for(app(scope, receive, send), seconds)
    except TimeoutError:
        answer.raised = f"no answer within {seconds:g} s"
    except Exception as error:
        answer.raised = f"{type(error).__name__}: {error}"
    answer.seconds = time.perf_counter() - begin
    return answer


def fault(request: Request, answer: Answer) -> str | None:
    """What is wrong with an answer, or None."""
    text = answer.body.decode("utf-8", "backslashreplace")
    if answer.raised:
        return answer.raised
    if not 200 <= answer.status < 500:
        return f"status {answer.status}: {text[:300]}"
    if answer.status == 200:
        return f"in a stream: {text[-300:]}" if text.startswith("data: ") and '"type": "server_error"' in text else None
    if request.method == "HEAD":
        return None
    try:
        error = json.loads(answer.body)["error"]
        right = set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
        right = right and isinstance(error["message"], str) and len(error["message"]) < 2100
    except (ValueError, KeyError, TypeError):
        right = False
    return None if right else f"not OpenAI's shape of an error: {text[:300]}"


async def fuzz(
    app: Any, seed: int | str, count: int, at_once: int = AT_ONCE, grammar: Callable[[int | str], Grammar] = Grammar
) -> tuple[Counter[str], list[dict[str, Any]]]:
    """Ask `count` requests of a seed: how many had which status, and the faults."""
    made, counts, faults = grammar(seed), Counter[str](), list[dict[str, Any]]()
    for start in range(0, count, at_once):
        requests = [made.request() for _ in range(min(at_once, count - start))]
        answers = await asyncio.gather(*(ask(app, request) for request in requests))
        for number, (request, answer) in enumerate(zip(requests, answers, strict=True), start):
            counts[f"{answer.status}"] += 1
            if answer.status == 400 and (param := json.loads(answer.body)["error"]["param"]) is not None:
                counts["named"] += bool(param)
            if (what := fault(request, answer)) is not None:
                said = {"number": number, "method": request.method, "path": request.path, "fault": what}
                faults.append({**said, "body": request.body[:500].decode("utf-8", "backslashreplace")})
    return counts, faults


def demo_app(batched: bool) -> tuple[Any, Any]:
    """The application over the demo model, and its state."""
    from quantload import LoadOptions, load_quantized
    from quantload.checkpoint.resolve import resolve
    from quantload.server import ServerState, create_app
    from quantload.server.warm_up import warm_up
    from quantload.tokenizer import load_processor

    state = ServerState("demo", continuous_batching=batched)
    model = load_quantized(DEMO, "quark_mxfp4", options=LoadOptions(stats=False))
    state.finish(model, load_processor(resolve(DEMO), False), warm_up)
    return create_app(state, request_log="off"), state


def main() -> None:
    """Ask, print the table and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000, help="to each of the two servers, half of them")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    machine = describe_machine()
    print(headline(machine))
    results = []
    for batched in (False, True):
        app, state = demo_app(batched)
        begin = time.perf_counter()
        counts, faults = asyncio.run(fuzz(app, f"{options.seed} {batched}", options.requests // 2))
        state.stop()
        for each in faults[:50]:
            print(" ", json.dumps(each)[:1000])
        results.append({"batched": batched, "requests": options.requests // 2, "counts": counts, "faults": faults,
                        "seconds": time.perf_counter() - begin})  # fmt: skip
    print(table(results))
    reduced = "" if options.requests >= 20_000 else "part"
    write_result("serve_fuzz", {"machine": machine, "seed": options.seed, "results": results}, options.results, reduced)
    raise SystemExit(1 if any(each["faults"] for each in results) else 0)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Counts of each server."""
    rows = []
    for result in results:
        counts = result["counts"]
        refused = sum(count for status, count in counts.items() if status.startswith("4"))
        rows.append(
            ["continuous batching" if result["batched"] else "one after the other", f"{result['requests']:,}",
             f"{counts['200']:,}", f"{refused:,}", f"{counts['named']:,}", f"{len(result['faults']):,}",
             f"{result['seconds']:.0f} s"]
        )  # fmt: skip
    return markdown(rows, ["requests", "number", "answered", "refused", "with `param`", "faults", "time"])


if __name__ == "__main__":
    main()
