"""Several answers to a request, their usage, how likely their tokens were, and the tokens that end them."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch
from openai.types.chat import ChatCompletionMessageParam
from quantload.server import ServerState
from quantload.server.answers import sum_usage
from server_harness import Client, running

HELLO = [{"role": "user", "content": "hello"}]
PROMPTS = ["the quick", "the lazy dog", "fox"]


def expected(model: Any, tokenizer: Any, prompt: str, tokens: int, **fields: Any) -> str:
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False, **fields)
    return str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def complete(client: Client, prompt: Any, **fields: Any) -> dict[str, Any]:
    reply = client.post("/v1/completions", {"prompt": prompt, **fields})
    assert reply.status == 200, reply.text
    answer: dict[str, Any] = reply.json
    return answer


def texts(answer: dict[str, Any]) -> list[str]:
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [choice["text"] for choice in answer["choices"]]


def joined(events: list[Any]) -> dict[int, str]:
    """The text of each choice of a stream."""
    found: dict[int, str] = {}
    for event in events[:-1]:
        for choice in event["choices"]:
            piece = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            found[choice["index"]] = found.get(choice["index"], "") + piece
    return found


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/completions", {"prompt": "the fox"}), ("/v1/chat/completions", {"messages": HELLO})]
)
def test_the_usage_of_a_stream_comes_only_when_it_is_asked_for(client: Client, path: str, body: dict[str, Any]) -> None:
    body = {**body, "max_tokens": 5}
    *events, done = client.post(path, {**body, "stream": True}).events
    assert done == "[DONE]"
    assert not any("usage" in event for event in events)
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["length"]
    options = {"stream_options": {"include_usage": True}, "stream": True}
    *with_usage, last, done = client.post(path, {**body, **options}).events
    assert len(with_usage) == len(events)
    assert all(event["usage"] is None for event in with_usage)
    assert last["choices"] == []
    assert last["usage"] == client.post(path, body).json["usage"]
    assert len({(event["id"], event["created"], event["object"], event["model"]) for event in [*with_usage, last]}) == 1


def test_a_prompt_counts_once_however_many_answer_it() -> None:
    usages = [{"prompt_tokens": p, "completion_tokens": c, "total_tokens": p + c} for p in (3, 5) for c in (7, 9)]
    assert sum_usage(usages, 2) == {"prompt_tokens": 8, "completion_tokens": 32, "total_tokens": 40}


def test_several_prompts_are_answered_in_their_order(client: Client, model: Any, tokenizer: Any) -> None:
    wanted = [expected(model, tokenizer, prompt, 8) for prompt in PROMPTS]
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    answer = complete(client, PROMPTS, max_tokens=8)
    assert texts(answer) == wanted
    prompt_tokens = sum(map(len, ids))
    assert answer["usage"] == {
        "prompt_tokens": prompt_tokens, "completion_tokens": 24, "total_tokens": prompt_tokens + 24,
    }  # fmt: skip
    assert texts(complete(client, ids, max_tokens=8)) == wanted
    assert texts(complete(client, ids[1], max_tokens=8)) == wanted[1:2]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    events = client.post("/v1/completions", {"prompt": PROMPTS, "max_tokens": 8, **options}).events
    assert joined(events) == dict(enumerate(wanted))
    assert events[-2]["usage"] == answer["usage"]
    assert sorted(e["choices"][0]["index"] for e in events[:-2] if e["choices"][0]["finish_reason"]) == [0, 1, 2]


def test_n_answers_have_seeds_that_count_up(client: Client) -> None:
    sampled = {"max_tokens": 12, "temperature": 1.5}
    alone = [texts(complete(client, "the", seed=seed, **sampled))[0] for seed in (5, 6, 7)]
    answer = complete(client, "the", n=3, seed=5, **sampled)
    assert texts(answer) == alone
    assert len(set(alone)) == 3
    assert answer["usage"]["completion_tokens"] == 36
    assert answer["usage"]["prompt_tokens"] == complete(client, "the", max_tokens=1)["usage"]["prompt_tokens"]
    body = {"messages": HELLO, "n": 2, "seed": 5, **sampled}
    chat = client.post("/v1/chat/completions", body).json["choices"]
    assert [choice["index"] for choice in chat] == [0, 1]
    streamed = client.post("/v1/chat/completions", {**body, "stream": True}).events
    assert joined(streamed) == {index: choice["message"]["content"] for index, choice in enumerate(chat)}


def test_one_prompt_that_does_not_fit_refuses_all(client: Client) -> None:
    for stream in (False, True):
        reply = client.post("/v1/completions", {"prompt": ["the", "x y " * 600], "stream": stream})
        assert (reply.status, reply.json["error"]["code"]) == (400, "context_length_exceeded")
    assert texts(complete(client, "the", max_tokens=1))  # nothing of it is left


@pytest.mark.parametrize("fields", [{"prompt": [320]}, {"prompt": "the", "stop_token_ids": [1, 9999]}])
def test_ids_beyond_the_vocabulary_are_refused(client: Client, fields: dict[str, Any]) -> None:
    reply = client.post("/v1/completions", fields)
    assert reply.status == 400
    assert reply.json["error"]["param"] == next(name for name, value in fields.items() if isinstance(value, list))


def test_min_tokens_and_ignore_eos_put_off_the_end(client: Client, tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    likely = {"logit_bias": {str(eos): 100}, "max_tokens": 7}

    def ends(**fields: Any) -> tuple[int, str]:
        answer = complete(client, "the", **likely, **fields)
        return answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]

    assert ends() == (1, "stop")
    assert ends(min_tokens=4) == (5, "stop")
    assert ends(min_tokens=7) == (7, "length")
    assert ends(ignore_eos=True) == (7, "length")
    assert ends(ignore_eos=True, stop_token_ids=[eos]) == (1, "stop")
    reply = client.post("/v1/completions", {"prompt": "the", "max_tokens": 3, "min_tokens": 4})
    assert (reply.status, reply.json["error"]["param"]) == (400, "min_tokens")


def test_a_stop_token_ends_the_answer_and_is_in_it(client: Client, model: Any, tokenizer: Any) -> None:
    whole = expected(model, tokenizer, "the quick", 12)
    ids = model.generate(**tokenizer("the quick", return_tensors="pt"), max_new_tokens=12, do_sample=False)[0].tolist()
    generated = ids[-12:]
    end = next(token for token in generated[2:] if token not in generated[:2])
    count = generated.index(end) + 1
    answer = complete(client, "the quick", max_tokens=12, stop_token_ids=[end])
    assert texts(answer) == [tokenizer.decode(generated[:count])]
    assert whole.startswith(texts(answer)[0])
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == count


def test_logprobs_of_a_completion_are_those_of_a_forward(client: Client, model: Any, tokenizer: Any) -> None:
    # A bias and a temperature change the choice and not what is told.
    fields = {"max_tokens": 6, "logprobs": 3, "temperature": 2, "seed": 1, "logit_bias": {"40": -100}}
    choice = complete(client, "the quick", **fields)["choices"][0]
    told = choice["logprobs"]
    assert "".join(told["tokens"]) == choice["text"]
    assert told["text_offset"] == [len("".join(told["tokens"][:place])) for place in range(6)]
    ids = [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))[0] for text in told["tokens"]]
    assert tokenizer.decode(ids) == choice["text"]
    prompt = tokenizer("the quick")["input_ids"]
    rows = torch.log_softmax(model(torch.tensor([prompt + ids])).logits[0].detach().float(), -1)[len(prompt) - 1 : -1]
    for place, (token, row) in enumerate(zip(ids, rows, strict=True)):
        assert told["token_logprobs"][place] == pytest.approx(float(row[token]), abs=1e-4)
        likely = row.topk(3)
        top = told["top_logprobs"][place]
        assert sorted(top.values(), reverse=True)[:3] == pytest.approx(likely.values.tolist(), abs=1e-4)
        assert top[told["tokens"][place]] == pytest.approx(float(row[token]), abs=1e-4)
    assert math.isfinite(sum(told["token_logprobs"]))
    assert told["token_logprobs"] != sorted(told["token_logprobs"])
    events = client.post("/v1/completions", {"prompt": "the quick", **fields, "stream": True}).events[:-1]
    parts = [event["choices"][0]["logprobs"] for event in events]
    for name in told:
        assert [one for part in parts for one in part[name]] == told[name]


def test_logprobs_of_a_chat(client: Client, tokenizer: Any) -> None:
    body = {"messages": HELLO, "max_tokens": 5, "logprobs": True, "top_logprobs": 2}
    choice = client.post("/v1/chat/completions", body).json["choices"][0]
    content = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in content) == choice["message"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == choice["message"]["content"]
    for token in content:
        first, second = token["top_logprobs"]
        assert first["logprob"] >= second["logprob"]
    plain = client.post("/v1/chat/completions", {**body, "top_logprobs": 0}).json["choices"][0]["logprobs"]["content"]
    assert [token["top_logprobs"] for token in plain] == [[]] * 5
    events = client.post("/v1/chat/completions", {**body, "stream": True}).events[:-1]
    assert [token for event in events for token in event["choices"][0]["logprobs"]["content"]] == content
    reply = client.post("/v1/chat/completions", {"messages": HELLO, "top_logprobs": 2})
    assert (reply.status, reply.json["error"]["param"]) == (400, "top_logprobs")


def test_logprobs_end_where_a_stop_string_cuts_the_text(client: Client, model: Any, tokenizer: Any) -> None:
    full = expected(model, tokenizer, "the quick", 20)
    body = {"prompt": "the quick", "max_tokens": 20, "stop": full[9:12], "logprobs": 0}
    choice = complete(client, **body)["choices"][0]
    told = choice["logprobs"]
    assert choice["text"] == full[: full.index(full[9:12])]
    assert "".join(told["tokens"][:-1]) < choice["text"] <= "".join(told["tokens"])
    assert all(list(top) == [token] for top, token in zip(told["top_logprobs"], told["tokens"], strict=True))
    events = client.post("/v1/completions", {**body, "stream": True}).events[:-1]
    assert [token for event in events for token in event["choices"][0]["logprobs"]["tokens"]] == told["tokens"]


def test_a_continuous_batch_knows_several_answers_and_ends(model: Any, tokenizer: Any) -> None:
    state = ServerState("tiny", continuous_batching=True)
    state.finish(model, tokenizer)
    wanted = [expected(model, tokenizer, prompt, 6) for prompt in PROMPTS]
    generated = tokenizer(wanted[0])["input_ids"]
    with running(state) as client:
        assert texts(complete(client, PROMPTS, max_tokens=6)) == wanted
        events = client.post("/v1/completions", {"prompt": PROMPTS, "max_tokens": 6, "stream": True}).events
        assert joined(events) == dict(enumerate(wanted))
        stopped = complete(client, PROMPTS[0], max_tokens=6, stop_token_ids=[generated[0]])
        assert stopped["usage"]["completion_tokens"] == 1


def test_requests_with_several_answers_do_not_mix(client: Client) -> None:
    def ask(seed: int) -> list[str]:
        return texts(complete(client, ["the", "fox"], n=2, seed=seed, temperature=1.5, max_tokens=6))

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, [1, 2, 1, 2]))
    assert answers[0] == answers[2] != answers[1] == answers[3]


def test_openais_client_reads_all_of_it(client: Client) -> None:
    said: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]
    with openai.OpenAI(base_url=f"{client.url}/v1", api_key="none", max_retries=0) as api:
        whole = api.completions.create(model="tiny", prompt=["the", "fox"], max_tokens=3, logprobs=2)
        assert [choice.index for choice in whole.choices] == [0, 1]
        assert whole.choices[1].logprobs is not None
        assert whole.choices[1].logprobs.top_logprobs is not None
        assert len(whole.choices[1].logprobs.top_logprobs) == 3
        chat = api.chat.completions.create(
            model="tiny", messages=said, max_tokens=3, n=2, logprobs=True, top_logprobs=1, extra_body={"min_tokens": 3}
        )
        assert [len(choice.logprobs.content or []) for choice in chat.choices if choice.logprobs] == [3, 3]
        chunks = list(
            api.chat.completions.create(
                model="tiny", messages=said, max_tokens=3, stream=True, stream_options={"include_usage": True}
            )
        )
        assert chunks[-1].usage is not None
        assert chat.usage is not None
        assert chunks[-1].usage.completion_tokens == 3
        assert chunks[-1].usage.prompt_tokens == chat.usage.prompt_tokens
