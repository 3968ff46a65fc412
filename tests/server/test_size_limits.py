"""Requests that are too large are refused before they cost anything, and none of them holds up the others."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from quantload.server import ServerState, app
from quantload.server.api_errors import ApiError
from quantload.server.json_values import parse_json
from quantload.server.off_loop import LARGE_BYTES, OnLoop, Workers, on_loop
from quantload.server.size_limits import (
    LEAST_BODY,
    MOST_BODY,
    MOST_MEDIA_BODY,
    PIECE,
    UNKNOWN_TOKEN_BYTES,
    UNLIMITED_CONTEXT,
    SizeLimits,
    size_limits,
    texts_of,
)  # fmt: skip
from server_harness import Client, running

PARTS = 1000
"""Objects, lists and fields of a body in these tests."""


class Letters:
    """A tokenizer with a token for each letter, or for a word of them, that counts what it was given."""

    def __init__(self, word: int = 1) -> None:
        self.word = word
        self.letters = 0

    def get_vocab(self) -> dict[str, int]:
        return {"a" * self.word: 0, "b": 1}

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        self.letters += len(text)
        return {"input_ids": [0] * (len(text) // self.word)}


@pytest.mark.parametrize(
    ("context", "piece", "expected"),
    [
        (100, "abcd", 400),
        (100, "ĠĠĠ", 300),  # spaces, as byte-level vocabularies write them
        (100, "▁▁ab", 400),  # as SentencePiece does
        (100, "鍵", 300),
        (None, "ab", 2 * UNLIMITED_CONTEXT),
    ],
)
def test_a_prompt_has_no_more_bytes_than_the_context_can_hold(context: int | None, piece: str, expected: int) -> None:
    class Tokenizer:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, piece: 1}

    assert size_limits(context, Tokenizer(), media=False).prompt_bytes == expected


def test_a_tokenizer_that_cannot_list_its_tokens_has_tokens_of_a_usual_length() -> None:
    assert size_limits(10, object(), media=False).prompt_bytes == 10 * UNKNOWN_TOKEN_BYTES


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (SizeLimits(512, 8), LEAST_BODY),
        (SizeLimits(40_960, 16), 6 * 40_960 * 16 + (256 << 10)),
        (SizeLimits(1 << 20, 128), MOST_BODY),
        (SizeLimits(512, 8, media=True), MOST_MEDIA_BODY),
    ],
)
def test_a_body_has_room_for_the_longest_prompt_in_json(limits: SizeLimits, expected: int) -> None:
    assert limits.body_bytes == expected
    if expected not in (MOST_BODY, LEAST_BODY, MOST_MEDIA_BODY):
        assert len(json.dumps({"prompt": "\x01" * limits.prompt_bytes})) <= limits.body_bytes


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": "b" * 101_000}, "prompt"),
        ({"prompt": "é" * 51_000}, "prompt"),
        ({"messages": [{"role": "user", "content": "b" * 60_000}] * 2}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "b" * 101_000}]}]}, "messages"),
        ({"messages": [], "tools": [{"function": {"description": "b" * 101_000}}]}, "messages"),
        ({"messages": [], "chat_template_kwargs": {"x": ["b" * 101_000]}}, "messages"),
        ({"messages": [{"role": "", "content": ""}] * 1001}, "messages"),
    ],
)
def test_what_cannot_fit_is_refused_before_it_is_tokenized(body: dict[str, Any], field: str) -> None:
    tokenizer = Letters()
    with pytest.raises(ApiError) as caught:
        SizeLimits(1000, 100).check(body, tokenizer)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, field, "context_length_exceeded")
    assert tokenizer.letters == 0


def test_a_long_text_is_tokenized_only_until_it_is_known_that_it_does_not_fit() -> None:
    tokenizer = Letters()
    with pytest.raises(ApiError, match="context is 100000 tokens"):
        SizeLimits(100_000, 100).check({"prompt": "b" * 9_000_000}, tokenizer)
    assert tokenizer.letters <= 100_000 + 2 * PIECE


@pytest.mark.parametrize(
    "body", [{"prompt": "a" * 100_000}, {"messages": [{"content": "a" * 50_000}, {"content": "a" * 50_000}]}]
)
def test_what_fits_is_let_through(body: dict[str, Any]) -> None:
    """Of the longest tokens alone, so the most bytes that can fit."""
    tokenizer = Letters(word=100)
    SizeLimits(1000, 100).check(body, tokenizer)
    assert tokenizer.letters == 100_000


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("[" + "{}," * PARTS + "0]", True),
        ("[" + "{}," * (PARTS - 1) + "0]", False),
        (json.dumps("{[" * PARTS), False),
        (json.dumps(['\\"{[' * PARTS, [{}]]), False),
        ("{" + ",".join(f'"{n}":0' for n in range(PARTS)) + "}", True),
        (json.dumps([":" * PARTS, {"a:": "::"}]), False),
        ('["{", ' + "[],{}," * (PARTS // 2) + "0]", True),
    ],
)
@pytest.mark.parametrize("kind", [str, str.encode])
def test_json_has_no_more_parts_than_are_parsed_in_no_time(
    text: str, refused: bool, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantload.server.json_values.MAX_PARTS", PARTS)
    if not refused:
        assert parse_json(kind(text)) == json.loads(text)
        return
    with pytest.raises(ApiError, match="objects, lists and fields"):
        parse_json(kind(text))


@pytest.mark.parametrize(
    "text", ['"' + '\\"' * 500_000, '"' + "\\" * 999_999, "[" * 200_000 + '"a' * 30_000, '"' * 99_999]
)
def test_a_string_without_an_end_takes_no_longer_than_another(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantload.server.json_values.MAX_PARTS", PARTS)
    start = time.monotonic()
    with pytest.raises(ApiError):
        parse_json("{" * (PARTS + 1) + text)
    with pytest.raises(ApiError):
        parse_json(text + "{" * (PARTS + 1))
    assert time.monotonic() - start < 5


def test_media_are_no_text() -> None:
    value = [{"type": "image_url", "image_url": {"url": "data:"}}, {"text": "x", "a": {"b": ["y"]}}]
    assert sorted(texts_of(value)) == ["image_url", "x", "y"]


@pytest.fixture(scope="module")
def served(model: Any, tokenizer: Any) -> Iterator[tuple[Client, ServerState]]:
    state = ServerState("tiny")
    state.finish(model, tokenizer)
    with running(state) as client:
        yield client, state


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "the fox " * 60_000}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "the fox " * 60_000}]}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}] * 600}, "messages"),
        ("/v1/completions", {"prompt": ["the", "the fox " * 60_000], "n": 3}, "prompt"),
        ("/v1/completions", {"prompt": [1] * 100_000}, "prompt"),
        ("/v1/completions", {"prompt": "the fox " * 500}, None),  # by its bytes it could be within the context
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_a_400(
    served: tuple[Client, ServerState], path: str, body: dict[str, Any], param: str | None, stream: bool
) -> None:
    reply = served[0].post(path, {**body, "stream": stream})
    assert (reply.status, reply.json["error"]["code"]) == (400, "context_length_exceeded")
    assert param is None or reply.json["error"]["param"] == param


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(served: tuple[Client, ServerState]) -> None:
    with socket.create_connection(("127.0.0.1", served[0].port), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99000000\r\n\r\n")
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 413
        assert json.loads(response.read())["error"]["type"] == "invalid_request_error"


def test_a_body_of_unsaid_length_is_read_no_further_than_its_limit(served: tuple[Client, ServerState]) -> None:
    connection = socket.create_connection(("127.0.0.1", served[0].port), timeout=10)
    with connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(17):
            connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413")


def test_bodies_together_have_a_limit(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "ALL_BODIES", 100_000)
    state = ServerState("tiny")
    state.finish(model, tokenizer)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 90000\r\n\r\n"
    with running(state) as client:
        with socket.create_connection(("127.0.0.1", client.port), timeout=10) as first:
            first.sendall(head + b"x" * 80_000)
            time.sleep(0.1)
            reply = client.post("/v1/completions", {"prompt": "x" * 50_000})
            assert (reply.status, reply.json["error"]["code"]) == (503, "server_busy")
            assert int(reply.headers["retry-after"]) >= 1
        time.sleep(0.1)  # whoever leaves gives back what it had
        assert client.post("/v1/completions", {"prompt": "x" * 50_000}).status == 400
        assert client.post("/v1/completions", {"prompt": "the", "max_tokens": 1}).status == 200


@pytest.mark.parametrize("slow", ["json", "tokenizer", "template"])
def test_others_are_answered_while_a_request_is_prepared(
    slow: str, served: tuple[Client, ServerState], monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    client, begun, go_on = served[0], threading.Event(), threading.Event()
    chat = {"messages": [{"role": "user", "content": "the fox"}], "max_tokens": 1}

    def held(real: Any) -> Any:
        def work(*args: Any, **kwargs: Any) -> Any:
            begun.set()
            assert go_on.wait(10)
            return real(*args, **kwargs)

        return work

    if slow == "json":
        monkeypatch.setattr(app, "parse_json", held(parse_json))
    elif slow == "tokenizer":
        monkeypatch.setattr(type(tokenizer), "_encode_plus", held(type(tokenizer)._encode_plus))
    else:
        monkeypatch.setattr(type(tokenizer), "apply_chat_template", held(type(tokenizer).apply_chat_template))
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(client.post, "/v1/chat/completions", chat)
        try:
            assert begun.wait(10)
            for _ in range(3):
                assert client.get("/health").status == 200
            assert not reply.done()
        finally:
            go_on.set()
        assert reply.result().status == 200


def test_large_requests_leave_a_thread_for_the_others() -> None:
    async def check() -> None:
        workers, go_on = Workers(), threading.Event()
        large = [asyncio.ensure_future(workers.run(go_on.wait, LARGE_BYTES)) for _ in range(4)]
        assert await asyncio.wait_for(workers.run(lambda: 7, 100), 5) == 7
        go_on.set()
        await asyncio.gather(*large)
        workers.stop()
        with pytest.raises(ApiError, match="stopping"):
            await workers.run(lambda: 7, 100)

    asyncio.run(check())


def test_a_coroutine_runs_in_threads_and_hands_back_what_is_of_the_loop() -> None:
    seen: list[str] = []

    async def on_the_loop(fail: bool) -> int:
        seen.append(threading.current_thread().name)
        await asyncio.sleep(0)
        if fail:
            raise ValueError("on the loop")
        return 3

    async def work(loop: asyncio.AbstractEventLoop, fail: bool) -> int:
        seen.append(threading.current_thread().name)
        assert on_loop(loop, threading.current_thread) is threading.main_thread()
        got = await OnLoop(loop, on_the_loop(fail))
        seen.append(threading.current_thread().name)
        return got + 1

    async def check() -> None:
        workers, loop = Workers(), asyncio.get_running_loop()
        assert await workers.run_coroutine(work(loop, False), 0) == 4
        with pytest.raises(ValueError, match="on the loop"):
            await workers.run_coroutine(work(loop, True), 0)
        workers.stop()

    asyncio.run(check())
    assert [name.startswith("quantload-request") for name in seen] == [True, False, True, True, False]
