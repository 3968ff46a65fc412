"""Clients that behave badly: that leave, do not read, do not finish what they send, or send what is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
from serve_clients import HEADERS, STUCK_SECONDS, Row
from serve_process import KEY

LONG = {"prompt": "def f(", "max_tokens": 900, "temperature": 0, "logit_bias": {"0": -100}}
HELLO = [{"role": "user", "content": "x"}]
UNDER_WAY = ("quantload_requests_running", "quantload_requests_waiting")
"""Gauges whose sum it is: a batch runs many, and those that wait are few then."""
SLOT_SECONDS = 3.0  # in which a slot is free again: a look at the connection each 0.25 s, a token, a prompt
HEALTH_SECONDS = 5.0
CLOSE_SECONDS = 90.0

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def head(path: str, length: int | None = None, key: str = KEY) -> bytes:
    """The head of a POST request as bytes on the wire, without its end where there is no `length`."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {key}"]
    if length is None:
        return "\r\n".join(lines).encode()
    return "\r\n".join([*lines, "Content-Type: application/json", f"Content-Length: {length}", "", ""]).encode()


async def send(port: int, data: bytes, receive_buffer: int | None = None) -> Stream:
    """A connection on which `data` was sent; `receive_buffer` bytes are kept by the system for who does not read."""
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=receive_buffer or 1 << 16)
    writer.write(data)
    await writer.drain()
    return reader, writer


async def post(port: int, body: dict[str, Any], receive_buffer: int | None = None) -> Stream:
    """A completion that is asked for, its answer unread."""
    data = json.dumps(body).encode()
    return await send(port, head("/v1/completions", len(data)) + data, receive_buffer)


def abort(writer: asyncio.StreamWriter) -> None:
    """Close a connection at once, whatever is still to come on it."""
    writer.transport.abort()


async def seconds_until_closed(reader: asyncio.StreamReader) -> float | None:
    """How long a server keeps a connection, in seconds; None if longer than `CLOSE_SECONDS`."""
    start = time.monotonic()
    try:
        await asyncio.wait_for(reader.read(), CLOSE_SECONDS)
    except TimeoutError:
        return None
    except OSError:
        pass
    return time.monotonic() - start


@contextlib.asynccontextmanager
async def health_watched(client: httpx.AsyncClient, row: Row) -> AsyncIterator[None]:
    """Ask for `/health` again and again while the block runs, and count the answers."""

    async def watch() -> None:
        while True:
            start = time.monotonic()
            try:
                status = (await client.get("/health")).status_code
            except httpx.HTTPError as error:
                row.add("no answer", time.monotonic() - start, repr(error))
            else:
                took = time.monotonic() - start
                late = took > HEALTH_SECONDS
                row.add(str(status), took, f"{status} after {took:.1f} s" if late or status != 200 else None)
            await asyncio.sleep(0.1)

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def leaving(client: httpx.AsyncClient, port: int, tries: int) -> list[Row]:
    """Rows of clients that leave in the middle of a long answer: how long until the next one has its turn."""
    rows = []
    for stream in (True, False):
        row = Row("clients that leave", f"in the middle of an answer{', streaming' if stream else ''}")
        for _ in range(tries):
            reader, writer = await post(port, {**LONG, "stream": stream})
            await (reader.readuntil(b"data: ") if stream else _running(client, 1))
            start = time.monotonic()
            abort(writer)
            await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
            took = time.monotonic() - start
            row.add("slot is free", took, f"after {took:.2f} s" if took > SLOT_SECONDS else None)
        rows.append(row)
    row = Row("clients that leave", "the queue")
    for _ in range(tries):
        _, first = await post(port, {**LONG, "stream": True})
        await _running(client, 1)
        others = [await post(port, {**LONG, "stream": False}) for _ in range(8)]
        await _under_way(client, 9)
        start = time.monotonic()
        for _, writer in (*others, (None, first)):
            abort(writer)
        await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
        took = time.monotonic() - start
        row.add("none was run", took, f"after {took:.2f} s" if took > SLOT_SECONDS else None)
    return [*rows, row]


async def full_queue(client: httpx.AsyncClient, port: int, places: int) -> list[Row]:
    """Rows of requests that find a queue of `places` full: refused at once, and taken again when there is room.

    A batch may end those that hold it meanwhile: then others take the room.
    """
    refused, again = Row("a full queue", f"a request more than {places} that wait"), Row("a full queue", "room again")
    held: list[Stream] = []
    await _fill(client, port, places + 1, held)
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": HELLO}),
    ] * 8
    end = time.monotonic() + STUCK_SECONDS
    while asked and time.monotonic() < end:
        path, said = asked[-1]
        start = time.monotonic()
        try:
            reply = await client.post(path, json={**said, "max_tokens": 1}, timeout=SLOT_SECONDS)
            there_was_room = reply.status_code == 200
        except httpx.ReadTimeout:
            there_was_room = True
        if there_was_room:
            await _fill(client, port, places + 1, held)
            continue
        asked.pop()
        right = reply.status_code == 429 and int(reply.headers.get("retry-after", 0)) >= 1
        right = right and reply.json()["error"]["code"] is not None
        refused.add(str(reply.status_code), time.monotonic() - start, None if right else reply.text[:200])
    for _, writer in held:
        abort(writer)
    start = time.monotonic()
    reply = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
    while reply.status_code != 200 and time.monotonic() < start + 5 * SLOT_SECONDS:
        reply = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
    again.add(str(reply.status_code), time.monotonic() - start, None if reply.status_code == 200 else reply.text[:200])
    return [refused, again]


