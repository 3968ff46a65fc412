"""Requests by a grammar over all fields and routes (`bench/serve_fuzz.py`): none is answered with a 5xx."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Any

import pytest
import serve_fuzz
from quantload.server import ServerState, create_app
from serve_grammar import Grammar, Request
from transformers import BertConfig, BertModel


@pytest.mark.parametrize(
    ("batched", "count"),
    [
        (False, 400),
        pytest.param(False, 6000, marks=pytest.mark.slow),
        pytest.param(True, 3000, marks=pytest.mark.slow),
    ],
)
def test_no_request_is_answered_with_a_5xx(model: Any, tokenizer: Any, batched: bool, count: int) -> None:
    state = ServerState("demo", continuous_batching=batched)
    state.finish(model, tokenizer)
    counts, faults = asyncio.run(serve_fuzz.fuzz(create_app(state, request_log="off"), count, count))
    state.stop()
    assert faults == []
    assert counts["200"] > count / 8
    assert counts["400"] > count / 8
    assert counts["named"] > 0.8 * counts["400"]


@pytest.mark.slow
def test_a_model_that_only_encodes_answers_with_no_5xx(tokenizer: Any) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes)).eval()
    state = ServerState("demo")
    state.finish(model, tokenizer)
    fuzzed = serve_fuzz.fuzz(create_app(state, request_log="off"), "bert", 3000, grammar=partial(Grammar, embeddings=9))
    counts, faults = asyncio.run(fuzzed)
    state.stop()
    assert faults == []
    assert counts["200"] > 150


def test_requests_are_a_function_of_the_seed() -> None:
    first, again = Grammar(1), Grammar(1)
    assert [first.request() for _ in range(200)] == [again.request() for _ in range(200)]


@pytest.mark.parametrize(
    ("status", "body", "what"),
    [
        (500, b"{}", "status 500"),
        (0, b"", "status 0"),
        (200, b'data: {"error": {"type": "server_error"}}\n\ndata: [DONE]\n\n', "in a stream"),
        (400, b"Bad Request", "not OpenAI's shape"),
        (422, b'{"detail": "x"}', "not OpenAI's shape"),
        (400, b'{"error": {"message": "m", "type": "server_error", "param": null, "code": null}}', "not OpenAI's"),
    ],
)
def test_what_is_wrong_with_an_answer_is_found(status: int, body: bytes, what: str) -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        if status:
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": body})

    request = Request("POST", "/v1/completions")
    assert what in str(serve_fuzz.fault(request, asyncio.run(serve_fuzz.ask(app, request))))


def test_an_exception_and_no_answer_are_faults() -> None:
    async def raising(*_: Any) -> None:
        raise KeyError("x")

    async def waiting(_scope: Any, receive: Any, _send: Any) -> None:
        while True:
            await receive()

    request = Request("GET", "/health")
    assert "KeyError" in str(serve_fuzz.fault(request, asyncio.run(serve_fuzz.ask(raising, request))))
    assert "no answer" in str(serve_fuzz.fault(request, asyncio.run(serve_fuzz.ask(waiting, request, 0.05))))


def test_a_right_answer_is_none() -> None:
    request = Request("POST", "/v1/completions")
    error = {"error": {"message": "m", "type": "invalid_request_error", "param": None, "code": None}}
    assert serve_fuzz.fault(request, serve_fuzz.Answer(400, json.dumps(error).encode())) is None
    assert serve_fuzz.fault(request, serve_fuzz.Answer(200, b"data: {}\n\ndata: [DONE]\n\n")) is None
