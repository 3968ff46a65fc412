from __future__ import annotations

from typing import Any

import pytest
from quantload.server.api_errors import ApiError
from quantload.server.generation_request import parse_chat, parse_completion

HELLO = [{"role": "user", "content": "hello"}]


def refused(parse: Any, body: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(body, "tiny")
    return caught.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 5),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", ["a", 1]),
        ("prompt", [1, -2]),
        ("prompt", [True]),
        ("prompt", ["a"] * 129),
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("logprobs", 21),
        ("logprobs", True),
        ("min_tokens", -1),
        ("ignore_eos", 1),
        ("stop_token_ids", 3),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [0] * 129),
        ("stream_options", {"include_usage": True}),  # without a stream
        ("prompt", None),
        ("stream", "yes"),
        ("stream", 1),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("max_tokens", "7"),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("frequency_penalty", 3),
        ("presence_penalty", -3),
        ("seed", "x"),
        ("seed", 2**63),
        ("stop", ""),
        ("stop", [""]),
        ("stop", [1]),
        ("stop", ["x"] * 17),
        ("stop", "x" * 1001),
        ("logit_bias", [1]),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"1": 101}),
    ],
)
def test_a_wrong_value_is_refused_by_name(field: str, value: object) -> None:
    error = refused(parse_completion, {"prompt": "x", field: value})
    assert (error.status, error.param) == (400, field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 3),
        ("echo", True),
        ("suffix", "end"),
    ],
)
def test_what_would_change_the_answer_and_is_not_there_is_refused(field: str, value: object) -> None:
    error = refused(parse_completion, {"prompt": "x", field: value})
    assert (error.status, error.param, error.code) == (400, field, "unsupported_parameter")


@pytest.mark.parametrize(
    "extra",
    [{"n": 1}, {"echo": False}, {"logprobs": None}, {"user": "me"}, {"stream_options": None}, {"ignore_eos": False}],
)
def test_what_asks_for_nothing_is_taken(extra: dict[str, Any]) -> None:
    (request,) = parse_completion({"prompt": "x", **extra}, "tiny").parts()
    assert request.body == {"model": "tiny", "prompt": "x", "stream": False}


def test_an_unknown_field_is_named() -> None:
    assert refused(parse_completion, {"prompt": "x", "promt": "y"}).code == "unknown_parameter"
    assert refused(parse_completion, {"prompt": "x", "messages": HELLO}).param == "messages"


@pytest.mark.parametrize("body", [[], "x", 3, None, True])
def test_only_an_object_is_a_request(body: object) -> None:
    assert refused(parse_chat, body).status == 400


def test_another_model_does_not_exist() -> None:
    error = refused(parse_chat, {"model": "gpt-4", "messages": HELLO})
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert error.body()["error"]["type"] == "invalid_request_error"
    assert parse_chat({"model": "tiny", "messages": HELLO}, "tiny").body["model"] == "tiny"


def test_the_newer_name_of_the_token_limit_wins() -> None:
    both = {"messages": HELLO, "max_tokens": 3, "max_completion_tokens": 5}
    assert parse_chat(both, "tiny").max_tokens == 5
    assert refused(parse_completion, {"prompt": "x", "max_completion_tokens": 5}).status == 400


def test_numbers_arrive_as_given() -> None:
    request = parse_completion(
        {"prompt": ["x"], "temperature": 1, "stop": "end", "logit_bias": {"7": -100}, "seed": -4, "stream": True},
        "tiny",
    )
    assert (request.temperature, request.stop, request.logit_bias, request.seed) == (1.0, ("end",), {7: -100.0}, -4)
    assert request.stream is request.body["stream"] is True


def test_no_tools_when_the_client_forbids_them() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert parse_chat({"messages": HELLO, "tools": tools}, "tiny").body["tools"] == tools
    assert "tools" not in parse_chat({"messages": HELLO, "tools": tools, "tool_choice": "none"}, "tiny").body


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hi",
        ["hi"],
        [{"content": "x"}],
        [{"role": 1, "content": "x"}],
        [{"role": "user", "content": 7}],
        [{"role": "user", "content": [{"text": "x"}]}],
        [{"role": "user", "content": [{"type": "text", "text": None}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/"}}]}],
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "/etc/passwd"}}]}],
        [{"role": "assistant", "tool_calls": {}}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "3"}}]}],
    ],
)
def test_wrong_messages_are_refused(messages: object) -> None:
    error = refused(parse_chat, {"messages": messages})
    assert error.status == 400
    assert error.param is not None
    assert error.param.startswith("messages")


def test_right_messages_pass() -> None:
    messages = [
        {"role": "system", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"role": "assistant", "content": "y", "tool_calls": None},
    ]
    passed = parse_chat({"messages": messages}, "tiny").body["messages"]
    assert "tool_calls" not in passed[-1]


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "return_dict", "tools"])
def test_a_request_may_not_replace_the_template(name: str) -> None:
    body = {"messages": HELLO, "chat_template_kwargs": {"enable_thinking": False}}
    assert parse_chat(body, "tiny").body["chat_template_kwargs"] == {"enable_thinking": False}
    error = refused(parse_chat, {"messages": HELLO, "chat_template_kwargs": {name: "x"}})
    assert error.param == "chat_template_kwargs"
