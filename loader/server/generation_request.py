"""Reading the JSON of a request: every field is checked here, before anything is computed.

A field that would change the answer and is not supported is an error, never ignored. What remains for transformers'
handlers is the prompt or the messages; the numbers go into a `GenerationRequest`.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .answer_fields import (
    Prompt,
    read_chat_logprobs,
    read_completion_logprobs,
    read_count,
    read_flag,
    read_include_usage,
    read_prompts,
    read_stop_tokens,
)
from .api_errors import ApiError, bad_request
from .grammar import Constraint, read_constraint
from .logprobs import Chosen
from .messages import check_messages, check_template_kwargs, check_tools
from .transformers_chat import request_fields
from .usage import Usage

# Logits are divided by both: beyond these a float32 overflows, and no token has a probability.
MIN_TEMPERATURE = 1e-5
MIN_REPETITION_PENALTY = 0.01

COMPLETION_MAX_TOKENS = 16  # what OpenAI's completions API says for a request without max_tokens

# Fields that say something about the request, not about the answer: taken and not used.
INERT = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_options",
        "prompt_cache_retention",
    }
)  # fmt: skip

# Fields that would change the answer, with the values that ask for nothing.
ONLY_DEFAULT: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "functions": (),
    "function_call": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}

SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "seed",
    "logit_bias",
    "stop",
    "min_tokens",
    "logprobs",
)

ANSWERS = ("n", "response_format", "stream_options", "ignore_eos", "stop_token_ids")
"""Fields about the number, the end and the form of the answers, which a continuous batch knows how to take too."""

_SHARED = frozenset({"model", "stream", "max_tokens", "generation_config", *SAMPLING, *ANSWERS, *INERT, *ONLY_DEFAULT})
COMPLETION_FIELDS = _SHARED | {"prompt"}
_CHAT = ("messages", "tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs", "max_completion_tokens")
CHAT_FIELDS = _SHARED | {*_CHAT, "top_logprobs"}


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """One checked request: None everywhere means the client did not say.

    `body` is what transformers' handler gets, `nbytes` how long its JSON was. `max_tokens` counts new tokens;
    `default_max_tokens` is used, cut to what the context has left, when the client gave none. `cancelled` is set when
    nobody waits for the answer; `usage` is where its generation counts. A request has `n` answers to each of its
    `prompts` (a chat has one prompt, the messages in `body`); `parts` has one for each answer, which is what is
    generated: `prompt_ids` is its prompt if that came as ids, `again` whether an earlier part has the same prompt,
    `logprobs` how many likely tokens are noted in `chosen` for each that was. `do_sample` samples at the model's own
    temperature.
    """

    body: dict[str, Any]
    stream: bool
    max_tokens: int | None = None
    default_max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    do_sample: bool = False
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    constraint: Constraint | None = None
    n: int = 1
    include_usage: bool = False
    prompts: tuple[Prompt, ...] = ()
    prompt_ids: tuple[int, ...] | None = None
    again: bool = False
    chosen: list[Chosen] = field(default_factory=list)
    nbytes: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)
    usage: Usage = field(default_factory=Usage)

    @property
    def prompt_field(self) -> str:
        """What the client calls the text that it sent."""
        return "messages" if "messages" in self.body else "prompt"

    def parts(self) -> list[GenerationRequest]:
        """One request for each answer, all answers to a prompt in a row; their seeds count up from the client's."""
        bodies: list[tuple[dict[str, Any], tuple[int, ...] | None]] = [(self.body, None)]
        if self.prompts:
            texts = [prompt if isinstance(prompt, str) else None for prompt in self.prompts]
            ids = [None if isinstance(prompt, str) else prompt for prompt in self.prompts]
            bodies = [({**self.body, "prompt": text or ""}, one) for text, one in zip(texts, ids, strict=True)]
        seeds = [None if self.seed is None else self.seed + index for index in range(self.n)]
        return [
            replace(self, body=body, prompt_ids=ids, seed=seed, chosen=[], again=index > 0)
            for body, ids in bodies
            for index, seed in enumerate(seeds)
        ]


def parse_completion(body: object, model_name: str) -> GenerationRequest:
    """A request to `/v1/completions`. Raises `ApiError` (400, or 404 for another model)."""
    fields = _with_generation_config(checked_fields(body, model_name, COMPLETION_FIELDS))
    prompts = read_prompts(fields.get("prompt"))
    return _request(
        fields,
        {"model": model_name},
        default_max_tokens=COMPLETION_MAX_TOKENS,
        logprobs=read_completion_logprobs(fields),
        constraint=read_constraint(fields),
        prompts=prompts,
    )


def parse_chat(body: object, model_name: str) -> GenerationRequest:
    """A request to `/v1/chat/completions`. Raises `ApiError` (400, or 404 for another model)."""
    fields = _with_generation_config(checked_fields(body, model_name, CHAT_FIELDS))
    handler_body: dict[str, Any] = {"model": model_name, "messages": check_messages(fields.get("messages"))}
    if fields.get("tool_choice") == "none":
        fields = {name: value for name, value in fields.items() if name != "tools"}
    tools = None if fields.get("tools") is None else check_tools(fields["tools"])
    if tools:
        handler_body["tools"] = tools
    if fields.get("chat_template_kwargs") is not None:
        handler_body["chat_template_kwargs"] = check_template_kwargs(fields["chat_template_kwargs"])
    return _request(
        fields,
        handler_body,
        default_max_tokens=None,
        logprobs=read_chat_logprobs(fields),
        constraint=read_constraint(fields, tools),
    )


