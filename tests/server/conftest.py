"""A tiny random model with a real tokenizer, served."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from quantload.server import ServerState
from server_harness import Client, running
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))  # last, so that its module names hide nothing

TEXT = "the quick brown fox jumps over the lazy dog, and then it sleeps. 0123456789 äöü € 🦊 \n" * 4
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ('system', 'user', 'assistant', 'tool') %}"
    "{{ raise_exception('no such role: ' + m['role']) }}{% endif %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=["<eos>"])
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.lm_head.weight.data[tokenizer.eos_token_id] = 0
    # Only readable text: half a character at the end of a stream is never sent.
    texts = {token: tokenizer.decode([token]) for token in range(len(tokenizer))}
    model.generation_config.suppress_tokens = [
        t for t, text in texts.items() if not (text.isascii() and text.isprintable())
    ]
    return model


@pytest.fixture(scope="session")
def state(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> ServerState:
    state = ServerState("tiny")
    state.finish(model, tokenizer)
    return state


@pytest.fixture(scope="session")
def client(state: ServerState) -> Iterator[Client]:
    with running(state) as client:
        yield client
