"""Answer a few requests before anybody else's: what is compiled or allocated at the first is there when one comes."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from ..errors import LoadCancelledError
from ..schemes.ahead import prepare_products
from ..shortage import named
from ..tokenizer import chat_templates
from .api_errors import ApiError
from .embeddings import embed
from .generation_request import GenerationRequest, parse_chat, parse_completion
from .prompts import PLACEHOLDERS, vocabulary_size
from .transformers_serving import ServedModel

logger = logging.getLogger("quantload")

PROMPT_TOKENS = {"cpu": (1, 24), "other": (1, 3, 16, 17, 32, 33, 48, 65, 80, 160)}
"""Lengths of prompts. Triton compiles a matmul anew for each of its tile sizes (16, 32, 64 and 128 tokens), for one
token, and for a multiple of 16. For a CPU `prepare_products` compiles, and a pass takes as long as it has tokens."""
CHECKED_TOKENS = 24
"""Length of the prompt that a batch is tried with."""
BATCHES = (1, 2, 4)
"""Requests at a time, where they are generated for together."""
TEXT = "The quick brown fox jumps over the lazy dog. "


def warm_up(served: ServedModel, cancel: threading.Event) -> None:
    """Compile, and generate, what requests of any length will need.

    Raises `LoadCancelledError` soon after `cancel` was set, and what a model raises that cannot generate.
    """
    if served.generates and not chat_templates(served.manager.processor):
        logger.warning("%s has no chat template: /v1/chat/completions is refused", served.name)
    begin = time.perf_counter()
    prepare_products(served.model, served.model.device, served.model.dtype)
    for work in _passes(served):
        if cancel.is_set():
            raise LoadCancelledError("the server was told to stop before it was ready")
        with named("the first tokens"):
            work()
    logger.info("Warmed up in %.1f s", time.perf_counter() - begin)


def _passes(served: ServedModel) -> Iterator[Callable[[], Any]]:
    if not served.generates:
        length = min(24, served.context or 24)
        yield (
            served.state.get_manager(served.name)
            .submit(embed, served.model, _some_ids(served, length), served.pooling)
            .result
        )
        return
    if served.batches:
        yield partial(_settle_batch, served)
    if served.batches:
        for count in BATCHES:
            yield partial(_answer, [partial(served.complete, _completion(served)) for _ in range(count)])
    elif served.model.main_input_name == "input_ids":
        lengths = PROMPT_TOKENS.get(served.model.device.type, PROMPT_TOKENS["other"])
        for length in lengths:
            if served.context is None or length + 2 <= served.context:
                # On the thread that generates: its scratch memory and torch's threads belong to it.
                yield served.state.get_manager(served.name).submit(_generate, served, length).result
        yield partial(_answer, [partial(served.complete, _completion(served))])
    if chat_templates(served.manager.processor):
        chat = {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 2}
        yield partial(_answer, [partial(served.chat, parse_chat(chat, served.name))])


def _settle_batch(served: ServedModel) -> None:
    """Let a model whose batches are not what it says alone have none."""
    length = CHECKED_TOKENS if served.context is None else max(1, min(CHECKED_TOKENS, served.context // 2))
    ids = _some_ids(served, length)
    body = {"prompt": ids, "max_tokens": max(1, length // 3), "temperature": 0, "logprobs": 0, "ignore_eos": True}
    (request,) = parse_completion(body, served.name).parts()
    served.settle_batch(ids, request)


def _completion(served: ServedModel) -> GenerationRequest:
    return parse_completion({"prompt": TEXT, "max_tokens": 2}, served.name)


def _generate(served: ServedModel, length: int) -> None:
    """Two tokens after a prompt of `length`."""
    ids = torch.tensor([_some_ids(served, length)], device=served.model.device)
    served.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)


def _some_ids(served: ServedModel, length: int) -> list[int]:
    """Those of a text, without such as stand for an image or another input."""
    tokenizer = getattr(served.manager.processor, "tokenizer", served.manager.processor)
    size, config = vocabulary_size(served.model.config), served.model.config
    odd = {getattr(config, name, None) for name in PLACEHOLDERS}
    ids = [token for token in tokenizer(TEXT)["input_ids"] if token not in odd and token < (size or token + 1)]
    return list(itertools.islice(itertools.cycle(ids or [0]), length))


def _answer(requests: Sequence[Callable[[str], Coroutine[Any, Any, Any]]]) -> None:
    """Answer requests at the same time; a refusal is an answer, as of a chat template that wants other messages."""

    async def all_of_them() -> None:
        names = (f"warm-up-{number}" for number in itertools.count())
        for outcome in await asyncio.gather(*(each(next(names)) for each in requests), return_exceptions=True):
            if isinstance(outcome, BaseException) and not (isinstance(outcome, ApiError) and outcome.status < 500):
                raise outcome

    asyncio.run(all_of_them())
