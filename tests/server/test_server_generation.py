from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from quantload.server.api_errors import ApiError
from quantload.server.generation import (
    CheckedQueue,
    CountPenalty,
    GenerationFailed,
    apply_request,
    fit_context,
)
from quantload.server.generation_request import GenerationRequest, parse_completion
from quantload.server.stop_strings import StopMatcher
from transformers import GenerationConfig


def asking(**fields: Any) -> GenerationRequest:
    return parse_completion({"prompt": "x", **fields}, "tiny")


@pytest.mark.parametrize(
    ("own", "fields", "sampled"),
    [
        ({}, {}, None),
        ({"do_sample": True}, {}, True),
        ({}, {"temperature": 0.7}, True),
        ({}, {"top_p": 0.9}, True),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0}, False),
    ],
)
def test_when_a_token_is_sampled(own: dict[str, Any], fields: dict[str, Any], sampled: bool | None) -> None:
    config = GenerationConfig(**own)
    before = config.do_sample
    apply_request(config, asking(**fields))
    assert config.do_sample == (before if sampled is None else sampled)


def test_what_the_request_leaves_open_stays_the_models() -> None:
    config = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, repetition_penalty=1.1)
    apply_request(config, asking(top_p=0.5, logit_bias={"3": -2}))
    assert (config.temperature, config.top_k, config.top_p, config.repetition_penalty) == (0.6, 20, 0.5, 1.1)
    assert config.sequence_bias == {(3,): -2.0}


@pytest.mark.parametrize(
    ("fields", "own", "prompt", "context", "limit"),
    [
        ({"max_tokens": 7}, None, 3, 10, 7),
        ({}, None, 3, None, 16),
        ({}, None, 3, 10, 7),
        ({"max_tokens": 9}, None, 3, None, 9),
    ],
)
def test_the_limit_fits_the_context(
    fields: dict[str, Any], own: int | None, prompt: int, context: int | None, limit: int
) -> None:
    config = GenerationConfig(max_new_tokens=own)
    fit_context(config, asking(**fields), prompt, context)
    assert config.max_new_tokens == limit


@pytest.mark.parametrize(("fields", "prompt"), [({"max_tokens": 8}, 3), ({}, 10), ({}, 11), ({}, 0)])
def test_what_does_not_fit_is_refused(fields: dict[str, Any], prompt: int) -> None:
    with pytest.raises(ApiError) as caught:
        fit_context(GenerationConfig(), asking(**fields), prompt, 10)
    assert caught.value.status == 400


def test_penalties_are_openais_formula() -> None:
    prompt, generated = [0, 0], [1, 1, 2]
    ids = torch.tensor([prompt + generated])
    penalty = CountPenalty(frequency=0.5, presence=0.25)
    assert not penalty(torch.tensor([prompt]), torch.zeros(1, 4)).any()
    out = penalty(ids, torch.zeros(1, 4))
    assert out.tolist() == [[0.0, -1.25, -0.75, 0.0]]


class Failure:
    def __init__(self, msg: str) -> None:
        self.msg = msg


def test_the_queue_trims_at_a_stop_string_and_raises_errors() -> None:
    async def run() -> None:
        inner: asyncio.Queue[Any] = asyncio.Queue()
        queue = CheckedQueue(inner, StopMatcher(["\n\n"]), Failure)
        for item in ("a\n", "b\n", "\nc", None):
            inner.put_nowait(item)
        assert [await queue.get() for _ in range(3)] == ["a", "\nb", None]

        queue = CheckedQueue(inner, StopMatcher(["!"]), Failure)
        inner.put_nowait("x")
        inner.put_nowait(Failure("boom"))
        assert queue.get_nowait() == "x"
        with pytest.raises(asyncio.QueueEmpty):
            queue.get_nowait()
        with pytest.raises(GenerationFailed, match="boom"):
            await queue.get()

    asyncio.run(run())
