"""Models with an encoder answer with all that was generated: nothing of the answer is taken for the prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from quantload.errors import UnsupportedCheckpointError
from quantload.options import LoadOptions
from quantload.server import ServerState
from quantload.server.command import serve_model
from quantload.server.generation import behind_the_prompt
from quantload.server.served_kinds import why_not_served
from server_harness import Client, running
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

CONTEXT = 64
PROMPT = "the quick brown fox jumps over the lazy dog"


def t5(vocab: int, end: int) -> Any:
    config = T5Config(
        vocab_size=vocab, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=end,
        eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def bart(vocab: int, end: int) -> Any:
    """The first token of its answers is forced, as that of a language is."""
    config = BartConfig(
        vocab_size=vocab, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=CONTEXT,
        decoder_start_token_id=end, eos_token_id=end, pad_token_id=end, bos_token_id=end, forced_eos_token_id=None,
        forced_bos_token_id=70,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


@pytest.fixture(scope="module", params=[t5, bart])
def model(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    torch.manual_seed(0)
    built = request.param(len(tokenizer), tokenizer.eos_token_id).eval()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    texts = {token: tokenizer.decode([token]) for token in range(len(tokenizer))}
    unreadable = [token for token, text in texts.items() if not (text.isascii() and text.isprintable())]
    built.generation_config.suppress_tokens = sorted({*unreadable, tokenizer.eos_token_id})
    return built


@pytest.fixture(scope="module")
def client(model: Any, tokenizer: Any) -> Iterator[Client]:
    state = ServerState("tiny")
    state.finish(model, tokenizer)
    with running(state) as client:
        yield client


def expected(model: Any, tokenizer: Any, tokens: int, **fields: Any) -> str:
    ids = tokenizer(PROMPT, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False, **fields)
    assert out.shape[1] == tokens + 1  # the token that begins it
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def test_the_whole_answer_comes_and_is_counted(client: Client, model: Any, tokenizer: Any) -> None:
    reply = client.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 12}).json
    (choice,) = reply["choices"]
    assert choice["text"] == expected(model, tokenizer, 12) != ""
    assert choice["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 12
    assert reply["usage"]["prompt_tokens"] == len(tokenizer(PROMPT)["input_ids"]) > 1


def test_a_stream_has_the_same_text(client: Client, model: Any, tokenizer: Any) -> None:
    events = client.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 12, "stream": True}).events
    text = "".join(event["choices"][0]["text"] for event in events[:-1])
    assert text == expected(model, tokenizer, 12)


def test_stop_strings_and_penalties_look_at_the_answer_alone(client: Client, model: Any, tokenizer: Any) -> None:
    whole = expected(model, tokenizer, 12)
    stop = whole[3:5]
    reply = client.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 12, "stop": stop}).json
    assert reply["choices"][0]["text"] == whole[: whole.index(stop)]
    assert reply["choices"][0]["finish_reason"] == "stop"
    fields = {"prompt": PROMPT, "max_tokens": 12, "presence_penalty": 2.0}
    penalized = client.post("/v1/completions", fields).json["choices"][0]["text"]

    def penalty(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen = torch.zeros_like(scores).scatter_(1, ids[:, 1:], 1.0)
        return scores - 2.0 * seen

    assert penalized == expected(model, tokenizer, 12, logits_processor=[penalty])


def test_prompt_and_answer_have_a_context_each(client: Client, model: Any, tokenizer: Any) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None:
        reply = client.post("/v1/completions", {"prompt": PROMPT * 20, "max_tokens": 2})
        assert reply.status == 200
        return
    count = len(tokenizer(PROMPT)["input_ids"])
    assert count > 3
    reply = client.post("/v1/completions", {"prompt": PROMPT, "max_tokens": limit - 1})
    assert (reply.status, reply.json["usage"]["completion_tokens"]) == (200, limit - 1)
    for body in ({"prompt": PROMPT, "max_tokens": limit}, {"prompt": PROMPT * 20, "max_tokens": 1}):
        reply = client.post("/v1/completions", body)
        assert (reply.status, reply.json["error"]["code"]) == (400, "context_length_exceeded")


SERVED = ("LlamaForCausalLM", "T5ForConditionalGeneration", "LlavaForConditionalGeneration", "GPT2DoubleHeadsModel",
          "M2M100ForConditionalGeneration", "Qwen2_5OmniForConditionalGeneration", "XLMWithLMHeadModel",
          "Blip2ForConditionalGeneration", "BertLMHeadModel", "SeamlessM4TForTextToText")  # fmt: skip
NOT_SERVED = {
    "WhisperForConditionalGeneration": "generates from recorded speech",
    "ParakeetForCTC": "generates from recorded speech",
    "MusicgenForConditionalGeneration": "generates sound",
    "MusicgenForCausalLM": "generates codes of sound",
    "BarkModel": "generates sound",
    "SeamlessM4TModel": "is none of the classes",
    "ImageGPTForCausalImageModeling": "generates images",
    "VisionEncoderDecoderModel": "reads no text",
    "Pix2StructForConditionalGeneration": "reads no text",
    "RagTokenForGeneration": "is none of the classes",
    "BertForMaskedLM": "does not generate at all",
    "ViTModel": "does not generate at all",
    "T5EncoderModel": "does not generate at all",
}


@pytest.mark.parametrize("name", SERVED)
def test_models_of_text_are_served(name: str) -> None:
    assert why_not_served(getattr(transformers, name), _config(name)) is None


@pytest.mark.parametrize(("name", "why"), NOT_SERVED.items())
def test_others_are_not_and_are_told_why(name: str, why: str) -> None:
    assert str(why_not_served(getattr(transformers, name), _config(name))).startswith(why)


def _config(name: str) -> Any:
    """What the check looks at of the usual config of a class."""
    cls = getattr(transformers, name)
    usual = cls.config_class
    values = {"model_type": usual.model_type, "num_codebooks": 4 if name.startswith("Musicgen") else None}
    return type("Config", (), {**values, "is_encoder_decoder": False, "sub_configs": {}})()


class RemoteModel(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """A class that transformers does not know."""


def test_a_class_of_remote_code_is_served() -> None:
    assert why_not_served(RemoteModel, _config("LlamaForCausalLM")) is None


def test_an_encoder_and_a_decoder_cannot_batch_continuously() -> None:
    assert "continuous" in str(why_not_served(T5ForConditionalGeneration, T5Config(), continuous_batching=True))


def test_it_is_told_before_a_weight_is_read(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedCheckpointError, match="BertForMaskedLM, does not generate at all"):
        serve_model(
            checkpoint("bert"), "none", device="cpu", policy=None, options=LoadOptions(), revision=None,
            trust_remote_code=False, host="127.0.0.1", port=0, api_key=None, served_model_name="x",
            continuous_batching=False,
        )  # fmt: skip


def test_what_is_no_text_is_no_answer() -> None:
    prompt = torch.tensor([[5, 6, 7]])
    assert behind_the_prompt(torch.tensor([[5, 6, 7, 8]]), prompt, 3).tolist() == [[5, 6, 7, 8]]
    assert behind_the_prompt(torch.tensor([[0, 8, 9]]), prompt, 1).tolist() == [[5, 6, 7, 8, 9]]
    assert behind_the_prompt(torch.tensor([[8, 9]]), prompt, 0).tolist() == [[5, 6, 7, 8, 9]]
    assert behind_the_prompt(torch.tensor([[8, 9]]), prompt, None).tolist() == [[5, 6, 7, 8, 9]]
    assert behind_the_prompt(torch.tensor([[0, 6, 7, 8]]), prompt, 3).tolist() == [[5, 6, 7, 8]]
    for sound in (torch.zeros(1, 100), (torch.zeros(1), torch.zeros(1)), torch.zeros(100, dtype=torch.long)):
        with pytest.raises(TypeError, match="token ids"):
            behind_the_prompt(sound, prompt, None)
