"""Checking the conversation of a chat request before it reaches the chat template."""

from __future__ import annotations

import inspect
from typing import Any

from jinja2 import Template
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from .api_errors import bad_request
from .json_values import parse_json

TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
MEDIA_PARTS = frozenset({"image_url", "video_url", "audio_url", "input_audio"})

# What every function between the server and the template takes by name: a request that set one could replace the
# template, or give an argument twice.
RESERVED_TEMPLATE_KWARGS = frozenset({"messages", "num_frames"}).union(
    *(
        inspect.signature(function).parameters
        for function in (
            PreTrainedTokenizerBase.apply_chat_template,
            ProcessorMixin.apply_chat_template,
            render_jinja_template,
            Template.render,
        )
    )
)


def check_messages(messages: object) -> list[dict[str, Any]]:
    """The messages of a chat request, unchanged. Raises `ApiError` (400) naming the first that is wrong."""
    if not isinstance(messages, list) or not messages:
        raise bad_request("`messages` must be a list with at least one message", "messages")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise bad_request(f"{where} must be an object with a string `role`", where)
        _check_content(message.get("content"), f"{where}.content")
        if message.get("tool_calls") is None:
            message.pop("tool_calls", None)  # transformers asks only whether the key is there
        else:
            _check_tool_calls(message["tool_calls"], f"{where}.tool_calls")
    return messages


def check_tools(tools: object) -> list[dict[str, Any]]:
    """The tools of a chat request, unchanged. Raises `ApiError` (400)."""
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise bad_request("`tools` must be a list of objects", "tools")
    return tools


def check_template_kwargs(kwargs: object) -> dict[str, Any]:
    """Variables for the chat template, unchanged. Raises `ApiError` (400) for one that the server sets itself."""
    if not isinstance(kwargs, dict):
        raise bad_request("`chat_template_kwargs` must be an object", "chat_template_kwargs")
    reserved = sorted(RESERVED_TEMPLATE_KWARGS & set(kwargs))
    if reserved:
        raise bad_request(f"`chat_template_kwargs` may not set {', '.join(reserved)}", "chat_template_kwargs")
    return kwargs


def _check_content(content: object, where: str) -> None:
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise bad_request(f"{where} must be a string or a list of parts", where)
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        kind = kind if isinstance(kind, str) else None
        if kind in TEXT_PARTS:
            if not isinstance(part.get("text"), str):
                raise bad_request(f"{where}[{index}].text must be a string", where)
        elif kind in MEDIA_PARTS:
            _check_media(part, kind, f"{where}[{index}]")
        else:
            allowed = ", ".join(sorted(TEXT_PARTS | MEDIA_PARTS))
            raise bad_request(f"{where}[{index}].type must be one of {allowed}", where)


def _check_media(part: dict[str, Any], kind: str, where: str) -> None:
    value = part.get(kind)
    if kind == "input_audio":
        if not isinstance(value, dict) or not isinstance(value.get("data"), str):
            raise bad_request(f"{where}.input_audio must be an object with base64 `data`", where)
        if not isinstance(value.get("format"), str):
            raise bad_request(f"{where}.input_audio must name its `format`", where)
        return
    url = value.get("url") if isinstance(value, dict) else None
    # A path or an http address would make the server read a file, or fetch, on behalf of the client.
    if not isinstance(url, str) or not url.startswith("data:"):
        raise bad_request(f"{where}.{kind}.url must be a data: URL; this server fetches nothing", where)


def _check_tool_calls(calls: object, where: str) -> None:
    if not isinstance(calls, list):
        raise bad_request(f"{where} must be a list", where)
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise bad_request(f"{where}[{index}].function must be an object with a string `name`", where)
        arguments = function.get("arguments")
        field = f"{where}[{index}].function.arguments"
        parsed = parse_json(arguments, field) if isinstance(arguments, str) else arguments
        if not isinstance(parsed, dict):
            raise bad_request(f"{field} must hold a JSON object", where)


def has_media(messages: list[dict[str, Any]]) -> bool:
    """Whether any checked message carries an image, video or audio part."""
    contents = [message.get("content") for message in messages]
    return any(part["type"] in MEDIA_PARTS for content in contents if isinstance(content, list) for part in content)
