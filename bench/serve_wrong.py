"""Requests that are wrong: each must get a 4xx in OpenAI's shape, soon, while others are answered."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
from serve_clients import Row
from serve_process import KEY
from serve_trouble import health_watched

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
OVERSIZE = (64 << 20) + 1
ANSWER_SECONDS = 20.0


@dataclass(frozen=True)
class Wrong:
    """A wrong request, by its kind; the body as JSON or as bytes."""

    kind: str
    path: str
    body: Any
    method: str = "POST"


def wrong_requests() -> Iterator[Wrong]:
    """One after the other."""
    hello = [{"role": "user", "content": "x"}]
    for path, said in ((COMPLETIONS, {"prompt": "x"}), (CHAT, {"messages": hello})):
        yield Wrong("a body of 64 MiB and more", path, b'{"prompt": "' + b"x" * OVERSIZE)
        for text in (
            b"",
            b"{",
            b"[" * 100_000,
            b'{"a": NaN}',
            b"\xff\xfe",
            b"7",
            b'{"prompt": "x"} {}',
            b'{"a":' * 5000,
        ):
            yield Wrong("what is no JSON object", path, text)
        for name in ("nonsense", "__class__", "max_token", "\ud800", "x" * 10_000):
            yield Wrong("unknown fields", path, {**said, name: 1})
        limits: list[Any] = [-1, 0, 1.5, "7", 2**63, 10**30, True, []]
        for limit in limits:
            yield Wrong("max_tokens that are none", path, {**said, "max_tokens": limit})
        numbers = {"temperature": -1, "top_p": 2, "top_k": -5, "min_p": "x", "seed": 2**70, "presence_penalty": 9}
        for name, value in numbers.items():
            yield Wrong("numbers beyond their range", path, {**said, name: value})
        for name, value in (("logit_bias", {"99999999": 1}), ("logit_bias", {"x": 1}), ("stop", [""]), ("stop", [7])):
            yield Wrong("other values that are none", path, {**said, name: value})
        for value in ([], {}, "yes", 1):
            yield Wrong("other values that are none", path, {**said, "stream": value})
        yield Wrong("another model", path, {**said, "model": "../../etc/passwd"})
        yield Wrong("another model", path, {**said, "model": "gpt-4"})
        yield Wrong("a wrong method", path, None, "GET")
        yield Wrong("a wrong method", path, said, "PUT")
    for tokens in (2_000, 1_000_000):
        yield Wrong(f"a prompt of {tokens:,} tokens", COMPLETIONS, {"prompt": "x = 1\n" * (tokens // 4)})
        long = [{"role": "user", "content": "x = 1\n" * (tokens // 4)}]
        yield Wrong(f"a prompt of {tokens:,} tokens", CHAT, {"messages": long})
    for messages in (None, [], "x", [7], [{"role": 1}], [{"role": "user", "content": {"a": 1}}], [{"content": "x"}]):
        yield Wrong("messages that are none", CHAT, {"messages": messages})
    for path in ("/v1", "/v1/completions/", "/docs", "/v1/files", "/../../etc/passwd", "/v1/models/%2e%2e%2fetc"):
        yield Wrong("paths that are none", path, None, "GET")


async def wrong(client: httpx.AsyncClient, repeats: int) -> list[Row]:
    """Rows of all wrong requests, by kind, and of `/health` meanwhile."""
    rows: dict[str, Row] = {}
    health = Row("wrong requests", "/health meanwhile")
    async with health_watched(client, health):
        for _ in range(repeats):
            for request in wrong_requests():
                row = rows.setdefault(request.kind, Row("wrong requests", request.kind))
                await _try(client, request, row)
    return [*rows.values(), health]


async def _try(client: httpx.AsyncClient, request: Wrong, row: Row) -> None:
    start = time.monotonic()
    body: dict[str, Any] = {}
    if isinstance(request.body, bytes):
        body = {"content": request.body}
    elif request.body is not None:
        body = {"content": json.dumps(request.body).encode()}
    try:
        reply = await client.request(request.method, request.path, **body)
    except httpx.HTTPError as error:
        row.add("no answer", time.monotonic() - start, f"{str(request.body)[:80]}: {error!r}")
        return
    took = time.monotonic() - start
    why = misshapen(reply)
    if took > ANSWER_SECONDS:
        why = f"after {took:.1f} s"
    row.add(str(reply.status_code), took, None if why is None else f"{str(request.body)[:80]}: {why}")


def misshapen(reply: httpx.Response) -> str | None:
    """What is wrong with an answer to a wrong request; None if it is a 4xx in OpenAI's shape."""
    if not 400 <= reply.status_code < 500:
        return f"{reply.status_code} {reply.text[:200]}"
    try:
        error = reply.json()["error"]
        shaped = set(error) == {"message", "type", "param", "code"} and isinstance(error["message"], str)
    except (ValueError, KeyError, TypeError):
        shaped = False
    return None if shaped and reply.headers.get("x-request-id") else f"not OpenAI's shape: {reply.text[:200]}"


def keys() -> list[str | None]:
    """Values of `Authorization` that do not have the key, as strangers would try them."""
    near = [
        KEY[:-1],
        KEY + "x",
        KEY.upper(),
        KEY[1:],
        KEY[::-1],
        f"{KEY} {KEY}",
        KEY.encode().hex(),
        f'"{KEY}"',
        "*",
    ]
    return [
        None, "", "Bearer", KEY, f"Basic {KEY}", f"Token {KEY}", f"Bearer{KEY}", f"Bearer, {KEY}",
        *(f"Bearer {each}" for each in near), "Bearer null", "Bearer None", "Bearer " + "x" * 5000,
    ]  # fmt: skip


async def strangers(url: str) -> Row:
    """Row of every route without the right key."""
    row = Row("wrong requests", "without the key")
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        for path in (COMPLETIONS, CHAT, "/v1/models", "/load_report", "/metrics", "/version", "/nowhere", "/health/"):
            for key in keys():
                start = time.monotonic()
                headers = {} if key is None else {"Authorization": key}
                reply = await client.request("POST" if path in (COMPLETIONS, CHAT) else "GET", path, headers=headers)
                why = None if reply.status_code == 401 else f"{path} {key!r}: {reply.status_code}"
                row.add(str(reply.status_code), time.monotonic() - start, why)
    return row
