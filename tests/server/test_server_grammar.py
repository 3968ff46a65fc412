"""Answers that keep to a schema, and tools that have to be called."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from quantload.server import ServerState
from quantload.server.api_errors import ApiError
from quantload.server.generation_request import parse_chat, parse_completion
from server_harness import Client, running
from transformers import Qwen3Config, Qwen3ForCausalLM

pytest.importorskip("llguidance")

HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["fox", "dog"]}, "legs": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["kind", "legs"],
    "additionalProperties": False,
}
BY_SCHEMA = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}}


def tool(name: str, **parameters: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": parameters, "required": [*parameters], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS = [tool("jump", over={"enum": ["dog", "log"]}), tool("sleep", hours={"type": "integer", "maximum": 9})]


@pytest.fixture(scope="module")
def client(tokenizer: Any) -> Iterator[Client]:
    """A model of a type whose answers are parsed for reasoning and tool calls, with more tokens than its tokenizer."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 13, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, max_position_embeddings=512,
    )  # fmt: skip
    state = ServerState("tiny")
    state.finish(Qwen3ForCausalLM(config).eval(), tokenizer)
    with running(state) as client:
        yield client


def chat(client: Client, **fields: Any) -> dict[str, Any]:
    reply = client.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 200, **fields})
    assert reply.status == 200, reply.text
    choice: dict[str, Any] = reply.json["choices"][0]
    return choice


@pytest.mark.parametrize("sampling", [{}, {"temperature": 2, "seed": 3}, {"temperature": 1, "top_k": 2, "seed": 1}])
def test_an_answer_keeps_to_its_schema_and_ends(client: Client, sampling: dict[str, Any]) -> None:
    choice = chat(client, response_format=BY_SCHEMA, **sampling)
    animal = json.loads(choice["message"]["content"])
    assert animal.keys() == {"kind", "legs"}
    assert animal["kind"] in ("fox", "dog")
    assert 1 <= animal["legs"] <= 9
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == json.dumps(animal)


def test_a_completion_and_a_stream_keep_to_it_too(client: Client) -> None:
    body = {"prompt": "the", "max_tokens": 200, "response_format": BY_SCHEMA, "temperature": 2, "seed": 5, "n": 2}
    choices = client.post("/v1/completions", body).json["choices"]
    assert all(json.loads(choice["text"])["kind"] in ("fox", "dog") for choice in choices)
    events = client.post("/v1/completions", {**body, "stream": True}).events[:-1]
    for index, choice in enumerate(choices):
        pieces = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]


def test_any_object(client: Client) -> None:
    choice = chat(client, response_format={"type": "json_object"}, temperature=1.0, seed=2)
    assert choice["message"]["content"].startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)


def test_what_is_cut_off_says_so(client: Client) -> None:
    choice = chat(client, response_format=BY_SCHEMA, max_tokens=3)
    assert choice["finish_reason"] == "length"
    called = chat(client, tools=TOOLS, tool_choice="required", max_tokens=3)
    assert called["finish_reason"] == "length"
    assert called["message"]["content"].startswith("[")
    assert not called["message"].get("tool_calls")


def arguments(call: dict[str, Any]) -> None:
    given = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "jump":
        assert given["over"] in ("dog", "log")
    else:
        assert call["function"]["name"] == "sleep"
        assert given["hours"] <= 9


@pytest.mark.parametrize("seed", [1, 2])
def test_a_tool_that_has_to_be_called_is(client: Client, seed: int) -> None:
    fields = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "temperature": 2, "seed": seed}
    choice = chat(client, **fields)
    (call,) = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], choice["message"]["content"], call["type"]) == ("tool_calls", None, "function")
    arguments(call)
    body = {"messages": HELLO, "max_tokens": 200, **fields, "stream": True}
    *_, last, done = client.post("/v1/chat/completions", body).events
    assert done == "[DONE]"
    (streamed,) = last["choices"][0]["delta"]["tool_calls"]
    assert (last["choices"][0]["finish_reason"], streamed["index"]) == ("tool_calls", 0)
    assert streamed["function"] == call["function"]


def test_a_tool_that_is_named_is_called(client: Client) -> None:
    said: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]
    nothing = {"type": "object", "additionalProperties": False}
    tools: list[ChatCompletionToolParam] = [
        {"type": "function", "function": {"name": name, "parameters": nothing}} for name in ("jump", "sleep")
    ]
    with openai.OpenAI(base_url=f"{client.url}/v1", api_key="x", max_retries=0) as api:
        answer = api.chat.completions.create(
            model="tiny", messages=said, tools=tools, max_tokens=200, temperature=0,
            tool_choice={"type": "function", "function": {"name": "sleep"}},
        )  # fmt: skip
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    (call,) = calls
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("sleep", "{}")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"response_format": {"type": "json_object"}, "min_tokens": 3}, "min_tokens"),
        ({"response_format": {"type": "json_object"}, "tools": TOOLS, "tool_choice": "required"}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice"),
        ({"tools": [{"type": "function"}], "tool_choice": "required"}, "tools"),
        ({"tools": [{"function": {"name": "f", "parameters": 3}}], "tool_choice": "required"}, "tools"),
        ({"tools": TOOLS, "parallel_tool_calls": False}, "parallel_tool_calls"),
    ],
)
def test_what_no_grammar_can_follow_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat({"messages": HELLO, **fields}, "tiny")
    assert (caught.value.status, caught.value.param) == (400, param)


def test_a_schema_that_is_none_is_a_400(client: Client) -> None:
    wrong = {"type": "json_schema", "json_schema": {"schema": {"type": "strange"}}}
    reply = client.post("/v1/completions", {"prompt": "x", "response_format": wrong})
    assert (reply.status, reply.json["error"]["param"]) == (400, "response_format")
    assert "strange" in reply.json["error"]["message"]


def test_without_the_extra_a_400_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantload.server.grammar.find_spec", lambda _: None)
    with pytest.raises(ApiError, match=r"quantload\[grammar\]") as caught:
        parse_completion({"prompt": "x", "response_format": {"type": "json_object"}}, "tiny")
    assert (caught.value.status, caught.value.code) == (400, "unsupported_parameter")
    assert parse_completion({"prompt": "x", "response_format": {"type": "text"}}, "tiny").constraint is None


CIRCLE = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}


@pytest.mark.parametrize(
    "schema",
    [
        {**CIRCLE, "$ref": "#/$defs/a"},
        {**CIRCLE, "type": "array", "items": {"$ref": "#/$defs/a"}, "minItems": 1},
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    ],
)
def test_a_schema_that_nothing_keeps_to_is_refused_by_name(client: Client, schema: dict[str, Any]) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"messages": HELLO, "max_tokens": 20, "response_format": wanted}
    reply = client.post("/v1/chat/completions", body)
    assert (reply.status, reply.json["error"]["param"]) == (400, "response_format"), reply.text
    *_, last, done = client.post("/v1/chat/completions", {**body, "stream": True}).events
    assert last["error"]["type"] == "invalid_request_error"
    assert (last["error"]["param"], done) == ("response_format", "[DONE]")