def _with_generation_config(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with those that a `generation_config` stands for; what is said in both is what the field says."""
    config = fields.get("generation_config")
    if config is None:
        return fields
    return request_fields(config) | {name: value for name, value in fields.items() if value is not None}


def checked_fields(body: object, model_name: str, known: Collection[str]) -> dict[str, Any]:
    """The object that a body is, if it has no fields but those `known`. Raises `ApiError` (400; 404: another model)."""
    if not isinstance(body, dict):
        raise bad_request(f"the body must be a JSON object, not {_json_type(body)}")
    for name in body:
        if name not in known:
            raise bad_request(f"unknown field {name!r}", name, "unknown_parameter")
    model = body.get("model")
    if model is not None and model != model_name:
        raise ApiError(
            404,
            f"the model {model!r} does not exist here; this server serves {model_name!r} only",
            param="model",
            code="model_not_found",
        )
    return body


def _request(
    fields: dict[str, Any],
    handler_body: dict[str, Any],
    *,
    default_max_tokens: int | None,
    logprobs: int | None,
    constraint: Constraint | None,
    prompts: tuple[Prompt, ...] = (),
) -> GenerationRequest:
    for name, harmless in ONLY_DEFAULT.items():
        value = fields.get(name)
        # `is`-like for booleans: 0 == False and 1 == True would let `logprobs: 0` and `echo: 0` through.
        if value is not None and not any(type(value) is type(one) and value == one for one in harmless):
            raise bad_request(f"{name}={value!r} is not supported by this server", name, "unsupported_parameter")
    stream = fields.get("stream")
    if not (stream is None or isinstance(stream, bool)):
        raise bad_request(f"`stream` must be true or false, not {_json_type(stream)}", "stream")
    handler_body["stream"] = bool(stream)
    token_limits = [_integer(fields, name, 1) for name in ("max_completion_tokens", "max_tokens")]
    return GenerationRequest(
        body=handler_body,
        stream=bool(stream),
        max_tokens=next((limit for limit in token_limits if limit is not None), None),
        default_max_tokens=default_max_tokens,
        temperature=_temperature(fields),
        top_p=_number(fields, "top_p", 0.0, 1.0, open_low=True),
        top_k=_integer(fields, "top_k", 0),
        min_p=_number(fields, "min_p", 0.0, 1.0),
        repetition_penalty=_number(fields, "repetition_penalty", MIN_REPETITION_PENALTY, 10.0),
        frequency_penalty=_number(fields, "frequency_penalty", -2.0, 2.0) or 0.0,
        presence_penalty=_number(fields, "presence_penalty", -2.0, 2.0) or 0.0,
        seed=_integer(fields, "seed", -(2**63), 2**63 - 1),
        logit_bias=_logit_bias(fields.get("logit_bias")),
        stop=_stop(fields.get("stop")),
        do_sample=fields.get("do_sample", False),
        min_tokens=_integer(fields, "min_tokens", 0) or 0,
        ignore_eos=read_flag(fields, "ignore_eos"),
        stop_token_ids=read_stop_tokens(fields),
        logprobs=logprobs,
        constraint=constraint,
        n=read_count(fields, len(prompts) or 1),
        include_usage=read_include_usage(fields, bool(stream)),
        prompts=prompts,
    )


def _number(fields: Mapping[str, Any], name: str, low: float, high: float, open_low: bool = False) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not fits or (open_low and value == low):
        raise bad_request(f"`{name}` must be a number {'above' if open_low else 'from'} {low:g} to {high:g}", name)
    return float(value)


def _temperature(fields: Mapping[str, Any]) -> float | None:
    temperature = _number(fields, "temperature", 0.0, 2.0)
    if temperature is not None and 0.0 < temperature < MIN_TEMPERATURE:
        raise bad_request(f"`temperature` must be 0, which is greedy, or from {MIN_TEMPERATURE:g} to 2", "temperature")
    return temperature


def _integer(fields: Mapping[str, Any], name: str, low: int, high: int = 2**31 - 1) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise bad_request(f"`{name}` must be a whole number from {low} to {high}", name)
    return value


def _logit_bias(value: object) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad_request("`logit_bias` must be an object of token id to bias", "logit_bias")
    for token, bias in value.items():
        fits = isinstance(bias, int | float) and not isinstance(bias, bool) and -100 <= bias <= 100
        if not (isinstance(token, str) and token.isascii() and token.isdigit() and len(token) < 10 and fits):
            raise bad_request("`logit_bias` must map token ids to biases from -100 to 100", "logit_bias")
    return {int(token): float(bias) for token, bias in value.items()}


def _stop(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or len(strings) > 16 or not all(isinstance(s, str) and s for s in strings):
        raise bad_request("`stop` must be a string or a list of up to 16 strings, none of them empty", "stop")
    if any(len(s) > 1000 for s in strings):
        raise bad_request("a `stop` string may have 1000 characters at most", "stop")
    return tuple(strings)


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
