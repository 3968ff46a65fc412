"""Clients of a server: what they ask, the one right answer to it, and what became of each request."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
from serve_process import KEY

STUCK_SECONDS = 300.0
HEADERS = {"Authorization": f"Bearer {KEY}"}
PROMPTS = (
    "def read_lines(path):\n", "class Stack:\n    def __init__(self", "import os\n", "for i in range(",
    "# the number of", "while True:\n    try:\n", "return sorted(", "x = {",
)  # fmt: skip


@dataclass
class Row:
    """What became of some tries: how often each outcome, the longest one in seconds, what was wrong."""

    group: str
    what: str
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, outcome: str, seconds: float, wrong: str | None = None) -> None:
        """Count a try."""
        self.outcomes[outcome] += 1
        self.seconds.append(seconds)
        if wrong is not None:
            self.wrong.append(wrong)

    def to_json(self) -> dict[str, Any]:
        """For the result file: times as median and longest, ten examples of what was wrong."""
        ordered = sorted(self.seconds) or [0.0]
        return {
            "group": self.group, "what": self.what, "tries": self.outcomes.total(), "outcomes": dict(self.outcomes),
            "median_seconds": round(ordered[len(ordered) // 2], 3), "longest_seconds": round(ordered[-1], 3),
            "wrong": len(self.wrong), "examples": self.wrong[:10],
        }  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A request whose answer is always the same: greedy, or sampled with a seed."""

    path: str
    body: dict[str, Any]
    stream: bool

    @property
    def kind(self) -> str:
        """How the table names it."""
        return f"{'chat' if 'chat' in self.path else 'completions'}{', streaming' if self.stream else ''}"


@dataclass(frozen=True)
class Reply:
    """Status, text of the answer (or the body of an error), seconds to its first text and to its end."""

    status: int
    text: str
    first_seconds: float
    seconds: float
    headers: httpx.Headers


def questions() -> list[Question]:
    """Every prompt in every way, some sampled."""
    found = []
    ways = itertools.product(("/v1/completions", "/v1/chat/completions"), (False, True))
    for number, (prompt, (path, stream)) in enumerate(itertools.product(PROMPTS, ways)):
        said = {"prompt": prompt} if path == "/v1/completions" else {"messages": [{"role": "user", "content": prompt}]}
        how = {"temperature": 0.9, "seed": number} if number % 5 == 4 else {"temperature": 0}
        found.append(Question(path, {**said, **how, "max_tokens": 3 + number % 6}, stream))
    return found


def new_client(url: str) -> httpx.AsyncClient:
    """A client with the key and no limits of its own but that of a stuck request."""
    return httpx.AsyncClient(
        base_url=url, headers=HEADERS, timeout=STUCK_SECONDS, limits=httpx.Limits(max_connections=None)
    )


async def ask(client: httpx.AsyncClient, question: Question) -> Reply:
    """Send a question and read all of its answer."""
    start = time.monotonic()
    first = 0.0
    parts: list[str] = []
    body = {**question.body, "stream": question.stream}
    async with client.stream("POST", question.path, json=body) as response:
        async for line in response.aiter_lines():
            first = first or time.monotonic() - start
            parts.append(line)
    text = "\n".join(parts)
    if response.status_code == 200:
        text = _streamed(parts) if question.stream else _whole(text)
    return Reply(response.status_code, text, first, time.monotonic() - start, response.headers)


def _whole(text: str) -> str:
    choice = json.loads(text)["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def _streamed(lines: list[str]) -> str:
    events = [line.removeprefix("data: ") for line in lines if line]
    if not events or events.pop() != "[DONE]":
        return "the stream has no [DONE]"
    found = ""
    for event in map(json.loads, events):
        for choice in event.get("choices", []):
            found += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
        if "error" in event:
            return f"error: {event['error']['message']}"
    return found


async def answers_alone(client: httpx.AsyncClient, asked: list[Question]) -> dict[int, str]:
    """The answers one after the other, by the place of the question: what they are under load as well."""
    found = {}
    for place, question in enumerate(asked):
        reply = await ask(client, question)
        if reply.status != 200:
            raise RuntimeError(f"{question.body} alone: {reply.status} {reply.text}")
        found[place] = reply.text
    return found


async def load(
    client: httpx.AsyncClient, asked: list[Question], alone: dict[int, str], clients: int, seconds: float, seed: int
) -> list[Row]:
    """Rows of `clients` that ask for `seconds`, each the next question as soon as it has its answer."""
    rows = {kind: Row("load", kind) for kind in sorted({question.kind for question in asked})}
    first = Row("load", "first text of a stream")
    end = time.monotonic() + seconds

    async def one(number: int) -> None:
        chosen = random.Random(seed * 1000 + number)
        while time.monotonic() < end:
            place = chosen.randrange(len(asked))
            row, start = rows[asked[place].kind], time.monotonic()
            try:
                reply = await ask(client, asked[place])
            except httpx.HTTPError as error:
                row.add("no answer", time.monotonic() - start, f"{asked[place].body}: {error!r}")
                continue
            judge(row, reply, alone[place])
            if asked[place].stream and reply.status == 200:
                first.add("right", reply.first_seconds)
            if reply.status == 429:
                await asyncio.sleep(min(2.0, float(reply.headers.get("retry-after", 1))))

    await asyncio.gather(*(one(number) for number in range(clients)))
    return [*rows.values(), first]


def judge(row: Row, reply: Reply, right: str) -> None:
    """Count a reply: right, refused because the queue is full, or wrong."""
    if reply.status == 429:
        named = "retry-after" in reply.headers
        row.add("queue is full", reply.seconds, None if named else "429 without Retry-After")
    elif reply.status != 200:
        row.add(str(reply.status), reply.seconds, f"{reply.status} {reply.text[:200]}")
    elif reply.text != right:
        row.add("another answer", reply.seconds, f"{reply.text!r} instead of {right!r}")
    else:
        row.add("right", reply.seconds)