async def not_reading(client: httpx.AsyncClient, port: int, clients: int) -> Row:
    """Row of clients that ask for streams and read nothing: others' answers come, and theirs take no slot for ever."""
    row = Row("clients that do not read", "others are answered behind them")
    silent = [
        await post(port, {**LONG, "max_tokens": 100, "stream": True}, receive_buffer=2048) for _ in range(clients)
    ]
    for _ in range(3):
        await one_more(client, row)
    for _, writer in silent:
        abort(writer)
    return row


async def one_more(client: httpx.AsyncClient, row: Row) -> None:
    """An ordinary request: it must have its answer."""
    start = time.monotonic()
    try:
        reply = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
    except httpx.HTTPError as error:
        row.add("no answer", time.monotonic() - start, repr(error))
        return
    wrong = None if reply.status_code == 200 else reply.text[:200]
    row.add(str(reply.status_code), time.monotonic() - start, wrong)


async def unfinished(client: httpx.AsyncClient, port: int, count: int, wait: bool) -> list[Row]:
    """Rows of connections whose head, body or next request never comes; with `wait`, until the server closes them."""
    kinds = {
        "nothing is sent": b"",
        "half a head": head("/v1/completions"),
        "a head without its body": head("/v1/completions", 100),
        "half a body": head("/v1/completions", 100) + b'{"prompt": "',
        "nothing after an answer": b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    }
    health = Row("unfinished requests", "/health meanwhile")
    rows = [Row("unfinished requests", what) for what in kinds]
    async with health_watched(client, health):
        held = [
            (row, await send(port, data)) for row, data in zip(rows, kinds.values(), strict=True) for _ in range(count)
        ]
        await one_more(client, health)
        if wait:
            closed = await asyncio.gather(*(seconds_until_closed(reader) for _, (reader, _) in held))
            for (row, _), seconds in zip(held, closed, strict=True):
                row.add("closed", seconds or CLOSE_SECONDS, None if seconds else f"still open after {CLOSE_SECONDS} s")
    for _, (_, writer) in held:
        abort(writer)
    return [*(rows if wait else []), health]


async def crowd(client: httpx.AsyncClient, port: int, connections: int) -> Row:
    """Row of requests while more idle connections than the server takes are open."""
    row = Row("unfinished requests", f"answers beside {connections:,} idle connections")
    held: list[Stream] = []
    for _ in range(connections):
        with contextlib.suppress(OSError):
            held.append(await send(port, b""))
    for path in ("/health", "/metrics", "/v1/models", "/health"):
        start = time.monotonic()
        async with httpx.AsyncClient(base_url=client.base_url, headers=HEADERS, timeout=STUCK_SECONDS) as new:
            try:
                status = (await new.get(path)).status_code
            except httpx.HTTPError as error:
                row.add("no answer", time.monotonic() - start, f"{path}: {error!r}")
                continue
        row.add(str(status), time.monotonic() - start, None if status == 200 else f"{path}: {status}")
    for _, writer in held:
        abort(writer)
    return row


async def _until(client: httpx.AsyncClient, least: int, *names: str) -> None:
    end = time.monotonic() + STUCK_SECONDS
    while time.monotonic() < end:
        if sum([await gauge(client, name) for name in names]) >= least:
            return
        await asyncio.sleep(0.02)
    raise RuntimeError(f"{' and '.join(names)} never were {least}")


async def _running(client: httpx.AsyncClient, least: int) -> None:
    await _until(client, least, "quantload_requests_running")


async def _under_way(client: httpx.AsyncClient, least: int) -> None:
    await _until(client, least, *UNDER_WAY)


async def _fill(client: httpx.AsyncClient, port: int, most: int, held: list[Stream]) -> None:
    """Begin long answers until `most` are under way: some of before may just be ending, and then some are refused."""
    end = time.monotonic() + STUCK_SECONDS
    while time.monotonic() < end:
        lacking = most - round(sum([await gauge(client, name) for name in UNDER_WAY]))
        if lacking <= 0:
            return
        held += [await post(port, {**LONG, "stream": True}) for _ in range(lacking)]
        await asyncio.sleep(0.1)
    raise RuntimeError(f"never were {most} requests under way")


async def gauge(client: httpx.AsyncClient, name: str) -> float:
    """A metric without labels, as `/metrics` has it now."""
    text = (await client.get("/metrics")).text
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))
