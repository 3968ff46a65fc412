from __future__ import annotations

from typing import Any

import pytest
from quantload.server.api_errors import ApiError
from quantload.server.generation_request import GenerationRequest, parse_completion
from quantload.server.generation_settings import apply_request, fit_context
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
