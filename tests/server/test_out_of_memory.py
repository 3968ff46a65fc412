"""A request that there is no memory for is answered, and so is the next one."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from quantload.errors import MemoryBudgetError
from quantload.server import generation_request
from quantload.server.transformers_serving import ServedModel
from quantload.server.warm_up import warm_up
from server_harness import Client

ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4096 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize("error", [RuntimeError(ALLOCATOR), MemoryError()], ids=["torch", "python"])
def test_an_answer_that_finds_no_memory_is_a_503_or_an_event_that_says_so(
    model: Any, client: Client, error: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise error

    body = {"prompt": "the", "max_tokens": 7}
    handle = model.register_forward_pre_hook(fail)
    try:
        reply = client.post("/v1/completions", body)
        events = client.post("/v1/completions", {**body, "stream": True}).events
    finally:
        handle.remove()
    said = "a tensor of 4096 bytes" if isinstance(error, RuntimeError) else "out of memory"
    message = f"there was no memory for an answer of up to 7 tokens to this request: {said}"
    assert (reply.status, reply.headers["retry-after"]) == (503, "1")
    assert reply.json["error"] == {"message": message, "type": "server_error", "param": None, "code": "out_of_memory"}
    assert events[-2:] == [{"error": reply.json["error"]}, "[DONE]"]
    assert client.get("/health").status == client.post("/v1/completions", body).status == 200


def test_a_body_that_finds_no_memory_is_a_503(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(generation_request.GenerationRequest, "__init__", fail)
        reply = client.post("/v1/completions", {"prompt": "the"})
    assert (reply.status, reply.json["error"]["code"]) == (503, "out_of_memory")
    assert reply.json["error"]["message"] == "there was no memory for this request: out of memory"
    assert client.post("/v1/completions", {"prompt": "the", "max_tokens": 1}).status == 200


def test_first_tokens_that_find_no_memory_end_the_load(model: Any, tokenizer: Any) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError(ALLOCATOR)

    handle = model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(MemoryBudgetError, match="no memory for the first tokens: a tensor of 4096 bytes"):
            warm_up(ServedModel(model, tokenizer, "demo", False), threading.Event())
    finally:
        handle.remove()
