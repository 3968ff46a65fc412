"""Fields that say how many answers there are, what is told about them and when they end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .api_errors import bad_request

MAX_CHOICES = 128
"""What OpenAI allows for `n`; here for all prompts of a request together."""
MAX_TOP_LOGPROBS = 20
MAX_STOP_TOKENS = 128

Prompt = str | tuple[int, ...]
"""A text, or the ids of its tokens."""


def read_prompts(value: object, name: str = "prompt") -> tuple[Prompt, ...]:
    """A text, a list of texts, the ids of a text's tokens, or a list of such. Raises `ApiError` (400)."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(one, str) for one in value):
            return tuple(value)
        if _are_ids(value):
            return (tuple(value),)
        if all(isinstance(one, list) and one and _are_ids(one) for one in value):
            return tuple(tuple(one) for one in value)
    raise bad_request(
        f"`{name}` must be a string, a list of strings, a list of token ids, or a list of such lists", name
    )


def read_count(fields: Mapping[str, Any], prompts: int) -> int:
    """`n`, the answers to each of so many prompts. Raises `ApiError` (400)."""
    n = fields.get("n")
    n = 1 if n is None else n
    if not _is_whole(n) or not 1 <= n <= MAX_CHOICES:
        raise bad_request(f"`n` must be a whole number from 1 to {MAX_CHOICES}", "n")
    if n * prompts > MAX_CHOICES:
        raise bad_request(
            f"{prompts} prompts with {n} answers each are more than {MAX_CHOICES}", "prompt" if n == 1 else "n"
        )
    return int(n)


def read_completion_logprobs(fields: Mapping[str, Any]) -> int | None:
    """How many likely tokens to tell for each of a completion, None for no log probabilities at all."""
    count = fields.get("logprobs")
    if count is not None and (not _is_whole(count) or not 0 <= count <= MAX_TOP_LOGPROBS):
        raise bad_request(f"`logprobs` must be a whole number from 0 to {MAX_TOP_LOGPROBS}", "logprobs")
    return count


def read_chat_logprobs(fields: Mapping[str, Any]) -> int | None:
    """As `read_completion_logprobs`, from the two fields of the chat API."""
    wanted = read_flag(fields, "logprobs")
    count = fields.get("top_logprobs")
    if count is not None and (not _is_whole(count) or not 0 <= count <= MAX_TOP_LOGPROBS):
        raise bad_request(f"`top_logprobs` must be a whole number from 0 to {MAX_TOP_LOGPROBS}", "top_logprobs")
    if count and not wanted:
        raise bad_request("`top_logprobs` needs `logprobs`: true", "top_logprobs")
    return (count or 0) if wanted else None


def read_include_usage(fields: Mapping[str, Any], stream: bool) -> bool:
    """Whether `stream_options` asks for a last event with the usage. Raises `ApiError` (400)."""
    options = fields.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise bad_request("`stream_options` must be an object", "stream_options")
    if not stream:
        raise bad_request("`stream_options` is only for requests with `stream`: true", "stream_options")
    for name in options:
        if name not in ("include_usage", "include_obfuscation", "continuous_usage_stats"):
            raise bad_request(f"unknown field 'stream_options.{name}'", f"stream_options.{name}", "unknown_parameter")
    if read_flag(options, "continuous_usage_stats", "stream_options."):
        raise bad_request(
            "`stream_options.continuous_usage_stats` is not supported: the usage comes once, at the end",
            "stream_options.continuous_usage_stats",
            "unsupported_parameter",
        )
    read_flag(options, "include_obfuscation", "stream_options.")  # padding against listeners: true or false is the same
    return read_flag(options, "include_usage", "stream_options.")


def read_stop_tokens(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """`stop_token_ids`. Raises `ApiError` (400)."""
    ids = fields.get("stop_token_ids")
    if ids is None:
        return ()
    if not isinstance(ids, list) or len(ids) > MAX_STOP_TOKENS or not _are_ids(ids):
        raise bad_request(f"`stop_token_ids` must be a list of up to {MAX_STOP_TOKENS} token ids", "stop_token_ids")
    return tuple(ids)


def read_ids(value: object, name: str) -> list[int]:
    """A list of token ids. Raises `ApiError` (400)."""
    if not isinstance(value, list) or not _are_ids(value):
        raise bad_request(f"`{name}` must be a list of token ids", name)
    return value


def read_flag(fields: Mapping[str, Any], name: str, where: str = "") -> bool:
    """A field that is true or false, false if it is missing. Raises `ApiError` (400)."""
    value = fields.get(name)
    if not (value is None or isinstance(value, bool)):
        raise bad_request(f"`{where}{name}` must be true or false", f"{where}{name}")
    return bool(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_ids(values: list[Any]) -> bool:
    return all(_is_whole(value) and 0 <= value < 1 << 31 for value in values)
