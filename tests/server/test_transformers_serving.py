from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch
from openai.types.chat import ChatCompletionMessageParam
from quantload.server import ServerState
from quantload.server.transformers_serving import LoadedModelManager
from server_harness import Client, running, wait_for
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

CONTEXT = 512
HELLO = [{"role": "user", "content": "hello"}]


class Forwards:
    """Counts the forward passes of a model, and makes each last `seconds`."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0

    def __call__(self, *_: Any) -> None:
        self.count += 1
        time.sleep(self.seconds)


@pytest.fixture
def forwards(model: Any) -> Iterator[Forwards]:
    counter = Forwards()
    handle = model.register_forward_pre_hook(counter)
    yield counter
    handle.remove()


def expected(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def complete(client: Client, prompt: str, **fields: Any) -> dict[str, Any]:
    reply = client.post("/v1/completions", {"prompt": prompt, **fields})
    assert reply.status == 200, reply.text
    answer: dict[str, Any] = reply.json
    return answer


def streamed(client: Client, path: str, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The text of a stream, and its last event with a choice, with the usage of the one behind it."""
    fields = {**body, "stream": True, "stream_options": {"include_usage": True}}
    *events, usage, done = client.post(path, fields).events
    assert done == "[DONE]"
    assert usage["choices"] == []
    choices = [event["choices"][0] for event in events]
    text = "".join(c["text"] if "text" in c else c["delta"].get("content") or "" for c in choices)
    return text, events[-1] | {"usage": usage["usage"]}


def test_a_completion_is_what_generate_gives(client: Client, model: Any, tokenizer: Any) -> None:
    answer = complete(client, "the quick", max_tokens=12)
    assert answer["choices"][0]["text"] == expected(model, tokenizer, "the quick", 12)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 12
    assert (answer["model"], answer["object"]) == ("tiny", "text_completion")


def test_a_chat_answer_is_what_generate_gives(client: Client, model: Any, tokenizer: Any) -> None:
    reply = client.post("/v1/chat/completions", {"messages": HELLO, "max_completion_tokens": 8})
    message = reply.json["choices"][0]["message"]
    prompt = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, tokenize=False)
    assert message == {"role": "assistant", "content": expected(model, tokenizer, prompt, 8)}
    assert reply.json["model"] == "tiny"


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/completions", {"prompt": "the fox"}), ("/v1/chat/completions", {"messages": HELLO})]
)
@pytest.mark.parametrize("limit", [1, 20])
def test_a_stream_is_the_answer_in_pieces(client: Client, path: str, body: dict[str, Any], limit: int) -> None:
    whole = client.post(path, {**body, "max_tokens": limit}).json
    text, last = streamed(client, path, {**body, "max_tokens": limit})
    choice = whole["choices"][0]
    assert text == (choice["text"] if "text" in choice else choice["message"]["content"])
    assert last["choices"][0]["finish_reason"] == choice["finish_reason"] == "length"
    assert last["usage"] == whole["usage"]


def test_without_a_limit(client: Client) -> None:
    assert complete(client, "the")["usage"]["completion_tokens"] == 16
    long = "fox " * 100
    reply = client.post("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}).json
    assert reply["usage"]["total_tokens"] == CONTEXT


def test_what_does_not_fit_the_context_is_a_400(client: Client) -> None:
    for body in ({"prompt": "x y " * CONTEXT}, {"prompt": "the", "max_tokens": CONTEXT}, {"prompt": ""}):
        for stream in (False, True):
            reply = client.post("/v1/completions", {**body, "stream": stream})
            assert reply.status == 400, body
    assert reply.json["error"]["code"] is None
    assert (
        client.post("/v1/completions", {"prompt": "x y " * CONTEXT}).json["error"]["code"] == "context_length_exceeded"
    )


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stop_string_ends_the_text_before_it(client: Client, model: Any, tokenizer: Any, path: str) -> None:
    body: dict[str, Any] = {"prompt": "the quick"} if path == "/v1/completions" else {"messages": HELLO}
    prompt = body.get("prompt") or tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, tokenize=False)
    full = expected(model, tokenizer, prompt, 40)
    stop = full[9:13]
    body |= {"max_tokens": 40, "stop": ["never this", stop]}
    whole = client.post(path, body).json
    choice = whole["choices"][0]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    assert text == full[: full.index(stop)]
    assert choice["finish_reason"] == "stop"
    assert whole["usage"]["completion_tokens"] < 40
    assert streamed(client, path, body)[0] == text


