"""What a client gets wrong is a 400 that names its field: never a 500, and never an error inside of a stream."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from quantload.server import ServerState
from quantload.server.warm_up import warm_up
from server_harness import Client, running
from transformers import PreTrainedTokenizerFast

HELLO = [{"role": "user", "content": "hello"}]
COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"


def said_of(text: str, kind: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": kind, "content": text}]}


def calling(arguments: Any) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"messages": [*HELLO, {"role": "assistant", "tool_calls": [call]}]}


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETION, {"prompt": "a\ud800"}, "prompt"),
    (COMPLETION, {"prompt": "a", "stop": "\udfff"}, "stop"),
    (COMPLETION, {"prompt": "a", "user": "\ud800"}, "user"),
    (COMPLETION, {"prompt": "a", "temperature": 1e-300}, "temperature"),
    (COMPLETION, {"prompt": "a", "temperature": 1e-6}, "temperature"),
    (COMPLETION, {"prompt": "a", "temperature": 1e300}, "temperature"),
    (COMPLETION, {"prompt": "a", "temperature": 10**40}, "temperature"),
    (COMPLETION, {"prompt": "a", "repetition_penalty": 1e-300}, "repetition_penalty"),
    (COMPLETION, {"prompt": "a", "repetition_penalty": 1e-3}, "repetition_penalty"),
    (COMPLETION, {"prompt": "a", "repetition_penalty": 1e300}, "repetition_penalty"),
    (COMPLETION, {"prompt": "a", "logit_bias": {"320": 1}}, "logit_bias"),
    (COMPLETION, {"prompt": "a", "logit_bias": {"999999999": 1}}, "logit_bias"),
    (COMPLETION, {"prompt": "a", "logit_bias": {"\u0663": 1}}, "logit_bias"),
    (COMPLETION, {"prompt": "a", "logit_bias": {"1.0": 1}}, "logit_bias"),
    (COMPLETION, {"prompt": "a", "logit_bias": {"-1": 1}}, "logit_bias"),
    (COMPLETION, {"prompt": ""}, "prompt"),
    (COMPLETION, {"prompt": "x y " * 512}, "prompt"),
    (COMPLETION, {"prompt": "<beyond>"}, "prompt"),
    (CHAT, said_of("\ud800"), "messages[0].content"),
    (CHAT, said_of("a", kind="\ud800"), "messages[0].role"),
    (CHAT, said_of("x y " * 512), "messages"),
    (CHAT, said_of("<beyond>"), "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": {}, "text": "a"}]}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": ["text"], "text": "a"}]}]}, "messages[0].content"),
    (CHAT, calling('{"a": "\\ud800"}'), "messages[1].tool_calls[0].function.arguments"),
    (CHAT, calling("[" * 900 + "]" * 900), "messages[1].tool_calls[0].function.arguments"),
    (CHAT, calling("[" * 90_000), "messages[1].tool_calls[0].function.arguments"),
    (CHAT, calling('{"a": ' * 70 + "1" + "}" * 70), "messages[1].tool_calls[0].function.arguments"),
    (CHAT, calling(nested(200)), "messages[1].tool_calls[0].function"),
    (CHAT, {"messages": HELLO, "tools": [nested(200)]}, "tools[0].a.a.a"),
    *(
        (CHAT, {"messages": HELLO, "chat_template_kwargs": {name: 1}}, "chat_template_kwargs")
        for name in ("messages", "self", "conversation", "conversations", "chat_template", "tokenize", "tools",
                     "documents", "add_generation_prompt", "return_tensors", "processor_kwargs", "num_frames")
    ),
    (CHAT, {"messages": HELLO, "chat_template_kwargs": {"raise_exception": 1, "broken": 1}}, "messages"),
]  # fmt: skip


@pytest.fixture(scope="module")
def odd_client(model: Any, tokenizer: PreTrainedTokenizerFast) -> Any:
    """A model whose tokenizer has a token more than it, and whose template fails for a variable."""
    odd = copy.deepcopy(tokenizer)
    odd.add_tokens(["<beyond>"])
    odd.chat_template = "{{ broken + 'x' if broken else '' }}" + str(tokenizer.chat_template)
    state = ServerState("odd")
    state.finish(model, odd)
    with running(state) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body", "param"), REFUSED)
def test_what_a_client_gets_wrong_is_named(
    odd_client: Client, path: str, body: dict[str, Any], param: str, stream: bool
) -> None:
    reply = odd_client.post(path, {**body, "stream": stream, "max_tokens": 2})
    assert (reply.status, reply.json["error"]["param"]) == (400, param), reply.text
    assert reply.json["error"]["type"] == "invalid_request_error"


def test_an_unknown_field_that_does_not_encode(odd_client: Client) -> None:
    assert odd_client.post(COMPLETION, b'{"prompt": "a", "\\ud800": 1}').status == 400


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1e-5, "repetition_penalty": 0.01, "logit_bias": {"1": 100}, "frequency_penalty": -2},
        {"temperature": 2, "top_p": 1e-300, "min_p": 1e-300, "repetition_penalty": 10},
        {"top_p": 1, "top_k": 2**31 - 1, "min_p": 1, "seed": -(2**63)},
        {"logit_bias": {str(token): -100 for token in range(300)}, "temperature": 1e-5, "seed": 2**63 - 1},
    ],
)
def test_extremes_that_are_allowed_are_answered(odd_client: Client, fields: dict[str, Any]) -> None:
    for stream in (False, True):
        reply = odd_client.post(COMPLETION, {"prompt": "the", "max_tokens": 3, "stream": stream, **fields})
        assert reply.status == 200, reply.text
        assert '"error"' not in reply.text


def test_a_model_without_a_chat_template_says_so(
    model: Any, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    state = ServerState("plain")
    state.finish(model, plain, warm_up)
    assert "plain has no chat template" in caplog.text
    with running(state) as client:
        reply = client.post(CHAT, {"messages": HELLO})
        assert (reply.status, reply.json["error"]["param"]) == (400, "messages")
        assert "no chat template" in reply.json["error"]["message"]
        assert client.post(COMPLETION, {"prompt": "the", "max_tokens": 1}).status == 200
