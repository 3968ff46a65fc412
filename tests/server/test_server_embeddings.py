"""Vectors of texts, from models that encode text and generate none."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from quantload.model.text_kinds import encodes_text
from quantload.server import ServerState
from quantload.server.embeddings import Pooling, embed, first_position, stored_pooling
from quantload.server.warm_up import warm_up
from server_harness import Client, running
from transformers import (
    BertConfig,
    BertModel,
    LlamaForCausalLM,
    Qwen3Model,
    RobertaConfig,
    RobertaModel,
    T5EncoderModel,
    T5Model,
    ViTModel,
)

TEXTS = ["the quick brown fox", "the lazy dog", "fox"]
CONTEXT = 32
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def bert(vocabulary: int) -> Any:
    return BertModel(BertConfig(vocab_size=vocabulary, max_position_embeddings=CONTEXT, **SIZES))


def roberta(vocabulary: int) -> Any:
    """Its positions begin behind the one for padding."""
    return RobertaModel(
        RobertaConfig(vocab_size=vocabulary, max_position_embeddings=CONTEXT + 2, pad_token_id=1, **SIZES)
    )


@pytest.fixture(scope="module", params=[bert, roberta])
def encoder(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    torch.manual_seed(0)
    return request.param(len(tokenizer)).eval()


@pytest.fixture(scope="module")
def encoding(encoder: Any, tokenizer: Any) -> Iterator[Client]:
    state = ServerState("tiny")
    state.finish(encoder, tokenizer, warm_up)
    with running(state) as client:
        yield client


def expected(encoder: Any, tokenizer: Any, text: str) -> list[float]:
    """The mean of the last hidden states, of length 1."""
    states = encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].detach()
    mean = states.mean(0)
    vector: list[float] = (mean / mean.norm()).tolist()
    return vector


def test_a_vector_is_the_mean_of_a_texts_tokens(encoding: Client, encoder: Any, tokenizer: Any) -> None:
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    for given in (TEXTS, ids):
        answer = encoding.post("/v1/embeddings", {"input": given}).json
        assert [one["index"] for one in answer["data"]] == [0, 1, 2]
        for one, text in zip(answer["data"], TEXTS, strict=True):
            assert one["embedding"] == pytest.approx(expected(encoder, tokenizer, text), abs=1e-5)
        tokens = sum(map(len, ids))
        assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    one = encoding.post("/v1/embeddings", {"input": TEXTS[0], "encoding_format": "base64"}).json["data"][0]
    vector = np.frombuffer(base64.b64decode(one["embedding"]), "<f4")
    assert vector.tolist() == pytest.approx(expected(encoder, tokenizer, TEXTS[0]), abs=1e-5)


def test_openais_client_reads_it(encoding: Client, encoder: Any, tokenizer: Any) -> None:
    with openai.OpenAI(base_url=f"{encoding.url}/v1", api_key="x", max_retries=0) as api:
        answer = api.embeddings.create(model="tiny", input=TEXTS)
    assert answer.data[1].embedding == pytest.approx(expected(encoder, tokenizer, TEXTS[1]), abs=1e-5)


def test_a_text_may_fill_the_context_and_no_more(encoding: Client) -> None:
    assert encoding.get("/v1/models").json["data"][0]["max_model_len"] == CONTEXT
    assert encoding.post("/v1/embeddings", {"input": [5] * CONTEXT}).status == 200
    reply = encoding.post("/v1/embeddings", {"input": [[5], [5] * (CONTEXT + 1)]})
    assert (reply.status, reply.json["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [9999]}, "input"),
        ({"input": 3}, "input"),
        ({"input": "x", "encoding_format": "binary"}, "encoding_format"),
        ({"input": "x", "dimensions": 8}, "dimensions"),
        ({"input": "x", "prompt": "x"}, "prompt"),
    ],
)
def test_wrong_requests_are_refused(encoding: Client, fields: dict[str, Any], param: str) -> None:
    reply = encoding.post("/v1/embeddings", fields)
    assert (reply.status, reply.json["error"]["param"]) == (400, param)


def test_each_kind_of_model_has_its_routes(encoding: Client, client: Client) -> None:
    hello = [{"role": "user", "content": "hello"}]
    for served, path, body in (
        (encoding, "/v1/completions", {"prompt": "x"}),
        (encoding, "/v1/chat/completions", {"messages": hello}),
        (client, "/v1/embeddings", {"input": "x"}),
    ):
        reply = served.post(path, body)
        assert (reply.status, reply.json["error"]["code"]) == (400, "unsupported_model")


@pytest.mark.parametrize(("pooling", "pooled"), [("cls", 0), ("last", -1)])
def test_other_ways_to_pool(tokenizer: Any, pooling: Pooling, pooled: int) -> None:
    model = bert(len(tokenizer)).eval()
    ids = tokenizer(TEXTS[0])["input_ids"]
    states = model(torch.tensor([ids])).last_hidden_state[0, pooled].detach()
    assert embed(model, ids, pooling) == pytest.approx((states / states.norm()).tolist(), abs=1e-5)


def test_how_a_checkpoint_pools_is_read(tmp_path: Path) -> None:
    assert stored_pooling(tmp_path) is None
    (tmp_path / "1_Pooling").mkdir()
    config = tmp_path / "1_Pooling" / "config.json"
    config.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    assert stored_pooling(tmp_path) == "cls"
    config.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ValueError, match="pooling_mode_max_tokens"):
        stored_pooling(tmp_path)


def test_which_classes_encode_text() -> None:
    assert all(map(encodes_text, (BertModel, RobertaModel, Qwen3Model)))
    assert not any(map(encodes_text, (LlamaForCausalLM, T5Model, T5EncoderModel, ViTModel)))
    assert first_position(torch.nn.Linear(1, 1)) == 0