def test_a_seed_repeats_the_sample_and_a_temperature_samples(client: Client) -> None:
    def sample(**fields: Any) -> str:
        return str(complete(client, "the", max_tokens=24, **fields)["choices"][0]["text"])

    with ThreadPoolExecutor(4) as pool:  # others sample at the same time
        texts = list(pool.map(lambda seed: sample(temperature=1.5, seed=seed), [1, 2, 1, 2]))
    assert texts[0] == texts[2]
    assert texts[1] == texts[3]
    assert texts[0] != texts[1]
    assert sample() == sample(temperature=0) != texts[0]
    assert sample(temperature=1.0, top_k=1) == sample()


def test_penalties_and_bias_change_the_choice(client: Client, tokenizer: Any) -> None:
    fox = tokenizer(" fox")["input_ids"][0]
    biased = complete(client, "the", max_tokens=6, logit_bias={str(fox): 100})["choices"][0]["text"]
    assert biased == tokenizer.decode([fox]) * 6
    once = complete(client, "the", max_tokens=6, logit_bias={str(fox): 1.5}, presence_penalty=2)["choices"][0]["text"]
    assert once.count(tokenizer.decode([fox])) <= 1


def test_an_end_of_text_on_the_last_token_is_a_stop(client: Client, tokenizer: Any) -> None:
    eos = {str(tokenizer.eos_token_id): 100}
    answer = complete(client, "the", max_tokens=1, logit_bias=eos)
    assert answer["choices"][0] == {"finish_reason": "stop", "index": 0, "text": "", "logprobs": None}
    _, last = streamed(client, "/v1/completions", {"prompt": "the", "max_tokens": 1, "logit_bias": eos})
    assert last["choices"][0]["finish_reason"] == "stop"


def test_simultaneous_requests_do_not_mix(client: Client, model: Any, tokenizer: Any) -> None:
    prompts = [f"the {word}" for word in ("quick", "brown", "fox", "dog", "lazy", "0123")]
    wanted = [expected(model, tokenizer, prompt, 16) for prompt in prompts]

    def ask(index: int) -> str:
        if index % 2:
            return streamed(client, "/v1/completions", {"prompt": prompts[index], "max_tokens": 16})[0]
        return str(complete(client, prompts[index], max_tokens=16)["choices"][0]["text"])

    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(ask, range(len(prompts))))
    assert answers == wanted


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_ends_its_generation(client: Client, forwards: Forwards, stream: bool) -> None:
    forwards.seconds = 0.02
    connection = client.open("POST", "/v1/completions", {"prompt": "the", "max_tokens": 400, "stream": stream})
    wait_for(lambda: forwards.count > 5)
    connection.sock.shutdown(2)
    connection.close()
    assert complete(client, "the", max_tokens=1)["usage"]["completion_tokens"] == 1  # waits for its turn
    assert forwards.count < 200


def test_a_request_whose_client_left_in_the_queue_is_never_run(client: Client, forwards: Forwards) -> None:
    forwards.seconds = 0.05
    first = client.open("POST", "/v1/completions", {"prompt": "the", "max_tokens": 30})
    wait_for(lambda: forwards.count > 0)
    gone = client.open("POST", "/v1/completions", {"prompt": "fox", "max_tokens": 400})
    time.sleep(0.2)
    gone.close()
    assert first.getresponse().status == 200
    complete(client, "the", max_tokens=1)
    assert forwards.count <= 32


