"""A model may write anything: what is no tool call is text, and never an error."""

from __future__ import annotations

import asyncio
import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest
import serve_fuzz
import torch
from quantload.server import ServerState, create_app
from quantload.server.answer_parsing import ForgivingParser, is_call, parsed_or_text
from quantload.server.api_errors import ApiError
from quantload.server.prompts import check_prompt_ids
from server_harness import Client, running
from transformers import (
    ByT5Tokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]


def call(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "arguments": {}, **fields}}


@pytest.fixture(scope="module")
def chatml(tokenizer: PreTrainedTokenizerFast) -> Any:
    made = copy.deepcopy(tokenizer)
    made.chat_template = CHATML
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    return made


@pytest.fixture(scope="module")
def qwen(chatml: Any) -> Any:
    """A client of a Qwen3 model, whose answers transformers looks for tool calls in."""
    config = Qwen3Config(
        vocab_size=len(chatml), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=512, eos_token_id=chatml.eos_token_id,
        bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    state = ServerState("qwen")
    state.finish(Qwen3ForCausalLM(config).eval(), chatml)
    with running(state) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("closed", [False, True])
def test_a_tool_call_that_is_cut_off_or_none_is_content(qwen: Client, chatml: Any, closed: bool, stream: bool) -> None:
    begin, end = chatml.convert_tokens_to_ids("<tool_call>"), chatml.convert_tokens_to_ids("</tool_call>")
    bias = {str(begin): 100, **({str(end): 99.5} if closed else {})}
    body = {"messages": HELLO, "max_tokens": 4, "logit_bias": bias, "presence_penalty": 2, "stream": stream}
    reply = qwen.post(CHAT, body)
    assert reply.status == 200, reply.text
    assert '"error"' not in reply.text
    if stream:
        assert reply.events[-1] == "[DONE]"
        assert reply.events[-2]["choices"][0]["finish_reason"] == "length"
    else:
        assert reply.json["choices"][0]["message"].get("tool_calls") is None


def test_a_prompt_that_looks_like_half_an_answer_is_refused(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    odd = copy.deepcopy(tokenizer)
    odd.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    odd.response_template = {
        "start_anchor": "A:",
        "fields": {"tool_calls": {"open": "<", "close": ">", "content": "json"}, "content": {"content": "text"}},
    }
    state = ServerState("odd")
    state.finish(model, odd)
    with running(state) as client:
        for text, refused in (("A:<{bad>", True), ("A:", False)):
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": 2}
            streamed = client.post(CHAT, {**body, "stream": True})
            assert streamed.status == (400 if refused else 200), streamed.text
            assert client.post(CHAT, body).status == 200
        assert client.post(CHAT, {**body, "stream": True}).status == 200


@pytest.mark.parametrize(
    ("value", "right"),
    [
        (call(), True),
        (call(arguments="{}"), True),
        (call(name=None), False),
        (call(arguments={1, 2}), False),
        ({"function": {"name": "f"}}, False),
        ({"function": []}, False),
        ([call()], False),
        (None, False),
    ],
)
def test_what_is_a_call(value: Any, right: bool) -> None:
    assert is_call(value) is right
    parsed = parsed_or_text(lambda: {"content": "a", "tool_calls": [value]}, lambda: "text")
    assert ("tool_calls" in parsed) is right
    assert parsed["content"] == ("a" if right else "text")


class Parser:
    """Calls between `<` and `>`; `!` is what it cannot parse."""

    initial_events = ()

    def feed(self, text: str) -> list[Any]:
        if "!" in text:
            raise KeyError(text)
        if text == ">":
            return [{"type": "region_close", "field": "tool_calls", "value": {"function": {}}}]
        return [{"type": "region_chunk", "field": "tool_calls", "text": text, "dirty": True}]

    def finalize(self) -> Any:
        raise ValueError("unfinished")


def contents(events: list[Any]) -> str:
    return "".join(event["text"] for event in events if event.get("field") == "content")


def test_a_stream_goes_on_as_text() -> None:
    parser = ForgivingParser(Parser())
    assert contents(parser.feed("{")) == ""
    assert contents(parser.feed("}!")) == "{}!"
    assert contents(parser.feed(" and on")) == " and on"
    assert parser.finalize() == ({}, [])


def test_what_is_no_call_at_its_end_is_text() -> None:
    parser = ForgivingParser(Parser())
    parser.feed("[1]")
    assert contents(parser.feed(">")) == "[1]"
    parser.feed("{")
    assert contents(parser.finalize()[1]) == "{"


def test_beams_do_not_stream(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.generation_config, "num_beams", 3)
    state = ServerState("beams")
    state.finish(model, tokenizer)
    with running(state) as client:
        body = {"prompt": "the", "max_tokens": 2}
        assert client.post("/v1/completions", body).status == 200
        reply = client.post("/v1/completions", {**body, "stream": True})
        assert (reply.status, reply.json["error"]["param"]) == (400, "stream")


def test_a_tokenizer_in_python_answers_whole_and_refuses_odd_ids() -> None:
    tokenizer = ByT5Tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0,
        eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    state = ServerState("demo")
    state.finish(T5ForConditionalGeneration(config).eval(), tokenizer)
    with running(state) as client:
        body = {"prompt": "the", "max_tokens": 2}
        assert client.post("/v1/completions", body).status == 200
        reply = client.post("/v1/completions", {**body, "stream": True})
        assert (reply.status, reply.json["error"]["param"]) == (400, "stream")
        reply = client.post("/detokenize", {"tokens": [2**31 - 1]})
        assert (reply.status, reply.json["error"]["param"]) == (400, "tokens")


def test_a_token_that_stands_for_an_image_needs_one() -> None:
    config = SimpleNamespace(
        image_token_id=5, video_token_id=None, get_text_config=lambda: SimpleNamespace(vocab_size=9)
    )
    check_prompt_ids({"input_ids": torch.tensor([[1, 4]])}, config, "prompt")
    check_prompt_ids({"input_ids": torch.tensor([[1, 5]]), "pixel_values": torch.zeros(1)}, config, "prompt")
    for ids in (torch.tensor([[1, 5]]), [5], [9], [-1]):
        with pytest.raises(ApiError) as caught:
            check_prompt_ids({"input_ids": ids}, config, "prompt")
        assert (caught.value.status, caught.value.param) == (400, "prompt")


@pytest.mark.slow
def test_no_odd_request_to_a_model_with_tool_calls_is_a_5xx(qwen: Client, chatml: Any) -> None:
    config = Qwen3Config(
        vocab_size=len(chatml), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=512, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    state = ServerState("demo")
    state.finish(Qwen3ForCausalLM(config).eval(), chatml)
    counts, faults = asyncio.run(serve_fuzz.fuzz(create_app(state, request_log="off"), "qwen", 3000))
    state.stop()
    assert faults == [], json.dumps(faults[:3])
    assert counts["200"] > 300
