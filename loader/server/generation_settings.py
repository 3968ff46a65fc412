"""What a request says, on the generation configuration of the model: sampling, ends, how many tokens fit."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from .api_errors import bad_request
from .generation_request import GenerationRequest

NO_TOKEN = 2**31 - 1


def apply_request(config: GenerationConfig, request: GenerationRequest) -> None:
    """Put the sampling parameters of a request on the model's own generation configuration.

    What the request does not say stays as the model has it. A temperature above 0, or a restriction of the choice
    (`top_p`, `top_k`, `min_p`) without one, turns sampling on; temperature 0 turns it off.
    """
    restrictions = {"top_p": request.top_p, "top_k": request.top_k, "min_p": request.min_p}
    given = {name: value for name, value in restrictions.items() if value is not None}
    if request.temperature == 0:
        config.do_sample = False
        config.temperature = config.top_p = config.top_k = config.min_p = None
    elif request.temperature is not None or given or request.do_sample:
        config.do_sample = True
        if request.temperature is not None:
            config.temperature = request.temperature
        # transformers fills in 50 where nobody set it; who asks for a temperature did not ask for that.
        config.top_k = config.top_k if config.top_k is not None else 0
        for name, value in given.items():
            setattr(config, name, value)
    if request.repetition_penalty is not None:
        config.repetition_penalty = request.repetition_penalty
    if request.logit_bias:
        config.sequence_bias = {(token,): bias for token, bias in request.logit_bias.items()}
    if request.min_tokens:
        config.min_new_tokens = request.min_tokens


def apply_end_tokens(config: GenerationConfig, request: GenerationRequest) -> None:
    """Say which tokens end the answer: the model's own unless they are to be ignored, and those of the request.

    Where none is left, an id that no vocabulary has says so: `generate` puts the model's own in the place of None.
    """
    own = config.eos_token_id
    ends = [] if request.ignore_eos or own is None else [own] if isinstance(own, int) else list(own)
    ends.extend(token for token in request.stop_token_ids if token not in ends)
    if request.ignore_eos or request.stop_token_ids:
        config.eos_token_id = ends or [NO_TOKEN]


def fit_context(
    config: GenerationConfig,
    request: GenerationRequest,
    prompt_tokens: int,
    context: int | None,
    apart: bool = False,
) -> None:
    """Set how many tokens may be generated; `context` is the model's limit in tokens (None: no limit).

    `apart`: the prompt goes to an encoder, and the answer has a context of its own, with a token that begins it.
    Raises `ApiError` (400) if the prompt is empty, or if it and `max_tokens` together do not fit.
    """
    if prompt_tokens == 0:
        raise bad_request("the prompt is empty: it has no tokens", request.prompt_field)
    wanted = request.max_tokens
    if apart and context is not None:
        _fit_apart(request, prompt_tokens, wanted, context)
    room = None if context is None else context - (1 if apart else prompt_tokens)
    if room is not None and (wanted or 1) > room:
        asked = "at least 1 is" if wanted is None else f"{wanted} are"
        raise bad_request(
            f"this model's context is {context} tokens: the prompt has {prompt_tokens} and {asked} to be generated; "
            "shorten the prompt or lower max_tokens",
            request.prompt_field,
            code="context_length_exceeded",
        )
    limit = wanted or request.default_max_tokens or config.max_new_tokens or 1024
    config.max_new_tokens = limit if room is None else min(limit, room)
    config.max_length = None
    if request.min_tokens > config.max_new_tokens:
        raise bad_request(
            f"`min_tokens` is {request.min_tokens}, and {config.max_new_tokens} are to be generated at most",
            "min_tokens",
        )


def _fit_apart(request: GenerationRequest, prompt_tokens: int, wanted: int | None, context: int) -> None:
    """Raise `ApiError` (400) where the prompt does not fit into the encoder, or the answer into the decoder."""
    prompt = ("the prompt has", prompt_tokens, context, request.prompt_field)
    for what, tokens, most, field in (prompt, ("max_tokens is", wanted or 0, context - 1, "max_tokens")):
        if tokens > most:
            raise bad_request(
                f"{what} {tokens}, and this model takes {most} at most, apart from each other; make it less",
                field,
                code="context_length_exceeded",
            )


def context_length(config: Any) -> int | None:
    """The number of positions a model's text configuration names, or None where it names none."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
