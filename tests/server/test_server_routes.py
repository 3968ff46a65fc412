"""Routes besides generation: models, token ids, the version, a full queue, and what `transformers chat` asks for."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import quantload
from huggingface_hub import AsyncInferenceClient
from quantload.server import ServerState
from quantload.server.admission import Admission
from quantload.server.api_errors import ApiError
from quantload.server.generation_request import parse_chat
from quantload.server.transformers_chat import request_fields
from server_harness import Client, running, wait_for
from transformers import GenerationConfig

HELLO = [{"role": "user", "content": "hello"}]


def test_a_model_by_its_name(client: Client, model: Any, tokenizer: Any) -> None:
    entry = client.get("/v1/models/tiny")
    assert entry.json == client.get("/v1/models").json["data"][0]
    assert (entry.json["id"], entry.json["max_model_len"]) == ("tiny", 512)
    assert client.get("/v1/models/other").json["error"]["code"] == "model_not_found"
    state = ServerState("Org/Model-7B")
    state.finish(model, tokenizer)
    with running(state) as served, openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as api:
        assert api.models.retrieve("Org/Model-7B").id == "Org/Model-7B"
        with pytest.raises(openai.NotFoundError):
            api.models.retrieve("Org/Other")


def test_the_version(client: Client) -> None:
    assert client.get("/version").json == {"version": quantload.__version__}


def test_tokens_of_a_text_and_back(client: Client, tokenizer: Any) -> None:
    text = "the quick 🦊"
    ids = tokenizer(text)["input_ids"]
    told = client.post("/tokenize", {"prompt": text, "return_token_strs": True}).json
    assert told == {
        "count": len(ids), "max_model_len": 512, "tokens": ids, "token_strs": tokenizer.convert_ids_to_tokens(ids),
    }  # fmt: skip
    assert client.post("/detokenize", {"model": "tiny", "tokens": ids}).json == {"prompt": text}
    assert client.post("/detokenize", {"tokens": []}).json == {"prompt": ""}


def test_tokens_of_a_chat_are_those_it_is_answered_with(client: Client, tokenizer: Any) -> None:
    ids = client.post("/tokenize", {"messages": HELLO}).json["tokens"]
    assert tokenizer.decode(ids) == "<|user|>hello\n<|assistant|>"
    usage = client.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 1}).json["usage"]
    assert usage["prompt_tokens"] == len(ids)
    without = client.post("/tokenize", {"messages": HELLO, "add_generation_prompt": False}).json["tokens"]
    assert tokenizer.decode(without) == "<|user|>hello\n"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": HELLO}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"prompt": "x", "tools": []}, "tools"),
        ("/tokenize", {"prompt": "x", "add_special_tokens": 1}, "add_special_tokens"),
        ("/tokenize", {"messages": HELLO, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ("/tokenize", {"prompt": "x", "temperature": 1}, "temperature"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [320]}, "tokens"),
        ("/detokenize", {"tokens": [1.0]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/load_model", {"path": "/etc"}, "path"),
    ],
)
def test_wrong_requests_for_tokens_are_refused(client: Client, path: str, body: Any, param: str) -> None:
    reply = client.post(path, body)
    assert (reply.status, reply.json["error"]["param"]) == (400, param)


def test_a_full_queue_is_a_429_that_says_when_to_come_back(model: Any, tokenizer: Any) -> None:
    overload = pytest.raises(openai.RateLimitError, match="2 requests are under way")
    state = ServerState("tiny", max_queue=1)
    state.finish(model, tokenizer)
    handle = model.register_forward_pre_hook(lambda *_: time.sleep(0.01))
    try:
        with running(state) as client, ThreadPoolExecutor(2) as pool:
            body = {"prompt": "the", "max_tokens": 40}
            taken = [pool.submit(client.post, "/v1/completions", body) for _ in range(2)]
            wait_for(lambda: state.admission.under_way == 2)
            reply = client.post("/v1/completions", body)
            assert (reply.status, reply.json["error"]["code"]) == (429, "queue_full")
            assert reply.json["error"]["type"] == "rate_limit_error"
            assert 1 <= int(reply.headers["retry-after"]) <= 60
            assert client.post("/tokenize", {"prompt": "x"}).status == 200
            with openai.OpenAI(base_url=f"{client.url}/v1", api_key="x", max_retries=0) as api, overload:
                api.completions.create(model="tiny", prompt="x")
            assert [one.result().status for one in taken] == [200, 200]
            assert client.post("/v1/completions", {"prompt": "", "max_tokens": 1}).status == 400
            stream = client.open("POST", "/v1/completions", {**body, "max_tokens": 400, "stream": True})
            stream.getresponse().readline()
            stream.sock.shutdown(2)
            wait_for(lambda: state.admission.under_way == 0)
    finally:
        handle.remove()


def test_how_long_to_wait_is_learned_from_those_before() -> None:
    admission = Admission(0)
    admission.enter().leave()
    place = admission.enter()
    for seconds in (30.0,) * 20:
        admission.under_way += 1
        admission.left(seconds)
    with pytest.raises(ApiError) as caught:
        admission.enter()
    assert caught.value.headers is not None
    assert 28 <= int(caught.value.headers["Retry-After"]) <= 30
    place.leave()
    place.leave()
    assert admission.under_way == 0
    with pytest.raises(ValueError, match="-1"):
        Admission(-1)


def test_transformers_chat_finds_what_it_asks_for(
    client: Client, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its own client code: the load at the beginning, then chats with a generation config as a text.
    command = pytest.importorskip("transformers.cli.chat", exc_type=ImportError)  # 5.16 needs requests for it
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    command.RichInterface("tiny", "me", client.url).print_model_load("tiny")
    assert "already loaded" in capsys.readouterr().out
    assert client.post("/load_model", {"model": "other"}).status == 404
    config = GenerationConfig(do_sample=False, max_new_tokens=5)

    async def chat() -> list[Any]:
        async with AsyncInferenceClient(base_url=client.url) as api:
            extra = {"generation_config": config.to_json_string(), "model": "tiny"}
            return [
                chunk async for chunk in await api.chat_completion(HELLO, stream=True, model="tiny", extra_body=extra)
            ]

    chunks = asyncio.run(chat())
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"
    plain = client.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 5, "temperature": 0}).json
    assert text == plain["choices"][0]["message"]["content"]


def test_a_generation_config_says_what_fields_say() -> None:
    config = GenerationConfig(do_sample=True, max_new_tokens=9, top_k=4, eos_token_id=[3, 4], pad_token_id=0)
    request = parse_chat({"messages": HELLO, "generation_config": config.to_json_string(), "max_tokens": 5}, "tiny")
    assert (request.do_sample, request.max_tokens, request.top_k, request.stop_token_ids) == (True, 5, 4, (3, 4))
    assert request_fields('{"do_sample": false, "temperature": 0.5, "max_new_tokens": null}') == {"temperature": 0}
    assert request_fields('{"do_sample": true, "temperature": 0.5}') == {"temperature": 0.5}


@pytest.mark.parametrize("config", ["{", "[]", 3, '{"num_beams": 4}'])
def test_a_generation_config_that_cannot_be_followed_is_refused(config: object) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat({"messages": HELLO, "generation_config": config}, "tiny")
    assert (caught.value.status, caught.value.param) == (400, "generation_config")
