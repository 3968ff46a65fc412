"""A server under load and among clients that behave badly: answers, time, memory, and what is left of it at the end.

    python bench/serve_load.py                            # seven minutes
    python bench/serve_load.py --seconds 5 --clients 16   # a quick look

`quantload serve` runs the demo model in a process of its own. Answers under load are the same as those alone; a slot
that nobody waits for is free soon; what is wrong gets a 4xx in OpenAI's shape; memory and descriptors do not grow; the
key is not in the log. What is not so is counted as wrong, and the script ends with 1.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
from machine import describe_machine, headline
from markdown import markdown
from result_files import RESULTS, write_result
from serve_clients import Row, answers_alone, load, new_client, questions
from serve_process import KEY, Held, Server, serving
from serve_trouble import LONG, abort, crowd, full_queue, gauge, head, leaving, not_reading, post, send, unfinished
from serve_wrong import strangers, wrong

MIB = 1 << 20
SECONDS, CLIENTS = 180.0, 64
QUEUE = 64
GROWTH = {"rss_bytes": 24 * MIB, "descriptors": 4, "threads": 0}
"""How much more of each the process may hold at the end of the load than after its first quarter."""
STOP_SECONDS = 12.0
IDLE_SECONDS = 10.0


class Samples:
    """What the process held, each half second of the load."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.held: list[Held] = []

    @asynccontextmanager
    async def taken(self) -> AsyncIterator[None]:
        """Take them while the block runs."""

        async def sample() -> None:
            while True:
                self.held.append(self.server.held())
                await asyncio.sleep(0.5)

        task = asyncio.create_task(sample())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def row(self) -> Row:
        """The first quarter's end against the end, each the most of an eighth of the samples."""
        row, count = Row("load", "what the process holds"), len(self.held)
        eighth = max(1, count // 8)
        early, late = (most(self.held[place - eighth : place]) for place in (2 * eighth, count))
        for name, allowed in GROWTH.items():
            grown = getattr(late, name) - getattr(early, name)
            row.add(f"{name} {getattr(early, name):,} to {getattr(late, name):,}", 0.0)
            if grown > allowed:
                row.wrong.append(f"{name} grew by {grown:,} from {getattr(early, name):,}")
        return row


def most(held: list[Held]) -> Held:
    """The most of each."""
    columns = zip(*(asdict(each).values() for each in held), strict=True)
    return Held(*(max(column) for column in columns))


async def measure(server: Server, options: argparse.Namespace) -> tuple[list[Row], list[Held]]:
    """All rows but that of the log, and what the process held during the load."""
    quick = options.seconds < 60
    asked, samples = questions()[:: 7 if quick else 1], Samples(server)
    async with new_client(server.url) as client:
        rows = [await strangers(server.url)]
        alone = await answers_alone(client, asked)
        async with samples.taken():
            rows += await load(client, asked, alone, options.clients, options.seconds, options.seed)
        rows.append(samples.row())
        rows.append(await idle(client))
        rows += await leaving(client, server.port, 1 if quick else 20)
        rows += await full_queue(client, server.port, QUEUE)
        rows.append(await not_reading(client, server.port, 1 if quick else 8))
        rows += await unfinished(client, server.port, 4 if quick else 50, wait=not quick)
        rows.append(await crowd(client, server.port, 1_100))
        rows += await wrong(client, 1 if quick else 3)
        rows.append(await idle(client))
    rows.append(await stopped(server))
    return rows, samples.held


async def idle(client: httpx.AsyncClient) -> Row:
    """Row of what is still under way, a moment after the last client has its answer."""
    row, start = Row("load", "nothing is left under way"), time.monotonic()
    while True:
        left = [await gauge(client, f"quantload_requests_{what}") for what in ("running", "waiting")]
        took = time.monotonic() - start
        if not any(left) or took > IDLE_SECONDS:
            row.add("idle" if not any(left) else "busy", took, f"{left} after {took:.0f} s" if any(left) else None)
            return row
        await asyncio.sleep(0.1)


async def stopped(server: Server) -> Row:
    """Row of SIGTERM while a stream, a request that waits, a half body and a half head are under way."""
    held = [
        await post(server.port, {**LONG, "stream": True}),
        await post(server.port, LONG),
        await send(server.port, head("/v1/completions", 99) + b"{"),
        await send(server.port, head("/v1/completions")),
    ]
    await held[0][0].readuntil(b"data: ")
    code, took = await asyncio.to_thread(server.stop)
    row = Row("end", "SIGTERM with requests under way")
    row.add(f"exit code {code}", took, f"exit code {code} after {took:.1f} s" if code or took > STOP_SECONDS else None)
    for _, writer in held:
        abort(writer)
    return row


def log_row(server: Server) -> Row:
    """Row of the lines of the log."""
    log = Row("end", "lines of the log")
    for line in server.noise:
        log.add("no JSON", 0.0, line[:200])
    for entry in server.log:
        text = str(entry)
        if entry["level"] == "warning":
            print(f"warned: {entry['message']}", flush=True)
        wrong = KEY in text or "exception" in entry or entry["level"] == "error"
        log.add(entry["level"], 0.0, text[:300] if wrong else None)
    return log


def render(result: dict[str, Any]) -> str:
    """The rows: tries, what became of them, median and longest time."""
    lines = []
    for row in result["rows"]:
        said = ", ".join(f"{count:,} {what}" if count > 1 else what for what, count in row["outcomes"].items())
        times = [f"{row[name]:.2f} s" if row[name] else "" for name in ("median_seconds", "longest_seconds")]
        lines.append((row["group"], row["what"], f"{row['tries']:,}", said, *times, str(row["wrong"])))
    return markdown(lines, ("", "what", "tries", "what came of it", "median", "longest", "wrong"))


def main(arguments: list[str] | None = None) -> int:
    """Run, print the table, write the dated JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the load alone")
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    machine, start = describe_machine(), time.monotonic()
    print(headline(machine), flush=True)
    with serving("--max-queue", str(QUEUE)) as server:
        rows, held = asyncio.run(measure(server, options))
        rows.append(log_row(server))
    settings = {"seconds": options.seconds, "clients": options.clients, "seed": options.seed}
    settings["whole_seconds"] = round(time.monotonic() - start)
    result = {
        "machine": machine, "settings": settings, "rows": [row.to_json() for row in rows],
        "held": [asdict(each) for each in held[:: max(1, len(held) // 100)]],
    }  # fmt: skip
    print(render(result))
    for row in rows:
        for example in row.wrong[:5]:
            print(f"wrong: {row.group}, {row.what}: {example}", flush=True)
    reduced = "" if options.seconds >= SECONDS and options.clients >= CLIENTS else "part"
    print(f"\nwritten: {write_result('serve_load', result, options.results, reduced)}")
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
