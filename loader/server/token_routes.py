"""Between texts and token ids: what `/tokenize` and `/detokenize` take and give, as vLLM's routes of these names do."""

from __future__ import annotations

from typing import Any

from .answer_fields import read_flag, read_ids
from .api_errors import bad_request
from .generation_request import checked_fields
from .messages import check_messages, check_template_kwargs, check_tools
from .transformers_serving import ServedModel

TOKENIZE_FIELDS = frozenset(
    {
        "model", "prompt", "messages", "add_special_tokens", "add_generation_prompt", "return_token_strs", "tools",
        "chat_template_kwargs",
    }
)  # fmt: skip
DETOKENIZE_FIELDS = frozenset({"model", "tokens"})
_CHAT_ONLY = ("add_generation_prompt", "tools", "chat_template_kwargs")


def tokenize(served: ServedModel, body: object) -> dict[str, Any]:
    """The ids that a completion (`prompt`) or a chat (`messages`) would give the model. Raises `ApiError`."""
    fields = checked_fields(body, served.name, TOKENIZE_FIELDS)
    if (fields.get("prompt") is None) == (fields.get("messages") is None):
        raise bad_request("give one of `prompt` and `messages`", "prompt")
    ids = _of_chat(served, fields) if fields.get("prompt") is None else _of_text(served, fields)
    told: dict[str, Any] = {"count": len(ids), "max_model_len": served.context, "tokens": ids}
    if read_flag(fields, "return_token_strs"):
        told["token_strs"] = served.texts.tokenizer.convert_ids_to_tokens(ids)
    return told


def _of_text(served: ServedModel, fields: dict[str, Any]) -> list[int]:
    if not isinstance(fields["prompt"], str):
        raise bad_request("`prompt` must be a string", "prompt")
    for name in _CHAT_ONLY:
        if fields.get(name) is not None:
            raise bad_request(f"`{name}` is for `messages`", name)
    special = read_flag(fields, "add_special_tokens") or fields.get("add_special_tokens") is None
    return served.encode(fields["prompt"], special)


def _of_chat(served: ServedModel, fields: dict[str, Any]) -> list[int]:
    if read_flag(fields, "add_special_tokens"):
        raise bad_request("`add_special_tokens` is for `prompt`: a template has its own", "add_special_tokens")
    variables = fields.get("chat_template_kwargs")
    return served.encode_chat(
        check_messages(fields["messages"]),
        tools=None if fields.get("tools") is None else check_tools(fields["tools"]) or None,
        add_generation_prompt=read_flag(fields, "add_generation_prompt") or fields.get("add_generation_prompt") is None,
        variables={} if variables is None else check_template_kwargs(variables),
    )


def detokenize(served: ServedModel, body: object) -> dict[str, Any]:
    """The text of `tokens`, special ones included. Raises `ApiError`, also for ids that no token has."""
    fields = checked_fields(body, served.name, DETOKENIZE_FIELDS)
    ids = read_ids(fields.get("tokens"), "tokens")
    tokenizer = served.texts.tokenizer
    try:
        known = tokenizer.convert_ids_to_tokens(ids)
        if None in known:
            raise bad_request(f"no token has the id {ids[known.index(None)]}", "tokens")
        return {"prompt": tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)}
    except (ValueError, LookupError, OverflowError) as error:  # tokenizers in Python say it in their own ways
        raise bad_request(f"there are ids of no token: {error}", "tokens") from error
