"""Requests that are generated for together: each with its own sampling, and the text it would have had alone."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quantload.server import ServerState
from quantload.server.api_errors import ApiError
from quantload.server.batch_sampling import BatchedAnswer, PerRequestSampling
from quantload.server.batching import (
    Batch,
    _added,
    batch_tokens,
    disagreement,
    leaves_models_as_they_are,
    why_not_batched,
)
from quantload.server.ending import Ending, RequestCancelled
from quantload.server.generation_request import parse_completion
from quantload.server.logprobs import Chosen
from quantload.server.warm_up import warm_up
from server_harness import Client, running, wait_for
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.requests import RequestState

pytestmark = pytest.mark.skipif(
    not leaves_models_as_they_are(),
    reason="nothing is batched by default with this version of transformers",
)
PROMPTS = ["the quick", "fox jumps over", "lazy dog, and", "0123"]


@pytest.fixture(scope="module")
def batched(model: Any, tokenizer: Any) -> Iterator[Client]:
    state = ServerState("tiny", continuous_batching=None)
    state.finish(model, tokenizer)
    assert state.served().batches
    with running(state) as client:
        yield client


def ask(client: Client, prompt: Any, **fields: Any) -> Any:
    reply = client.post("/v1/completions", {"prompt": prompt, "max_tokens": 12, **fields})
    assert reply.status == 200, reply.text
    return reply.json


def choices(answer: Any) -> list[tuple[str, str]]:
    return [(choice["text"], choice["finish_reason"]) for choice in answer["choices"]]


FIELDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.9, "seed": 3},
    {"temperature": 1.5, "top_p": 0.8, "seed": 1, "n": 2},
    {"temperature": 1.0, "top_k": 7, "min_p": 0.01, "seed": 4, "presence_penalty": 0.7},
    {"temperature": 0, "repetition_penalty": 1.3, "min_tokens": 9},
    {"temperature": 0, "logit_bias": {"70": 90}, "stop": ["gg"]},
    {"temperature": 0, "frequency_penalty": 1.0, "logprobs": 2},
]
if find_spec("llguidance") is not None:
    FIELDS.append({"response_format": {"type": "json_object"}, "seed": 0, "temperature": 1.0})


def test_requests_in_one_batch_have_the_sampling_of_each(client: Client, batched: Client) -> None:
    """All of them at once in the batch, one after the other in the other server."""
    cases = [(prompt, fields) for prompt in PROMPTS[:2] for fields in FIELDS]
    alone = [ask(client, prompt, **fields) for prompt, fields in cases]
    with ThreadPoolExecutor(len(cases)) as pool:
        together = list(pool.map(lambda case: ask(batched, case[0], **case[1]), cases))
    for (_, fields), one, other in zip(cases, alone, together, strict=True):
        assert choices(other) == choices(one), fields
        assert other["usage"] == one["usage"], fields
        for first, second in zip(one["choices"], other["choices"], strict=True):
            if "logprobs" in fields:
                told = [each["logprobs"]["token_logprobs"] for each in (first, second)]
                torch.testing.assert_close(*map(torch.tensor, told), atol=1e-4, rtol=0)


def test_a_stop_string_ends_the_generation_and_not_only_the_text(client: Client, batched: Client) -> None:
    full = choices(ask(client, PROMPTS[0], temperature=0, max_tokens=200))[0][0]
    stopped = ask(batched, PROMPTS[0], temperature=0, max_tokens=200, stop=[full[9:12]])
    assert choices(stopped) == [(full[: full.index(full[9:12])], "stop")]
    assert stopped["usage"]["completion_tokens"] < 20
    events = batched.post(
        "/v1/completions", {"prompt": PROMPTS[0], "stream": True, "max_tokens": 200, "stop": [full[9:12]]}
    ).events
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == choices(stopped)[0][0]


@pytest.mark.slow
def test_what_is_longer_than_the_batch_is_generated_for_alone(
    model: Any, tokenizer: Any, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Batch, "has_room_for", lambda self, tokens: tokens < 20)
    state = ServerState("tiny", continuous_batching=None)
    state.finish(model, tokenizer)
    with running(state) as short:
        for fields in ({"max_tokens": 2}, {"max_tokens": 40}):
            assert choices(ask(short, PROMPTS[0], **fields)) == choices(ask(client, PROMPTS[0], **fields))
            streamed = short.post("/v1/completions", {"prompt": PROMPTS[0], "stream": True, **fields}).events
            text = "".join(event["choices"][0]["text"] for event in streamed[:-1])
            assert text == choices(ask(client, PROMPTS[0], **fields))[0][0]


def test_a_request_that_fails_ends_alone(batched: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantload.server import batch_sampling

    choose = batch_sampling.BatchedAnswer.choose

    def fail(self: Any, logits: Any) -> int:
        if self._ending.request.seed == 13:
            raise ValueError("unlucky")
        return choose(self, logits)

    monkeypatch.setattr(batch_sampling.BatchedAnswer, "choose", fail)
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(ask, batched, PROMPTS[1], temperature=1.0, seed=1)
        reply = batched.post("/v1/completions", {"prompt": "the", "seed": 13, "temperature": 1.0})
        assert (reply.status, "ValueError" in reply.text) == (500, True)
        assert len(choices(other.result())) == 1
    assert batched.get("/health").status == 200


def test_a_request_that_nobody_waits_for_ends_with_its_next_token(model: Any, tokenizer: Any) -> None:
    request = parse_completion({"prompt": "the", "max_tokens": 9}, "tiny")
    config = GenerationConfig(max_new_tokens=9, eos_token_id=0)
    answer = BatchedAnswer(
        model, config, [5, 6], LogitsProcessorList(), Ending(tokenizer, config, request, None, None), 0
    )
    sampling, state = PerRequestSampling(), RequestState("a", [5, 6], max_new_tokens=9)
    sampling.add("a", answer)
    for cancelled, limit in ((False, 9), (True, 1)):
        if cancelled:
            request.cancelled.set()
        sampling.prepare_tensor_args([SimpleNamespace(state=state, has_new_token=True)], torch.empty(0))
        sampling(torch.tensor([6]), torch.randn(1, len(tokenizer)), torch.empty(0))
        assert state._new_tokens_limit == limit
    assert isinstance(answer.error, RequestCancelled)
    del answer
    gc.collect()
    assert not sampling._answers


@pytest.mark.parametrize("is_held", [True, False])
def test_a_request_that_was_left_ends_also_where_another_one_comes_before_its_next_token(
    is_held: bool, model: Any, tokenizer: Any
) -> None:
    config, sampling = GenerationConfig(max_new_tokens=9, eos_token_id=0), PerRequestSampling()
    requests = [parse_completion({"prompt": "the", "max_tokens": 9}, "tiny") for _ in "ab"]
    states, answers = [RequestState(name, [5, 6], max_new_tokens=9) for name in "ab"], []
    for state, request in zip(states, requests, strict=True):
        ending = Ending(tokenizer, config, request, None, None)
        answers.append(BatchedAnswer(model, config, [5, 6], LogitsProcessorList(), ending, 0))
        sampling.add(state.request_id, answers[-1])
        requests[0].cancelled.set()
    if not is_held:
        del answers[0]
        gc.collect()
    sampling.prepare_tensor_args([SimpleNamespace(state=each, has_new_token=True) for each in states], torch.empty(0))
    sampling(torch.tensor([6, 6]), torch.randn(2, len(tokenizer)), torch.empty(0))
    assert [each._new_tokens_limit for each in states] == [1, 9]
    assert states[0].error


def test_a_pass_that_fails_is_an_error_for_those_in_it_and_nobody_else(
    batched: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(PerRequestSampling, "prepare_tensor_args", lambda *_, **__: 1 / 0)
        # 503 where the batch is seen to be dead before its last words are.
        assert batched.post("/v1/completions", {"prompt": "the"}).status in (500, 503)
    wait_for(lambda: batched.post("/v1/completions", {"prompt": "the"}).status == 200)  # 503 while the old one ends
    assert batched.get("/health").status == 200


def test_a_request_that_a_dying_batch_drops_is_a_503() -> None:
    with pytest.raises(ApiError) as caught:
        _added(lambda *_, **__: None, [1, 2], request_id="a")
    assert (caught.value.status, caught.value.code) == (503, "worker_dead")
    assert _added(lambda *_, **__: "a") == "a"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("cuda")}, "measured on CPUs only"),
        ({"attention": "eager"}, "its attention is eager"),
        ({"is_encoder_decoder": True}, "an encoder and a decoder"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"num_beams": 3}, "searches with beams"),
    ],
)
def test_what_is_not_batched_has_a_reason(model: Any, change: dict[str, Any], reason: str) -> None:
    own = model.config
    text = SimpleNamespace(layer_types=change.get("layer_types"), num_hidden_layers=2, num_attention_heads=4)
    config = SimpleNamespace(
        get_text_config=lambda **_: text if "layer_types" in change else own.get_text_config(),
        is_encoder_decoder=change.get("is_encoder_decoder", False),
        _attn_implementation=change.get("attention", "sdpa"),
    )
    fake = SimpleNamespace(
        config=config if "num_beams" not in change else own, device=change.get("device", model.device),
        dtype=model.dtype, init_continuous_batching=None, generation_config=SimpleNamespace(**change),
    )  # fmt: skip
    assert why_not_batched(model, True) is None
    assert reason in (why_not_batched(fake, True) or "")


@pytest.mark.slow
def test_a_batch_that_is_not_what_the_model_says_is_given_up(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("quantload.server.transformers_serving.disagreement", lambda *_: "it was nonsense")
    state = ServerState("tiny", continuous_batching=None)
    with caplog.at_level(logging.WARNING, "quantload"):
        state.finish(model, tokenizer, warm_up)
    assert "one after the other: it was nonsense" in caplog.text
    assert not state.served().batches
    with running(state) as client:
        assert choices(ask(client, PROMPTS[0]))
    assert threading.active_count() < 60


def test_the_check_knows_the_models_own_tokens_from_others(model: Any) -> None:
    prompt = [5, 6, 7]
    logprobs = torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1].detach().float(), -1)
    token = int(logprobs.argmax())
    assert disagreement(model, prompt, [Chosen(token, float(logprobs[token]), ())]) is None
    assert disagreement(model, prompt, [Chosen(token, float(logprobs[token]) - 2, ())]) is not None


def test_the_room_of_a_batch_is_whole_blocks_within_a_part_of_the_memory(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, width, float32
    assert batch_tokens(model, 512) == 8 * 512
    monkeypatch.setattr(
        "quantload.server.batching.memory_limits", lambda: [SimpleNamespace(available=8 * 3000 * per_token)]
    )
    assert batch_tokens(model, 512) == 2816