def test_an_error_in_the_middle_of_a_stream_is_an_event(client: Client, model: Any) -> None:
    calls = iter(range(100))

    def fail(*_: Any) -> None:
        if next(calls) == 3:
            raise RuntimeError('the "device"\nis gone')

    handle = model.register_forward_pre_hook(fail)
    try:
        events = client.post("/v1/completions", {"prompt": "the", "max_tokens": 9, "stream": True}).events
    finally:
        handle.remove()
    assert events[-1] == "[DONE]"
    assert events[-2]["error"]["message"] == 'generation failed: the "device"\nis gone'
    assert complete(client, "the", max_tokens=2)["usage"]["completion_tokens"] == 2


def test_an_error_outside_a_stream_is_a_500_without_its_traceback(client: Client, model: Any) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("secret path")

    handle = model.register_forward_pre_hook(fail)
    try:
        reply = client.post("/v1/completions", {"prompt": "the"})
    finally:
        handle.remove()
    assert (reply.status, reply.json["error"]["type"]) == (500, "server_error")
    assert "secret" not in reply.text


def test_what_the_template_refuses_is_a_400(client: Client) -> None:
    reply = client.post("/v1/chat/completions", {"messages": [{"role": "wizard", "content": "x"}]})
    assert reply.status == 400
    assert "no such role: wizard" in reply.json["error"]["message"]


def test_a_text_model_refuses_an_image(client: Client) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    assert client.post("/v1/chat/completions", {"messages": [{"role": "user", "content": [part]}]}).status == 400


def test_openais_own_client(client: Client) -> None:
    with openai.OpenAI(base_url=f"{client.url}/v1", api_key="none", max_retries=0) as api:
        assert [model.id for model in api.models.list()] == ["tiny"]
        text = api.completions.create(model="tiny", prompt="the", max_tokens=5).choices[0].text
        pieces = api.completions.create(model="tiny", prompt="the", max_tokens=5, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == text
        said: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]
        chat = api.chat.completions.create(model="tiny", messages=said, max_completion_tokens=5, temperature=0)
        deltas = api.chat.completions.create(model="tiny", messages=said, max_tokens=5, stream=True)
        assert "".join(d.choices[0].delta.content or "" for d in deltas) == chat.choices[0].message.content
        with pytest.raises(openai.NotFoundError, match="serves 'tiny' only"):
            api.completions.create(model="gpt-4", prompt="the")
        with pytest.raises(openai.BadRequestError):
            api.completions.create(model="tiny", prompt="the", max_tokens=0)


def test_a_chat_format_of_its_own_is_not_parsed_as_qwens(tokenizer: Any) -> None:
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).eval()
    state = ServerState("moe")
    state.finish(model, tokenizer)
    prompt = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, tokenize=False)
    with running(state) as client:
        body = {"messages": HELLO, "max_tokens": 6}
        answer = client.post("/v1/chat/completions", body).json["choices"][0]["message"]["content"]
        assert answer == expected(model, tokenizer, prompt, 6)
        assert streamed(client, "/v1/chat/completions", body)[0] == answer


def test_nothing_else_is_ever_loaded(model: Any, tokenizer: Any) -> None:
    manager = LoadedModelManager(model, tokenizer, "tiny")
    assert manager.load_model_and_processor("other@main", gguf_file="x.gguf") == (model, tokenizer)
    manager.shutdown()
    assert manager.load_model_and_processor("tiny") == (model, tokenizer)
    with pytest.raises(RuntimeError):
        manager._load_model("other")


def test_a_continuous_batch(model: Any, tokenizer: Any) -> None:
    prompts = ["the", "the quick", "the quick brown", "fox"]
    wanted = [expected(model, tokenizer, prompt, 10) for prompt in prompts]
    state = ServerState("tiny", continuous_batching=True)
    state.finish(model, tokenizer)
    with running(state) as client:
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(lambda prompt: complete(client, prompt, max_tokens=10), prompts))
        assert [answer["choices"][0]["text"] for answer in answers] == wanted
        assert streamed(client, "/v1/completions", {"prompt": "the", "max_tokens": 10})[0] == wanted[0]
        assert client.get("/health").status == 200
