"""One prompt and the model's answer to it; over ranks, each of them calls this with the same arguments."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig, ProcessorMixin, TextStreamer

from .checkpoint.folder import Checkpoint
from .errors import PolicyError, UnsupportedCheckpointError
from .model.attention_cache import context_length
from .model.skeleton import find_model
from .model.text_kinds import is_encoder_decoder, why_no_text
from .shortage import named
from .tokenizer import chat_templates, is_of_library, load_processor, said, tokenizer_of

MAX_NEW_TOKENS = 128
"""Where nobody says how many, nor the context of the model allows fewer."""


class Prompt(NamedTuple):
    """Token ids [1, n] of a text, what they were made with, and how many tokens may follow.

    `room` is how many the context of the model leaves room for, None where it says nothing.
    """

    ids: Tensor
    tokenizer: Any
    is_chat: bool
    max_new_tokens: int
    room: int | None = None


class Answer(NamedTuple):
    """What a model generated; `finish_reason` is `stop` at an end token, else `length`; `seconds` are those it took."""

    text: str
    tokens: int
    finish_reason: str
    seconds: float


def read_prompt(
    checkpoint: Checkpoint, text: str, *, raw: bool, max_new_tokens: int | None, trust_remote_code: bool
) -> Prompt:
    """The token ids of a text, as a user's message by the chat template, where there is one and it is not `raw`.

    No weight is read for it. Raises `UnsupportedCheckpointError` for a model that answers no text with text,
    `CheckpointError` where there is no tokenizer, and `PolicyError` for what that or the context cannot take.
    """
    recipe = find_model(checkpoint, trust_remote_code)
    why = why_no_text(recipe.cls, recipe.config)
    if why is not None:
        raise UnsupportedCheckpointError(f"{checkpoint.model_id!r}, a {recipe.cls.__name__}, {why}")
    checkpoint.note_small_files()  # fetched where they are elsewhere; the load sees that they are still of this model
    processor = load_processor(checkpoint, trust_remote_code)
    tokenizer, is_chat = tokenizer_of(processor), not raw and bool(chat_templates(processor))
    try:
        if is_chat:
            text = _as_message(processor, text)
        ids = tokenizer(text, add_special_tokens=not is_chat, return_tensors="pt", verbose=False).input_ids
    except TemplateError as error:
        raise PolicyError(f"the chat template refused the prompt: {error}; --raw takes it as it is") from error
    except BaseException as error:
        if not is_of_library(error) or isinstance(error, MemoryError):
            raise
        raise PolicyError(f"the tokenizer cannot use the prompt: {said(error)}") from error
    room = _room(ids, recipe.config, max_new_tokens)
    allowed = max_new_tokens or min(MAX_NEW_TOKENS, MAX_NEW_TOKENS if room is None else room)
    return Prompt(ids, tokenizer, is_chat, allowed, room)


def answer(
    model: Any, prompt: Prompt, *, temperature: float | None, seed: int, on_text: Callable[[str], None] | None = None
) -> Answer:
    """Generate behind a prompt; `on_text` is called with the text as it comes.

    `temperature` 0 takes the most likely token each time, None samples or not as the model's generation config says.
    """
    config = _generation_config(model, temperature, prompt.max_new_tokens)
    is_streamed = on_text is not None and (config.num_beams or 1) == 1
    streamer = _Streamer(prompt.tokenizer, on_text) if on_text is not None and is_streamed else None
    ids = prompt.ids.to(model.device)
    torch.manual_seed(seed)
    begin = time.perf_counter()
    with named(f"an answer of up to {prompt.max_new_tokens} tokens"):
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            streamer=streamer,
            tokenizer=prompt.tokenizer,
        )
    seconds = time.perf_counter() - begin
    new = made[0, 1 if is_encoder_decoder(model.config) else ids.shape[-1] :].tolist()
    text: str = prompt.tokenizer.decode(new, skip_special_tokens=True)
    if on_text is not None and not is_streamed:  # beams have no text before the end
        on_text(text)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return Answer(text, len(new), "stop" if new and new[-1] in ends else "length", seconds)


def _as_message(processor: Any, text: str) -> str:
    content: Any = [{"type": "text", "text": text}] if isinstance(processor, ProcessorMixin) else text
    rendered: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return rendered


def _room(ids: Tensor, config: Any, wanted: int | None) -> int | None:
    """How many tokens have room behind a prompt, None where the model does not say.

    Raises `PolicyError` for a prompt that the model cannot be given, and for more tokens than have room.
    """
    count, context = ids.shape[-1], context_length(config)
    if not count:
        raise PolicyError("the prompt is empty: it has no tokens")
    size = getattr(config.get_text_config(), "vocab_size", None)
    if isinstance(size, int) and int(ids.max()) >= size:
        raise PolicyError(f"the prompt has the token {int(ids.max())}, and the model knows those below {size}")
    if context is None:
        return None
    apart = is_encoder_decoder(config)  # the answer has a context of its own, and a token that begins it
    if apart and count > context:
        raise PolicyError(f"the prompt has {count} tokens, and the context of the model is {context}: shorten it")
    room = context - (1 if apart else count)
    if room < (wanted or 1):
        raise PolicyError(
            f"the context of the model is {context} tokens: the prompt has {count}, and {wanted or 'at least 1'} are "
            f"to be generated; shorten the prompt, or lower --max-new-tokens"
        )
    return room


def _generation_config(model: Any, temperature: float | None, max_new_tokens: int) -> GenerationConfig:
    """The model's own, with what was asked for."""
    config = copy.deepcopy(model.generation_config)
    config.max_new_tokens, config.max_length = max_new_tokens, None
    if temperature is not None:
        config.do_sample = temperature > 0
        config.temperature = temperature or None
        # transformers fills in 50 where nobody set it; who asks for a temperature did not ask for that.
        config.top_k = config.top_k if config.top_k is not None else 0
    return config


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Tells the text of an answer as it comes."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """What transformers' streamer calls."""
        if text:
            self._on_text(text)
