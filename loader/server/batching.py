"""Whether requests are generated for together, in how much memory, and whether that is what the model says alone."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from transformers import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

from ..memory.amounts import MIB, format_bytes
from ..memory.limits import memory_limits
from ..model.attention_cache import attention_cache_bytes
from ..model.text_kinds import is_encoder_decoder
from .api_errors import ApiError
from .batch_sampling import PerRequestSampling, plain_config
from .logprobs import Chosen

logger = logging.getLogger("quantload")

BLOCK_TOKENS = 256  # transformers' default size of a block of its paged cache
MOST_BYTES = 1024 * MIB
"""What a batch keeps of its requests, at most: it takes this memory as it starts."""
SHARE_OF_MEMORY = 8
"""One part in so many of the memory that is left is what a batch takes at most."""
LEAST_TOKENS = 2048
DYING_SECONDS = 10.0
CONTEXTS = 8
MOST_NATS = 0.5
"""By how much the likelihood of a token may differ, on the average, between a batch and the model alone: sums of BF16
numbers in another order differ by a tenth of it, a cache that holds something else by several times as much."""


class Batch:
    """The continuous batch of a server: transformers' `manager` of it, with the sampling of each request.

    `tokens` is how many its cache holds, of all requests together; None: as many as transformers takes memory for.
    """

    def __init__(self, manager: Any, model: Any, tokens: int | None) -> None:
        self.manager = manager
        self.sampling = PerRequestSampling()
        self._model = model
        self._tokens = tokens
        self._attention = model.config._attn_implementation

    @property
    def takes_the_model(self) -> bool:
        """Whether nobody else can run the model meanwhile: older versions of transformers change its attention."""
        return bool(self._model.config._attn_implementation != self._attention)

    def has_room_for(self, tokens: int) -> bool:
        """Whether a request of so many tokens, with its answer, can ever have its turn."""
        return self._tokens is None or tokens <= self._tokens or self.takes_the_model

    def start(self) -> None:
        """Take the memory, and begin to wait for requests, unless that was done; anew where the last one has died.

        A pass that raises ends transformers' loop, with an error for all requests that were in it.
        """
        held = self.manager._cb
        if held is not None and held.is_running() and self.manager.is_alive():
            return
        if held is not None:
            logger.error("The batch has failed, with all requests in it; it begins anew")
            held.join(time.perf_counter(), DYING_SECONDS)
        batch = self._model.init_continuous_batching(
            generation_config=plain_config(self._model.generation_config),
            continuous_batching_config=self.manager._cb_config,
        )
        batch.logit_processor = self.sampling
        batch.add_request = partial(_added, batch.add_request)
        batch.start()
        self.manager._cb = batch


def _added(add_request: Callable[..., str | None], *args: Any, **kwargs: Any) -> str:
    """`add_request`, which drops what comes to a batch that has just died: nobody would hear of it again."""
    request_id = add_request(*args, **kwargs)
    if request_id is None:
        raise ApiError(503, "the batch has failed; send the request again", code="worker_dead")
    return request_id


def batch_tokens(model: Any, context: int | None) -> int | None:
    """How many tokens a batch on a CPU has room for, in whole blocks; None for models on other devices.

    Eight contexts, but no more than a part of the memory that is left, and than 1 GiB.
    """
    if model.device.type != "cpu":
        return None
    per_token = attention_cache_bytes(model.config, 1, model.dtype) or 1
    left = min((limit.available for limit in memory_limits()), default=MOST_BYTES)
    fitting = min(MOST_BYTES, left // SHARE_OF_MEMORY) // per_token
    wanted = CONTEXTS * (context or 4096)
    return max(LEAST_TOKENS, min(wanted, fitting)) // BLOCK_TOKENS * BLOCK_TOKENS


def batch_config(tokens: int | None) -> ContinuousBatchingConfig:
    """Every request chooses its token in Python, before the next pass begins: no pass is prepared ahead."""
    blocks = None if tokens is None else tokens // BLOCK_TOKENS
    most = None if tokens is None else 512
    return ContinuousBatchingConfig(
        num_blocks=blocks, max_batch_tokens=most, use_async_batching=False, use_cuda_graph=False
    )


def leaves_models_as_they_are() -> bool:
    """Whether this version of transformers batches with `sdpa` attention as it is: 5.16 exchanges it for another."""
    switch = ContinuousBatchingManager.switch_to_cb_friendly_attn
    return "auto_switch_to_flash" in inspect.signature(switch).parameters


def why_not_batched(model: Any, reads_text_only: bool) -> str | None:
    """Why requests to a model are not generated for together unless somebody asks for it; None where they are."""
    config = model.config.get_text_config()
    kinds = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    if model.device.type != "cpu":
        return f"that has been measured on CPUs only, and the model is on {model.device.type}"
    if not leaves_models_as_they_are():
        return f"transformers {transformers.__version__} changes the attention of a model for a batch"
    if not reads_text_only or not hasattr(model, "init_continuous_batching"):
        return f"transformers does not batch a {type(model).__name__} continuously"
    if is_encoder_decoder(model.config):
        return "the model has an encoder and a decoder"
    if getattr(model, "_is_stateful", False) or kinds:
        return f"the model keeps more than keys and values ({', '.join(sorted(kinds)) or 'a state'})"
    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return f"its attention is {getattr(model.config, '_attn_implementation', None)}, and not sdpa"
    if attention_cache_bytes(model.config, 1, model.dtype) is None:
        return "its config does not say what a token takes in the cache"
    if (getattr(model.generation_config, "num_beams", None) or 1) > 1:
        return "its generation config searches with beams"
    return None


def say_how_much(model: Any, tokens: int) -> None:
    """Log the memory of a batch."""
    nbytes = tokens * (attention_cache_bytes(model.config, 1, model.dtype) or 0)
    logger.info(
        "Requests are generated for together, in a cache of %d tokens (%s); longer ones alone",
        tokens,
        format_bytes(nbytes),
    )


@torch.no_grad()
def disagreement(model: Any, prompt: Sequence[int], chosen: Sequence[Chosen]) -> str | None:
    """What a batch got wrong of the answer `chosen` to a prompt, by the model's own pass over both; None: nothing."""
    answer = [each.token for each in chosen]
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    own = torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None])[:, 0]
    told = torch.tensor([each.logprob for each in chosen], device=own.device)
    apart = float((own - told).abs().mean())
    return None if apart <= MOST_NATS else f"in a batch its tokens were {apart:.2f} nats from what it says alone"
